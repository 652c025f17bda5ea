"""Every attention kernel against a plain masked softmax, for every mask that we use."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.model import compiler, kernels
from sst_jax.model.attention import Visible, attention, attention_once
from sst_jax.model.chunked_attention import chunked

SEGMENTS = {
    "one document": [1] * 37,
    "packed": [1] * 9 + [2] * 20 + [3] * 8,
    "packed and padded": [1] * 14 + [2] * 11 + [0] * 12,
    "padded in front": [0] * 5 + [1] * 32,
}


def reference(q, k, v, segments, scale, window):
    """In float64 numpy, query by query."""
    q, k, v = (np.asarray(part, np.float64) for part in (q, k, v))
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for row in range(q.shape[0]):
        for t in range(q.shape[1]):
            first = 0 if window is None else max(t - window + 1, 0)
            seen = [s for s in range(first, t + 1) if segments[row, s] == segments[row, t]]
            for head in range(q.shape[2]):
                scores = k[row, seen, head // group] @ q[row, t, head] * scale
                weights = np.exp(scores - scores.max())
                out[row, t, head] = weights / weights.sum() @ v[row, seen, head // group]
    return out


def inputs(head_dim, segments, length=37):
    rng = np.random.default_rng(0)
    shapes = ((2, length, 4, head_dim), (2, length, 2, head_dim), (2, length, 2, head_dim))
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return q, k, v, np.array([segments, [1] * length], np.int32)


def xla(q, k, v, segments, scale, window):
    return attention(
        q, Visible(k, v, kernels.same_document(jnp.asarray(segments)), is_causal=True, window=window), scale
    )


def cudnn_on_cpu(monkeypatch):
    """Our call of cuDNN's attention, answered by XLA's under the same arguments; checks what cuDNN asks for."""
    library = jax.nn.dot_product_attention

    def stand_in(q, k, v, *, implementation, local_window_size, **rest):
        assert implementation == "cudnn"
        assert q.shape[1] % 2 == 0
        assert local_window_size is None or local_window_size[1] == 0
        return library(q, k, v, local_window_size=local_window_size, **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return kernels.cudnn


@pytest.mark.parametrize("window", [None, 5, 16], ids=["global", "window 5", "window 16"])
@pytest.mark.parametrize("mask", SEGMENTS)
@pytest.mark.parametrize("name", ["xla", "cudnn", "splash", "chunked"])
def test_equals_a_plain_masked_softmax(name, mask, window, monkeypatch):
    q, k, v, segments = inputs(128 if name == "splash" else 16, SEGMENTS[mask])
    kernel = {
        "xla": lambda: xla,
        "cudnn": lambda: cudnn_on_cpu(monkeypatch),
        "splash": lambda: kernels.KERNELS["splash_interpreted"],
        "chunked": lambda: functools.partial(chunked, block=16),
    }[name]()
    out = kernel(q, k, v, jnp.asarray(segments), 0.3, window)
    assert out.shape == q.shape
    assert np.abs(out - reference(q, k, v, segments, 0.3, window)).max() <= 2e-5


@pytest.mark.slow
def test_splash_has_the_gradients_of_xla():
    q, k, v, segments = inputs(128, SEGMENTS["packed and padded"])

    def pull(kernel):
        return jax.grad(lambda *qkv: jnp.sin(kernel(*qkv, jnp.asarray(segments), 0.3, 16)).sum(), (0, 1, 2))(q, k, v)

    for ours, theirs in zip(pull(kernels.KERNELS["splash_interpreted"]), pull(xla), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("window", "head_dim"), [(None, 16), (16, 16), (None, 512)], ids=["global", "window 16", "512 wide"]
)
def test_chunks_have_the_gradients_of_xla_and_store_no_square_of_scores(window, head_dim):
    q, k, v, segments = inputs(head_dim, SEGMENTS["packed and padded"])
    q = q * (16 / head_dim) ** 0.5

    def pull(kernel):
        return jax.grad(lambda *qkv: jnp.sin(kernel(*qkv, jnp.asarray(segments), 0.3, window)).sum(), (0, 1, 2))

    blocks = functools.partial(chunked, block=8)
    out = blocks(q, k, v, jnp.asarray(segments), 0.3, window)
    assert np.abs(out - reference(q, k, v, segments, 0.3, window)).max() <= 2e-5
    for ours, theirs in zip(jax.jit(pull(blocks))(q, k, v), jax.jit(pull(xla))(q, k, v), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    written = str(jax.make_jaxpr(pull(blocks))(q, k, v))
    assert re.findall(r"\[2,2,2,8,8\]", written)
    assert not re.findall(r",(37|40),(37|40)\]", written)


def test_where_cudnn_does_not_compile_chunks_take_its_place(monkeypatch, capsys):
    monkeypatch.setattr(kernels.jax, "devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
    monkeypatch.setattr(kernels.jax, "default_backend", lambda: "gpu")
    assert kernels.here("cudnn", "bfloat16", 128) == "cudnn"  # it is asked for by name
    kernels._cudnn_refuses.cache_clear()
    assert kernels.here("auto", "bfloat16", 128) == "chunked"  # this CPU has no cuDNN
    assert "cuDNN refuses heads of 128 on this card" in capsys.readouterr().out
    kernels._cudnn_refuses.cache_clear()
    monkeypatch.setattr(kernels, "_cudnn_refuses", lambda _: "")
    assert kernels.here("auto", "bfloat16", 128) == "cudnn"


@pytest.mark.parametrize(
    ("where", "head_dim", "dtype", "expected"),
    [
        (("cpu", None), 256, "bfloat16", "xla"),
        (("gpu", (9, 0)), 256, "bfloat16", "cudnn"),
        (("gpu", (12, 0)), 128, "bfloat16", "cudnn"),
        (("gpu", (12, 0)), 256, "bfloat16", "chunked"),
        (("gpu", (10, 0)), 256, "bfloat16", "cudnn"),
        (("gpu", (8, 9)), 256, "bfloat16", "chunked"),
        (("gpu", (8, 9)), 128, "bfloat16", "cudnn"),
        (("gpu", None), 256, "bfloat16", "chunked"),
        (("gpu", (9, 0)), 512, "bfloat16", "chunked"),
        (("gpu", (9, 0)), 128, "float32", "chunked"),
        (("gpu", (9, 0)), 20, "bfloat16", "chunked"),
        (("tpu", None), 256, "bfloat16", "splash"),
        (("tpu", None), 64, "float32", "xla"),
    ],
)
def test_auto_takes_what_fits(where, head_dim, dtype, expected):
    assert kernels.pick("auto", head_dim, dtype, *where) == expected
    if expected in ("xla", "chunked"):
        for name in ("cudnn", "splash"):
            with pytest.raises(InputError, match=name):
                kernels.pick(name, head_dim, dtype, *where)


def test_layers_with_heads_beyond_cudnns_go_by_chunks():
    assert [kernels.fitting("cudnn", size) for size in (128, 256, 512)] == ["cudnn", "cudnn", "chunked"]
    assert [kernels.fitting(name, 512) for name in ("xla", "splash")] == ["xla", "splash"]


def test_unknown_kernels_are_named():
    with pytest.raises(InputError, match="flash3"):
        kernels.pick("flash3", 128, "bfloat16", "gpu", (9, 0))


def test_one_query_a_row_is_multiplied_and_added_up_as_softmax_attention():
    """Of queries that share keys, some of which a row does not see; the gradient too, against float64 and numpy."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 1, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8)))
    seen = np.array([[True, True, False, True, False, False], [False, False, True, True, True, True]])
    dy = rng.standard_normal(q.shape)
    wide_k, wide_v = (np.repeat(part, 2, axis=2) for part in (k, v))
    scores = np.where(seen[:, None, :], np.einsum("bnh,bsnh->bns", q[:, 0], wide_k) * 0.3, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bnh,bsnh->bns", dy[:, 0], wide_v)
    dscores = p * (dp - (p * dp).sum(-1, keepdims=True)) * 0.3
    expected = np.einsum("bns,bsnh->bnh", p, wide_v)[:, None], np.einsum("bns,bsnh->bnh", dscores, wide_k)[:, None]

    def run(q):
        return attention_once(q, *(jnp.asarray(part, jnp.float32) for part in (k, v)), jnp.asarray(seen), 0.3)

    with compiler.compiled_for("interpreted"):
        out, pull = jax.vjp(run, jnp.asarray(q, jnp.float32))
        ours = out, pull(jnp.asarray(dy, jnp.float32))[0]
    for mine, exact in zip(ours, expected, strict=True):
        assert np.abs(np.asarray(mine) - exact).max() < 1e-5
