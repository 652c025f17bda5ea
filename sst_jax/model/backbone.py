"""The backbone: shapes of a text decoder, and what its family's layers compute."""

from __future__ import annotations

import dataclasses
import math

from sst_jax.model.fields import as_tuple, check_numbers, check_one_of, is_finite, require

MAX_LAYERS = 4096  # a file may claim any number; beyond this the claim is nonsense, and tables so long are refused


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

    def __post_init__(self) -> None:
        require(isinstance(self.family, str), f"backbone.family={self.family!r} must be a name")
        check_one_of("backbone", "activation", self.activation, ("gelu_tanh", "silu"))
        whole = ["num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim", "vocab_size"]
        for field in whole + ["window"] * (self.window is not None):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, f"backbone.{field}={value!r} must be a positive integer")
        require(self.num_layers <= MAX_LAYERS, f"backbone.num_layers={self.num_layers} is beyond {MAX_LAYERS}")
        for field in ("post_norms", "qk_norm", "scale_embedding", "tied_head", "qkv_bias"):
            check_one_of("backbone", field, getattr(self, field), (True, False))
        reals = ("query_pre_attn_scalar", "rope_theta_local", "rope_theta_global", "rope_scale_global", "norm_eps")
        check_numbers("backbone", self, *reals, "max_positions", positive=True)
        check_numbers("backbone", self, "norm_offset")
        if self.rope_llama3 is not None:
            as_tuple("backbone", self, "rope_llama3")
            bands = self.rope_llama3
            real = all(map(is_finite, bands))
            require(
                real and len(bands) == 3 and 0 < bands[0] < bands[1] and bands[2] > 0,
                f"backbone.rope_llama3={self.rope_llama3!r} must be (low_freq_factor, high_freq_factor, positions) "
                "with 0 < low < high",
            )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"backbone.num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"backbone.head_dim={self.head_dim} must be even: RoPE rotates pairs")
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
