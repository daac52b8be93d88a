"""Entropies, ranks, masses, determinants and densities; the jackknife; intervals."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from test_estimators import from_eigenvalues, generator

from sharpkit.errors import MeasureError, SettingsError
from sharpkit.estimators import (
    Locked,
    Probing,
    deflated_quadrature,
    density_of,
    effective_rank,
    lock,
    log_det,
    negative_mass,
    renyi_entropy,
    renyi_entropy_of_probes,
    spectral_density,
)
from sharpkit.estimators.jackknife import jackknife
from sharpkit.estimators.krylov import Krylov
from sharpkit.operators import SymmetricOperator
from sharpkit.results import Estimate, Spectrum

ALPHAS = [0.5, 1.0, 1.5, 2.0, 3.0, math.inf]
INDEFINITE = [9.0, -6.0, 5.0, *np.random.default_rng(3).normal(0, 1, 27)]
POSITIVE = list(np.geomspace(20, 0.01, 30))


def wrap(A):
    return SymmetricOperator.wrap(A)


def nothing(A):
    eps = torch.finfo(A.dtype).eps
    return Locked(A[:, :0], np.zeros(0), np.zeros(0), 10 * eps * float(A.norm()), 0)


def locked_by(operator, steps, seed=1000):
    krylov = Krylov(operator, generator(seed))
    while len(krylov.steps) < steps and not krylov.exhausted:
        krylov.step()
    return lock(krylov, len(krylov.steps))


def exact_quadrature(values, locked=0, probes=4, dtype=torch.float64, seed=0):
    """Of a diagonal matrix: z_i^2 = 1, so each probe's sum is exact with as many steps as P."""
    A = torch.diag(torch.tensor(np.array(values), dtype=dtype))
    eye = torch.eye(len(values), dtype=dtype)
    held = nothing(A)
    if locked:
        held = Locked(eye[:, :locked], np.array(values[:locked]), np.zeros(locked), held.floor, 0)
    return deflated_quadrature(
        wrap(A), held, num_probes=probes, num_steps=len(values), generator=generator(seed)
    )


def quadrature_of(A, locked=0, probes=4, steps=12, seed=0):
    operator = wrap(A)
    held = locked_by(operator, locked) if locked else nothing(A)
    return deflated_quadrature(
        operator, held, num_probes=probes, num_steps=steps, generator=generator(seed)
    )


def entropy(values, alpha, spectrum="abs"):
    values = np.array(values)
    sizes = np.abs(values) if spectrum == "abs" else np.maximum(values, 0)
    p = sizes[sizes > 0] / sizes.sum()
    if alpha == 1:
        return float(-(p * np.log(p)).sum())
    if math.isinf(alpha):
        return float(-np.log(p.max()))
    return float(np.log((p**alpha).sum()) / (1 - alpha))


# -- Renyi entropies ------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("spectrum", ["abs", "clipped"])
@pytest.mark.parametrize("locked", [0, 3])
def test_entropies_are_exact_where_the_quadrature_is(alpha, spectrum, locked):
    for values in (INDEFINITE, POSITIVE, [-x for x in POSITIVE[:3]] + POSITIVE[3:]):
        quadrature = exact_quadrature(values, locked)
        e = renyi_entropy(quadrature, alpha=alpha, spectrum=spectrum)
        assert e.value == pytest.approx(entropy(values, alpha, spectrum), abs=1e-8)
        assert e.details["unresolved"] < 1e-8
        assert e.details["sampling"] < 1e-8  # of a diagonal matrix the probes agree
        assert e.converged
        assert e.dof >= 3
        assert np.mean(e.draws) == pytest.approx(e.value)
        low, high = e.interval()
        assert low <= entropy(values, alpha, spectrum) <= high
        assert e.details["num_locked"] == locked
        assert ("floor_shift" in e.details) == (alpha < 1)
        assert e.notes == ()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("spectrum", ["abs", "clipped"])
@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e30])
def test_entropies_have_no_scale(alpha, spectrum, factor):
    A = from_eigenvalues(INDEFINITE)
    e = renyi_entropy(quadrature_of(A, locked=12), alpha=alpha, spectrum=spectrum)
    s = renyi_entropy(quadrature_of(A * factor, locked=12), alpha=alpha, spectrum=spectrum)
    assert s.value == pytest.approx(e.value, rel=1e-7)
    assert s.probe_error == pytest.approx(e.probe_error, rel=1e-5)


@pytest.mark.parametrize("spectrum", ["abs", "clipped"])
def test_entropies_fall_with_their_order(spectrum):
    for seed in range(5):
        quadrature = exact_quadrature(INDEFINITE, 1, seed=seed)
        found = [
            renyi_entropy(quadrature, alpha=a, spectrum=spectrum) for a in [0.2, 0.8, *ALPHAS[1:]]
        ]
        values = [e.value for e in found]
        assert values == sorted(values, reverse=True)
        assert values[0] <= math.log(len(INDEFINITE))
        assert values[-1] >= 0


@pytest.mark.parametrize("alpha", [*ALPHAS, 0.999, 1.001, 20.0])
@pytest.mark.parametrize(("value", "count"), [(1.0, 50), (-3.0, 17), (1e-8, 5), (2.0, 1)])
def test_equal_eigenvalues_give_the_logarithm_of_their_number(alpha, value, count):
    quadrature = quadrature_of(from_eigenvalues([value] * count))
    assert renyi_entropy(quadrature, alpha=alpha).value == pytest.approx(math.log(count), abs=1e-9)
    if value < 0:
        with pytest.raises(MeasureError, match="zero has no entropy"):
            renyi_entropy(quadrature, alpha=alpha, spectrum="clipped")


def test_entropies_near_order_one_are_near_shannons():
    quadrature = exact_quadrature(POSITIVE)
    at = renyi_entropy(quadrature, alpha=1.0).value
    for alpha in (1 - 1e-5, 1 + 1e-5):
        assert renyi_entropy(quadrature, alpha=alpha).value == pytest.approx(at, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, math.inf])
def test_intervals_of_entropies_hold_the_truth_where_eigenvalues_crowd_at_zero(alpha):
    values = [*np.geomspace(50, 3, 6), *np.geomspace(1, 1e-5, 144)]
    A, hits = from_eigenvalues(values), 0
    locked = locked_by(wrap(A), 20)
    for seed in range(60):
        e = renyi_entropy(
            deflated_quadrature(
                wrap(A), locked, num_probes=4, num_steps=12, generator=generator(seed)
            ),
            alpha=alpha,
        )
        low, high = e.interval()
        hits += low <= entropy(values, alpha) <= high
    assert hits >= 54


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_what_rounding_hides_is_said(alpha):
    values = [*np.linspace(1, 10, 8), *[0.0] * 150]
    found = {}
    for dtype in (torch.float32, torch.float64):
        A = from_eigenvalues(values, dtype=dtype)
        operator = wrap(A)
        locked = locked_by(operator, 20)
        quadrature = deflated_quadrature(
            operator, locked, num_probes=4, num_steps=8, generator=generator()
        )
        e = found[dtype] = renyi_entropy(quadrature, alpha=alpha)
        assert e.value == pytest.approx(entropy(values, alpha), abs=1e-4)
        # By the formula: 150 eigenvalues at the floor, beside eight known ones.
        assert e.details["floor"] == locked.floor
        powers = (np.array(values) ** alpha).sum()
        shift = math.log1p(150 * locked.floor**alpha / powers) / (1 - alpha)
        assert e.details["floor_shift"] == pytest.approx(shift, rel=0.2)
        hidden = [*values[:8], *[locked.floor] * 150]  # indeed no more than this
        assert entropy(hidden, alpha) - entropy(values, alpha) <= e.details["floor_shift"] * 1.2
    if alpha == 0.5:
        assert found[torch.float32].details["floor_shift"] > 0.01
        assert "count as zero" in found[torch.float32].notes[0]
        assert "float64" in found[torch.float32].notes[0]
    assert found[torch.float64].notes == ()


def test_the_entropy_of_probes_is_that_of_order_two():
    A = from_eigenvalues(POSITIVE)
    operator, truth = wrap(A), entropy(POSITIVE, 2)
    locked = locked_by(operator, 14)
    assert 0 < locked.size < 14
    deviations = []
    for seed in range(200):
        e = renyi_entropy_of_probes(Probing(operator, locked, generator(seed)).until(8))
        assert e.dof == 7
        assert np.mean(e.draws) == pytest.approx(e.value)
        deviations.append(e.value - truth)
    assert abs(np.mean(deviations)) < 3.5 * np.std(deviations) / math.sqrt(200) + 1e-6
    # With a signed trace: below zero there is none.
    for values in ([-1.0] * 20, [1.0, -1.0] * 10):
        B = from_eigenvalues(values)
        with pytest.raises(MeasureError, match=r"positive trace.*spectrum='abs'"):
            renyi_entropy_of_probes(Probing(wrap(B), nothing(B), generator()).until(8))
    scaled = Probing(wrap(1e6 * A), locked_by(wrap(1e6 * A), 14), generator(3)).until(8)
    plain = Probing(operator, locked, generator(3)).until(8)
    assert renyi_entropy_of_probes(scaled).value == pytest.approx(
        renyi_entropy_of_probes(plain).value, rel=1e-9
    )


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_orders_that_are_not_positive_are_refused(alpha):
    with pytest.raises(SettingsError, match="`alpha` greater than 0"):
        renyi_entropy(exact_quadrature([1.0, 2.0]), alpha=alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_has_no_entropy_rank_or_mass(dtype):
    zero = torch.zeros(12, 12, dtype=dtype)
    operator = wrap(zero)
    for locked in (nothing(zero), locked_by(operator, 12)):
        quadrature = deflated_quadrature(
            operator, locked, num_probes=2, num_steps=4, generator=generator()
        )
        for function in (
            effective_rank,
            negative_mass,
            *(lambda q, a=a: renyi_entropy(q, alpha=a) for a in ALPHAS),
        ):
            with pytest.raises(MeasureError, match=r"zero"):
                function(quadrature)
        assert log_det(quadrature, tau=2.0).value == pytest.approx(12 * math.log(2))
    with pytest.raises(SettingsError, match=r"'abs' or 'clipped'\. Got 'signed'"):
        renyi_entropy(exact_quadrature([1.0, 2.0]), alpha=1, spectrum="signed")


# -- rank, mass, determinant ----------------------------------------------------------------


def test_effective_rank():
    for values in (INDEFINITE, POSITIVE):
        quadrature = exact_quadrature(values, 2)
        e, h = effective_rank(quadrature), renyi_entropy(quadrature, alpha=1)
        assert e.value == pytest.approx(math.exp(h.value))
        assert e.probe_error == pytest.approx(e.value * math.expm1(h.probe_error))
        assert e.dof == h.dof
        assert e.value == pytest.approx(math.exp(entropy(values, 1)), rel=1e-8)
        assert np.mean(e.draws) == pytest.approx(e.value)
        low, high = e.interval()
        assert low <= math.exp(entropy(values, 1)) <= high
    assert effective_rank(exact_quadrature([3.0] * 7)).value == pytest.approx(7)


@pytest.mark.parametrize("locked", [0, 2])
def test_negative_mass(locked):
    values = np.array(INDEFINITE)
    truth = -values[values < 0].sum() / abs(values).sum()
    e = negative_mass(exact_quadrature(INDEFINITE, locked))
    assert e.value == pytest.approx(truth, abs=1e-9)
    assert e.interval()[0] <= truth <= e.interval()[1]
    assert negative_mass(exact_quadrature(POSITIVE, locked)).value == 0.0
    assert negative_mass(exact_quadrature([-x for x in POSITIVE], locked)).value == pytest.approx(1)
    A = from_eigenvalues(INDEFINITE)
    big, plain = negative_mass(quadrature_of(1e9 * A, 12)), negative_mass(quadrature_of(A, 12))
    assert big.value == pytest.approx(plain.value, rel=1e-7)
    hits = 0
    for seed in range(60):
        low, high = negative_mass(quadrature_of(A, steps=10, seed=seed)).interval()
        hits += low <= truth <= high
    assert hits >= 54


@pytest.mark.parametrize("locked", [0, 2])
@pytest.mark.parametrize("tau", [1e-3, 7.0, 100.0])
@pytest.mark.parametrize("spectrum", ["abs", "signed"])
def test_log_det(locked, tau, spectrum):
    for values in (INDEFINITE, POSITIVE):
        shifted = (np.abs(values) if spectrum == "abs" else np.array(values)) + tau
        quadrature = exact_quadrature(values, locked)
        if shifted.min() <= 0:
            with pytest.raises(MeasureError, match=r"There is one of -6, so .* spectrum='abs'"):
                log_det(quadrature, tau=tau, spectrum=spectrum)
            continue
        e = log_det(quadrature, tau=tau, spectrum=spectrum)
        truth = np.log(shifted).sum()
        assert e.value == pytest.approx(truth, abs=1e-8)
        assert e.interval()[0] - 1e-12 <= truth <= e.interval()[1] + 1e-12
        assert np.mean(e.draws) == pytest.approx(e.value)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
def test_shifts_that_are_not_positive_are_refused(tau):
    with pytest.raises(SettingsError, match="`tau`"):
        log_det(exact_quadrature([1.0, 2.0]), tau=tau)


@pytest.mark.parametrize("spectrum", ["abs", "signed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_det_scales_with_its_shift(spectrum, dtype):
    # log det(sA + s tau) = log det(A + tau) + P log s, and errors of logarithms have no unit.
    A = from_eigenvalues(np.linspace(0.5, 1.5, 50), dtype=dtype)
    plain = log_det(quadrature_of(A, 10), tau=0.1, spectrum=spectrum)
    large = log_det(quadrature_of(2**20 * A, 10), tau=0.1 * 2**20, spectrum=spectrum)
    assert large.value - 50 * math.log(2**20) == pytest.approx(plain.value, abs=1e-2)
    assert large.probe_error == pytest.approx(plain.probe_error, rel=1e-2)


def test_intervals_of_log_det_hold_the_truth():
    values = np.array([*np.geomspace(50, 3, 6), *np.geomspace(1, 1e-4, 94)])
    A = from_eigenvalues(values)
    locked = locked_by(wrap(A), 16)
    for tau, spectrum in [(0.1, "signed"), (0.01, "abs")]:
        hits, truth = 0, np.log(values + tau).sum()
        for seed in range(100):
            quadrature = deflated_quadrature(
                wrap(A), locked, num_probes=5, num_steps=10, generator=generator(seed)
            )
            low, high = log_det(quadrature, tau=tau, spectrum=spectrum).interval()
            hits += low <= truth <= high
        assert hits >= 90


# -- density --------------------------------------------------------------------------------


@pytest.mark.parametrize("locked", [0, 12, 40])
def test_the_density_has_the_known_values_in_every_probe(locked):
    A = from_eigenvalues(INDEFINITE)
    quadrature = quadrature_of(A, locked, steps=6)
    s = density_of(quadrature)
    assert s.dim == 30
    assert s.known == tuple(sorted(quadrature.locked.values))
    assert len(s.known) == (30 if locked == 40 else pytest.approx(6, abs=5) if locked else 0)
    for nodes, weights in zip(s.nodes, s.weights, strict=True):
        assert sum(weights) == pytest.approx(1, abs=1e-12)
        assert list(nodes) == sorted(nodes)
        assert min(weights) >= 0
        for value in s.known:
            assert weights[nodes.index(value)] == 1 / 30
    if locked == 40:
        share, low, high = s.cumulative([-7.0, 0.0, 10.0])
        assert share == pytest.approx([0.0, np.mean(np.array(INDEFINITE) < 0), 1.0])
        assert low == pytest.approx(share)
        assert high == pytest.approx(share)


@pytest.mark.parametrize("kind", ["indefinite", "decaying", "clustered", "mostly zero"])
@pytest.mark.parametrize("locked", [0, 16])
def test_the_band_holds_the_cumulative_density(kind, locked):
    random = np.random.default_rng(5)
    values = np.sort(
        {
            "indefinite": [12.0, -9.0, 8.0, *random.normal(0, 1, 117)],
            "decaying": [*np.geomspace(50, 3, 6), *np.geomspace(1, 1e-4, 114)],
            "clustered": [
                *(1 + 0.01 * random.normal(size=60)),
                *(4 + 0.01 * random.normal(size=60)),
            ],
            "mostly zero": [*np.linspace(1, 10, 10), *[0.0] * 110],
        }[kind]
    )
    A = from_eigenvalues(values)
    grid = np.linspace(values[0] - 0.5, values[-1] + 0.5, 61) + 1e-3
    truth = np.searchsorted(values, grid, side="right") / len(values)
    held = []
    for seed in range(40):
        s = density_of(quadrature_of(A, locked, probes=5, steps=10, seed=seed))
        share, low, high = (np.array(x) for x in s.cumulative(grid))
        assert (np.diff(share) >= -1e-12).all()
        assert (share >= 0).all()
        assert (share <= 1).all()
        assert (low >= 0).all()
        assert (high <= 1).all()
        assert (low <= share).all()
        assert (share <= high).all()
        assert share[0] == 0
        assert share[-1] == pytest.approx(1, abs=1e-12)
        held.append((low <= truth + 1e-12) & (truth <= high + 1e-12))
    held = np.stack(held)
    assert held.mean() >= 0.95
    assert held.mean(axis=0).min() >= 0.85  # point by point
    assert (held.mean(axis=1) >= 0.9).mean() >= 0.85  # and run by run
    if locked and kind != "mostly zero":  # and it is no empty claim
        assert np.mean(high - low) < 0.45


def test_the_band_of_one_probe_is_the_theorem_s():
    # Chebyshev, Markov and Stieltjes: certain for the measure of the start vector.
    eigenvalues = np.linspace(-1, 2, 60)
    A = torch.diag(torch.tensor(eigenvalues))
    for seed in range(10):
        v = torch.randn(60, generator=generator(seed), dtype=torch.float64)
        shares = np.cumsum((v / v.norm()).square().numpy())
        s = spectral_density(wrap(A), num_probes=1, num_steps=8, generator=generator(seed))
        grid = np.linspace(-1.2, 2.2, 300)
        at = np.searchsorted(eigenvalues, grid, side="right")
        truth = np.r_[0.0, shares][at]
        share, low, high = (np.array(x) for x in s.cumulative(grid.tolist()))
        assert (low <= truth + 1e-12).all()
        assert (truth <= high + 1e-12).all()
        inner = (grid > s.nodes[0][0]) & (grid < s.nodes[0][-1])
        # No wider than the weights of the two nodes around a point.
        w, x = np.array(s.weights[0]), np.array(s.nodes[0])
        i = np.searchsorted(x, grid[inner], side="right")
        assert (high - low)[inner] == pytest.approx(w[i - 1] + w[i])
        assert (share - low)[inner] == pytest.approx(w[i - 1])


def test_cumulative_shares_by_hand():
    s = Spectrum(
        ((0.0, 1.0, 4.0), (0.0, 2.0, 4.0)), ((0.5, 0.25, 0.25), (0.5, 0.25, 0.25)), 4, known=(4.0,)
    )
    share, low, high = s.cumulative([-1.0, 0.0, 1.5, 3.0, 4.0], level=0.5)
    t = scipy.stats.t.ppf(0.75, 1)
    assert share == pytest.approx([0, 0.5, 0.625, 0.75, 1.0])
    spread = t * np.std([0.75, 0.5], ddof=1) / math.sqrt(2)
    assert low == pytest.approx([0, 0, max(0.25 - spread, 0), 0.5, 0.75])
    assert high == pytest.approx([0.5, 0.75, min(0.75 + spread, 1), 0.75, 1.0])
    twice = Spectrum(((4.0, 4.0),), ((0.5, 0.5),), 2, known=(4.0,))  # one known, one found
    assert twice.cumulative([5.0])[0] == [1.0]
    assert twice.cumulative([5.0])[1] == [0.5]
    wide, narrow = (s.cumulative([1.5], level)[2][0] for level in (0.6, 0.2))
    assert narrow < wide


# -- the jackknife --------------------------------------------------------------------------


def test_the_jackknife_by_its_definition():
    x = np.random.default_rng(0).normal(3, 1, (7, 2))
    function = lambda m: float(m[0] ** 2 / m[1])  # noqa: E731
    result = jackknife(x, function)
    draws = [
        7 * function(x.mean(axis=0)) - 6 * function(np.delete(x, i, axis=0).mean(axis=0))
        for i in range(7)
    ]
    assert result.draws == pytest.approx(draws)
    assert result.value == pytest.approx(np.mean(draws))
    assert result.error == pytest.approx(np.std(draws, ddof=1) / math.sqrt(7))
    mean = jackknife(x, lambda m: float(m[0]))  # of a mean: the mean and its standard error
    assert mean.value == pytest.approx(x[:, 0].mean())
    assert mean.draws == pytest.approx(x[:, 0])
    assert mean.error == pytest.approx(x[:, 0].std(ddof=1) / math.sqrt(7))
    alone = jackknife(x[:1], function)
    assert (alone.value, alone.error) == (function(x[0]), math.inf)


@pytest.mark.parametrize("count", [4, 8, 16])
def test_the_jackknife_takes_out_the_bias(count):
    random = np.random.default_rng(1)
    function, truth = lambda m: math.log(m[0]), 0.0
    x = random.gamma(4, 0.25, (6000, count, 1))  # mean 1, variance 1/4
    plain = np.mean([function(s.mean(axis=0)) for s in x]) - truth
    corrected = [jackknife(s, function) for s in x]
    bias = np.mean([r.value for r in corrected]) - truth
    noise = 3 * 0.5 / math.sqrt(6000 * count)
    assert plain == pytest.approx(-1 / 8 / count, abs=noise)  # -variance / 2 of the mean
    assert bias == pytest.approx(0, abs=noise)
    removed = bias - plain  # the same samples: their noise is gone
    assert removed == pytest.approx(1 / 8 / count, rel=0.2)
    t = scipy.stats.t.ppf(0.975, count - 1)
    assert 0.92 <= np.mean([abs(r.value) <= t * r.error for r in corrected]) <= 0.97
    # One that is a square loses its bias wholly: its second-order term is all there is.
    square = jackknife(x[0], lambda m: float(m[0] ** 2)).value
    assert square == pytest.approx(x[0].mean() ** 2 - x[0].var(ddof=1) / count)


# -- intervals ------------------------------------------------------------------------------


def test_intervals_of_each_kind():
    normal, t7 = scipy.stats.norm.ppf(0.975), scipy.stats.t.ppf(0.975, 7)
    assert Estimate(2.0, 0.1, "stderr").interval() == pytest.approx(
        (2 - 0.1 * normal, 2 + 0.1 * normal)
    )
    assert Estimate(2.0, 0.1, "stderr", dof=7).interval() == pytest.approx(
        (2 - 0.1 * t7, 2 + 0.1 * t7)
    )
    half = scipy.stats.t.ppf(0.75, 7) * 0.1
    assert Estimate(2.0, 0.1, "stderr", dof=7).interval(0.5) == pytest.approx((2 - half, 2 + half))
    for kind in ("bound", "rounding"):
        for level in (0.5, 0.95):
            assert Estimate(2.0, 0.1, kind, dof=7).interval(level) == pytest.approx((1.9, 2.1))
    assert Estimate(2.0, 0.1, "lower_bound").interval() == (2.0, math.inf)
    assert Estimate(2.0, None, "stderr").interval() == (-math.inf, math.inf)
    for level in (0.0, 1.0, -0.1, 95, math.nan):
        with pytest.raises(SettingsError, match="`level` between 0 and 1"):
            Estimate(2.0, 0.1, "stderr").interval(level)


def test_intervals_of_the_population():
    normal, t3 = scipy.stats.norm.ppf(0.975), scipy.stats.t.ppf(0.975, 3)
    with pytest.raises(MeasureError, match="Use data=False"):
        Estimate(2.0, 0.1, "stderr").interval(data=True)
    e = Estimate(2.0, 0.1, "stderr", data_error=0.2)
    half = math.hypot(0.1, 0.2) * normal
    assert e.interval(data=True) == pytest.approx((2 - half, 2 + half))
    assert e.interval() == pytest.approx((2 - 0.1 * normal, 2 + 0.1 * normal))
    groups = Estimate(2.0, 0.1, "stderr", data_error=0.2, data_draws=(1.0, 2.0, 2.0, 3.0))
    half = math.hypot(0.1 * normal, 0.2 * t3)
    assert groups.interval(data=True) == pytest.approx((2 - half, 2 + half))
    bound = Estimate(2.0, 0.1, "bound", data_error=0.2)
    half = math.hypot(0.1, 0.2 * normal)
    assert bound.interval(data=True) == pytest.approx((2 - half, 2 + half))
    low, high = Estimate(2.0, 0.1, "lower_bound", data_error=0.2).interval(data=True)
    assert high == math.inf
    assert low <= 2 - 0.2 * normal
