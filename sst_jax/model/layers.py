"""One decoder layer as an NNX module: norms, linears with their LoRA, and nothing of the stream but its parameters.

`Block` is declared once, for one layer. Its variables carry one of three types, so that `nnx.split` turns a block into
the three trees that the project keeps apart: `base` (frozen), `adapter` (LoRA) and `blend` (the stream's). Stacked over
layers, [L, ...], they are what `model/decoder.py` scans over. How a layer computes is in `model/halves.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sst_jax.model import collected, compiler
from sst_jax.model.collected import Pair, Walked
from sst_jax.model.config import BackboneConfig, ModelConfig, StreamConfig
from sst_jax.model.quantization.nf4_product import LEAST, LowRank
from sst_jax.model.quantization.storages import adapted_products, product, products, takes_low_rank, unpacks
from sst_jax.model.remat import inputs_kept
from sst_jax.model.sharding import on_a_mesh
from sst_jax.types import AnyFloat, Frequencies, Heads, Hidden, Params, Positions, RotaryTable, Tokens

FEW_ROWS = 32  # of which a product is faster on a CPU with its kernel transposed


class Base(nnx.Param):
    """A frozen backbone parameter."""


class Adapter(nnx.Param):
    """A LoRA parameter, float32."""


class Blend(nnx.Param):
    """A parameter of the stream, float32."""


def to_float32(x: AnyFloat) -> AnyFloat:
    """Return x in float32, or in its own type where that is wider; norms and the blend never run in bfloat16."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def unit_rms(x: AnyFloat, eps: float) -> AnyFloat:
    """Return x divided by its root mean square over the last axis, in float32 or wider."""
    x = to_float32(x)
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    if x.ndim == 4 and x.shape[1] == 1:  # heads of one position
        # Or XLA makes one kernel of sum and product for each half of a head that is rotated; so it makes one of all.
        mean = jax.lax.optimization_barrier(mean)
    return x * jax.lax.rsqrt(mean + eps)


def scaled_unit_rms(x: AnyFloat, scale: AnyFloat, eps: float, offset: float) -> AnyFloat:
    """Return x / rms(x) * (offset + scale), in float32 or wider.

    Of what it computes only x is kept for the gradient.

    Args:
      x: [..., D], or any other last axis.
      scale: of the length of that axis.
      eps: added to the mean square.
      offset: 1 where a checkpoint stores the scale's difference from 1, else 0.
    """
    return inputs_kept(_scaled_unit_rms, static_argnums=(2, 3))(x, scale, eps, offset)


def _scaled_unit_rms(x: AnyFloat, scale: AnyFloat, eps: float, offset: float) -> AnyFloat:
    return unit_rms(x, eps) * (offset + to_float32(scale))


def unscaled_unit_rms(x: AnyFloat, eps: float) -> AnyFloat:
    """Return `unit_rms`, of whose computation only x is kept for the gradient."""
    return inputs_kept(unit_rms, static_argnums=(1,))(x, eps)


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale), computed and returned in float32 or wider; callers cast the result.

    As in Gemma's reference for every dtype. Llama's and Qwen's casts before it multiplies by the scale, which in
    bfloat16 is one more rounding, and in float32 the same.
    """

    def __init__(self, size: int, eps: float, offset: float, dtype: DTypeLike):
        self.scale = Base(jnp.full(size, 1.0 - offset, dtype))
        self.eps, self.offset = eps, offset

    def __call__(self, x: AnyFloat) -> AnyFloat:
        return scaled_unit_rms(x, self.scale[...], self.eps, self.offset)


class NoNorm(nnx.Module):
    """The identity, in the place of a norm that a family lacks: x in float32 or wider."""

    def __call__(self, x: AnyFloat) -> AnyFloat:
        return to_float32(x)


class LayerScalar(nnx.Module):
    """A number that a layer's output is multiplied by."""

    def __init__(self, dtype: DTypeLike):
        self.scale = Base(jnp.ones(1, dtype))

    def __call__(self, x: AnyFloat) -> AnyFloat:
        return x * to_float32(self.scale[...])


def capped(logits: AnyFloat, cap: float | None) -> AnyFloat:
    """Return logits capped softly, cap * tanh(logits / cap); as they are where cap is None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


@jax.custom_vjp
def up_product(z: AnyFloat, b: AnyFloat) -> AnyFloat:
    """Return z @ b, [..., outputs] from z [..., rank] and b [rank, outputs].

    The gradient of b is written as z^T times the cotangent. JAX would write its transpose, for which XLA's CPU backend
    copies the cotangent, by far the largest array here, column by column: an eighth of a whole training step.
    """
    return z @ b


def _up_product_forward(z: AnyFloat, b: AnyFloat) -> tuple[AnyFloat, tuple[AnyFloat, AnyFloat]]:
    return z @ b, (z, b)


def _up_product_backward(saved: tuple[AnyFloat, AnyFloat], dy: AnyFloat) -> tuple[AnyFloat, AnyFloat]:
    z, b = saved
    return dy @ b.T, jnp.einsum("...r,...n->rn", z, dy)


up_product.defvjp(_up_product_forward, _up_product_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """A LoRA factor in two types, in the place of its array: cast once a layer, and not at every position of a walk."""

    value: AnyFloat  # what is trained
    narrow: AnyFloat  # what multiplies


def narrowed(adapter: Params, dtype: DTypeLike) -> Params:
    """Return a layer's adapter with its factors ready to multiply activations of a type, where that saves time.

    On GPUs a cast is a kernel of its own wherever a product is a library's; on CPUs and TPUs it goes into the product.
    """
    if compiler.platform() not in ("cuda", "rocm", "interpreted") or dtype == jnp.float32:
        return adapter
    return jax.tree.map(lambda value: Factor(value, jax.lax.stop_gradient(value).astype(dtype)), adapter)


@jax.custom_vjp
def factor_product(z: AnyFloat, value: AnyFloat, narrow: AnyFloat) -> AnyFloat:
    """Return z times a factor in z's type; the factor's gradient is added up in its own type."""
    return z @ narrow


def _factor_product_forward(z: AnyFloat, value: AnyFloat, narrow: AnyFloat) -> tuple[AnyFloat, tuple]:
    return z @ narrow, (z, narrow)


def _factor_product_backward(saved: tuple, dy: AnyFloat) -> tuple:
    z, narrow = saved
    return dy @ narrow.T, jnp.einsum("...r,...n->rn", z, dy, preferred_element_type=jnp.float32), None


factor_product.defvjp(_factor_product_forward, _factor_product_backward)


class Linear(nnx.Module):
    """y = x W + b + scale * (x * drop) A B, in x's type.

    W and b are frozen; A and B are float32 and absent at rank 0.

    Args:
      shape: (inputs, outputs).
      rank: of the LoRA factors.
      scale: of their product.
      dtype: of W and b.
      rngs: the source of random weights.
      bias: whether there is a b.
    """

    def __init__(
        self, shape: tuple[int, int], rank: int, scale: float, dtype: DTypeLike, rngs: nnx.Rngs, bias: bool = False
    ):
        inputs, outputs = shape
        self.kernel = Base(jax.random.normal(rngs.params(), shape, dtype) / math.sqrt(inputs))
        self.outputs, self.rank, self.scale, self.has_bias = outputs, rank, scale, bias
        if bias:
            self.bias = Base(jnp.zeros(outputs, dtype))
        if rank:
            bound = 1.0 / math.sqrt(inputs)  # PEFT's default initialisation; B = 0 makes a fresh adapter the identity
            self.lora_a = Adapter(jax.random.uniform(rngs.params(), (inputs, rank), minval=-bound, maxval=bound))
            self.lora_b = Adapter(jnp.zeros((rank, outputs)))

    def __call__(self, x: AnyFloat, drop: AnyFloat | None = None) -> AnyFloat:
        return side_by_side([self], x, [drop])[0]

    def low_rank(self, x: AnyFloat, drop: AnyFloat | None = None) -> AnyFloat:
        """Return (x * drop) A B, without the scale."""
        z = x if drop is None else x * drop.astype(x.dtype)
        a, b = self.lora_a.get_value(), self.lora_b.get_value()
        if isinstance(a, Factor):
            return factor_product(factor_product(z, a.value, a.narrow), b.value, b.narrow)
        return up_product(z @ a.astype(x.dtype), b.astype(x.dtype))


class Joined(NamedTuple):
    """Linears of one input, each with LoRA in its kernel: x W + x A B is [x, x A] times W on top of B.

    down      A of each, [in, R]
    kernels   W of each on top of the rows of all their factors, its own B and zeros, [in + R, out]
    """

    down: AnyFloat
    kernels: tuple[AnyFloat, ...]


class Transposed(NamedTuple):
    """Kernels of linears of one input as few rows multiply by them fast on a CPU, transposed, [out, in] each."""

    kernels: tuple[AnyFloat, ...]


@jax.custom_vjp
def transposed_product(x: AnyFloat, kernel: AnyFloat, turned: AnyFloat) -> AnyFloat:
    """Return x times a frozen kernel [in, out], read from its transpose; the gradient reads the kernel itself.

    XLA's CPU backend multiplies by the transpose of what lies in memory without packing it anew: for eight rows in
    six tenths of the time, forward and backward.
    """
    return jax.lax.dot_general(x, turned, (((x.ndim - 1,), (1,)), ((), ())))


def _transposed_product_forward(x: AnyFloat, kernel: AnyFloat, turned: AnyFloat) -> tuple[AnyFloat, AnyFloat]:
    return transposed_product(x, kernel, turned), kernel


def _transposed_product_backward(kernel: AnyFloat, dy: AnyFloat) -> tuple:
    return jax.lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ()))), None, None


transposed_product.defvjp(_transposed_product_forward, _transposed_product_backward)


def transposed(linears: Sequence[Linear], rows: int, dtype: DTypeLike) -> Transposed | None:
    """Return transposed kernels of linears of one input for a loop over products of so few rows; None where in vain.

    Args:
      linears: of one input.
      rows: of a product.
      dtype: of the activations.
    """
    kernels = [linear.kernel.get_value() for linear in linears]
    plain = all(isinstance(kernel, jax.Array) and kernel.dtype == jnp.float32 for kernel in kernels)
    if compiler.platform() != "cpu" or on_a_mesh() or dtype != jnp.float32 or not plain or not 1 < rows <= FEW_ROWS:
        return None
    # Behind the barrier it lies in memory. Else XLA would see the same product in both forms, and take the slow one.
    return Transposed(tuple(jax.lax.optimization_barrier(jax.lax.stop_gradient(kernel).T) for kernel in kernels))


def side_by_side(
    linears: Sequence[Linear],
    x: AnyFloat,
    drops: Sequence[AnyFloat | None],
    lora: Walked | Joined | Transposed | None = None,
) -> list[AnyFloat]:
    """Return what each of several linears makes of one x.

    Their frozen kernels are multiplied together where the storage can. So are their LoRA factors, of one row on a GPU,
    where time is the number of kernels that are launched, and the bytes that these read.

    Args:
      linears: of the same inputs.
      x: [..., inputs].
      drops: of each; None: nothing is dropped.
      lora: of all of them in a step of a walk, where `in_a_walk` gives it: what they make is then one array. Or as
        `joined` gives it; or their kernels as `transposed` gives them.
    """
    if isinstance(lora, Walked):
        return [_walked(linears, x, lora)]
    if isinstance(lora, Joined):
        return _joined(linears, x, lora)
    kernels, whole = [linear.kernel.get_value() for linear in linears], not on_a_mesh()
    found: Sequence[AnyFloat]
    if isinstance(lora, Transposed):
        found = [transposed_product(x, kernel, other) for kernel, other in zip(kernels, lora.kernels, strict=True)]
    elif whole:
        found = products(x, kernels)
    else:  # the parts of each lie on several devices, and are not to be put together
        found = [product(x, kernel) for kernel in kernels]
    outputs = [
        y + linear.bias[...].astype(x.dtype) if linear.has_bias else y for linear, y in zip(linears, found, strict=True)
    ]
    adapted = [place for place, linear in enumerate(linears) if linear.rank]
    on_a_gpu = whole and compiler.platform() in ("cuda", "interpreted")
    trained = any(
        drops[place] is not None or isinstance(linears[place].lora_a.get_value(), Factor) for place in adapted
    )
    if adapted and on_a_gpu and x.size == x.shape[-1] and x.dtype == jnp.bfloat16 and not trained:
        added = _low_rank_of_one_row([linears[place] for place in adapted], x)
    else:
        added = [linears[place].low_rank(x, drops[place]) for place in adapted]
    for place, more in zip(adapted, added, strict=True):
        outputs[place] = outputs[place] + more * linears[place].scale
    return outputs


def _walked(linears: Sequence[Linear], x: AnyFloat, walked: Walked) -> AnyFloat:
    """Return `side_by_side` in a step of a walk, as one array; its gradient is left in the tickets."""
    kernels = [linear.kernel.get_value() for linear in linears]
    ticket = jax.tree.map(lambda part: part.reshape(*x.shape[:-1], -1), walked.ticket)
    y = adapted_products(collected.enter(x, ticket.inputs), kernels, walked.factors)
    y = collected.leave(y, ticket.cotangents)
    if not any(linear.has_bias for linear in linears):
        return y
    zeros = [jnp.zeros(linear.outputs, x.dtype) for linear in linears]
    biases = [
        linear.bias[...].astype(x.dtype) if linear.has_bias else zero
        for linear, zero in zip(linears, zeros, strict=True)
    ]
    return y + jnp.concatenate(biases)


def in_a_walk(
    linears: Sequence[Linear], rows: int, dtype: DTypeLike, drops: Sequence[AnyFloat | None]
) -> tuple[tuple[Pair, ...], LowRank] | None:
    """Return LoRA of linears of one input as a walk takes it; None where it takes it as all else does.

    That is with the factors of one rank cast (`narrowed`), nothing dropped, and a storage that multiplies by kernels
    and factors together.

    Args:
      linears: of one input.
      rows: of a step.
      dtype: of the activations.
      drops: of each linear, as for `side_by_side`.
    """
    kernels, ranks = [linear.kernel.get_value() for linear in linears], {linear.rank for linear in linears}
    if any(drop is not None for drop in drops) or len(ranks) > 1 or 0 in ranks:
        return None
    factors = [(linear.lora_a.get_value(), linear.lora_b.get_value()) for linear in linears]
    inputs = factors[0][0].value.shape[0] if isinstance(factors[0][0], Factor) else 0
    if not inputs or not takes_low_rank((rows, inputs), kernels, dtype):
        return None
    pairs = tuple(Pair(a.value, b.value, linear.scale) for linear, (a, b) in zip(linears, factors, strict=True))
    rank = max(LEAST, 1 << (max(ranks) - 1).bit_length())
    return pairs, collected.side_by_side(pairs, tuple((a.narrow, b.narrow) for a, b in factors), rank)


def joined(linears: Sequence[Linear], shape: tuple[int, ...], dtype: DTypeLike) -> Joined | None:
    """Return linears of one input with LoRA in their kernels; None where these are not unpacked to be multiplied.

    Unpacking writes a kernel anyhow. LoRA apart writes and reads its outputs, which are as large as the linear's. Not
    for training: of the joined kernel no part is frozen.

    Args:
      linears: of one input, without dropout.
      shape: of the input.
      dtype: of the input.
    """
    kernels = unpacks(shape, [linear.kernel.get_value() for linear in linears], dtype)
    if kernels is None or not all(linear.rank for linear in linears):
        return None

    def narrow(factor: AnyFloat | Factor) -> AnyFloat:
        return factor.narrow if isinstance(factor, Factor) else factor.astype(dtype)

    down = [narrow(linear.lora_a.get_value()) for linear in linears]
    up = [(narrow(linear.lora_b.get_value()) * linear.scale).astype(dtype) for linear in linears]
    ends = np.cumsum([len(b) for b in up])
    rows = [jnp.pad(b, ((end - len(b), ends[-1] - end), (0, 0))) for b, end in zip(up, ends, strict=True)]
    whole = [jnp.concatenate(parts) for parts in zip(kernels, rows, strict=True)]
    return Joined(jnp.concatenate(down, axis=1), tuple(whole))


def _joined(linears: Sequence[Linear], x: AnyFloat, joined: Joined) -> list[AnyFloat]:
    """Return `side_by_side` of linears with LoRA in their kernels."""
    x = jnp.concatenate([x, x @ joined.down], axis=-1)
    found = [x @ kernel for kernel in joined.kernels]
    return [
        y + linear.bias[...].astype(x.dtype) if linear.has_bias else y for linear, y in zip(linears, found, strict=True)
    ]


def _low_rank_of_one_row(linears: Sequence[Linear], x: AnyFloat) -> list[AnyFloat]:
    """Return x A B of several linears for x of one row, by multiplying and adding up.

    XLA reads the factors of all of them in one kernel, as they are stored, and casts them there.
    """
    ranks, outputs = ([getattr(linear, name)[...].shape[-1] for linear in linears] for name in ("lora_a", "lora_b"))

    def wide(factor: AnyFloat) -> AnyFloat:
        return factor.astype(x.dtype).astype(jnp.float32)

    factors = jnp.concatenate([wide(linear.lora_a[...]) for linear in linears], axis=1)
    low = wide((x.reshape(-1, 1).astype(jnp.float32) * factors).sum(0))
    parts = [
        part[:, None] * wide(linear.lora_b[...])
        for linear, part in zip(linears, jnp.split(low, np.cumsum(ranks)[:-1]), strict=True)
    ]
    high = jnp.concatenate(parts, axis=1).sum(0).astype(x.dtype).reshape(*x.shape[:-1], -1)
    return list(jnp.split(high, np.cumsum(outputs)[:-1], axis=-1))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


class Block(nnx.Module):
    """The parameters of one decoder layer, with the stream's where there is one."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        backbone, adapter, stream = config.backbone, config.adapter, config.stream

        def norm(size: int, present: bool = True) -> RMSNorm | NoNorm:
            return RMSNorm(size, backbone.norm_eps, backbone.norm_offset, dtype) if present else NoNorm()

        def linear(name: str) -> Linear:
            rank, shape = adapter.rank if name in adapter.targets else 0, backbone.linear_shapes[name]
            return Linear(shape, rank, adapter.scale, dtype, rngs, bias=name in backbone.biased)

        self.pre_attn_norm = norm(backbone.d_model, backbone.pre_norms)
        self.q, self.k = linear("q"), linear("k")
        self.v = None if backbone.values_from_keys else linear("v")
        width = {
            name: backbone.linear_shapes[name][1] if backbone.qk_norm_whole else backbone.head_dim for name in "qk"
        }
        self.q_norm, self.k_norm = norm(width["q"], backbone.qk_norm), norm(width["k"], backbone.qk_norm)
        self.o = linear("o")
        self.post_attn_norm = norm(backbone.d_model, backbone.post_norms)
        self.pre_ffn_norm = norm(backbone.d_model, backbone.pre_norms)
        self.gate, self.up, self.down = linear("gate"), linear("up"), linear("down")
        self.post_ffn_norm = norm(backbone.d_model, backbone.post_norms)
        self.residual_scale = backbone.residual_scale
        self.layer_scalar = LayerScalar(dtype) if backbone.layer_scalar else None
        if stream is not None and stream.alpha is None:
            size = backbone.d_model if stream.granularity == "dimension" else 1
            self.theta = Blend(jnp.full(size, initial_theta(stream), float))
        if stream is not None and stream.learn_gain:
            self.gain = Blend(jnp.full(1, stream.gain, float))


def initial_theta(stream: StreamConfig) -> float:
    """Return the theta whose sigmoid, scaled to alpha_range, is `alpha_init`; that of gate="tanh" is alpha 0."""
    if stream.gate == "tanh":
        return 0.0
    lo, hi = stream.alpha_range
    share = (stream.alpha_init - lo) / (hi - lo)
    return math.log(share / (1.0 - share))


def rope_frequencies(
    head_dim: int,
    theta: float,
    scale: float,
    llama3: tuple[float, float, int] | None = None,
    yarn: tuple[float, float, int] | None = None,
    divisors: tuple[float, ...] = (),
) -> Frequencies:
    """Return the frequencies of rotary embedding (arXiv 2104.09864), radians a position [H/2].

    Args:
      head_dim: H, or as many of a head's dimensions as are rotated.
      theta: the base of the exponents.
      scale: divides the frequencies.
      llama3: (low, high, original positions), as `rope_type` "llama3" of transformers: wavelengths below original /
        high stay as they are, those above original / low are scaled, those in between partly. None: all are scaled.
      yarn: (fast, slow, original positions), as `rope_type` "yarn" (arXiv 2309.00071): frequencies that turn more than
        `fast` times in the original positions stay, those that turn less than `slow` times are scaled.
      divisors: of each frequency, LongRoPE's (arXiv 2402.13753), beside the scale.
    """
    # Rounded as PyTorch rounds it, a last bit of the frequency being 5e-5 of a radian at position 500: float32
    # exponents, a correctly rounded power (so from float64), its float32 reciprocal. In 64-bit mode nothing is rounded.
    dtype = jnp.result_type(float)
    exponent = np.arange(0, head_dim, 2, dtype=dtype) / np.asarray(head_dim, dtype)
    power = np.power(theta, exponent, dtype=np.float64).astype(dtype)
    if divisors:
        return 1 / (np.asarray(divisors, dtype) * power)
    frequency = 1 / power
    if yarn is not None:
        stays = yarn_share(head_dim, theta, yarn).astype(dtype)
        return 1 / (np.asarray(scale, dtype) * power) * (1 - stays) + frequency * stays
    scaled = frequency / np.asarray(scale, dtype)
    if llama3 is None:
        return scaled
    low, high, original = llama3
    wavelength = 2 * math.pi / frequency
    share = (original / wavelength - low) / (high - low)  # of the unscaled frequency, in between
    between = (1 - share) * frequency / np.asarray(scale, dtype) + share * frequency
    scaled = np.where(wavelength > original / low, scaled, between)
    return np.where(wavelength < original / high, frequency, scaled)


def yarn_share(head_dim: int, theta: float, yarn: tuple[float, float, int]) -> Frequencies:
    """Return how much of each frequency YaRN leaves unscaled, 0 to 1, [H/2]: a ramp over whole dimensions."""
    fast, slow, original = yarn

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), head_dim - 1)
    width = np.float32(high - low if high != low else 0.001)
    return 1 - np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / width, 0, 1)


def rope_table(positions: Positions, frequencies: Frequencies) -> tuple[RotaryTable, RotaryTable]:
    """Return cosines and sines of rotary embedding at positions."""
    angle = positions[..., None].astype(frequencies.dtype) * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Heads, table: tuple[RotaryTable, RotaryTable]) -> Heads:
    """Rotate heads by the angles of `rope_table`; halves are paired as in Hugging Face's `rotate_half`.

    Where the table is of fewer than H/2 angles, the dimensions behind theirs stay as they are.
    """
    cos, sin = (part[:, :, None, :].astype(jnp.promote_types(x.dtype, jnp.float32)) for part in table)
    size = cos.shape[-1]
    first, second = (to_float32(part) for part in (x[..., :size], x[..., size : 2 * size]))
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)
    return turned if 2 * size == x.shape[-1] else jnp.concatenate((turned, x[..., 2 * size :]), axis=-1)


def embed(backbone: BackboneConfig, embedding: AnyFloat, tokens: Tokens, dtype: DTypeLike) -> Hidden:
    """Return token embeddings times embed_scale, a factor rounded to the table's dtype as in the reference.

    Args:
      backbone: its embed_scale.
      embedding: the table [V, D].
      tokens: to look up.
      dtype: of the result.
    """
    scale = jnp.asarray(backbone.embed_scale, embedding.dtype)
    return (jnp.take(embedding, tokens, axis=0) * scale).astype(dtype)
