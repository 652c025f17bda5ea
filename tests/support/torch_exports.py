"""Toy models in the export formats, and the PyTorch ones opened as their users open them."""

import dataclasses

import numpy as np

from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.inference.model import Model
from sst_jax.model.config import LINEARS, AdapterConfig, ModelConfig, StreamConfig
from sst_jax.weights.exporting import ExportOptions, export_model
from sst_jax.weights.loading import LoadedModel
from sst_jax.weights.provenance import Provenance
from tests.support import toys

# The byte tokenizer's vocabulary; transformers wants d_model to be a multiple of the heads.
BACKBONE = dataclasses.replace(toys.BACKBONE, d_model=36, vocab_size=ByteTokenizer.vocab_size)
SHALLOW = dataclasses.replace(toys.SHALLOW, d_model=36, vocab_size=ByteTokenizer.vocab_size)
FACTS = {
    "kind": "random", "path": "random:toy", "digest": "0" * 64, "layout": None, "quantize": "none", "dtype": "float32",
}  # fmt: skip


def model(stream=None, backbone=BACKBONE, rank=3, targets=LINEARS, dtype="float32", seed=0, **facts):
    """A toy Model; `stream` is a dict of StreamConfig's fields, or None."""
    stream = None if stream is None else StreamConfig(**stream)
    config = ModelConfig(backbone, stream, AdapterConfig(rank, 2.0 * rank, targets, dropout=0.1))
    return Model(config, toys.params(config, dtype, seed), ByteTokenizer(), Provenance.from_json({**FACTS, **facts}))


def write(ours, folder, kind="sst", dtype="float32", **options):
    """Exports a Model as `export` would, without a detour through a saved one."""
    opened = LoadedModel(ours.config, ours.params, ours.tokenizer, ours.provenance)
    dtype = None if kind == "adapter" else dtype
    export_model(opened, folder, ExportOptions(kind, dtype, **options))
    return folder


def open_torch(folder, **settings):
    """The model of an sst folder, in float32 unless told otherwise."""
    import torch
    import transformers

    torch.set_num_threads(1)  # for products this small a second thread mostly waits for its turn
    settings.setdefault("dtype", torch.float32)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **settings
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return loaded.eval()


def torch_model(ours, folder, keep_lora=False, **settings):
    return open_torch(write(ours, folder, "sst", keep_lora=keep_lora), **settings)


def apart(theirs, ours):
    """Distance of two arrays in relation to the second."""
    theirs, ours = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
    return np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
