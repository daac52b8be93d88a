"""Intervals cover what they say, and p-values are uniform where there is nothing."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from sharpkit.study.correlation import granulated_tau, sign_error
from sharpkit.study.correlation.carried import carried_interval
from sharpkit.study.correlation.partial import conditional_p
from sharpkit.study.correlation.ranks import Sample, from_normal
from sharpkit.study.correlation.resampling import draw_counts, draw_orders, permutation_p


def study(rng, n, r, *, size=1, groups=1, ties=False, rel=1.0, dof=0):
    """Models of a normal copula: seeds of a setting share 70% of the variance."""
    S = np.array([[1, r], [r, 1]])
    z = rng.multivariate_normal([0, 0], S, n // size).repeat(size, axis=0)
    if size > 1:
        z = math.sqrt(0.7) * z + math.sqrt(0.3) * rng.multivariate_normal([0, 0], S, len(z))
    cluster = np.arange(n // size).repeat(size)
    group = cluster % groups
    x, y = z[:, 0] + 3 * group, z[:, 1] + 3 * group
    x = np.round(1.5 * x) if ties else x
    # The exact reliability rel: noise of each model's own size, and a measured standard error.
    noise = np.exp(0.4 * rng.normal(size=n))
    noise *= math.sqrt((1 / rel - 1) / np.mean(noise**2))
    error = noise * (np.sqrt(rng.chisquare(dof, n) / dof) if dof else 1.0)
    return x + noise * rng.normal(size=n), y, error, cluster, group


def coverage(trials, n, r, statistic="kendall", truth=None, **kind):
    rng = np.random.default_rng(11)
    truth = float(from_normal(np.array(r), statistic)) if truth is None else truth
    covered = 0
    for i in range(trials):
        x, y, e, cluster, group = study(rng, n, r, **kind)
        c = carried_interval(
            x, y, e, ["stderr"] * n, statistic=statistic, seed=i,
            clusters=cluster if kind.get("size", 1) > 1 else None,
            groups=group if kind.get("groups", 1) > 1 else None,
        )  # fmt: skip
        covered += c.low <= truth <= c.high
    return covered


def tie_truth(r):
    """tau-b of a rounded normal variable, by its cells."""
    cuts = np.r_[-np.inf, np.arange(-8.5, 9) / 1.5, np.inf]
    p = np.diff(scipy.stats.norm.cdf(cuts))
    rng = np.random.default_rng(0)
    z = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], 400000)
    x = np.round(1.5 * z[:, 0])
    shared = np.mean(np.sign(x[::2] - x[1::2]) * np.sign(z[::2, 1] - z[1::2, 1]))
    return shared / math.sqrt(1 - (p**2).sum())


CASES = [
    ("ten", {"n": 10, "r": 0.5}),
    ("thirty", {"n": 30, "r": 0.5}),
    ("a hundred", {"n": 100, "r": 0.5}),
    ("strong", {"n": 30, "r": 0.9}),
    ("none", {"n": 30, "r": 0.0}),
    ("ties", {"n": 30, "r": 0.5, "ties": True}),
    ("seeds", {"n": 36, "r": 0.5, "size": 3}),
    ("groups", {"n": 32, "r": 0.5, "groups": 4}),
    ("noise", {"n": 30, "r": 0.5, "rel": 0.8, "dof": 5}),
    ("noise and seeds", {"n": 60, "r": 0.5, "rel": 0.8, "dof": 5, "size": 3}),
    ("much noise", {"n": 100, "r": 0.5, "rel": 0.6, "dof": 10}),
    ("spearman", {"n": 30, "r": 0.5, "statistic": "spearman"}),
    ("pearson", {"n": 30, "r": 0.5, "statistic": "pearson"}),
    ("pearson and noise", {"n": 100, "r": 0.9, "rel": 0.8, "dof": 10, "statistic": "pearson"}),
]
SHORT = {"thirty", "seeds", "noise"}


def bands(trials, low=0.92, high=0.98):
    """Counts that a coverage within the limits gives in 999 of 1000 runs."""
    return (
        scipy.stats.binom.ppf(0.0005, trials, low),
        scipy.stats.binom.ppf(0.9995, trials, high),
    )


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES if n in SHORT])
def test_intervals_cover_in_short(case):
    low, high = bands(120)
    assert low <= coverage(120, **case) <= high


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES])
def test_intervals_cover(case):
    truth = tie_truth(case["r"]) if case.get("ties") else None
    covered = coverage(500, truth=truth, **case)
    print(f"{case}: {covered / 5:.1f}%")
    assert 0.92 * 500 <= covered <= 0.985 * 500


def test_without_the_correction_noise_hides_the_truth():
    rng = np.random.default_rng(12)
    truth, covered = 2 / math.pi * math.asin(0.7), [0, 0]
    for i in range(60):
        x, y, e, _, _ = study(rng, 100, 0.7, rel=0.6)
        for k, errors in enumerate((e, 0 * e)):
            c = carried_interval(x, y, errors, ["stderr"] * 100, seed=i)
            covered[k] += c.low <= truth <= c.high
    assert covered[0] >= 53
    assert covered[1] < 45


@pytest.mark.parametrize(("n", "rel"), [(30, 0.6), (100, 0.8)])
def test_a_strong_correlation_that_noise_hides_is_covered_by_pearsons_interval(n, rel):
    # Corrected draws beyond 1: an interval that cuts them there leaves the truth below it.
    covered = coverage(100, n, 0.9, "pearson", rel=rel, dof=10)
    assert covered >= bands(100)[0]


@pytest.mark.parametrize("rel", [1.0, 0.75])
def test_pearsons_partial_interval_carries_the_noise(rel):
    # x and y share z and have the correlation 0.9 given z; rel is that of x given z.
    rng, covered, widths = np.random.default_rng(16), 0, []
    for i in range(60):
        x, y, e, _, _ = study(rng, 100, 0.9, rel=rel, dof=10)
        z = rng.normal(size=(100, 1))
        both = x + z[:, 0], y + z[:, 0]
        c = carried_interval(*both, e, ["stderr"] * 100, covariates=z, statistic="pearson", seed=i)
        covered += c.low <= 0.9 <= c.high
        widths.append(c.high - c.low)
    assert covered >= bands(60)[0]
    assert np.median(widths) < 0.4


def test_pearsons_interval_carries_that_the_reliability_is_estimated():
    # r* / sqrt(R*) of resamples written out; with one R for all they would spread by 4% more.
    n = 120
    x, y, e, _, _ = study(np.random.default_rng(18), n, 0.6, rel=0.7, dof=10)
    c = carried_interval(x, y, e, ["stderr"] * n, statistic="pearson")
    sample = Sample(np.stack([x, y], axis=1), np.zeros(n, int), np.arange(n), "pearson", e)
    found = []
    for row in draw_counts(sample, 0):
        i = np.repeat(np.arange(n), row.astype(int))
        share = 1 - np.mean(e[i] ** 2) / np.var(x[i], ddof=1)  # of the variance: no noise
        found.append(np.corrcoef(x[i], y[i])[0, 1] / math.sqrt(share))
    assert c.high - c.low == pytest.approx(3.96 * np.std(found), rel=0.02)


def p_values(kind, trials, statistic="kendall", n=24):
    rng = np.random.default_rng(13)
    found = []
    for _ in range(trials):
        size = 3 if "clusters" in kind else 1
        x, y, _, cluster, group = study(rng, n, 0.0, size=size, groups=2 if "groups" in kind else 1)
        if kind == "partial":  # x and y have nothing in common but z
            z = rng.normal(size=(n, 1))
            x, y = x + 1.3 * z[:, 0], np.exp(y + 1.3 * z[:, 0])
        orders = draw_orders(cluster, group, rng, 199)
        if kind == "partial":
            found.append(conditional_p(x[:, None], y, z, group, orders, statistic)[0])
        else:
            found.append(permutation_p(x[:, None], y, group, orders, statistic)[0])
    return np.array(found)


def assert_uniform(p):
    # p is one of 1/200, ..., 1: spread within its step it is uniform if the orders are fair.
    spread = p - np.random.default_rng(0).uniform(0, 1 / 200, len(p))
    assert scipy.stats.kstest(spread, "uniform").pvalue > 0.005


@pytest.mark.parametrize("kind", ["plain", "groups", "clusters", "groups, clusters", "partial"])
def test_p_values_are_uniform_under_the_null(kind):
    assert_uniform(p_values(kind, 300))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "statistic"),
    [
        (kind, statistic)
        for kind in ("plain", "groups", "clusters", "groups, clusters", "partial")
        for statistic in ("kendall", "spearman", "pearson")
        if (kind, statistic) != ("partial", "pearson")  # this study's null is not linear
    ],
)
def test_p_values_are_uniform_under_the_null_at_length(kind, statistic):
    # Tau of few models takes few values, and its ties make p larger: 2% at most with 60.
    assert_uniform(p_values(kind, 2000, statistic, n=60))


def test_p_values_that_forget_groups_or_clusters_are_not_uniform():
    rng = np.random.default_rng(14)
    for kind in ({"size": 3}, {"groups": 2}):
        found = []
        for _ in range(150):
            x, y, *_ = study(rng, 24, 0.0, **kind)
            none = np.zeros(24, dtype=int)
            orders = draw_orders(np.arange(24), none, rng, 199)
            found.append(permutation_p(x[:, None], y, none, orders)[0])
        with pytest.raises(AssertionError):
            assert_uniform(np.array(found))


@pytest.mark.parametrize("r", [0.0, 0.6])
def test_intervals_of_granulated_tau_cover(r):
    rng = np.random.default_rng(15)
    levels = np.stack(np.meshgrid(range(2), range(3), range(4)), axis=-1).reshape(-1, 3)
    table = pd.DataFrame(levels, columns=["a", "b", "c"])
    covered, trials = np.zeros(4), 120
    truth = 2 / math.pi * math.asin(r)
    for _ in range(trials):
        x, y, *_ = study(rng, 24, r)
        g = granulated_tau(x, y, table)
        for k, part in enumerate((g, *g.axes)):
            covered[k] += part.low <= truth <= part.high
    assert (covered >= bands(trials)[0]).all()


def sign_coverage(levels, seeds, r, trials):
    """Which share of environments' intervals, and of those of the largest, hold the truth."""
    rng = np.random.default_rng(17)
    rows = np.stack(np.meshgrid(*map(range, levels), indexing="ij"), axis=-1)
    table = pd.DataFrame(rows.reshape(-1, len(levels)).repeat(seeds, axis=0))
    truth = (1 - 2 / math.pi * math.asin(r)) / 2
    covered, given = np.zeros(1 + len(levels)), np.zeros(1 + len(levels))
    for i in range(trials):
        x, y, *_ = study(rng, len(table), r, size=seeds)
        s = sign_error(x, y, table, seed=i)
        ends = [(s.low, s.high), *((e.low, e.high) for e in s.environments)]
        covered += [low <= truth <= high for low, high in ends]
        given += [not math.isnan(low) for low, _ in ends]
    return covered, given


@pytest.mark.parametrize("r", [0.0, 0.9])
@pytest.mark.parametrize(("levels", "seeds"), [((2, 3, 4), 1), ((2, 8), 3), ((3, 2, 2), 3)])
def test_intervals_of_sign_errors_cover(levels, seeds, r):
    covered, given = sign_coverage(levels, seeds, r, 100)
    assert (given == 100).all()
    assert (covered >= bands(100)[0]).all()


@pytest.mark.parametrize("levels", [(2, 2, 2), (2, 4), (3, 2)])
def test_few_settings_of_several_seeds_give_no_interval_of_a_sign_error(levels):
    # Four pairs of settings, resampled, do not reach as far as the truth may lie (82% to 90%).
    _, given = sign_coverage(levels, 3, 0.9, 3)
    assert given[0] == 0
    assert given[-1] == (3 if levels == (2, 4) else 0)
