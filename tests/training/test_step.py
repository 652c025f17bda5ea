"""Loss, optimizer and train step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sst_jax.data import loader
from sst_jax.data.prompts import Example
from sst_jax.model.state import alpha_summary
from sst_jax.training import loss
from sst_jax.training.loss import answer_losses, token_losses
from sst_jax.training.optimizer import OptimizerConfig, accumulate_by_tokens, make_optimizer
from sst_jax.training.step import ForwardConfig, alpha_warmup_fraction_at, batch_losses, init_state, train_step
from tests.support import toys


@pytest.fixture(params=[(128, 64), (8, 16), (5, 25), (7, 49)], ids=str)
def tiles(request, monkeypatch):
    """Positions and vocabulary entries of a tile, for a vocabulary of 50: whole rows, a broken last tile, even ones."""
    rows, columns = request.param
    for name, value in (("ROWS", rows), ("MESH_ROWS", rows), ("COLUMNS", columns), ("FEW", 4)):
        monkeypatch.setattr(loss, name, value)
    return rows


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize(
    ("blocks", "more", "share", "cap"),
    [(1, -1, 1.0, None), (1, 0, 0.5, 2.0), (1, 1, 0.3, None), (3, -2, 0.02, 5.0), (2, 0, 0.0, None)],
)
def test_tiled_loss_equals_full_logits(tiles, blocks, more, share, cap):
    """Value and gradient within 1e-6, for whole and broken blocks and for blocks with nothing to score."""
    positions = blocks * tiles + more
    rng = np.random.default_rng(positions)
    hidden = jnp.asarray(rng.normal(size=(positions, 16)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(50, 16)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, positions), jnp.int32)
    scored = jnp.asarray(rng.random(positions) < share)
    weight = jnp.asarray(rng.random(positions), jnp.float32)

    def plain(hidden):
        logits = hidden @ table.T
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (jnp.where(scored, losses, 0.0) * weight).sum()

    def ours(hidden):
        return (token_losses(hidden, table, targets, scored, cap) * weight).sum()

    (expected, wanted), (got, gradient) = (jax.value_and_grad(function)(hidden) for function in (plain, ours))
    assert float(got) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


@pytest.mark.fast_cases(8)
@pytest.mark.parametrize("learned", [0, 1, 4, 5, 24])
def test_few_learned_positions_are_one_block_and_more_are_several(tiles, learned):
    """Wherever they lie: four are one block here."""
    rng = np.random.default_rng(learned)
    hidden, table = (jnp.asarray(rng.normal(size=(size, 16)), jnp.float32) for size in (24, 50))
    targets = jnp.asarray(rng.integers(0, 50, 24), jnp.int32)
    scored = jnp.zeros(24, bool).at[rng.permutation(24)[:learned]].set(True)
    losses, pull = jax.vjp(lambda hidden: token_losses(hidden, table, targets, scored), hidden)
    logits = hidden @ table.T
    each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    p = jax.nn.softmax(logits)
    np.testing.assert_allclose(losses, jnp.where(scored, each, 0.0), rtol=1e-6, atol=1e-6)
    wanted = jnp.where(scored[:, None], p @ table - table[targets], 0.0)
    np.testing.assert_allclose(pull(jnp.ones(24))[0], wanted, atol=1e-5)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("confidence", [1.0, 30.0])
def test_tiled_loss_in_bfloat16_is_as_close_as_its_types_allow(tiles, confidence):
    """Against float64 on the same rounded numbers: also where a token is all but certain, whose gradient is small."""
    rng = np.random.default_rng(3)
    table = jnp.asarray(rng.normal(size=(50, 16)) / 4, jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, 50, 20), jnp.int32)
    hidden = (table[targets] * confidence).astype(jnp.bfloat16)
    scored = jnp.ones(20, bool)
    losses, pull = jax.vjp(lambda hidden: token_losses(hidden, table, targets, scored), hidden)
    (gradient,) = pull(jnp.ones(20, losses.dtype))
    x, e = np.asarray(hidden, np.float64), np.asarray(table, np.float64)
    logits = x @ e.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    own = p[np.arange(20), targets]
    np.testing.assert_allclose(losses, -np.log(own), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), p @ e - e[targets], rtol=0.02, atol=2e-4)


def test_a_number_that_is_none_in_the_table_shows_in_the_loss(tiles):
    table = jnp.ones((50, 4)).at[33, 2].set(jnp.nan)
    losses = token_losses(jnp.ones((20, 4)), table, jnp.zeros(20, jnp.int32), jnp.ones(20, bool))
    assert np.isnan(losses).all()


def test_answer_losses_are_those_of_the_next_token():
    tokens = jnp.asarray(toys.tokens(2, 9))
    mask = jnp.zeros(tokens.shape, bool).at[0, 5:].set(True).at[1, 0].set(True)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 8)), jnp.float32)
    table = jnp.asarray(np.random.default_rng(1).normal(size=(61, 8)), jnp.float32)
    losses = answer_losses(hidden, table, tokens, mask)
    log_p = jax.nn.log_softmax(hidden @ table.T)
    for place in range(5, 9):
        assert float(losses[0, place]) == pytest.approx(-float(log_p[0, place - 1, tokens[0, place]]), rel=1e-5)
    assert float(losses[0, :5].sum()) == 0.0
    assert float(losses[1].sum()) == 0.0  # nothing comes before a row's first token
    np.testing.assert_array_equal(answer_losses(hidden, table, np.asarray(tokens), np.asarray(mask)), losses)


def test_memory_of_the_loss_does_not_grow_with_the_vocabulary():
    def temporaries(vocabulary):
        shape = jax.ShapeDtypeStruct
        arguments = shape((4096, 8), jnp.float32), shape((vocabulary, 8), jnp.float32)
        rest = shape((4096,), jnp.int32), shape((4096,), bool)
        gradient = jax.jit(jax.grad(lambda *given: token_losses(*given).sum()))
        return gradient.lower(*arguments, *rest).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(3 * loss.COLUMNS + 5), temporaries(30 * loss.COLUMNS + 5)
    assert large < 1.05 * small
    assert large < 4 * loss.ROWS * loss.COLUMNS * 4  # a few tiles, where a block of whole rows of logits would be 30


def trainable(params):
    return {name: params[name] for name in ("adapter", "blend")}


def batches(count, rows=2, length=18):
    for seed in range(count):
        tokens = toys.tokens(rows, length, seed=seed)
        segments = np.ones_like(tokens)
        segments[:, length // 2 :] = 2
        positions = np.concatenate([np.arange(length // 2), np.arange(length - length // 2)])
        mask = np.zeros(tokens.shape, bool)
        mask[:, 3:7] = True
        yield {
            "tokens": tokens, "segment_ids": segments, "answer_mask": mask,
            "positions": np.tile(positions, (rows, 1)).astype(np.int32),
        }  # fmt: skip


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("forward", ["two_pass", pytest.param("exact", marks=pytest.mark.slow)])
def test_a_run_of_steps_compiles_once_learns_and_leaves_the_base_alone(forward):
    config = toys.config({})
    params = toys.params(config)
    before = jax.tree.map(np.array, params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-2, blend_learning_rate=3e-2, warmup_steps=1), 12)
    step = jax.jit(functools.partial(train_step, config, ForwardConfig(forward), optimizer))
    state = init_state(trainable(params), optimizer)
    (batch,) = batches(1)
    losses = []
    for _ in range(12):
        state, metrics = step(state, params["base"], batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    for other in batches(3):
        step(state, params["base"], other, jax.random.key(0))
    assert step._cache_size() == 1
    assert losses[-1] < 0.8 * losses[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, params["base"], before["base"]))
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.trainable, trainable(before))
    assert all(jax.tree.leaves(moved))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.trainable)} == {"float32"}


def test_a_step_that_is_not_finite_changes_nothing_but_the_count():
    """One token's embedding is not a number; the others come through as if the batch with it had not been."""
    config = toys.config({}, backbone=toys.LLAMA)  # its head is not its embedding
    params = toys.params(config)
    poisoned = params["base"]["embed"]["embedding"].at[7].set(jnp.nan)
    base = {**params["base"], "embed": {"embedding": poisoned}}
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), 10)
    step = jax.jit(functools.partial(train_step, config, ForwardConfig("two_pass"), optimizer))
    good = [{**batch, "tokens": np.where(batch["tokens"] == 7, 8, batch["tokens"])} for batch in batches(4)]
    bad = {**good[0], "tokens": np.full_like(good[0]["tokens"], 7)}

    def run(sequence):
        state, skipped = init_state(trainable(params), optimizer), []
        for batch in sequence:
            state, metrics = step(state, base, batch, jax.random.key(0))
            skipped.append(bool(metrics["skipped"]))
        return state, skipped

    wanted, skipped = run(good)
    assert skipped == [False] * 4
    state, skipped = run([bad, good[0], bad, bad, good[1], good[2], bad, good[3]])
    assert skipped == [True, False, True, True, False, False, True, False]
    assert (int(state.step), int(wanted.step)) == (8, 4)
    assert jax.tree.all(jax.tree.map(np.array_equal, state[1:], wanted[1:]))


@pytest.mark.parametrize("value", [np.inf, 1e30])
def test_a_gradient_that_overflows_is_skipped_though_the_loss_is_finite(value):
    """1e30 is finite, and its square, in the clip's norm, is not."""
    state = {"adapter": {}, "blend": {"theta": jnp.ones(3)}}
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), 10)
    before = init_state(state, optimizer)

    @jax.custom_vjp
    def steep(x):
        return x.sum()

    steep.defvjp(lambda x: (x.sum(), x), lambda x, cotangent: (jnp.full_like(x, value),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sst_jax.training.step.batch_losses", lambda *args, **_: steep(args[3]["blend"]["theta"]))
        batch = {"answer_mask": np.ones((1, 3), bool)}
        after, metrics = train_step(
            toys.config(), ForwardConfig("plain"), optimizer, before, {}, batch, jax.random.key(0)
        )
    assert np.isfinite(metrics["loss"])
    assert metrics["skipped"]
    assert jax.tree.all(jax.tree.map(np.array_equal, after[1:], before[1:]))


def test_weight_decay_does_not_touch_the_blend():
    trainable = {"adapter": {"a": jnp.ones(3)}, "blend": {"theta": jnp.ones(3)}}
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5, warmup_steps=0), 10)
    still = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = optimizer.update(still, optimizer.init(trainable), trainable)
    assert (np.asarray(updates["blend"]["theta"]) == 0).all()
    assert (np.asarray(updates["adapter"]["a"]) < 0).all()


def uneven_rows(packed):
    """A batch of eight rows whose documents have answers of 1 to 20 tokens."""
    rng = np.random.default_rng(5)
    examples = []
    for number in range(24 if packed else 8):
        ids = toys.tokens(int(rng.integers(4, 9 if packed else 24)), seed=number)
        learned = np.arange(len(ids)) >= rng.integers(1, len(ids))
        examples.append(Example(tokens=ids, answer_mask=learned, id=str(number)))
    batch = next(loader.rows(examples, loader.Layout(24, 8, packed), seed=3))
    counts = batch["answer_mask"].sum(1)
    assert counts.max() > 2 * counts.min()
    return batch


@pytest.mark.slow
@pytest.mark.parametrize(("pieces", "packed"), [(4, True), (4, False), (8, False)])
def test_an_update_on_the_same_rows_is_the_same_whole_or_in_pieces(pieces, packed, float64):
    config = toys.config({}, toys.SHALLOW)
    params, whole = toys.params(config, "float64"), uneven_rows(packed)
    forward = ForwardConfig("plain", dtype="float64")

    def taken(optimizer, sequence):
        state = init_state(trainable(params), optimizer)
        step = jax.jit(functools.partial(train_step, config, forward, optimizer))
        for batch in sequence:
            before, (state, _) = state.trainable, step(state, params["base"], batch, jax.random.key(0))
            if batch is not sequence[-1]:
                jax.tree.map(np.testing.assert_array_equal, state.trainable, before)
        return jax.tree.map(np.subtract, trainable(params), state.trainable)  # with sgd(1.0): the gradient

    split = [dict(zip(whole, parts, strict=True)) for parts in zip(
        *(np.split(array, pieces) for array in whole.values()), strict=True)]  # fmt: skip
    expected = taken(optax.sgd(1.0), [whole])
    got = taken(accumulate_by_tokens(optax.sgd(1.0), pieces), split)
    scale = optax.tree.norm(expected)
    assert optax.tree.norm(jax.tree.map(np.subtract, got, expected)) < 1e-9 * scale
    even = taken(optax.MultiSteps(optax.sgd(1.0), pieces).gradient_transformation(), split)
    assert optax.tree.norm(jax.tree.map(np.subtract, even, expected)) > 1e-2 * scale  # what equal weights would give


@pytest.mark.slow
@pytest.mark.parametrize("hole", [0, 2])
def test_a_skipped_micro_batch_shifts_no_window(hole):
    """The update is that of the window's other rows, the next window's stays its own; all holes change nothing."""
    config = toys.config({}, toys.SHALLOW)
    params = toys.params(config)
    whole = uneven_rows(packed=False)
    pieces = [{name: array[start : start + 2] for name, array in whole.items()} for start in (0, 2, 4, 6)]
    one, two, three, _ = pieces
    optimizer = accumulate_by_tokens(optax.adam(1e-2), 3)
    poison = {"embed": {"embedding": jnp.full_like(params["base"]["embed"]["embedding"], jnp.nan)}}

    step = jax.jit(functools.partial(train_step, config, ForwardConfig("plain"), optimizer))
    state, skipped = init_state(trainable(params), optimizer), []
    first = [one, two]
    first.insert(hole, None)
    for batch in [*first, None, None, None, three, three, three]:
        base = params["base"] | (poison if batch is None else {})
        state, metrics = step(state, base, batch or one, jax.random.key(0))
        skipped.append(bool(metrics["skipped"]))
    assert skipped == [batch is None for batch in first] + [True] * 3 + [False] * 3

    inner = optax.adam(1e-2)
    wanted = init_state(trainable(params), inner)
    plain = jax.jit(functools.partial(train_step, config, ForwardConfig("plain"), inner))
    for batch in ({name: np.concatenate([one[name], two[name]]) for name in one}, three):
        wanted, _ = plain(wanted, params["base"], batch, jax.random.key(0))
    assert (int(state.optimizer.updates), int(state.optimizer.micro_step)) == (3, 0)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state.optimizer.inner, wanted.optimizer
    )
    assert int(state.optimizer.inner[0].count) == 2


def test_an_update_of_a_window_that_is_not_finite_leaves_the_next_window_whole():
    config = toys.config({}, toys.SHALLOW)
    params, (batch,) = toys.params(config), batches(1)
    optimizer = accumulate_by_tokens(optax.chain(optax.scale(1e38), optax.scale(1e38)), 2)
    step = jax.jit(functools.partial(train_step, config, ForwardConfig("plain"), optimizer))
    state, skipped = init_state(trainable(params), optimizer), []
    for _ in range(2):
        state, metrics = step(state, params["base"], batch, jax.random.key(0))
        skipped.append(bool(metrics["skipped"]))
    assert skipped == [False, True]
    jax.tree.map(np.testing.assert_array_equal, state.trainable, trainable(params))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.optimizer.gradient_sum))


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_alpha_warms_up_by_updates_and_is_logged_as_it_is_in_use(accumulate):
    config = toys.config({"alpha_warmup": 2, "alpha_range": (0.0, 0.5), "alpha_init": 0.3})
    params = toys.params(config)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, accumulate=accumulate), 8)
    state = init_state(trainable(params), optimizer)
    step = jax.jit(functools.partial(train_step, config, ForwardConfig("exact"), optimizer))
    seen = []
    for batch in batches(3 * accumulate):
        alpha_warmup_fraction = alpha_warmup_fraction_at(config, state)
        seen.append(float(alpha_warmup_fraction))
        logged, full = (
            alpha_summary(config.stream, state.trainable["blend"], at)["alpha_mean"]
            for at in (alpha_warmup_fraction, None)
        )
        assert logged == pytest.approx(float(alpha_warmup_fraction) * full)
        state, _ = step(state, params["base"], batch, jax.random.key(0))
    assert seen == [at for at in (0.0, 0.5, 1.0) for _ in range(accumulate)]
    assert alpha_warmup_fraction_at(toys.config({}), state) is None


def test_an_update_that_is_not_finite_is_skipped_though_loss_and_gradient_are():
    """The weights would be lost, and every later step with them."""
    config = toys.config({})
    params, (batch,) = toys.params(config), batches(1)
    optimizer = optax.chain(optax.scale(1e38), optax.scale(1e38))
    state = init_state(trainable(params), optimizer)
    after, metrics = jax.jit(functools.partial(train_step, config, ForwardConfig("plain"), optimizer))(
        state, params["base"], batch, jax.random.key(0)
    )
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["gradient_norm"])
    assert bool(metrics["skipped"])
    jax.tree.map(np.testing.assert_array_equal, after.trainable, state.trainable)


def test_only_layers_that_carry_a_state_are_logged():
    stream = toys.config({"layers": (1,)}).stream
    theta = jnp.zeros((3, 4)).at[1].set(2.0)
    summary = alpha_summary(stream, {"theta": theta})
    lo, hi = stream.alpha_range
    assert summary["alpha_min"] == summary["alpha_max"] == pytest.approx(float(lo + (hi - lo) * jax.nn.sigmoid(2.0)))
    assert alpha_summary(stream, {"theta": theta[1:2]}) == summary  # one for all layers


@pytest.mark.slow
def test_alpha_warms_up_from_the_lower_end():
    config = toys.config({"alpha_warmup": 4, "alpha_range": (0.0, 0.5), "alpha_init": 0.3})
    params = toys.params(config)
    (batch,) = batches(1)
    losses = functools.partial(batch_losses, config, ForwardConfig("exact"), params["base"], trainable(params))
    plain = functools.partial(batch_losses, config, ForwardConfig("plain"), params["base"], trainable(params), batch)
    cold, warm, done = (losses(batch, alpha_warmup_fraction=jnp.float32(at)) for at in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(cold, plain(), atol=1e-5)
    np.testing.assert_allclose(done, losses(batch), atol=1e-6)
    assert np.abs(np.asarray(warm - cold)).max() > 1e-4
    assert np.abs(np.asarray(warm - done)).max() > 1e-4
