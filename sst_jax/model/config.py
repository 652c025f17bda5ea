"""What a model is, as three frozen dataclasses that check themselves: backbone, stream, adapter.

Everything that the V2 paper leaves open about the stream is a field of `StreamConfig` with a default, never a silent
choice in the code.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

from sst_jax.errors import InputError

MAX_LAYERS = 4096  # a file may claim any number; beyond this the claim is nonsense, and tables so long are refused
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _one_of(owner: str, field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    _require(value in allowed, f"{owner}.{field}={value!r} is not one of {', '.join(map(repr, allowed))}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # an int may be beyond every float


def _numbers(owner: str, config: Any, *fields: str, positive: bool = False) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(_is_finite(value), f"{owner}.{field}={value!r} must be a finite number")
        _require(not positive or value > 0, f"{owner}.{field}={value!r} must be positive")


def _tuple(owner: str, config: Any, field: str) -> None:
    value = getattr(config, field)
    _require(isinstance(value, list | tuple), f"{owner}.{field}={value!r} must be a list")
    object.__setattr__(config, field, tuple(value))


def from_mapping(cls: type, mapping: Mapping[str, Any]) -> Any:
    """Builds one of the dataclasses below from a mapping; an unknown or missing key raises `InputError` naming it."""
    _require(isinstance(mapping, Mapping), f"{cls.__name__} is read from a mapping of its fields, not {mapping!r}")
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(mapping) - known)
    _require(
        not unknown, f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}"
    )
    required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    missing = sorted(required - set(mapping))
    _require(not missing, f"{cls.__name__} lacks the field {', '.join(missing)}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in mapping.items()})


def _written_fields(config: object) -> dict[str, Any]:
    """The fields of a config dataclass that are written down.

    One that version 0.1.0 did not have is left out while it holds its default, so that what 0.1.0 recorded compares
    equal, and 0.1.0 reads what does not need the field.
    """
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.repr and ("since" not in field.metadata or getattr(config, field.name) != field.default)
    }


def _recorded(config: object) -> dict[str, Any] | None:
    return None if config is None else _written_fields(config)


def canonical_text(config: object) -> str:
    """Return the text of a config of dataclasses that digests are made of: `repr` as version 0.1.0 had it."""
    if not dataclasses.is_dataclass(config):
        return repr(config)
    fields = (f"{name}={canonical_text(value)}" for name, value in _written_fields(config).items())
    return f"{type(config).__qualname__}({', '.join(fields)})"


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Shapes of a text decoder, and what its family's block computes; Gemma 3's are the defaults.

    family           whose checkpoints it reads and writes: `families.registry` knows the names, and the facts of each
    layer_types      each layer's attention, "local" (a sliding window, rope_theta_local) or "global" (the whole prefix,
                     rope_theta_global). None: five local layers to one global, or all global without a window.
    rope_scale_global  positions of global layers are divided by it, or with rope_llama3 only the low frequencies' are
    rope_llama3      None, or Llama 3.1's (low_freq_factor, high_freq_factor, original positions)
    norm_offset      an RMSNorm multiplies by norm_offset + scale
    post_norms       whether attention's and the feed-forward's outputs are normed before they are added
    qk_norm          whether each head's queries and keys are normed before they are rotated
    activation       of the gated feed-forward: "gelu_tanh" or "silu"
    scale_embedding  whether embeddings are multiplied by sqrt(D)
    tied_head        whether the embedding is the output head too
    qkv_bias         whether the linears q, k and v add a bias
    """

    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    query_pre_attn_scalar: float
    window: int | None = None
    rope_theta_local: float = 10_000.0
    rope_theta_global: float = 1_000_000.0
    rope_scale_global: float = 1.0
    rope_llama3: tuple[float, float, int] | None = None
    norm_eps: float = 1e-6
    max_positions: int = 32_768
    layer_types: tuple[str, ...] | None = None
    family: str = "gemma3"
    norm_offset: float = 1.0
    post_norms: bool = True
    qk_norm: bool = True
    activation: str = "gelu_tanh"
    scale_embedding: bool = True
    tied_head: bool = True
    qkv_bias: bool = dataclasses.field(default=False, metadata={"since": "0.2.0"})

    def __post_init__(self) -> None:
        _require(isinstance(self.family, str), f"backbone.family={self.family!r} must be a name")
        _one_of("backbone", "activation", self.activation, ("gelu_tanh", "silu"))
        whole = ["num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim", "vocab_size"]
        for field in whole + ["window"] * (self.window is not None):
            value = getattr(self, field)
            _require(isinstance(value, int) and value > 0, f"backbone.{field}={value!r} must be a positive integer")
        _require(self.num_layers <= MAX_LAYERS, f"backbone.num_layers={self.num_layers} is beyond {MAX_LAYERS}")
        for field in ("post_norms", "qk_norm", "scale_embedding", "tied_head", "qkv_bias"):
            _one_of("backbone", field, getattr(self, field), (True, False))
        reals = ("query_pre_attn_scalar", "rope_theta_local", "rope_theta_global", "rope_scale_global", "norm_eps")
        _numbers("backbone", self, *reals, "max_positions", positive=True)
        _numbers("backbone", self, "norm_offset")
        if self.rope_llama3 is not None:
            _tuple("backbone", self, "rope_llama3")
            bands = self.rope_llama3
            real = all(map(_is_finite, bands))
            _require(
                real and len(bands) == 3 and 0 < bands[0] < bands[1] and bands[2] > 0,
                f"backbone.rope_llama3={self.rope_llama3!r} must be (low_freq_factor, high_freq_factor, positions) "
                "with 0 < low < high",
            )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"backbone.num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"backbone.head_dim={self.head_dim} must be even: RoPE rotates pairs")
        if self.layer_types is None:
            period = 1 if self.window is None else 6
            kinds = tuple("local" if (layer + 1) % period else "global" for layer in range(self.num_layers))
            object.__setattr__(self, "layer_types", kinds)
        _tuple("backbone", self, "layer_types")
        _require(
            len(self.layer_types) == self.num_layers,
            f"backbone.layer_types has {len(self.layer_types)} entries for num_layers={self.num_layers}",
        )
        for kind in self.layer_types:
            _one_of("backbone", "layer_types", kind, ("local", "global"))
        _require(
            self.window is not None or "local" not in self.layer_types,
            "backbone.window is None, but layer_types has local layers",
        )

    @property
    def embed_scale(self) -> float:
        return math.sqrt(self.d_model) if self.scale_embedding else 1.0

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the seven linears of a layer."""
        d, f, q, kv = self.d_model, self.d_ff, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d)}

    @property
    def biased(self) -> tuple[str, ...]:
        """Names of the linears that add a bias."""
        return ("q", "k", "v") if self.qkv_bias else ()

    @property
    def num_params(self) -> int:
        """Parameters of the backbone; a tied head counts once."""
        shapes = self.linear_shapes
        linears = sum(i * o for i, o in shapes.values()) + sum(shapes[name][1] for name in self.biased)
        norms = (2 + 2 * self.post_norms) * self.d_model + 2 * self.qk_norm * self.head_dim
        tables = (2 - self.tied_head) * self.vocab_size * self.d_model
        return tables + self.d_model + self.num_layers * (linears + norms)


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """The state stream: what a layer remembers and how it is blended in.

    state        "ffn": the feed-forward block's output f. "block": the layer's output o (V1's cached state).
    norm         N in h' = h + alpha * (gain * N(s) - h): "none", "rms" (unit RMS), "match" (s rescaled to h's RMS).
    alpha        None: learned within alpha_range from alpha_init. A number: fixed there, outside the range too.
    alpha_range  alpha = lo + (hi - lo) * sigmoid(theta); (0, 1) is "free".
    alpha_warmup optimizer steps over which alpha rises from the range's lower end, in training alone: held-out losses
                 and decoding take alpha as it will be then. 0 is none.
    granularity  how many alphas: "dimension" (one a layer and dimension), "layer" (one a layer), "scalar" (one).
    gain         factor on N(s); learn_gain trains it, one a layer, from this value.
    decay        0: a state is the previous position's. lambda in (0, 1): s_t = lambda s_{t-1} + (1 - lambda) u_t.
    initial      at a document's first position: "none" (no blend), "zero", "own" (RMSNorm of the layer's input, V1),
                 "skip_bos" (as "none", and nothing leaves a BOS either).
    propagate    "scan": for state="block" the linear carry of s through o is exact; "shift": the plainer reading.
    dtype        how states are kept in caches; the blend itself is always float32 or wider.
    pass1_grad   whether gradients flow through the states of earlier passes.
    prompt       which positions of a prompt get the depth asked of `generate`: "last" (only the last one, whose output
                 is the first generated token), "none" (depth begins where the first generated token is fed), "all".
    kv           at iteration i > 1 a position's keys and values are written anew ("overwrite") or kept from
                 iteration 1 ("first", V1's frozen cache).
    layers       which layers carry a state; None is all.
    prefill      how a prompt's states are solved for: "sweeps" (in parallel, inside each layer, until they move by less
                 than sweep_tolerance of their norm; position by position where sweep_cap sweeps do not get there) or
                 "sequential" (position by position).
    """

    state: str = "ffn"
    norm: str = "none"
    alpha: float | None = None
    alpha_range: tuple[float, float] = (0.015, 0.10)
    alpha_init: float = 0.027
    alpha_warmup: int = 0
    granularity: str = "dimension"
    gain: float = 1.0
    learn_gain: bool = False
    decay: float = 0.0
    initial: str = "none"
    propagate: str = "scan"
    dtype: str = "float32"
    pass1_grad: bool = True
    prompt: str = "last"
    kv: str = "overwrite"
    layers: tuple[int, ...] | None = None
    prefill: str = "sweeps"
    sweep_tolerance: float = 1e-6
    sweep_cap: int = 12

    def __post_init__(self) -> None:
        _one_of("stream", "prefill", self.prefill, ("sweeps", "sequential"))
        _one_of("stream", "state", self.state, ("ffn", "block"))
        _one_of("stream", "norm", self.norm, ("none", "rms", "match"))
        _one_of("stream", "granularity", self.granularity, ("dimension", "layer", "scalar"))
        _one_of("stream", "initial", self.initial, ("none", "zero", "own", "skip_bos"))
        _one_of("stream", "propagate", self.propagate, ("scan", "shift"))
        _one_of("stream", "dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("stream", "prompt", self.prompt, ("last", "none", "all"))
        _one_of("stream", "kv", self.kv, ("overwrite", "first"))
        for field, kind in (("alpha_range", int | float), ("layers", int)):
            value = getattr(self, field)
            if value is not None or field == "alpha_range":
                several = isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)
                _require(several, f"stream.{field}={value!r} must be a list of numbers")
                object.__setattr__(self, field, tuple(value))
        _numbers("stream", self, "alpha_init", "alpha_warmup", "gain", "decay", "sweep_tolerance", "sweep_cap")
        _require(len(self.alpha_range) == 2, f"stream.alpha_range={self.alpha_range} must be two numbers")
        lo, hi = self.alpha_range
        _require(0.0 <= lo < hi <= 1.0, f"stream.alpha_range={self.alpha_range} must satisfy 0 <= lo < hi <= 1")
        if self.alpha is None:
            _require(
                lo < self.alpha_init < hi,
                f"stream.alpha_init={self.alpha_init} must lie strictly inside alpha_range={self.alpha_range}; "
                "a fixed alpha is set with stream.alpha",
            )
        else:
            _numbers("stream", self, "alpha")
            _require(0.0 <= self.alpha <= 1.0, f"stream.alpha={self.alpha} must be in [0, 1]")
        _require(0.0 <= self.decay < 1.0, f"stream.decay={self.decay} must be in [0, 1)")
        _require(self.sweep_tolerance > 0, f"stream.sweep_tolerance={self.sweep_tolerance} must be positive")
        _require(self.sweep_cap >= 2, f"stream.sweep_cap={self.sweep_cap} must be at least 2")
        _require(self.alpha_warmup >= 0, f"stream.alpha_warmup={self.alpha_warmup} must not be negative")

    @property
    def linear_carry(self) -> bool:
        """Whether s enters the layer's output linearly with a known factor, so that a scan can carry it exactly."""
        return self.state == "block" and self.propagate == "scan" and self.norm == "none"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """LoRA (arXiv 2106.09685) on the named linears: y = x W + (alpha / rank) * dropout(x) A B, A and B in float32."""

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = LINEARS
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _tuple("adapter", self, "targets")
        whole = isinstance(self.rank, int) and 0 <= self.rank < 2**20
        _require(whole, f"adapter.rank={self.rank!r} must be an integer >= 0, and below {2**20}")
        _numbers("adapter", self, "alpha", "dropout")
        for target in self.targets:
            _one_of("adapter", "targets", target, LINEARS)
        _require(0.0 <= self.dropout < 1.0, f"adapter.dropout={self.dropout} must be in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0


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
    adapter: AdapterConfig = AdapterConfig(rank=0)
    bos_id: int | None = dataclasses.field(default=None, repr=False)
    dtype: str = dataclasses.field(default="float32", repr=False)

    def __post_init__(self) -> None:
        if self.stream is not None and self.stream.layers is not None:
            for layer in self.stream.layers:
                _require(
                    0 <= layer < self.backbone.num_layers,
                    f"stream.layers names layer {layer}; the backbone has layers 0 to {self.backbone.num_layers - 1}",
                )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict that `from_dict` reads back to an equal config."""
        return {name: _recorded(getattr(self, name)) for name in RECORDED}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> ModelConfig:
        """Reads `to_dict`'s form.

        Raises: InputError, naming the missing or unknown field.
        """
        _require(isinstance(mapping, Mapping), f"a model config is read from a mapping of its fields, not {mapping!r}")
        _require("backbone" in mapping, "model config lacks the field backbone")
        unknown = sorted(set(mapping) - set(RECORDED))
        _require(not unknown, f"model config has no field {', '.join(unknown)}")
        stream, adapter = mapping.get("stream"), mapping.get("adapter")
        return cls(
            backbone=from_mapping(BackboneConfig, mapping["backbone"]),
            stream=None if stream is None else from_mapping(StreamConfig, stream),
            adapter=AdapterConfig(rank=0) if adapter is None else from_mapping(AdapterConfig, adapter),
        )
