"""Exports read back: sst folders and merged ones with a stream beside, bit for bit, or refused by name."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sst_jax
from sst_jax.errors import InputError
from sst_jax.families.registry import PRESETS
from sst_jax.model.fields import written_fields
from sst_jax.weights import export_format, huggingface
from sst_jax.weights.loading import open_model, resolve
from sst_jax.weights.lora import merge
from tests.support import toys
from tests.support.torch_exports import BACKBONE, SHALLOW, model, write

WILD = {"alpha_range": (0.0, 1.0)}
ODD = {
    **WILD, "state": "block", "norm": "match", "granularity": "scalar", "gain": 0.7, "learn_gain": True, "decay": 0.25,
    "initial": "own", "propagate": "shift", "dtype": "bfloat16", "pass1_grad": False, "kv": "first",
    "layers": (0, 2), "prefill": "sequential", "sweep_tolerance": 1e-4, "sweep_cap": 5, "alpha_warmup": 7,
    "iterate_prompt": "all",
}  # fmt: skip


def same(one, two):
    """Whether two trees hold the same arrays, bit for bit and in type."""
    one, two = jax.tree.map(np.asarray, (one, two))
    assert jax.tree.structure(one) == jax.tree.structure(two)
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), one, two))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [WILD, ODD, {"alpha": 0.3}], ids=["plain", "odd", "fixed"])
@pytest.mark.parametrize("backbone", [SHALLOW, PRESETS["tiny-qwen3"]], ids=["gemma3", "qwen3"])
def test_an_sst_folder_comes_back_bit_for_bit(tmp_path, backbone, fields, dtype):
    ours = model(fields, backbone, targets=("v", "q", "down"), dtype=dtype)
    folder = write(ours, tmp_path / "sst", "sst", keep_lora=True, dtype=dtype)
    back = sst_jax.load(folder, dtype)
    assert back.config == ours.config
    assert same(back.params, ours.params)
    assert resolve(folder).dtype == dtype
    assert back.tokenizer.encode("a b") == ours.tokenizer.encode("a b")


def test_every_stream_of_options_comes_back(tmp_path):
    for number, fields in enumerate(toys.covering()):
        ours = model(fields, SHALLOW if fields["layers"] is None else BACKBONE, rank=0)
        back = sst_jax.load(write(ours, tmp_path / str(number)))
        assert back.config.stream == ours.config.stream
        assert same(back.params, ours.params)


@pytest.mark.parametrize("kind", ["sst", "merged"])
def test_how_questions_are_put_goes_with_the_model(tmp_path, kind):
    ours = model(WILD, SHALLOW, rank=0, prompts="chat")
    back = sst_jax.load(write(ours, tmp_path / kind, kind))
    assert (
        ours.prompt_format == back.prompt_format == sst_jax.load(back.save(tmp_path / "base")).prompt_format == "chat"
    )
    assert model(WILD, SHALLOW).prompt_format == "plain"


def test_shards_are_read_together(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "write_folder", functools.partial(huggingface.write_folder, shard_bytes=20_000))
    ours = model(WILD)
    folder = write(ours, tmp_path / "sst", "sst", keep_lora=True)
    assert len(list(folder.glob("*.safetensors"))) > 5
    assert same(sst_jax.load(folder).params, ours.params)


@pytest.mark.parametrize("kind", ["sst", "merged"])
def test_folded_lora_comes_back_as_the_base_it_was_folded_into(tmp_path, kind):
    ours = model(ODD)
    merged = merge(ours.params["base"], ours.params["adapter"], ours.config.adapter)
    back = sst_jax.load(write(ours, tmp_path / "out", kind))
    assert back.config.stream == ours.config.stream
    assert back.config.adapter.rank == 0
    assert same(back.params["blend"], ours.params["blend"])
    for name in ("q", "down"):
        kernels = np.stack([merged["layers"][name]["kernel"][layer] for layer in range(BACKBONE.num_layers)])
        assert np.array_equal(back.params["base"]["layers"][name]["kernel"], kernels)
    tokens = toys.tokens(1, 12)
    expected = np.asarray(ours.logits(tokens))
    assert np.abs(np.asarray(back.logits(tokens)) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_merged_folder_without_a_stream_is_a_plain_backbone(tmp_path):
    folder = write(model(None), tmp_path / "out", "merged")
    assert not (folder / "stream.json").exists()
    assert sst_jax.load(folder).config.stream is None


def test_an_sst_folder_needs_a_stream(tmp_path):
    with pytest.raises(InputError, match="--format merged"):
        write(model(None), tmp_path / "out")


def test_pytorch_may_train_on_and_save_for_us_to_read(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ours = model(ODD, SHALLOW)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        write(ours, tmp_path / "out", "sst", keep_lora=True), trust_remote_code=True, dtype=torch.float32
    )
    with torch.no_grad():
        loaded.model.stream.theta += 0.25
    loaded.save_pretrained(tmp_path / "back")
    assert (tmp_path / "back" / "modeling_sst.py").is_file()
    for file in (tmp_path / "out").glob("*token*"):
        (tmp_path / "back" / file.name).write_bytes(file.read_bytes())
    back = sst_jax.load(tmp_path / "back")
    blend = {**ours.params["blend"], "theta": ours.params["blend"]["theta"] + np.float32(0.25)}
    assert back.config == ours.config
    assert same(back.params, {**ours.params, "blend": blend})


def test_quantised_on_the_way_in(tmp_path):
    folder = write(model(WILD, PRESETS["tiny"]), tmp_path / "out", "sst", keep_lora=True)
    opened = open_model(folder, "float32", "nf4")
    assert opened.provenance.quantize == "nf4"
    assert opened.config.stream is not None
    assert opened.params["adapter"]


def test_reading_runs_none_of_the_code_and_no_torch(tmp_path):
    folder = write(model(WILD, SHALLOW), tmp_path / "out")
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit('it ran')")
    code = f"import sys, sst_jax; sst_jax.load({str(folder)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------- refusals


def change(file, path, value):
    """Sets a value deep inside a JSON file; None removes the key."""
    document = json.loads(file.read_text())
    *parents, last = path.split(".")
    inner = document
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    file.write_text(json.dumps(document))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    for kind in ("sst", "merged"):
        write(model({**WILD, "learn_gain": True}, SHALLOW), root / kind, kind)
    return root


@pytest.fixture
def copied(exported, tmp_path):
    import shutil

    return lambda kind: shutil.copytree(exported / kind, tmp_path / kind)


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("sst", "model_type", "sst_mamba", r"config\.json: model_type='sst_mamba'"),
        ("sst", "sst.version", 2, r"config\.json: sst: format version 2 is unknown"),
        ("sst", "sst.version", None, "format version None"),
        ("sst", "sst.format", "other", "format 'other'"),
        ("sst", "sst", None, "format None"),
        ("sst", "sst.stream", None, "stream is missing"),
        ("sst", "sst.stream.depth", 4, "StreamConfig has no field depth"),
        ("sst", "sst.stream.state", "mlp", "state='mlp'"),
        ("sst", "sst.stream.granularity", "layer", r"theta is float32 \[4, 36\]; its options ask for float32 \[4, 1\]"),
        ("sst", "sst.stream.alpha", 0.5, "parameter theta is unknown"),
        ("sst", "sst.adapter", {"rank": 2}, "LoRA factors of q are missing"),
        ("sst", "sst.adapter", {"ranks": 2}, "ranks"),
        ("sst", "sst.prompts", "verse", r"sst: prompts='verse'"),
        ("merged", "prompts", 3, r"stream\.json: prompts=3"),
        ("merged", "version", 2, r"stream\.json: format version 2 is unknown"),
        ("merged", "format", "x", "format 'x'"),
        ("merged", "stream.kv", "third", "kv='third'"),
        ("merged", "stream.learn_gain", False, "parameter gain is unknown"),
    ],
)
def test_what_is_not_known_is_refused_by_name(copied, kind, path, value, message):
    folder = copied(kind)
    change(folder / ("config.json" if kind == "sst" else "stream.json"), path, value)
    with pytest.raises(InputError, match=message):
        sst_jax.load(folder)


@pytest.mark.parametrize("kind", ["sst", "merged"])
def test_a_missing_parameter_is_named(copied, kind):
    folder = copied(kind)
    file = folder / ("model.safetensors" if kind == "sst" else "stream.safetensors")
    tensors = load_file(file)
    del tensors["model.stream.theta" if kind == "sst" else "theta"]
    save_file(tensors, file)
    with pytest.raises(InputError, match="parameter theta is missing"):
        sst_jax.load(folder)
    file.unlink()
    with pytest.raises(InputError, match=r"safetensors"):
        sst_jax.load(folder)


def test_an_unknown_tensor_is_named(copied):
    folder = copied("sst")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.lora_A.weight"] = np.zeros((2, 36), np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"unknown key model\.layers\.0\.mlp\.gate_proj\.lora_A\.weight"):
        sst_jax.load(folder)


def test_formats_and_versions_are_written(exported):
    config = json.loads((exported / "sst" / "config.json").read_text())
    assert (config["model_type"], config["sst"]["version"]) == ("sst_gemma3_text", export_format.VERSION)
    record = json.loads((exported / "merged" / "stream.json").read_text())
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in written_fields(
        model({**WILD, "learn_gain": True}, SHALLOW).config.stream).items()}  # fmt: skip
    assert record["version"] == export_format.VERSION
    assert record["stream"] == config["sst"]["stream"] == options
