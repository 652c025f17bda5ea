"""Kernels of attention over whole sequences: XLA's own, cuDNN's flash attention, splash attention on TPU, and chunks.

All three compute the same: softmax over the keys of a query's own document, up to its own position and (in a sliding
window of W) at most W - 1 back. All but XLA's store no T x T scores; cuDNN reads a T x T mask.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.console.progress import print_line
from sst_jax.errors import InputError
from sst_jax.model.chunked_attention import chunked
from sst_jax.model.sharding import on_parts
from sst_jax.types import AttentionMask, KeysValues, Queries, SegmentIds

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash", "chunked")
AUTO = {"gpu": ("cudnn", "chunked"), "tpu": ("splash",)}  # what is tried in this order, before XLA's
WIDEST = 256  # of cuDNN's heads, on any card
LANES = 128  # of a TPU's vector unit: splash wants lengths and head dims in multiples of it


def pick(
    implementation: str, head_dim: int, dtype: str, backend: str, capability: tuple[int, int] | None = None
) -> str:
    """Return the kernel that "auto" stands for, or the named one after a check.

    Args:
      implementation: one of IMPLEMENTATIONS.
      head_dim: H.
      dtype: of the activations.
      backend: "cpu", "gpu" or "tpu".
      capability: CUDA compute capability; None: unknown, and taken as one whose heads are 128 wide at most.

    Raises: InputError when the named kernel cannot run there, saying why.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"attention={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    # NVIDIA documents the backward of wider heads for Hopper and data-centre Blackwell, not for RTX Blackwell (12.0).
    widest = WIDEST if capability is not None and capability[0] in (9, 10) else 128
    obstacles = {
        "cudnn": (
            "it needs an NVIDIA GPU" if backend != "gpu"
            else "it computes in bfloat16 only" if dtype != "bfloat16"
            else f"head_dim={head_dim} must be a multiple of 8 up to {widest} on this card"
            if head_dim > widest or head_dim % 8 else None
        ),
        "splash": (
            "it needs a TPU" if backend != "tpu"
            else f"head_dim={head_dim} must be a multiple of {LANES}" if head_dim % LANES else None
        ),
        "xla": None,
        "chunked": None,
    }  # fmt: skip
    if implementation == "auto":
        return next(name for name in (*AUTO.get(backend, ()), "xla") if obstacles[name] is None)
    if obstacles[implementation] is not None:
        raise InputError(f"attention={implementation!r} does not fit: {obstacles[implementation]}")
    return implementation


def fitting(kernel: str, head_dim: int) -> str:
    """Return the kernel that a layer takes of a model for which `kernel` was picked by the heads of its local layers.

    cuDNN takes no head that is wider than WIDEST: such layers attend by chunks.
    """
    return "chunked" if kernel == "cudnn" and head_dim > WIDEST else kernel


def runnable(dtype: str, head_dim: int) -> list[str]:
    """Return the kernels other than XLA's that this device runs."""
    found = []
    for name in IMPLEMENTATIONS:
        with contextlib.suppress(InputError):
            if name not in ("auto", "xla"):
                found.append(here(name, dtype, head_dim))
    return found


def here(implementation: str, dtype: str, head_dim: int) -> str:
    """Return `pick` for the device that JAX runs on; "auto" takes cuDNN only where it compiles there."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if not capability:
        return pick(implementation, head_dim, dtype, jax.default_backend(), None)
    major, minor = (int(part) for part in str(capability).split("."))
    picked = pick(implementation, head_dim, dtype, jax.default_backend(), (major, minor))
    if implementation == "auto" and picked == "cudnn" and (refusal := _cudnn_refuses(head_dim)):
        print_line(f"cuDNN refuses heads of {head_dim} on this card ({refusal}): attention goes by chunks instead")
        return "chunked"
    return picked


@functools.cache
def _cudnn_refuses(head_dim: int) -> str:
    """Return why cuDNN's attention and its gradient do not compile on this card; "" where they do."""
    heads = jax.ShapeDtypeStruct((1, 128, 1, head_dim), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def loss(q: Queries, k: KeysValues, v: KeysValues, segment_ids: SegmentIds) -> jax.Array:
        return cudnn(q, k, v, segment_ids, 1.0, 64).astype(jnp.float32).sum()

    try:
        jax.jit(jax.grad(loss, (0, 1, 2))).lower(heads, heads, heads, segments).compile()
    except Exception as error:  # whatever the library says no with
        return (str(error) or type(error).__name__).splitlines()[0]
    return ""


def cudnn(
    q: Queries, k: KeysValues, v: KeysValues, segment_ids: SegmentIds, scale: float, window: int | None
) -> Queries:
    """Attend with cuDNN's flash attention.

    Args:
      q: queries, rotated.
      k: keys, rotated.
      v: values.
      segment_ids: the documents of the sequences.
      scale: of the scores.
      window: positions that a query sees, its own included; None: all up to its own.

    Returns:
      The output, in q's shape and dtype.
    """
    length = q.shape[1]
    # The backward kernel takes even lengths only. The added position is of no document, and behind all others.
    q, k, v, segment_ids = _padded(q, k, v, segment_ids, 2)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=same_document(segment_ids),
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return out[:, :length]


def splash(
    q: Queries,
    k: KeysValues,
    v: KeysValues,
    segment_ids: SegmentIds,
    scale: float,
    window: int | None,
    interpret: bool = False,
) -> Queries:
    """Attend with JAX's splash attention for TPU.

    Args:
      q, k, v, segment_ids, scale, window: as for `cudnn`.
      interpret: run the kernel in Pallas' interpreter, on any device, slowly.

    Returns:
      The output, in q's shape and dtype.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    length = q.shape[1]
    q, k, v, segment_ids = _padded(q, k, v, segment_ids, LANES)
    square = (q.shape[1], q.shape[1])
    one = library.CausalMask(square) if window is None else library.LocalMask(square, (window - 1, 0), 0)
    block = next(size for size in (512, 256, LANES) if q.shape[1] % size == 0)
    kernel = library.make_splash_mha(
        library.MultiHeadMask([one] * q.shape[2]),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        block_sizes=library.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
    )
    heads_first = [jnp.moveaxis(part, 2, 1) for part in (q * jnp.asarray(scale, q.dtype), k, v)]
    segments = library.SegmentIds(jnp.asarray(segment_ids), jnp.asarray(segment_ids))
    return jnp.moveaxis(jax.vmap(kernel)(*heads_first, segments), 1, 2)[:, :length]


def same_document(segment_ids: SegmentIds) -> AttentionMask:
    """Return whether two positions are of one document. Padding counts as one, so that every query has a key."""
    segment_ids = jnp.asarray(segment_ids)
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


def _padded(q: Queries, k: KeysValues, v: KeysValues, segment_ids: SegmentIds, multiple: int) -> tuple:
    more = -q.shape[1] % multiple
    if not more:
        return q, k, v, segment_ids
    rows = [jnp.pad(part, ((0, 0), (0, more), (0, 0), (0, 0))) for part in (q, k, v)]
    return *rows, jnp.pad(segment_ids, ((0, 0), (0, more)), constant_values=np.int32(-1))


def on_mesh(kernel: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    """Return a kernel's output, run on each device's rows and heads.

    XLA cannot partition splash attention, and gathers the rows before it runs cuDNN's.
    """
    heads = ("rows", None, "heads", None)
    *arrays, scale, window = arguments
    return on_parts(
        functools.partial(kernel, scale=scale, window=window), arrays, (heads, heads, heads, ("rows", None))
    )


KERNELS = {
    "cudnn": functools.partial(on_mesh, cudnn),
    "splash": functools.partial(on_mesh, splash),
    "chunked": functools.partial(on_mesh, chunked),
    "splash_interpreted": functools.partial(on_mesh, functools.partial(splash, interpret=True)),
}
