"""What a family of decoders states: one `Family` record in one file, from which everything else here is looked up.

A family's file says what its block computes, its published shapes, the names of its tensors, how its config.json and
GGUF metadata are read and written, how its chat turns end, its licence, and which classes its PyTorch export builds on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from sst_jax.errors import InputError
from sst_jax.model.backbone import BackboneConfig
from sst_jax.types import Json

JsonObject = Mapping[str, Any]
Fields = dict[str, Any]  # of BackboneConfig, by name


class ParamSpec(NamedTuple):
    """One array of the base tree and its tensors on disk.

    path         in the base tree; arrays under "layers/" are stacked over L
    axes         of one layer's array in the tree: P = N * H, Q = K * H, the others as in `sst_jax.types`
    huggingface  key with {layer}, spelled as in the layout "text"
    gguf         key with {layer}
    transform    a name in `weights.key_map.TRANSFORMS`: what makes the array of the tensor
    """

    path: str
    axes: str
    huggingface: str
    gguf: str
    transform: str


class Fused(NamedTuple):
    """A tensor that holds the outputs of several linears, one behind the other.

    huggingface  its key with {layer}; those of the linears in the table are made up
    gguf         the same in GGUF
    parts        paths in the base tree, in order
    """

    huggingface: str
    gguf: str
    parts: tuple[str, ...]


class Wrapper(NamedTuple):
    """The config.json of a larger model whose text part is a member of the family.

    model_type  of the whole
    part        field that holds the text part's config
    write       (text part, dtype) -> config.json of the whole
    """

    model_type: str
    part: str
    write: Callable[[dict[str, Any], str], dict[str, Any]]


class ConfigFormat(NamedTuple):
    """How config.json states a member of the family.

    architecture  transformers' class
    fields        field of BackboneConfig -> (its name in config.json, the default of transformers 5.23): the hub's
                  configs leave many to them. A float default means that the field may be a float, None that it follows
                  from the fields before it.
    allowed       what the block does not compute: the field must be absent, or have one of these values
    unwritten     those of `allowed` that a written config.json leaves out
    read          (config, fields so far, where) -> the rest of BackboneConfig's fields
    write         the same backwards
    """

    model_type: str
    architecture: str
    fields: Mapping[str, tuple[str, int | float | None]]
    allowed: Mapping[str, tuple[Any, ...]]
    unwritten: tuple[str, ...]
    read: Callable[[JsonObject, Fields, str], Fields]
    write: Callable[[BackboneConfig], dict[str, Any]]
    wrapper: Wrapper | None = None


class Metadata:
    """The metadata keys `ARCHITECTURE.NAME` of one GGUF file.

    `asked` are the names that somebody looked at, `tensors` the names of the file's tensors.
    """

    def __init__(self, pairs: JsonObject, where: str, tensors: Collection[str] = ()):
        self.pairs, self.where, self.tensors = pairs, where, tensors
        self.architecture = pairs.get("general.architecture")
        self.asked: set[str] = set()

    def value(self, name: str, default: object = None) -> Any:
        self.asked.add(name)
        return self.pairs.get(f"{self.architecture}.{name}", default)

    def scalar(self, name: str, default: object = None) -> Any:
        """Return a value that is compared.

        Raises: InputError naming the key of an array, which does not compare to one truth.
        """
        value = self.value(name, default)
        if isinstance(value, (list, np.ndarray)):
            raise self.error(name, "is an array")
        return value

    def number(self, name: str, kind: type[int] | type[float] = int, default: float | None = None) -> Any:
        """Return a positive number of a kind.

        Raises: InputError naming the key that is missing without a default, or is no such number.
        """
        value = self.value(name, default)
        if value is None:
            raise InputError(f"{self.where}: metadata key {self.architecture}.{name} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 2**40:
            raise self.error(name, f"must be a positive {kind.__name__}")
        return kind(value)

    def without(self, part: str) -> Metadata:
        """Return the same keys but those whose names begin with `part`."""
        kept = {key: value for key, value in self.pairs.items() if f".{part}" not in key}
        other = Metadata(kept, self.where, self.tensors)
        other.asked = self.asked
        return other

    def error(self, name: str, problem: str) -> InputError:
        shown = " ".join(repr(self.value(name)).split())  # numpy breaks lines
        return InputError(f"{self.where}: metadata key {self.architecture}.{name}={shown} {problem}")


class GGUFFormat(NamedTuple):
    """How a GGUF file states a member of the family.

    architecture  general.architecture, and the prefix of its keys
    read          (metadata, fields so far) -> the rest of BackboneConfig's fields; "family" among them where families
                  share an architecture
    rope_llama3   what a tensor rope_freqs.weight stands for, (low factor, high factor, original positions), since no
                  metadata key tells; None where the family has no such tensor
    longrope      whether its files hold LongRoPE's divisors as tensors and its magnitude as rope.scaling.attn_factor
    rope_keys     keys of RoPE, behind "rope.", that `read` takes beside those of every architecture
    rope_angles   whether rope_freqs.weight tells which angles of a global head turn
    logit_cap     whether `read` takes final_logit_softcapping
    lacking       keys of what the block does not compute, which must be 0 or absent -> why
    packages      Python packages that hold a file: module -> the file's name in it, None where it assembles the file
    """

    architecture: str
    read: Callable[[Metadata, Fields], Fields]
    rope_llama3: tuple[float, float, int] | None = None
    longrope: bool = False
    rope_keys: tuple[str, ...] = ()
    rope_angles: bool = False
    logit_cap: bool = False
    lacking: Mapping[str, str] = {}
    packages: Mapping[str, str | None] = {}


class Splitting(NamedTuple):
    """How text is cut into words before merging: what `tokenizer.ggml.pre` stands for (llama.cpp, llama-vocab.cpp)."""

    pre_tokenizers: list[Json]
    normalizer: Json | None = None
    ignore_merges: bool = False  # whether a word that is a piece is that piece, however merging would spell it
    add_bos: bool = False  # whether a text begins with BOS where the file does not say
    byte_fallback: bool = False  # whether pieces are text, with a mark for a space and bytes for what they lack


class TokenFacts(NamedTuple):
    """What the vocabularies of a family hold.

    turn_ends   tokens that end a chat turn
    text_ends   tokens that end a text, beside the tokenizer's EOS
    splittings  `tokenizer.ggml.pre` of its GGUF files -> how text is cut
    """

    turn_ends: tuple[str, ...]
    text_ends: tuple[str, ...] = ()
    splittings: Mapping[str, Splitting] = {}


class TorchExport(NamedTuple):
    """The PyTorch export's own file (in `weights/torch_sst/`), and what its classes' names begin with."""

    module: str
    prefix: str


class Licence(NamedTuple):
    """The licence of a family's weights: the hub's identifier, and a sentence for an export's README."""

    identifier: str
    terms: str


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of decoders.

    name        of `BackboneConfig.family`
    title       for messages
    block       what its block computes, as fields of BackboneConfig
    presets     name -> shapes; the one whose name begins with "tiny" has random weights and the byte tokenizer
    hub_prefix  what hub ids have before a preset's name
    params      the arrays of its base tree
    fused       tensors that hold several linears
    layouts     other spellings of its Hugging Face keys: layout -> what stands there for "model."
    ignored     beginnings of Hugging Face and of GGUF keys that are no part of the decoder
    licence     None where it differs between members
    """

    name: str
    title: str
    block: JsonObject
    presets: Mapping[str, BackboneConfig]
    params: tuple[ParamSpec, ...]
    config: ConfigFormat
    torch: TorchExport
    tokens: TokenFacts
    gguf: GGUFFormat | None = None
    hub_prefix: str = ""
    fused: tuple[Fused, ...] = ()
    layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    licence: Licence | None = None

    @property
    def tiny(self) -> BackboneConfig:
        """The preset for tests."""
        return next(preset for name, preset in self.presets.items() if name.startswith("tiny"))

    @property
    def always_tied(self) -> bool:
        """Whether no member has an output head of its own."""
        return all(spec.path != "head/embedding" for spec in self.params)
