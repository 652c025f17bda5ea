"""The backbone: shapes of a text decoder, and what its family's layers compute."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

from sst_jax.model.fields import as_tuple, check_numbers, check_one_of, is_finite, require

Default = TypeVar("Default")

GLOBAL = "global_"  # what names of stacks of global layers begin with, where these have shapes of their own
MAX_LAYERS = 4096  # a file may claim any number; beyond this the claim is nonsense, and tables so long are refused


def _later(default: Default) -> Default:
    """Return a field that version 0.1.0 did not have."""
    return dataclasses.field(default=default, metadata={"since": "0.2.0"})


def stack_name(kind: str, name: str) -> str:
    """Return what a parameter of a kind of layers is called in the trees of a backbone with stacks by kind."""
    return GLOBAL + name if kind == "global" else name


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Shapes of a text decoder, and what its family's block computes; Gemma 3's are the defaults.

    family           the family whose checkpoints it reads and writes, a key of `families.registry.BY_NAME`
    layer_types      each layer's attention, "local" (a sliding window, rope_theta_local) or "global" (the whole prefix,
                     rope_theta_global). None: five local layers to one global, or all global without a window.
    rope_scale_global  divides the positions of global layers; with rope_llama3 those of the low frequencies alone
    rope_llama3      None, or Llama 3.1's (low_freq_factor, high_freq_factor, original positions)
    norm_offset      an RMSNorm multiplies by norm_offset + scale
    post_norms       whether attention's and the feed-forward's outputs are normed before they are added
    qk_norm          whether each head's queries and keys are normed before they are rotated
    activation       of the gated feed-forward: "gelu_tanh" or "silu"
    scale_embedding  whether embeddings are multiplied by sqrt(D)
    tied_head        whether the embedding is the output head too
    qkv_bias         whether the linears q, k and v add a bias
    pre_norms        whether attention's and the feed-forward's inputs are normed
    qk_norm_whole    whether queries and keys are normed over all heads at once, and not each head alone
    residual_scale   what attention's and the feed-forward's outputs are multiplied by before they are added
    embed_multiplier  what embeddings are multiplied by, beside sqrt(D)
    logit_divisor    what logits are divided by
    nope_layers      layers whose queries and keys are not rotated
    rotary_dims      how many of a head's dimensions are rotated, its first ones; None: all
    rope_yarn        None, or YaRN's (beta_fast, beta_slow, original positions), of global layers
    rope_short       LongRoPE's divisors of the frequencies of global layers up to rope_original positions, [H/2], or ()
    rope_long        the same of longer contexts: kept for exports; such contexts are refused
    rope_original    positions that LongRoPE's short divisors are for
    rope_magnitude   what cosines and sines of global layers are multiplied by: YaRN's and LongRoPE's attention factor
    query_scaling    None, or (beta, N): queries are multiplied by 1 + beta * log(1 + floor(position / N))
    attention_window  positions that a query sees at most, its own included, whatever the layer's kind: (W,) in all
                     layers, or one number a layer. No checkpoint's: a recipe asks for it. None: the kinds alone decide
    v_norm           whether each head's values are divided by their RMS
    values_from_keys  whether values are what keys are before their norm; with global_head_dim in global layers alone
    layer_scalar     whether a layer's output is multiplied by a number of its own
    logit_cap        None, or where logits are capped softly, cap * tanh(logit / cap)
    rope_angles_global  how many of a global head's H/2 angles turn, the first ones; None: all
    global_head_dim  None, or the width of a head of global layers, whose parameters are then stacks of their own
    global_num_kv_heads  of global layers with a width of their own; None: num_kv_heads
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
    layer_types: tuple[str, ...] = ()
    family: str = "gemma3"
    norm_offset: float = 1.0
    post_norms: bool = True
    qk_norm: bool = True
    activation: str = "gelu_tanh"
    scale_embedding: bool = True
    tied_head: bool = True
    qkv_bias: bool = dataclasses.field(default=False, metadata={"since": "0.2.0"})
    pre_norms: bool = _later(True)
    qk_norm_whole: bool = _later(False)
    residual_scale: float = _later(1.0)
    embed_multiplier: float = _later(1.0)
    logit_divisor: float = _later(1.0)
    nope_layers: tuple[int, ...] = _later(())
    rotary_dims: int | None = _later(None)
    rope_yarn: tuple[float, float, int] | None = _later(None)
    rope_short: tuple[float, ...] = _later(())
    rope_long: tuple[float, ...] = _later(())
    rope_original: int | None = _later(None)
    rope_magnitude: float = _later(1.0)
    query_scaling: tuple[float, int] | None = _later(None)
    attention_window: tuple[int, ...] | None = _later(None)
    v_norm: bool = _later(False)
    values_from_keys: bool = _later(False)
    layer_scalar: bool = _later(False)
    logit_cap: float | None = _later(None)
    rope_angles_global: int | None = _later(None)
    global_head_dim: int | None = _later(None)
    global_num_kv_heads: int | None = _later(None)

    def __post_init__(self) -> None:
        require(isinstance(self.family, str), f"backbone.family={self.family!r} must be a name")
        check_one_of("backbone", "activation", self.activation, ("gelu_tanh", "silu"))
        whole = ["num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim", "vocab_size"]
        optional = (
            "window", "rotary_dims", "rope_original", "rope_angles_global", "global_head_dim", "global_num_kv_heads",
        )  # fmt: skip
        for field in whole + [name for name in optional if getattr(self, name) is not None]:
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, f"backbone.{field}={value!r} must be a positive integer")
        require(self.num_layers <= MAX_LAYERS, f"backbone.num_layers={self.num_layers} is beyond {MAX_LAYERS}")
        for field in (
            "post_norms", "qk_norm", "scale_embedding", "tied_head", "qkv_bias", "pre_norms", "qk_norm_whole", "v_norm",
            "values_from_keys", "layer_scalar",
        ):  # fmt: skip
            check_one_of("backbone", field, getattr(self, field), (True, False))
        reals = (
            "query_pre_attn_scalar", "rope_theta_local", "rope_theta_global", "rope_scale_global", "norm_eps",
            "max_positions", "residual_scale", "embed_multiplier", "logit_divisor", "rope_magnitude",
        )  # fmt: skip
        check_numbers("backbone", self, *reals, positive=True)
        check_numbers("backbone", self, "norm_offset")
        if self.logit_cap is not None:
            check_numbers("backbone", self, "logit_cap", positive=True)
        for field in ("num_kv_heads", "global_num_kv_heads"):
            heads = getattr(self, field)
            require(
                heads is None or self.num_heads % heads == 0,
                f"backbone.num_heads={self.num_heads} must be a multiple of {field}={heads}",
            )
        require(
            self.global_head_dim is not None or self.global_num_kv_heads is None,
            f"backbone.global_num_kv_heads={self.global_num_kv_heads} needs global_head_dim",
        )
        self._check_rotation()
        if self.layer_types in ((), None):  # None: as a JSON file may say it
            period = 1 if self.window is None else 6
            kinds = tuple("local" if (layer + 1) % period else "global" for layer in range(self.num_layers))
            object.__setattr__(self, "layer_types", kinds)
        as_tuple("backbone", self, "layer_types")
        require(
            len(self.layer_types) == self.num_layers,
            f"backbone.layer_types has {len(self.layer_types)} entries for num_layers={self.num_layers}",
        )
        for kind in self.layer_types:
            check_one_of("backbone", "layer_types", kind, ("local", "global"))
        require(
            self.window is not None or "local" not in self.layer_types,
            "backbone.window is None, but layer_types has local layers",
        )
        self._check_attention_window()

    def _check_attention_window(self) -> None:
        """Make `attention_window` one number a layer, and refuse what is none."""
        given = self.attention_window
        if given is None:
            return
        windows = tuple(given) if isinstance(given, list | tuple) else (given,)
        require(
            len(windows) in (1, self.num_layers) and all(type(window) is int and window > 0 for window in windows),
            f"attention_window={given!r} must be a number of positions, 1 or more, or {self.num_layers} of them, one a "
            "layer",
        )
        object.__setattr__(self, "attention_window", windows * (self.num_layers // len(windows)))
        require(
            self.global_head_dim is None or len(set(windows)) == 1,
            f"attention_window={given!r} must be one number where global layers have shapes of their own",
        )

    def _check_rotation(self) -> None:
        """Raise InputError naming the field where what RoPE is told does not fit together."""
        for field in ("head_dim", "global_head_dim"):
            size = getattr(self, field)
            require(size is None or size % 2 == 0, f"backbone.{field}={size} must be even: RoPE rotates pairs")
        angles, of_all = self.rope_angles_global, (self.global_head_dim or self.head_dim) // 2
        require(angles is None or angles <= of_all, f"backbone.rope_angles_global={angles} must be at most {of_all}")
        rotated = self.num_rotated
        require(
            rotated % 2 == 0 and rotated <= self.head_dim,
            f"backbone.rotary_dims={rotated} must be even, and at most head_dim={self.head_dim}",
        )
        if self.rope_llama3 is not None:
            as_tuple("backbone", self, "rope_llama3")
            bands = self.rope_llama3
            real = all(map(is_finite, bands))
            require(
                real and len(bands) == 3 and 0 < bands[0] < bands[1] and bands[2] > 0,
                f"backbone.rope_llama3={self.rope_llama3!r} must be (low_freq_factor, high_freq_factor, positions) "
                "with 0 < low < high",
            )
        if self.rope_yarn is not None:
            as_tuple("backbone", self, "rope_yarn")
            require(
                all(map(is_finite, self.rope_yarn)) and len(self.rope_yarn) == 3 and min(self.rope_yarn) > 0,
                f"backbone.rope_yarn={self.rope_yarn!r} must be (beta_fast, beta_slow, positions), all above 0",
            )
        for field in ("nope_layers", "rope_short", "rope_long"):
            as_tuple("backbone", self, field)
        require(
            len(self.rope_short) == len(self.rope_long)
            and len(self.rope_short) in (0, rotated // 2)
            and bool(self.rope_short) == (self.rope_original is not None),
            f"backbone.rope_short and rope_long must have {rotated // 2} numbers each, and rope_original beside them",
        )
        require(
            all(is_finite(number) and number > 0 for number in self.rope_short + self.rope_long),
            "backbone.rope_short and rope_long must be positive numbers",
        )
        require(
            sum(map(bool, (self.rope_llama3, self.rope_yarn, self.rope_short))) <= 1,
            "backbone.rope_llama3, rope_yarn and rope_short exclude each other",
        )
        require(
            all(isinstance(layer, int) and 0 <= layer < self.num_layers for layer in self.nope_layers),
            f"backbone.nope_layers={self.nope_layers!r} must be numbers of layers, 0 to {self.num_layers - 1}",
        )
        if self.query_scaling is not None:
            as_tuple("backbone", self, "query_scaling")
            require(
                len(self.query_scaling) == 2 and all(map(is_finite, self.query_scaling)) and self.query_scaling[1] > 0,
                f"backbone.query_scaling={self.query_scaling!r} must be (beta, positions)",
            )

    @property
    def embed_scale(self) -> float:
        return (math.sqrt(self.d_model) if self.scale_embedding else 1.0) * self.embed_multiplier

    @property
    def num_rotated(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.head_dim if self.rotary_dims is None else self.rotary_dims

    @property
    def position_limit(self) -> int:
        """Positions that the block computes as its checkpoint's own code does: all but LongRoPE's long contexts."""
        return int(self.max_positions if self.rope_original is None else min(self.rope_original, self.max_positions))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Positions that a query sees in each layer, its own included; None: all up to its own."""
        own = [self.window if kind == "local" else None for kind in self.layer_types]
        if self.attention_window is None:
            return tuple(own)
        return tuple(
            asked if window is None else min(window, asked)
            for window, asked in zip(own, self.attention_window, strict=True)
        )

    @property
    def reach(self) -> int | None:
        """How many positions back the newest one that attention alone carries anything from; None: any number."""
        if None in self.windows:
            return None
        return sum(window - 1 for window in self.windows if window is not None)

    @property
    def reach_text(self) -> str:
        """What a person is told of windows that were asked for; "" where none were."""
        if self.attention_window is None:
            return ""
        windows = list(dict.fromkeys(self.windows))
        each = f"{windows[0]}" if len(windows) == 1 else f"{self.windows}"
        return f"attention windows of {each} in {self.num_layers} layers reach {self.reach} positions back"

    @property
    def attention_kinds(self) -> tuple[tuple[str, int | None], ...]:
        """The kinds of layers, each with its window, local ones first: more than two only with `attention_window`."""
        found = set(zip(self.layer_types, self.windows, strict=True))
        return tuple(sorted(found, key=lambda pair: (pair[0] == "global", pair[1] or 0)))

    @property
    def has_stacks_by_kind(self) -> bool:
        """Whether global layers have shapes of their own, so that each kind of layers is a stack."""
        return self.global_head_dim is not None

    def of_kind(self, kind: str) -> BackboneConfig:
        """Return the backbone that the layers of a kind, "local" or "global", would be all of: one shape, one stack."""
        own: dict[str, Any] = {"values_from_keys": False}
        if kind == "global":
            own = {
                "head_dim": self.global_head_dim or self.head_dim,
                "num_kv_heads": self.global_num_kv_heads or self.num_kv_heads,
            }
        cleared: dict[str, Any] = {"global_head_dim": None, "global_num_kv_heads": None, "rope_angles_global": None}
        return dataclasses.replace(self, layer_types=(kind,) * self.num_layers, **cleared, **own)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linears of a layer; of stacks by kind, of both under the stacks' names."""
        if self.has_stacks_by_kind:
            return {
                stack_name(kind, name): shape
                for kind in dict.fromkeys(self.layer_types)
                for name, shape in self.of_kind(kind).linear_shapes.items()
            }
        d, f, q, kv = self.d_model, self.d_ff, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
        if self.values_from_keys:
            del shapes["v"]
        return shapes

    def stack_layers(self, name: str) -> tuple[int, ...]:
        """Return the numbers of the layers whose parameters are in the stack of a name, such as "q" or "global_q"."""
        kind = "global" if name.startswith(GLOBAL) else "local"
        numbers = range(self.num_layers)
        return tuple(number for number in numbers if not self.has_stacks_by_kind or self.layer_types[number] == kind)

    def qk_norm_size(self, name: str) -> int:
        """Return the length of the scale of the norm of "q" or "k"."""
        return self.linear_shapes[name][1] if self.qk_norm_whole else self.head_dim

    @property
    def biased(self) -> tuple[str, ...]:
        """Names of the linears that add a bias."""
        return ("q", "k", "v") if self.qkv_bias else ()

    @property
    def num_params(self) -> int:
        """Parameters of the backbone; a tied head counts once."""
        tables = (2 - self.tied_head) * self.vocab_size * self.d_model
        if self.has_stacks_by_kind:
            layers = sum(
                self.layer_types.count(kind) * self.of_kind(kind).layer_params for kind in set(self.layer_types)
            )
        else:
            layers = self.num_layers * self.layer_params
        return tables + self.d_model + layers

    @property
    def layer_params(self) -> int:
        """Parameters of a layer, where all have one shape."""
        shapes = self.linear_shapes
        linears = sum(i * o for i, o in shapes.values()) + sum(shapes[name][1] for name in self.biased)
        heads = self.qk_norm_size("q") + self.qk_norm_size("k")
        norms = (2 * self.pre_norms + 2 * self.post_norms) * self.d_model + self.qk_norm * heads
        return linears + norms + self.layer_scalar
