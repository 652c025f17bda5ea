"""The stream in other families than Gemma: the same forwards, decoding and training, against the same naive reading."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.families.registry import PRESETS
from sst_jax.inference.sampling import Sampling
from sst_jax.model import decoder, rules
from sst_jax.model.config import ModelConfig, StreamConfig
from sst_jax.model.quantization import storages
from sst_jax.training.optimizer import OptimizerConfig, make_optimizer
from sst_jax.training.step import ForwardConfig, batch_losses, init_state, train_step
from tests.support import naive, toys
from tests.support.decoding import generate as generate_tokens

FAMILIES = {"llama": toys.LLAMA, "qwen3": toys.QWEN3}


@pytest.fixture(params=FAMILIES)
def backbone(request):
    return FAMILIES[request.param]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("backbone", "fields"),
    [
        pytest.param("llama", {}, marks=pytest.mark.slow),
        ("qwen3", {"state": "block", "norm": "match", "initial": "own", "decay": 0.3}),
    ],
    indirect=["backbone"],
)
def test_every_forward_is_the_naive_recurrence(backbone, fields, float64):
    config = toys.config({"alpha_range": (0.0, 1.0), **fields}, backbone)
    params, tokens = toys.params(config, "float64"), toys.tokens(8)
    numbers = jax.tree.map(np.asarray, params)
    truth = naive.hidden(config, numbers, tokens)
    for name, passes in (("exact", 2), ("k_pass", 9), ("local", 9)):
        out = toys.hidden_in_float64(config, params, tokens[None], forward=name, passes=passes)
        assert np.abs(np.asarray(out[0]) - truth).max() <= 1e-11, name
    two = toys.hidden_in_float64(config, params, tokens[None], forward="two_pass")
    plain = naive.hidden(dataclasses.replace(config, stream=None), numbers, tokens)
    assert np.abs(np.asarray(two[0]) - truth).max() > 1e-6
    assert np.abs(plain - truth).max() > 0.01


@pytest.mark.parametrize(
    "change",
    [
        {"norm_offset": 1.0},
        {"activation": "gelu_tanh"},
        {"scale_embedding": True},
        {"rope_llama3": None},
        {"rope_scale_global": 1.0},
        {"post_norms": True},
        {"qk_norm": True},
        {"tied_head": True},
        {"qkv_bias": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_fact_of_a_family_is_computed_on_its_own(change, float64):
    """One at a time turned to what Gemma has, against the naive reading of the same mixture."""
    config = toys.config({"alpha": 0.3}, dataclasses.replace(toys.LLAMA, **change))
    params, tokens = toys.params(config, "float64"), toys.tokens(20)
    numbers = jax.tree.map(np.asarray, params)
    truth = naive.logits(config, numbers, tokens)
    logits = toys.quick_jit(functools.partial(rules.logits, forward="exact"), "config")
    assert np.abs(np.asarray(logits(toys.in_float64(config), params, tokens[None])[0]) - truth).max() <= 1e-11
    if not {"post_norms", "qk_norm", "tied_head", "qkv_bias"} & set(
        change
    ):  # these change the tree; of the others both can be read
        other = naive.logits(toys.config({"alpha": 0.3}, toys.LLAMA), numbers, tokens)
        assert np.abs(other - truth).max() > 1e-3


@pytest.mark.parametrize("backbone", ["llama"], indirect=True)
def test_decoding_is_the_naive_recurrence(backbone):
    config = toys.config({"alpha": 0.3}, backbone)
    params, prompt, new = toys.params(config), toys.tokens(11), 12
    pieces = generate_tokens(
        config,
        params,
        [prompt.tolist()],
        depth=[3],
        max_new_tokens=new,
        sampling=Sampling(),
        seeds=[0],
        stop_ids=(),
        pad_id=0,
    )
    out = np.concatenate([piece.tokens for piece in pieces], axis=1)[0, :new]
    numbers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    logits = naive.logits(config, numbers, [*prompt, *out], [1] * 10 + [3] * (new + 1))
    assert logits[10:-1].argmax(-1).tolist() == out.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["llama"], indirect=True)
def test_batches_decode_in_bfloat16(backbone):
    """Several rows, each with groups of queries to several heads: a product that not every backend has."""
    config = dataclasses.replace(toys.config({"alpha": 0.3}, backbone), dtype="bfloat16")
    params, prompts = toys.params(config, "bfloat16"), toys.tokens(2, 11).tolist()

    def generate(prompts):
        pieces = generate_tokens(
            config,
            params,
            prompts,
            depth=[2] * len(prompts),
            max_new_tokens=4,
            sampling=Sampling(),
            seeds=[0] * len(prompts),
            stop_ids=(),
            pad_id=0,
        )
        return np.concatenate([piece.tokens for piece in pieces], axis=1)[:, :4].tolist()

    assert generate(prompts) == [generate([prompt])[0] for prompt in prompts]


def whole_batch(rows, length):
    tokens = toys.tokens(rows, length)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    ones = np.ones_like(tokens)
    return {"tokens": tokens, "segment_ids": ones, "answer_mask": ones.astype(bool), "positions": positions}


def test_the_loss_is_read_off_the_right_head(backbone):
    config = toys.config({}, backbone)
    params, batch = toys.params(config), whole_batch(1, 12)
    trainable = {name: params[name] for name in ("adapter", "blend")}
    got = batch_losses(config, ForwardConfig("exact"), params["base"], trainable, batch)[0]
    numbers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    log_p = jax.nn.log_softmax(naive.logits(config, numbers, batch["tokens"][0])[:-1])
    expected = -np.take_along_axis(np.asarray(log_p), batch["tokens"][0, 1:, None], axis=1)[:, 0]
    np.testing.assert_allclose(got[1:], expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["llama"], indirect=True)
def test_steps_learn_and_leave_the_base_alone(backbone):
    config = toys.config({}, backbone)
    params, batch = toys.params(config), whole_batch(2, 18)
    before = jax.tree.map(np.array, params["base"])
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-2, blend_learning_rate=3e-2, warmup_steps=1), 12)
    step = jax.jit(functools.partial(train_step, config, ForwardConfig("two_pass"), optimizer))
    state, losses = init_state({name: params[name] for name in ("adapter", "blend")}, optimizer), []
    for _ in range(12):
        state, metrics = step(state, params["base"], batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, params["base"], before))


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
def test_nf4_holds_the_linears_and_nothing_else(name):
    config = ModelConfig(PRESETS[name], StreamConfig())
    base = jax.eval_shape(
        lambda: storages.quantise_layers(decoder.init_params(config, jax.random.key(0), jnp.bfloat16)["base"]["layers"])
    )
    assert {part for part, leaf in base.items() if storages.is_quantised(leaf)} == set(PRESETS[name].linear_shapes)
    assert {leaf["scale"].dtype for part, leaf in base.items() if "norm" in part} == {jnp.dtype(jnp.bfloat16)}
