"""Paired statistics against scipy and statsmodels on random tables, and against published counts."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sst_jax.lab import statistics as ours

counts = st.integers(0, 60)
pvalues = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12)


@settings(deadline=None)  # the first example imports statsmodels
@given(counts, counts)
def test_mcnemar_equals_statsmodels(broken, mended):
    reference = pytest.importorskip("statsmodels.stats.contingency_tables")
    if broken + mended:
        expected = reference.mcnemar([[7, broken], [mended, 11]], exact=True).pvalue
        assert ours.mcnemar(broken, mended) == pytest.approx(min(expected, 1.0), abs=1e-12)
    else:
        assert ours.mcnemar(0, 0) == 1.0


@given(counts, counts)
def test_mcnemar_is_twice_the_binomial_tail(broken, mended):
    tail = 2 * stats.binom.cdf(min(broken, mended), broken + mended, 0.5)
    assert ours.mcnemar(broken, mended) == pytest.approx(min(1.0, tail), abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_wilson_equals_statsmodels(count, share, confidence):
    reference = pytest.importorskip("statsmodels.stats.proportion")
    successes = round(share * count)
    low, high = reference.proportion_confint(successes, count, 1 - confidence, method="wilson")
    value, *ends = ours.wilson(successes, count, confidence)
    assert value == successes / count
    assert ends == pytest.approx([low, high], abs=1e-9)


@pytest.mark.slow  # to import it takes a quarter of a minute; the definition below is as good a reference
@settings(deadline=None)
@given(pvalues)
def test_holm_equals_statsmodels(values):
    reference = pytest.importorskip("statsmodels.stats.multitest")
    assert ours.holm(values) == pytest.approx(list(reference.multipletests(values, method="holm")[1]), abs=1e-12)


@given(pvalues)
def test_holm_by_its_definition(values):
    """Adjusted p of i: the largest over p_j <= p_i of p_j times the number of p-values that are not smaller."""
    ordered = sorted(values)
    for value, adjusted in zip(values, ours.holm(values), strict=True):
        steps = [min(1.0, (len(values) - rank) * p) for rank, p in enumerate(ordered) if p <= value]
        # Equal p-values stand at several ranks; they share the adjustment of the first.
        assert adjusted == pytest.approx(max(steps), abs=1e-12)


def test_holm_keeps_the_order_it_was_given():
    assert ours.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert ours.holm([]) == []


@pytest.mark.parametrize(("broken", "mended"), [(0, 30), (10, 40), (30, 60), (77, 107)])
def test_published_counts(broken, mended):
    """121 against 91 of 198 right: whatever the discordant pairs, 30 more mended than broken."""
    assert ours.mcnemar(broken, mended) == pytest.approx(
        sum(math.comb(broken + mended, k) for k in range(broken + 1)) * 2 / 2 ** (broken + mended), rel=1e-9
    )
    difference = np.repeat([-1.0, 1.0, 0.0], [broken, mended, 198 - broken - mended])
    value, low, high = ours.bootstrap_mean(difference)
    assert value == pytest.approx(30 / 198)
    error = math.sqrt((broken + mended) / 198 - (30 / 198) ** 2) / math.sqrt(198)
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.01)


def test_published_scores():
    """Wilson's interval, written out, of 121 and 91 of 198."""
    z = stats.norm.ppf(0.975)
    for successes in (121, 91):
        share, squared = successes / 198, z * z / 198
        centre = (share + squared / 2) / (1 + squared)
        half = z / (1 + squared) * math.sqrt(share * (1 - share) / 198 + squared / (4 * 198))
        assert ours.wilson(successes, 198)[1:] == pytest.approx((centre - half, centre + half))
    assert ours.wilson(121, 198)[1:] == pytest.approx((0.5416, 0.6764), abs=1e-3)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 12))
def test_discordant_range_is_every_table_with_these_margins(first, second, count):
    first, second = min(first, count), min(second, count)
    tables = {
        (first - both, second - both)
        for both in range(count + 1)
        if both <= min(first, second) and first + second - both <= count
    }
    assert set(ours.discordant_range(first, second, count)) == tables


def test_the_published_counts_allow_every_discordance_from_30_to_184():
    tables = ours.discordant_range(91, 121, 198)
    assert tables[0] == (0, 30)
    assert tables[-1] == (77, 107)
    p = [ours.mcnemar(*table) for table in tables]
    assert p == sorted(p)
    assert p[0] == pytest.approx(2**-29)
    assert 0.02 < p[-1] < 0.05


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=8, max_size=60), st.integers(0, 5))
def test_bootstrap_follows_the_normal_interval(values, seed):
    values = np.asarray(values) + np.linspace(-2, 2, len(values))
    value, low, high = ours.bootstrap_mean(values, seed=seed, resamples=4000)
    error = values.std() / math.sqrt(len(values))
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.35 * error)
    assert ours.bootstrap_mean(values, seed=seed, resamples=4000) == (value, low, high)


def test_one_value_gives_no_interval():
    assert ours.bootstrap_mean([0.5]) == (0.5, -math.inf, math.inf)
    assert ours.t_mean([0.5]) == (0.5, -math.inf, math.inf)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_t_interval_equals_scipy(values):
    if np.ptp(values) > 1e-3:  # scipy warns where they are nearly equal
        value, low, high = ours.t_mean(values)
        expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert (value, low, high) == pytest.approx((np.mean(values), expected.low, expected.high), abs=1e-7)


def enumerated_union(right, changed, chance):
    """The expected union by listing every subset that could have been drawn anew and every outcome."""
    count = len(right)
    total = 0.0
    for item in range(count):
        missed = 1.0
        for share in changed:
            subsets = list(itertools.combinations(range(count), share))
            missed *= np.mean([1.0 - chance[item] * (item in subset) for subset in subsets])
        total += 1.0 if right[item] else 1.0 - missed
    return total / count


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=6), st.data())
def test_redraw_union_is_the_average_over_all_redraws(right, data):
    count = len(right)
    changed = data.draw(st.lists(st.integers(0, count), max_size=3))
    chance = data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    value, low, high = ours.redraw_union(right, changed, chance, draws=200)
    assert value == pytest.approx(enumerated_union(right, changed, chance))
    assert np.mean(right) <= low <= high <= 1.0


def test_redraw_union_simulates_what_it_expects():
    rng = np.random.default_rng(1)
    right, chance = rng.random(198) < 0.5, np.full(198, 0.25)
    value, low, high = ours.redraw_union(right, [60, 70, 80], chance)
    assert low < value < high
    assert high - low < 0.1
    assert (low + high) / 2 == pytest.approx(value, abs=0.01)


def test_without_changes_the_union_is_the_score():
    assert ours.redraw_union([True, False], [0, 0], [1.0, 1.0])[0] == 0.5
    assert ours.redraw_union([True, False], [], [1.0, 1.0])[0] == 0.5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.integers(0, 9))
def test_clustered_mean_is_the_mean_and_counts_clusters(sizes, seed):
    rng = np.random.default_rng(seed)
    groups = [rng.random(size) for size in sizes]
    value, low, high = ours.clustered_mean(groups, resamples=500)
    assert value == pytest.approx(np.concatenate(groups).mean())
    means = [group.mean() for group in groups]
    assert min(means) - 1e-12 <= low <= high <= max(means) + 1e-12


def test_copies_of_a_cluster_do_not_narrow_its_interval():
    rng = np.random.default_rng(0)
    groups = [rng.normal(each, 0.1, 5) for each in rng.standard_normal(12)]
    once = ours.clustered_mean(groups)
    often = ours.clustered_mean([np.tile(group, 50) for group in groups])
    assert often == pytest.approx(once)
    assert ours.clustered_mean(groups[:1]).low == -math.inf
    assert np.isnan(ours.clustered_mean([np.empty(0)]).value)


def test_json_knows_no_infinity():
    assert ours.finite(ours.Interval(0.5, -math.inf, math.inf)) == {"value": 0.5, "low": None, "high": None}
    assert ours.finite(ours.clustered_mean([np.empty(0)]))["value"] is None
