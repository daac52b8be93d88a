"""Each statistic against counting, scipy and closed cases."""

import importlib
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles_correlation import (
    holm,
    psi_of_axis,
    sign_errors,
    tau_b,
    tau_of_resample,
    weight,
)

from sharpkit.errors import SettingsError
from sharpkit.study.correlation import (
    adjust,
    granulated_tau,
    hoeffding_weights,
    kendall,
    partial_correlation,
    sign_error,
)
from sharpkit.study.correlation.granulated import _interval
from sharpkit.study.correlation.measurement import (
    ValueErrors,
    disattenuate,
    possible_taus,
    reliability,
)
from sharpkit.study.correlation.partial import conditional_p
from sharpkit.study.correlation.ranks import Sample, from_normal, texts, to_normal
from sharpkit.study.correlation.resampling import (
    arrangements,
    draw_counts,
    draw_orders,
    features,
    interval,
    permutation_p,
)

module = importlib.import_module("sharpkit.study.correlation.sign_error")  # not its function

SCIPY = {
    "kendall": lambda x, y: scipy.stats.kendalltau(x, y).statistic,
    "spearman": lambda x, y: scipy.stats.spearmanr(x, y).statistic,
    "pearson": lambda x, y: scipy.stats.pearsonr(x, y).statistic,
}


def sample_of(columns, statistic="kendall", groups=None, clusters=None, errors=None):
    n = len(columns)
    g = np.zeros(n, dtype=int) if groups is None else np.asarray(groups)
    c = np.arange(n) if clusters is None else np.asarray(clusters)
    return Sample(np.asarray(columns, dtype=float), g, c, statistic, errors)


def grid(levels, seeds=1):
    rows = list(itertools.product(*[range(k) for k in levels.values()], range(seeds)))
    return pd.DataFrame([r[:-1] for r in rows], columns=list(levels))


# -- correlations --------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", SCIPY)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_correlations_are_scipys(statistic, data):
    n = data.draw(st.integers(2, 25))
    value = st.integers(-4, 4)
    x, y, z = (np.array(data.draw(st.lists(value, min_size=n, max_size=n))) for _ in range(3))
    sample = sample_of(np.stack([x, y, z], axis=1), statistic)
    matrix = sample.matrix(sample.once)[0]
    assert np.array_equal(matrix, matrix.T, equal_nan=True)
    for (i, a), (j, b) in itertools.combinations(enumerate((x, y, z)), 2):
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            assert math.isnan(matrix[i, j])
        else:
            assert matrix[i, j] == pytest.approx(SCIPY[statistic](a, b), abs=1e-9)


@pytest.mark.parametrize("statistic", SCIPY)
def test_a_resample_is_the_models_written_out(statistic):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 12).astype(float), rng.normal(size=12)
    clusters = np.array([0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 5])
    sample = sample_of(np.stack([x, y], axis=1), statistic, clusters=clusters)
    counts = draw_counts(sample, 3, 30)
    got = sample.matrix(counts)[:, 0, 1]
    assert (counts.sum(axis=1) == 6).all()
    for value, row in zip(got, counts, strict=True):
        if statistic == "kendall":
            assert value == pytest.approx(tau_of_resample(x, y, clusters, row), nan_ok=True)
        else:
            index = np.repeat(np.arange(12), row[clusters].astype(int))
            assert value == pytest.approx(SCIPY[statistic](x[index], y[index]))


def test_without_ties_no_product_is_needed_and_nothing_changes():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 9))
    sample = sample_of(np.stack([x, y], axis=1))
    counts = draw_counts(sample, 0, 20)
    for value, row in zip(sample.matrix(counts)[:, 0, 1], counts, strict=True):
        assert value == pytest.approx(tau_of_resample(x, y, np.arange(9), row), nan_ok=True)


@pytest.mark.parametrize("statistic", SCIPY)
def test_groups_are_averaged_by_their_pairs(statistic):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 17))
    groups = np.repeat([0, 1, 2], [4, 6, 7])
    x[groups == 0] = 1.0  # a constant group has no say
    sample = sample_of(np.stack([x, y], axis=1), statistic, groups)
    parts = [SCIPY[statistic](x[groups == g], y[groups == g]) for g in (1, 2)]
    want = (15 * parts[0] + 21 * parts[1]) / 36
    assert sample.matrix(sample.once)[0, 0, 1] == pytest.approx(want)


def test_clusters_stay_in_their_group():
    columns = np.zeros((4, 2))
    with pytest.raises(SettingsError, match="within one group"):
        sample_of(columns, groups=[0, 0, 1, 1], clusters=[0, 1, 1, 2])
    sample = sample_of(np.arange(20.0).reshape(10, 2), groups=[0] * 4 + [1] * 6)
    counts = draw_counts(sample, 0, 50)
    assert (counts[:, :4].sum(axis=1) == 4).all()
    assert (counts[:, 4:].sum(axis=1) == 6).all()


# -- intervals -----------------------------------------------------------------------------


def test_perfect_order_is_no_certainty():
    c = kendall(range(10), range(10))
    assert (c.tau, c.high) == (1.0, 1.0)
    assert c.low == pytest.approx(0.8)
    down = kendall(range(10), range(0, -10, -1))
    assert (down.low, down.high) == (-1.0, pytest.approx(-0.8))
    rng = np.random.default_rng(0)  # normal variables with the stated end are rarely in order
    for n in (5, 10, 30):
        r = math.sin(math.pi / 2 * (1 - 20 / n**2))
        x = np.sort(rng.normal(size=(20000, n)), axis=1)
        y = r * x + math.sqrt(1 - r * r) * rng.normal(size=(20000, n))
        assert (np.diff(y, axis=1) > 0).all(axis=1).mean() < 0.03


def test_few_models_have_no_interval():
    for units in (4, 5):
        ends = interval(0.5, np.linspace(0, 1, 101), units=units)
        assert math.isnan(ends[0]) == (units < 5)
    assert all(math.isnan(e) for e in interval(0.5, np.full(10, np.nan), units=20))


def test_intervals_of_clusters_are_wider_by_students_t():
    draws = np.random.default_rng(0).normal(0, 0.1, 200000)
    plain = interval(0.0, draws, units=8)
    wide = interval(0.0, draws, units=8, clustered=True)
    assert wide[1] / plain[1] == pytest.approx(scipy.stats.t.ppf(0.975, 7) / 1.96, rel=0.02)
    r = interval(0.3, draws, units=8, groups=2, statistic="pearson")
    half = scipy.stats.t.ppf(0.975, 6) * np.std(np.arctanh(draws))
    assert np.arctanh(r) == pytest.approx([math.atanh(0.3) - half, math.atanh(0.3) + half], 1e-3)


# -- permutations --------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", SCIPY)
def test_p_is_the_share_of_all_orders(statistic):
    x = np.array([[1.0, 2], [2, 1], [4, 3], [3, 3], [5, 9]])
    y = np.array([1.0, 3, 2, 2, 5])
    every = np.array(list(itertools.permutations(range(5))))
    p = permutation_p(x, y, np.zeros(5, dtype=int), every, statistic)
    for k in range(2):
        at = abs(SCIPY[statistic](x[:, k], y))
        drawn = [abs(SCIPY[statistic](x[:, k], y[list(o)])) >= at - 1e-9 for o in every]
        assert p[k] == pytest.approx((1 + sum(drawn)) / 121)


@pytest.mark.parametrize("statistic", SCIPY)
def test_what_is_permuted_is_the_correlation_within_groups(statistic):
    rng = np.random.default_rng(3)
    columns = np.round(rng.normal(size=(15, 3)), 1)
    groups = np.repeat([0, 1, 2], [3, 5, 7])
    sample = sample_of(columns, statistic, groups)
    f = features(columns, groups, statistic)
    assert f.T @ f == pytest.approx(sample.matrix(sample.once)[0])


def test_orders_move_whole_clusters_of_one_size_within_groups():
    groups = np.array([0] * 6 + [1] * 4)
    clusters = np.array([0, 0, 1, 1, 2, 3, 4, 4, 5, 5])
    orders = draw_orders(clusters, groups, 0, 300)
    assert (np.sort(orders, axis=1) == np.arange(10)).all()
    assert (groups[orders] == groups).all()
    moved = clusters[orders]
    assert (moved[:, 0] == moved[:, 1]).all()
    assert (orders[:, 4:6] == [4, 5]).mean() < 1  # two clusters of one model change places
    assert len(np.unique(orders, axis=0)) == 8
    assert arrangements(clusters, groups) == pytest.approx(8)
    y = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    p = permutation_p(y[:, None], y, groups, orders)
    share = (orders == np.arange(10)).all(axis=1).sum()
    assert p[0] == pytest.approx((1 + share) / 301)
    assert math.isnan(permutation_p(np.ones((10, 1)), y, groups, orders)[0])


# -- partial -------------------------------------------------------------------------------


def test_one_covariate_is_kendalls_formula():
    a, b, c = 0.5, 0.6, -0.2
    t = np.array([[[1, a, b], [a, 1, c], [b, c, 1]]])
    want = (a - b * c) / math.sqrt((1 - b * b) * (1 - c * c))
    assert partial_correlation(t)[0] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("statistic", SCIPY)
def test_many_covariates_are_the_inverse_and_the_residuals(statistic):
    rng = np.random.default_rng(4)
    columns = rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5))
    sample = sample_of(columns, statistic)
    matrix = sample.matrix(sample.once)
    P = np.linalg.inv(matrix[0])
    got = partial_correlation(matrix)[0]
    assert got == pytest.approx(-P[0, 1] / math.sqrt(P[0, 0] * P[1, 1]))
    if statistic == "kendall":
        return
    data = scipy.stats.rankdata(columns, axis=0) if statistic == "spearman" else columns
    Z = np.hstack([np.ones((30, 1)), data[:, 2:]])
    left = data[:, :2] - Z @ np.linalg.lstsq(Z, data[:, :2], rcond=None)[0]
    assert got == pytest.approx(np.corrcoef(left.T)[0, 1])


def test_a_covariate_that_explains_all_leaves_nothing():
    x = np.arange(8.0)
    y = np.array([1.0, 0, 3, 2, 5, 4, 7, 6])
    for z in (x, -x, x**3):
        sample = sample_of(np.stack([x, y, z], axis=1))
        assert math.isnan(partial_correlation(sample.matrix(sample.once))[0])
    z = np.array([3.0, 1, 4, 1, 5, 9, 2, 6])
    twice = sample_of(np.stack([x, y, z, z], axis=1))
    once = sample_of(np.stack([x, y, z], axis=1))
    got = [partial_correlation(s.matrix(s.once))[0] for s in (twice, once)]
    assert math.isfinite(got[1])
    assert got[0] == pytest.approx(got[1])


def test_partial_tau_is_not_zero_under_conditional_independence():
    rng = np.random.default_rng(5)
    z = rng.normal(size=700)
    x, y = (0.8 * z + 0.6 * rng.normal(size=700) for _ in range(2))
    sample = sample_of(np.stack([x, y, z], axis=1))
    value = partial_correlation(sample.matrix(sample.once))[0]
    t, u = 2 / math.pi * math.asin(0.64), 2 / math.pi * math.asin(0.8)
    assert value == pytest.approx((t - u * u) / (1 - u * u), abs=0.05)
    assert value > 0.09


def test_conditional_p_values_are_those_of_the_formula():
    rng = np.random.default_rng(6)
    x, z = rng.normal(size=(12, 2)), rng.normal(size=(12, 1))
    y = x[:, 0] + z[:, 0]
    groups = np.zeros(12, dtype=int)
    orders = draw_orders(np.arange(12), groups, 1, 40)
    for statistic in SCIPY:
        got = conditional_p(x, y, z, groups, orders, statistic)
        score = lambda v: scipy.stats.norm.ppf(scipy.stats.rankdata(v) / 13)  # noqa: E731
        target, design = (y, z[:, 0]) if statistic == "pearson" else (score(y), score(z[:, 0]))
        fit = np.polynomial.Polynomial.fit(design, target, 1)(design)

        def partial(a, b, statistic=statistic):
            t = SCIPY[statistic]
            ab, az, bz = t(a, b), t(a, z[:, 0]), t(b, z[:, 0])
            return (ab - az * bz) / math.sqrt((1 - az * az) * (1 - bz * bz))

        for k in range(2):
            drawn = np.array([partial(x[:, k], fit + (target - fit)[o]) for o in orders])
            far = abs(partial(x[:, k], y) - np.median(drawn)) - 1e-9
            want = (1 + (abs(drawn - np.median(drawn)) >= far).sum()) / 41
            assert got[k] == pytest.approx(want)


# -- granulated ----------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 3])
def test_granulated_tau_is_counted(seeds):
    rng = np.random.default_rng(7)
    table = grid({"depth": 3, "width": 2, "lr": 4}, seeds)
    x, y = rng.normal(size=(2, len(table)))
    x = np.round(x, 1)
    g = granulated_tau(x, y, table)
    want = [psi_of_axis(x, y, table, axis) for axis in table.columns]
    assert [a.psi for a in g.axes] == pytest.approx(want)
    assert g.psi == pytest.approx(np.mean(want))
    assert [a.fixings for a in g.axes] == [8, 12, 6]
    assert [a.levels for a in g.axes] == [3, 2, 4]
    if seeds == 1:  # then it is the mean of tau-b over rows of the table
        rows = [tau_b(x[i : i + 4], y[i : i + 4]) for i in range(0, 24, 4)]
        assert g.axes[2].psi == pytest.approx(np.mean(rows))


def test_a_measure_of_depth_alone_orders_nothing_else():
    table = grid({"depth": 3, "width": 3}, 2)
    y = 10 * table["depth"] + table["width"]
    g = granulated_tau(table["depth"], y, table)
    depth, width = g.axes
    assert (depth.psi, depth.skipped) == (1.0, 0)
    assert math.isnan(width.psi)
    assert width.skipped == 3
    assert g.psi == 1.0
    one = granulated_tau([1, 2, 3], [1, 2, 3], pd.DataFrame({"a": [1, 1, 1]}))
    assert math.isnan(one.psi)
    assert one.axes[0].levels == 1
    with pytest.raises(SettingsError, match="axis"):
        granulated_tau([1], [1], pd.DataFrame(index=[0]))


def test_intervals_of_an_axis_are_agresti_and_coulls():
    taus = np.array([1.0] * 7 + [-1.0] * 3)
    low, high = _interval(taus, np.full(10, 2))
    p = 9 / 14
    half = 1.959964 * math.sqrt(p * (1 - p) / 14)
    assert (low, high) == (pytest.approx(2 * (p - half) - 1), pytest.approx(2 * (p + half) - 1))
    assert _interval(np.ones(6), np.full(6, 2))[0] < 0.3
    assert all(math.isnan(e) for e in _interval(np.ones(4), np.full(4, 2)))


def test_models_that_lack_a_hyperparameter_are_alike_in_it():
    table = grid({"depth": 2, "lr": 3})
    x = y = np.arange(6.0)
    lost = table.assign(lr=[0.5, 1.0, None, 0.5, 1.0, None])
    named = table.assign(lr=["a", "b", "c"] * 2)
    got, want = granulated_tau(x, y, lost), granulated_tau(x, y, named)
    assert got.axes[0] == want.axes[0]  # three fixings, one of them of those without
    assert got.axes[1].levels == 3
    got, want = sign_error(x, y, lost), sign_error(x, y, named)
    assert (got.pairs, got.mean) == (want.pairs, want.mean) == (9, 0.0)
    assert texts([None, math.nan, pd.NA, 1, "a"]) == ["missing"] * 3 + ["1", "a"]
    text = table.assign(lr=pd.Series(["a", "b", None] * 2, dtype="string"))
    assert sign_error(x, y, text).pairs == 9


# -- sign-error ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_test", [None, 200])
@pytest.mark.parametrize("kind", ["axis", "step", "settings"])
def test_sign_errors_are_counted(kind, num_test):
    rng = np.random.default_rng(8)
    table = grid({"depth": 3, "lr": 3}, 2)
    x, y = np.round(rng.normal(size=18), 1), rng.uniform(0, 0.6, size=18)

    def name_of(axis, i, j):
        if kind == "axis":
            return axis
        rows = table.astype(str)
        if kind == "step":
            parts = rows[axis].iloc[i], rows[axis].iloc[j]
        else:
            parts = "; ".join(rows.iloc[i]), "; ".join(rows.iloc[j])
        return f"{axis}: " + " | ".join(sorted(parts))

    want = sign_errors(x, y, table, name_of, num_test)
    s = sign_error(x, y, table, num_test=num_test, environments=kind)
    got = {e.name: e.error for e in s.environments}
    assert got == pytest.approx(want)
    assert s.robust == pytest.approx(max(want.values()))
    assert s.mean == pytest.approx(np.mean(list(want.values())))
    assert s.pairs == 2 * 3 * 3 * 4
    if num_test:
        assert 0 < s.zero_weight < s.pairs
    if kind == "axis":
        assert all(e.low <= e.error <= e.high for e in s.environments)
        assert s.low <= s.robust <= s.high
    else:  # of two levels and three fixings, with seeds
        assert math.isnan(s.low)


def test_weights_are_hoeffdings():
    gaps = [0.0, 0.01, 0.02, 0.0231, 0.03, 0.3]
    assert hoeffding_weights(np.array(gaps), 10000) == pytest.approx(
        [weight(g, 10000) for g in gaps]
    )
    assert (hoeffding_weights(np.array(gaps), None) == 1).all()
    with pytest.raises(SettingsError, match="num_test"):
        hoeffding_weights(np.array(gaps), 0)


def test_environments_of_little_weight_are_dropped_and_counted():
    table = grid({"depth": 2, "lr": 2}, 3)
    x = np.arange(12.0)
    y = 0.5 * table["depth"] + 1e-4 * x  # nothing but depth changes the gap for certain
    s = sign_error(x, y, table, num_test=1000)
    assert [e.name for e in s.environments] == ["depth"]
    assert (s.dropped, s.zero_weight) == (1, 18)
    assert s.robust == 0.0
    assert s.environments[0].effective == pytest.approx(18, rel=1e-3)
    none = sign_error(x, y, table, num_test=1000, environments="settings", min_effective=12)
    assert none.environments == ()
    assert math.isnan(none.robust)
    assert none.dropped == 4
    with pytest.raises(SettingsError, match="environments"):
        sign_error(x, y, table, environments="depth")


def test_a_measure_that_is_right_but_for_one_axis_fails_the_robust_test():
    table = grid({"depth": 4, "lr": 4}, 2)
    x = 10.0 * table["depth"] - table["lr"]
    y = 10.0 * table["depth"] + table["lr"]
    s = sign_error(x, y, table)
    assert s.mean == 0.5
    assert (s.robust, s.worst) == (1.0, "lr")
    assert 0.3 < s.low < 1
    assert s.high == 1.0
    assert sign_error(y, y, table).robust == 0.0


def test_the_end_of_the_largest_of_many_errors_allows_for_their_number():
    # Each environment's end at 0.05 / E: the largest of six noisy errors is too large.
    rng = np.random.default_rng(12)
    table = grid({"a": 2, "b": 2, "c": 2, "d": 2, "e": 2, "f": 2})
    x, y = rng.normal(size=(2, 64))
    s = sign_error(x, y, table)
    lows, highs = [e.low for e in s.environments], [e.high for e in s.environments]
    assert len(lows) == 6
    assert s.low < max(lows) - 0.01
    assert s.high > max(highs) + 0.01


def test_few_settings_of_several_seeds_widen_the_interval_by_students_t(monkeypatch):
    rng = np.random.default_rng(13)
    table = grid({"a": 4, "b": 5}, 3)
    x, y = rng.normal(size=(2, len(table)))
    t = scipy.stats.norm.cdf(scipy.stats.t.ppf(0.025, 19))
    assert module._wider(0.025, 19) == pytest.approx(t)
    wide = sign_error(x, y, table)
    once = sign_error(x[::3], y[::3], table[::3])
    monkeypatch.setattr(module, "_wider", lambda tail, _: tail)
    plain = sign_error(x, y, table)
    for a, b in zip(wide.environments, plain.environments, strict=True):
        assert a.low < b.low <= b.error <= b.high < a.high
    assert sign_error(x[::3], y[::3], table[::3]) == once  # one seed: as it was


# -- multiple ------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_corrections(p):
    assert adjust(p, "holm") == pytest.approx(holm(p))
    ordered = sorted(p)
    m = len(p)
    want = [min(min(1.0, m * ordered[j] / (j + 1)) for j in range(i, m)) for i in range(m)]
    assert sorted(adjust(p, "bh")) == pytest.approx(want)
    assert adjust(p, "none") == pytest.approx(p)
    assert (adjust(p, "holm") >= adjust(p, "bh") - 1e-12).all()


def test_corrections_leave_out_what_is_missing():
    assert np.array_equal(adjust([0.01, math.nan, 0.5]), [0.02, math.nan, 0.5], equal_nan=True)
    for p, kind in (([0.1], "bonferroni"), ([1.1], "holm")):
        with pytest.raises(SettingsError):
            adjust(p, kind)


# -- measurement ---------------------------------------------------------------------------


def test_the_echo_is_the_mean_over_fresh_noise():
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(2, 20))
    e = rng.uniform(0.1, 0.8, 20)
    sample = sample_of(np.stack([x, y], axis=1), errors=e)
    drawn = [SCIPY["kendall"](x, x + e * rng.normal(size=20)) for _ in range(500)]
    assert sample.echo(sample.once)[0] == pytest.approx(np.mean(drawn), abs=0.014)


@pytest.mark.parametrize("statistic", SCIPY)
def test_noise_is_taken_out_of_normal_variables(statistic):
    rng = np.random.default_rng(10)
    n, r, rel = 700, 0.6, 0.7
    z = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], n)
    s = np.full(n, math.sqrt(1 / rel - 1))
    noisy = np.stack([z[:, 0] + s * rng.normal(size=n), z[:, 1]], axis=1)
    sample = sample_of(noisy, statistic, errors=s)
    got = reliability(sample, sample.once)
    assert got[0] == pytest.approx(rel, abs=0.03)
    matrix = sample.matrix(sample.once)
    truth = float(from_normal(np.array(r), statistic))
    assert matrix[0, 0, 1] < truth - 0.05
    assert disattenuate(matrix, got, statistic)[0, 0, 1] == pytest.approx(truth, abs=0.04)


@pytest.mark.parametrize("statistic", SCIPY)
def test_translation_to_normal_and_back(statistic):
    r = np.linspace(-1, 1, 21)
    assert to_normal(from_normal(r, statistic), statistic) == pytest.approx(r)
    assert disattenuate(np.array([[[1, 0.3], [0.3, 1]]]), np.ones(1), statistic)[0, 0, 1] == 0.3


def test_bounds_enclose_every_order_that_is_possible():
    rng = np.random.default_rng(11)
    groups = np.zeros(7, dtype=int)
    for _ in range(8):
        x, y = rng.integers(0, 12, 7).astype(float), rng.integers(0, 6, 7).astype(float)
        below, above = rng.uniform(0, 2, size=(2, 7))
        low, high = possible_taus(x, y, groups, below, above)
        at = SCIPY["kendall"](x, y)
        assert low - 1e-9 <= at <= high + 1e-9
        for _ in range(40):
            tau = SCIPY["kendall"](x + rng.uniform(-below, above), y)
            assert low - 1e-9 <= tau <= high + 1e-9
        still = possible_taus(x, y, groups, np.zeros(7), np.zeros(7))
        assert still == (pytest.approx(at), pytest.approx(at))


def test_errors_are_sorted_by_kind():
    e = ValueErrors.of(
        np.array([1.0, 2, 3, 4, np.nan]), ["stderr", "bound", "rounding", "lower_bound", "stderr"]
    )
    assert e.noise.tolist() == [1, 0, 0, 0, 0]
    assert e.below.tolist() == [0, 2, 3, 0, 0]
    assert e.above.tolist() == [0, 2, 3, 4, 0]
    assert (e.unknown, e.lower_bounds) == (1, 1)
