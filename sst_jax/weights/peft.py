"""LoRA adapters as PEFT folders, in and out: adapter_config.json and adapter_model.safetensors. Needs no peft."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors.numpy import save_file

from sst_jax.errors import InputError
from sst_jax.families import registry
from sst_jax.files import read_json, staged_folder
from sst_jax.model.config import LINEARS, AdapterConfig, BackboneConfig, ModelConfig
from sst_jax.types import Json, Params
from sst_jax.weights import export_format, huggingface, key_map, lora
from sst_jax.weights.provenance import BaseRecord
from sst_jax.weights.source import Tensor

log = logging.getLogger(__name__)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's wrapper around the model

# Ways to begin an adapter that change the weights of its base too, whenever PEFT loads it.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
# What adapter_config.json may say, as it is read here or has no effect on the numbers; every other field must be unset.
_READ = {
    "auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "task_type", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "megatron_core", "qalora_group_size", "bias", "ensure_weight_tying",
    "use_rslora", "rank_pattern", "alpha_pattern",
}  # fmt: skip


def _modules(backbone: BackboneConfig) -> dict[str, str]:
    """Return each linear's module inside a layer, as the hub spells it: {"q": "self_attn.q_proj", ...}."""
    rows = {row.path: row.huggingface for row in registry.family_of(backbone).params}
    return {name: rows[f"layers/{name}/kernel"].split("{layer}.")[1].removesuffix(".weight") for name in LINEARS}


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no model: trainers put the base's config.json beside it."""
    whole = [name for name in ("model.safetensors", huggingface.INDEX) if (folder / name).is_file()]
    return (folder / CONFIG).is_file() and not ((folder / "config.json").is_file() and whole)


def write_folder(
    path: str | Path,
    config: ModelConfig,
    adapter: Params,
    base_name: str | None,
    layout: str,
    files: Mapping[str, bytes],
    revision: str | None = None,
) -> None:
    """Write an adapter, with `files` beside it.

    Args:
        path: a folder that is new or empty.
        config: of the model.
        adapter: its LoRA factors.
        base_name: what PEFT loads as base.
        layout: the base's: where PEFT will find its linears.
        files: by name.
        revision: of `base_name`, a hub id; None: what "main" is whenever it is loaded.

    Raises: InputError when `path` is not empty.
    """
    # transformers 5 names a multimodal model's text part so in memory, whichever of the two spellings is on disk.
    layout = layout if layout == "text" else "multimodal_v5"
    modules = [_modules(config.backbone)[name] for name in config.adapter.targets]
    targets: list[str] | str = [module.rpartition(".")[2] for module in modules]
    if layout != "text":  # the vision tower has linears of the same names
        targets = rf".*language_model.*\.({'|'.join(module.replace('.', chr(92) + '.') for module in modules)})"
    alpha = config.adapter.alpha
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": config.adapter.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.adapter.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    factors = export_format.lora_tensors(config.backbone, adapter, layout)
    with staged_folder(path) as folder:
        save_file({PREFIX + key: value for key, value in factors.items()}, folder / WEIGHTS, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
        for name, content in files.items():
            (folder / name).write_bytes(content)


def bases_of(folder: Path) -> list[BaseRecord]:
    """Return the base that an adapter stands on, under each of its names.

    What stream.json records of our own exports counts before PEFT's base_model_name_or_path and revision.
    Raises: InputError where nothing tells.
    """
    file = folder / export_format.STREAM_CONFIG
    recorded = read_json(file).get("base") if file.is_file() else None
    config, where = read_json(folder / CONFIG), folder / CONFIG
    recorded = recorded if isinstance(recorded, Mapping) else {}
    found = [BaseRecord.from_json(recorded, f"{file}: base")] if recorded.get("path") else []
    if name := config.get("base_model_name_or_path"):
        named = {**recorded, "path": name, "revision": config.get("revision")}
        found.append(BaseRecord.from_json(named, f"{where}: base_model_name_or_path"))
    if not found:
        raise InputError(f"{where}: base_model_name_or_path is missing, so the base is unknown")
    return found


def read_folder(folder: Path, backbone: BackboneConfig) -> export_format.StreamBundle:
    """Read an adapter and, where stream.json lies beside it, its stream; `backbone` is its base's.

    Layers and linears that have no factors are left as they are, and so is a vision tower that has some.

    Raises: InputError naming the file and the field, key or version at fault.
    """
    where, file = folder / CONFIG, folder / WEIGHTS
    config = read_json(where)
    _check_supported(config, where)
    family = registry.family_of(backbone)
    if family.fused:
        raise InputError(
            f"{where}: adapters of {family.title} are of fused linears, which are apart here: merge it into its base "
            "in PEFT (merge_and_unload), and open that"
        )
    factors, modules = _factors(file), _modules(backbone)
    held = [name for name in LINEARS if any(f".{modules[name]}.lora_" in key for key in factors)]
    if not held:
        raise InputError(f"{file} holds no LoRA factors of {', '.join(modules.values())}")
    adapter = AdapterConfig(
        rank=cast(Any, config.get("r")),  # checked by AdapterConfig
        alpha=cast(Any, config.get("lora_alpha")),
        dropout=config.get("lora_dropout", 0.0),
        targets=tuple(sorted(held, key=lambda name: _place(config.get("target_modules"), modules[name]))),
    )
    if config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        adapter, factors = lora.at_one_scale(factors, lora.Scales.from_config(adapter, config, str(where)), adapter)
    stream, prompts = None, None
    blend: Params = {}
    if (folder / export_format.STREAM_CONFIG).is_file():
        stream, blend, prompts = export_format.read_stream(folder, backbone)
    found = ModelConfig(backbone, stream, adapter)
    read = export_format.read_lora(factors, found, file, sparse=True)
    return export_format.StreamBundle(found, {"adapter": read, "blend": blend}, prompts)


def _check_supported(config: Json, where: Path) -> None:
    """Raise InputError, naming the field, where adapter_config.json describes more than LoRA's factors can say."""
    if config.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type={config.get('peft_type')!r} is unsupported; known is 'LORA'")
    for name, value in config.items():
        if (name not in _READ and value) or (name == "bias" and value != "none"):
            shown = str(value) if len(str(value)) < 80 else f"{str(value)[:80]}..."
            raise InputError(
                f"{where}: {name}={shown if not isinstance(value, str) else repr(value)} is unsupported: merge the "
                "adapter into its base in PEFT (merge_and_unload), and open that"
            )
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGE_THE_BASE):
        raise InputError(
            f"{where}: init_lora_weights={begun!r} is unsupported, as PEFT takes what such an adapter began with off "
            "its base; convert it in PEFT (save_pretrained's path_initial_model_for_weight_conversion)"
        )
    targets = config.get("target_modules")
    if not all(isinstance(name, str) for name in (targets if isinstance(targets, list) else [targets or ""])):
        raise InputError(f"{where}: target_modules={targets!r} must be names of modules, or a pattern")


def _factors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file by key without PEFT's prefix, but for those of a vision tower."""
    if not file.is_file():
        raise InputError(f"{file} is missing (pickled .bin adapters are never opened)")
    factors, skipped = {}, 0
    for tensor in huggingface.headers(file):
        if not tensor.name.startswith(PREFIX):
            raise InputError(f"{file}: unknown key {tensor.name}")
        key = tensor.name.removeprefix(PREFIX)
        if key_map.normalise(key)[0] is None:
            skipped += 1
        else:
            factors[key] = tensor
    if skipped:
        log.warning("%s: %d factors of the vision tower are left out, as the tower is", file, skipped)
    return factors


def _place(targets: list[str] | str | None, module: str) -> int:
    """Return where a module stands in target_modules, so that an adapter comes back with its targets in their order."""
    name = module.rpartition(".")[2]
    if isinstance(targets, str):
        return targets.find(name)
    return list(targets or ()).index(name) if name in (targets or ()) else len(targets or ())
