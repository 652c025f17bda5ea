"""What a model is: a backbone with, optionally, a stream and an adapter; frozen dataclasses that check themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sst_jax.model.adapter import LINEARS, AdapterConfig
from sst_jax.model.backbone import MAX_LAYERS, BackboneConfig
from sst_jax.model.fields import canonical_text, from_mapping, require, written_fields
from sst_jax.model.stream import StreamConfig

__all__ = [
    "LINEARS",
    "MAX_LAYERS",
    "AdapterConfig",
    "BackboneConfig",
    "ModelConfig",
    "StreamConfig",
    "canonical_text",
    "from_mapping",
]

NO_ADAPTER = AdapterConfig(rank=0)
RECORDED = ("backbone", "stream", "adapter")  # what of a ModelConfig is written to files


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A backbone with, optionally, a stream and an adapter. `stream=None` is the plain backbone.

    bos_id and dtype belong to an opened model and not to its description: opening one sets them, and neither `to_dict`
    nor `canonical_text` (of which identities of random weights are digests) has them. Compare recorded configs by
    `to_dict`.

    bos_id  the tokenizer's beginning-of-sequence token, for stream.initial="skip_bos"; None where it has none
    dtype   of the activations
    """

    backbone: BackboneConfig
    stream: StreamConfig | None = None
    adapter: AdapterConfig = NO_ADAPTER
    bos_id: int | None = dataclasses.field(default=None, repr=False)
    dtype: str = dataclasses.field(default="float32", repr=False)

    def __post_init__(self) -> None:
        if self.stream is None:
            return
        named = {
            "layers": self.stream.layers or (),
            "links": [layer for link in self.stream.links or () for layer in link],
        }
        for field, layers in named.items():
            for layer in layers:
                require(
                    0 <= layer < self.backbone.num_layers,
                    f"stream.{field} names layer {layer}; the backbone has layers 0 to {self.backbone.num_layers - 1}",
                )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict that `from_dict` reads back to an equal config."""
        parts = {name: getattr(self, name) for name in RECORDED}
        return {name: None if part is None else written_fields(part) for name, part in parts.items()}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> ModelConfig:
        """Read `to_dict`'s form.

        Raises: InputError, naming the missing or unknown field.
        """
        require(isinstance(mapping, Mapping), f"a model config is read from a mapping of its fields, not {mapping!r}")
        require("backbone" in mapping, "model config lacks the field backbone")
        unknown = sorted(set(mapping) - set(RECORDED))
        require(not unknown, f"model config has no field {', '.join(unknown)}")
        stream, adapter = mapping.get("stream"), mapping.get("adapter")
        return cls(
            backbone=from_mapping(BackboneConfig, mapping["backbone"]),
            stream=None if stream is None else from_mapping(StreamConfig, stream),
            adapter=NO_ADAPTER if adapter is None else from_mapping(AdapterConfig, adapter),
        )
