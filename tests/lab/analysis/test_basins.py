"""Basin measures on states whose truth was planted: shares, thresholds, order of events, reach, noise floor."""

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("diptest")

from hypothesis import given, settings
from hypothesis import strategies as st

from sst_jax.errors import InputError
from sst_jax.lab.analysis import basins, cosine, noise
from sst_jax.lab.analysis.basins import TextMetrics
from sst_jax.lab.analysis.collection import Problem

TEXTS, POSITIONS = 40, 60


def turned(rng, states, angle):
    """States [..., D] turned by angle [...] in random directions: their overlap with the old ones is cos(angle)."""
    other = rng.standard_normal(states.shape)
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    other -= (other * unit).sum(-1, keepdims=True) * unit
    other /= np.linalg.norm(other, axis=-1, keepdims=True)
    angle = np.asarray(angle)[..., None]
    return (np.cos(angle) * unit + np.sin(angle) * other) * np.linalg.norm(states, axis=-1, keepdims=True)


def planted_moves(rng, share, stable=0.02, shifted=0.9, spread=0.25):
    """1 - overlap of TEXTS texts, each with its own share of shifted positions, and which those are."""
    shares = np.clip(rng.normal(share, share / 4, TEXTS), 0, 1)
    masks = [rng.random(POSITIONS) < each for each in shares]
    angles = [np.where(mask, shifted, stable) * np.exp(spread * rng.standard_normal(POSITIONS)) for mask in masks]
    return [1 - np.cos(np.minimum(angle, 3)) for angle in angles], masks


def measured(moved, winner=None, replaced=None, rank=None, depth=None, rounding=None):
    """One problem of one layer: moved, winner [I, T]."""
    moved = np.asarray(moved, float)
    winner = np.zeros(moved.shape, int) if winner is None else np.asarray(winner)
    zeros = np.zeros(moved.shape)
    square = np.ones((1, 3)) if depth is None else depth
    return TextMetrics(
        "planted",
        moved[..., None],
        zeros if replaced is None else replaced,
        winner,
        zeros if rank is None else rank,
        square,
        square if rounding is None else rounding,
        {},
    )


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-6, 3.1), st.integers(0, 5), st.sampled_from(["float32", "float64"]))
def test_moved_is_one_minus_the_cosine_that_was_planted(angle, seed, dtype):
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((4, 7, 33)) * np.exp(rng.standard_normal((4, 7, 1)))
    other = turned(rng, states, np.full((4, 7), angle)).astype(dtype)
    tolerance = 1e-6 if dtype == "float64" else 3e-2 if angle < 1e-4 else 1e-3
    found = cosine.cosine_distance(states.astype(dtype), other)
    if dtype == "float64" or angle > 1e-5:
        np.testing.assert_allclose(found, 2 * np.sin(angle / 2) ** 2, rtol=tolerance)
    np.testing.assert_allclose(cosine.cosine_similarity(states, other), 1 - found, atol=1e-6)


def test_equal_states_have_not_moved_at_all():
    states = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    assert (cosine.cosine_distance(states, states) == 0).all()
    assert (cosine.cosine_distance(states, 2 * states) < 1e-30).all()


@pytest.mark.parametrize("share", [0.14, 0.4])
def test_two_kinds_are_found_with_their_share_and_threshold(share):
    rng = np.random.default_rng(1)
    groups, masks = planted_moves(rng, share)
    found = basins.fit_mixture(groups)
    truth = np.concatenate(masks).mean()
    assert found.bimodal
    assert found.share.low <= truth <= found.share.high
    assert found.share.value == pytest.approx(truth, abs=0.01)
    # In log10(1 - overlap) both kinds are normal, at twice the angle's logarithm less that of 2.
    assert found.means == pytest.approx([2 * np.log10(0.02) - np.log10(2), 2 * np.log10(0.9) - np.log10(2)], abs=0.1)
    parted = [mask == (basins.logs(group) > found.cut) for group, mask in zip(groups, masks, strict=True)]
    assert np.mean(parted) > 0.995
    assert found.threshold.low <= found.threshold.value <= found.threshold.high


@pytest.mark.parametrize("kind", ["normal", "skewed", "texts_differ", "clustered"])
def test_one_kind_is_called_one(kind):
    rng = np.random.default_rng(2)
    draw = {
        "normal": lambda: rng.normal(-3, 0.5, POSITIONS),
        "skewed": lambda: -5 + rng.gamma(2.0, 0.4, POSITIONS),  # of which two normals are the better description
        "texts_differ": lambda: rng.normal(rng.normal(-3, 0.3), 0.4, POSITIONS),
        "clustered": lambda: np.repeat(rng.normal(-3, 0.5, POSITIONS // 6), 6),
    }[kind]
    found = basins.fit_mixture([10.0 ** draw() for _ in range(TEXTS)])
    assert not found.bimodal
    assert found.threshold is None
    assert found.share is None
    if kind == "skewed":
        assert found.bic[1] < found.bic[0]


def test_the_dip_test_keeps_its_level():
    """Of 60 unimodal samples about one in twenty may be called two; the dip is conservative beside the uniform."""
    rng = np.random.default_rng(3)
    called = 0
    for _ in range(60):
        groups = [rng.normal(-3, 0.5, POSITIONS) for _ in range(TEXTS)]
        called += basins.thinned_dip(groups, rng)[1] < basins.LEVEL
    assert called <= 3


def test_nothing_moving_is_one_kind():
    found = basins.fit_mixture([np.zeros(30), np.zeros(30)])
    assert not found.bimodal
    assert found.dip_p == 1.0


@pytest.mark.parametrize(
    ("groups", "culprit"), [([], "0 positions"), ([np.ones(5)], "5 positions"), ([np.full(30, np.nan)], "not a number")]
)
def test_what_cannot_be_judged_is_named(groups, culprit):
    with pytest.raises(InputError, match=culprit):
        basins.fit_mixture(groups)


def test_one_mode_leaves_the_tenth_that_moved_most_as_a_contrast():
    rng = np.random.default_rng(4)
    each = [measured(np.stack([np.zeros(POSITIONS), 10 ** rng.normal(-3, 0.5, POSITIONS)])) for _ in range(TEXTS)]
    found = basins.fit_mixture([one.cosine_distance[-1, :, 0] for one in each])
    masks, cut, how = basins.shifted(each, 0, found)
    assert np.mean(masks) == pytest.approx(0.1, abs=0.01)
    assert how == "the tenth of the positions that moved most"
    assert cut == pytest.approx(np.quantile([basins.logs(one.cosine_distance[-1, :, 0]) for one in each], 0.9))


def test_tokens_at_shifts_and_at_stable_positions():
    """54 of 100 replaced at shifts and 1 elsewhere; every shift's winner came from place 50."""
    rng = np.random.default_rng(5)
    each, masks = [], []
    for _ in range(TEXTS):
        mask = rng.random(POSITIONS) < 0.14
        masks.append(mask)
        replaced = np.where(mask, rng.poisson(54, POSITIONS), rng.poisson(1, POSITIONS))
        winner, rank = np.stack([np.zeros(POSITIONS), mask]), np.stack([np.ones(POSITIONS), np.where(mask, 50, 1)])
        each.append(measured(np.zeros((2, POSITIONS)), winner, np.stack([replaced, replaced]), rank))
    found = basins.tokens_at(each, masks)
    assert found["shifted"]["replaced"]["low"] <= 54 <= found["shifted"]["replaced"]["high"]
    assert found["stable"]["replaced"]["low"] <= 1 <= found["stable"]["replaced"]["high"]
    assert found["shifted"]["changed"]["value"] == 1.0
    assert found["stable"]["changed"]["value"] == 0.0
    assert found["shifted"]["winner_rank"] == {"median": 50.0, "largest": 50}
    assert found["stable"]["winner_rank"] is None


def planted_orders(rng, lag, depths=5):
    """Texts whose states shift at a random depth at half of the positions; tokens `lag` depths later (None: apart)."""
    found = []
    for _ in range(TEXTS):
        at = np.where(rng.random(POSITIONS) < 0.5, rng.integers(1, depths, POSITIONS), depths)
        if lag is None:
            token = np.where(rng.random(POSITIONS) < 0.5, rng.integers(1, depths, POSITIONS), depths)
        else:
            token = np.where(at < depths, at + lag, depths)
        number = np.arange(depths)[:, None]
        found.append(measured(np.where(number >= at, 0.3, 1e-4), (number >= token).astype(int)))
    return found


@pytest.mark.parametrize("lag", [0, 1, None])
def test_the_order_of_events_is_recovered(lag):
    each = planted_orders(np.random.default_rng(6), lag)
    found = basins.order_of_events(each, 0, -2.0, permutations=300)
    counts = found["counts"]
    assert sum(counts.values()) == TEXTS * POSITIONS
    if lag == 1:
        assert counts["together"] == counts["token_first"] == 0
        assert counts["state_first"] > 0.3 * TEXTS * POSITIONS
        assert found["p"] == pytest.approx(1 / 301)
    else:
        assert found["p"] > 0.05
        if lag == 0:
            assert counts["state_first"] == counts["token_first"] == counts["state_only"] == 0
        else:
            for name, value in counts.items():
                assert value == pytest.approx(found["by_chance"][name], abs=80)


def test_how_far_a_shift_is_felt():
    """Planted: three positions behind a shift move more, those beyond as ever; texts differ in how much they move."""
    rng = np.random.default_rng(7)
    each, masks = [], []
    for _ in range(TEXTS):
        mask = rng.random(POSITIONS) < 0.05
        behind = sum(np.roll(mask, lag) * (np.arange(POSITIONS) >= lag) for lag in (1, 2, 3)) > 0
        values = rng.uniform(1e-3, 0.1) + 0.05 * behind + 1e-3 * rng.random(POSITIONS)
        each.append(measured(np.stack([np.zeros(POSITIONS), values])))
        masks.append(mask)
    found = {record["distance"]: record for record in basins.downstream(each, 0, masks, reach=8)}
    for distance in (1, 2, 3):
        assert found[distance]["low"] > 0.02
    for distance in (5, 6, 7, 8):
        assert abs(found[distance]["value"]) < 0.015


def test_position_zero_stands_apart():
    rng = np.random.default_rng(8)
    each, masks = [], []
    for _ in range(TEXTS):
        mask = np.arange(POSITIONS) == 0
        values = np.where(mask, 0.4, 0.01) * rng.uniform(0.9, 1.1, POSITIONS)
        each.append(measured(np.stack([np.zeros(POSITIONS), values]), np.stack([np.zeros(POSITIONS), mask])))
        masks.append(mask)
    found = basins.position_zero(each, 0, masks)
    assert found["moved"]["first"]["value"] == pytest.approx(0.4, abs=0.02)
    assert found["moved"]["others"]["value"] == pytest.approx(0.01, abs=0.001)
    assert found["changed"]["first"]["value"] == found["shifted"]["first"]["value"] == 1.0


def problem(states, top_ids, rounded=None):
    logits = np.broadcast_to(-np.arange(top_ids.shape[-1], dtype=float), top_ids.shape)
    return Problem("planted", [1], [1], [1], states, top_ids, logits, rounded, {})


def test_measures_of_a_problem_by_their_definitions():
    rng = np.random.default_rng(9)
    depths, positions, layers, size, top = 3, 5, 2, 8, 10
    states = rng.standard_normal((depths, positions, layers, size)).astype(np.float32)
    ids = np.stack([[rng.permutation(40)[:top] for _ in range(positions)] for _ in range(depths)])
    rounded = states[0] + rng.standard_normal(states[0].shape).astype(np.float32)
    found = basins.measure(problem(states, ids, rounded))
    for i in range(depths):
        for t in range(positions):
            assert found.replaced[i, t] == top - len(set(ids[i, t]) & set(ids[0, t]))
            where = np.flatnonzero(ids[0, t] == ids[i, t, 0])
            assert found.rank[i, t] == (where[0] + 1 if len(where) else top + 1)
            for layer in range(layers):
                a, b = states[0, t, layer].astype(float), states[i, t, layer].astype(float)
                cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                assert found.cosine_distance[i, t, layer] == pytest.approx(1 - cosine, abs=1e-12)
    expected = np.square(states[-1].astype(float) - states[0]).mean(0)
    np.testing.assert_allclose(found.depth_square, expected)
    np.testing.assert_allclose(found.rounding_square, np.square(rounded.astype(float) - states[0]).mean(0))


@pytest.mark.parametrize("ratio", [15.0, 1.0, 0.2])
def test_the_noise_floor_is_recovered(ratio):
    """Texts scaled alike on both sides, and layer 1 with twice the effect of layer 0."""
    rng = np.random.default_rng(10)
    each = []
    for _ in range(TEXTS):
        size = np.exp(rng.standard_normal())
        depth = size * np.square(ratio * np.array([[1.0], [2.0]]) * rng.normal(1, 0.05, (2, 30)))
        each.append(measured(np.zeros((2, 4)), depth=depth, rounding=size * np.square(rng.normal(1, 0.05, (2, 30)))))
    found = noise.noise_floor(each)
    for layer in (0, 1):
        interval = found["by_layer"][layer]["ratio"]
        assert interval["low"] <= ratio * (1 + layer) * 1.01
        assert interval["high"] >= ratio * (1 + layer) * 0.99
    record = found["by_layer"][0]
    assert found["everywhere"]["ratio"]["value"] == pytest.approx(ratio * np.sqrt(2.5), rel=0.03)
    if ratio == 1.0:
        assert record["p"] > 1e-3
        assert abs(record["rank_biserial"]) < 0.7
    else:
        assert record["p"] < 1e-6
        assert record["rank_biserial"] == pytest.approx(np.sign(ratio - 1))
    assert found["dimensions"]["above_rounding"] == pytest.approx({15.0: 1.0, 1.0: 0.75, 0.2: 0.0}[ratio], abs=0.15)


def test_without_any_rounding_there_is_no_floor():
    found = noise.noise_floor([measured(np.zeros((2, 4)), rounding=np.zeros((1, 3)))])
    assert "everywhere" not in found
