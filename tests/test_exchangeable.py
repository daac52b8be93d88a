"""XTrace, XDiag and Hutch++: their formulas, exactness, and the coverage of their intervals."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from sharpkit.errors import SettingsError, ShapeError
from sharpkit.estimators import (
    Diagonal,
    hutch_plus_plus,
    hutchinson_diagonal,
    hutchinson_trace,
    xdiag,
    xtrace,
)
from sharpkit.estimators.exchangeable import _Sketch
from sharpkit.operators import SymmetricOperator


def from_eigenvalues(eigenvalues, seed=0, dtype=torch.float64):
    values = torch.as_tensor(np.array(eigenvalues), dtype=torch.float64)
    Q = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=generator(seed), dtype=torch.float64)
    )[0]
    return ((Q * values) @ Q.T).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


rng = np.random.default_rng(0)
SPECTRA = {
    "decaying": [*np.geomspace(50, 3, 10), *np.geomspace(1, 1e-4, 110)],
    "flat": list(rng.uniform(0.2, 1.0, 120)),
    "indefinite": list(rng.normal(0, 1, 120)),
}
LOW_RANK = [*np.linspace(1, 10, 5), *np.linspace(-4, -1, 4), *[0.0] * 91]
METHODS = {
    "sphere": lambda A, m, g: xtrace(A, num_matvecs=m, generator=g),
    "signs": lambda A, m, g: xtrace(A, num_matvecs=m, vectors="signs", generator=g),
    "hutch++": lambda A, m, g: hutch_plus_plus(A, num_matvecs=m, generator=g),
    "xdiag": lambda A, m, g: xdiag(A, num_matvecs=m, generator=g).sum(torch.arange(A.dim)),
}


def naive(A, omega, i, others, weights, sphere):
    """The estimate from test vector i with a basis made anew from the others."""
    n = len(A)
    Q = torch.linalg.qr(A @ omega[:, others])[0]
    beyond = torch.eye(n, dtype=A.dtype) - Q @ Q.T
    rest = beyond @ A @ beyond
    form = (weights * omega[:, i]) @ rest @ omega[:, i]
    if sphere:
        form = form * (n - len(others)) / (beyond @ omega[:, i]).square().sum()
    return float((weights * (A - rest).diagonal()).sum() + form)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sphere", [False, True])
def test_leaving_out_one_or_two_is_a_basis_without_them(name, weighted, sphere):
    A, k = from_eigenvalues(SPECTRA[name]), 6
    omega = torch.randn(len(A), k, generator=generator(1), dtype=A.dtype)
    weights = torch.rand(len(A), generator=generator(2), dtype=A.dtype)
    weights = weights if weighted else torch.ones_like(weights)
    small = _Sketch.of(SymmetricOperator.wrap(A), omega).small(weights if weighted else None)
    values = small.estimates(sphere=sphere)
    steps = torch.zeros(k, k, dtype=A.dtype)
    for i in range(k):
        others = [j for j in range(k) if j != i]
        assert values[i].item() == pytest.approx(
            naive(A, omega, i, others, weights, sphere), rel=1e-10, abs=1e-10
        )
        for j in others:
            fewer = [q for q in others if q != j]
            steps[i, j] = values[i] - naive(A, omega, i, fewer, weights, sphere)
    covariance = float((steps * steps.T).sum()) / (k * (k - 1))
    assert small.covariance(values, sphere=sphere) == pytest.approx(covariance, rel=1e-8)


def test_entries_are_means_of_leave_one_out_values():
    A = from_eigenvalues(SPECTRA["indefinite"])
    d = xdiag(SymmetricOperator.wrap(A), num_matvecs=12, generator=generator())
    for p in (0, 17, 119):
        weights = torch.nn.functional.one_hot(torch.tensor(p), len(A)).to(A.dtype)
        values = [
            naive(A, d._sketch.omega, i, [j for j in range(6) if j != i], weights, False)
            for i in range(6)
        ]
        assert d.values[p].item() == pytest.approx(np.mean(values), abs=1e-10)
        assert d.sum(torch.tensor([p])).value == pytest.approx(np.mean(values), abs=1e-10)
        assert d.errors[p].item() >= np.std(values, ddof=1) / math.sqrt(6) * (1 - 1e-9)


def coverage(A, method, num_matvecs, seeds=300):
    truth = float(A.trace())
    hits, errors = 0, []
    for seed in range(seeds):
        e = METHODS[method](SymmetricOperator.wrap(A), num_matvecs, generator(seed))
        low, high = e.interval()
        hits += low <= truth <= high
        errors.append(e.value - truth)
    return hits / seeds, np.array(errors)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", ["sphere", "signs", "hutch++"])
@pytest.mark.parametrize("num_matvecs", [12, 30, 60])
def test_intervals_hold_the_trace_as_often_as_they_say(name, method, num_matvecs):
    covered, errors = coverage(from_eigenvalues(SPECTRA[name]), method, num_matvecs)
    assert 0.92 <= covered <= 0.99
    assert abs(errors.mean()) < 3.5 * errors.std() / math.sqrt(len(errors))  # unbiased


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("num_matvecs", [30, 60])
def test_intervals_hold_the_diagonal_and_its_sums(name, num_matvecs):
    A = from_eigenvalues(SPECTRA[name])
    half = torch.rand(len(A), generator=generator(5)) < 0.5
    truth = float(A.diagonal()[half].sum())
    hits, entries, seeds = 0, [], 60
    for seed in range(seeds):
        d = xdiag(SymmetricOperator.wrap(A), num_matvecs=num_matvecs, generator=generator(seed))
        t = scipy.stats.t.ppf(0.975, d.dof)
        entries.append(((d.values - A.diagonal()).abs() <= t * d.errors).double().mean().item())
        low, high = d.sum(half).interval()
        hits += low <= truth <= high
    assert 0.92 <= np.mean(entries) <= 0.98
    assert hits >= 0.88 * seeds  # the same formula as the trace's, tested there with 300


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_low_rank_leaves_rounding_only(method, dtype):
    A = from_eigenvalues(LOW_RANK, dtype=dtype)
    truth, eps = float(A.double().trace()), torch.finfo(dtype).eps
    for num_matvecs in (30, 60):
        for seed in range(30):
            operator = SymmetricOperator.wrap(A)
            e = METHODS[method](operator, num_matvecs, generator(seed))
            low, high = e.interval()
            assert low <= truth <= high
            assert 0 < e.probe_error < 1e4 * eps
            if method != "hutch++" and dtype == torch.float64:
                assert operator.num_matvecs == num_matvecs // 2 + 9  # none for what is not there


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [4, 5, 6])
def test_a_rank_about_the_number_of_vectors_is_no_trap(method, rank):
    A = from_eigenvalues([*np.linspace(1, 3, rank), *[0.0] * 50])
    hits = 0
    for seed in range(50):
        e = METHODS[method](SymmetricOperator.wrap(A), 10, generator(seed))
        low, high = e.interval()
        assert math.isfinite(e.value)
        hits += low <= float(A.trace()) <= high
        if rank == 4 and method != "hutch++":
            assert e.probe_error < 1e-12
    assert hits >= 44


@pytest.mark.parametrize("method", METHODS)
def test_zero_stays_zero(method):
    e = METHODS[method](SymmetricOperator.wrap(torch.zeros(30, 30)), 12, generator())
    assert (e.value, e.probe_error) == (0.0, 0.0)


@pytest.mark.parametrize("method", ["signs", "xdiag"])
def test_equal_signs_in_a_tiny_space_leave_it_unbiased(method):
    # Six numbers, three vectors: one run in ten draws a vector twice, up to its sign.
    A = from_eigenvalues([5.0, 3.0, 1.0, -1.0, -2.0, 0.5])
    errors = []
    for seed in range(300):
        e = METHODS[method](SymmetricOperator.wrap(A), 6, generator(seed))
        assert e.probe_error > 0
        errors.append(e.value - float(A.trace()))
    assert np.isfinite(errors).all()
    assert abs(np.mean(errors)) < 3.5 * np.std(errors) / math.sqrt(300)


@pytest.mark.parametrize("method", ["sphere", "signs", "hutch++"])
def test_products_in_single_precision_cost_little(method):
    A = from_eigenvalues(SPECTRA["decaying"])
    double = METHODS[method](SymmetricOperator.wrap(A), 60, generator())
    assert 0 < double.probe_error < 1e-2 * abs(double.value)
    covered, _ = coverage(A.float(), method, 60, seeds=100)
    assert covered >= 0.88


def test_decaying_spectra_are_far_cheaper_than_by_hutchinson():
    A = from_eigenvalues(SPECTRA["decaying"])
    plain = [
        hutchinson_trace(SymmetricOperator.wrap(A), num_probes=60, generator=generator(s)).value
        for s in range(30)
    ]
    for method, gain in [("sphere", 10), ("signs", 10), ("hutch++", 5)]:
        _, errors = coverage(A, method, 60, seeds=30)
        assert gain * math.sqrt(np.mean(errors**2)) < np.std(plain)
    truth = A.diagonal()
    operator = SymmetricOperator.wrap(A)
    ours = xdiag(operator, num_matvecs=60, generator=generator()).values - truth
    theirs = hutchinson_diagonal(operator, num_probes=60, generator=generator()).values - truth
    assert 10 * ours.norm() < theirs.norm()


@pytest.mark.parametrize("method", METHODS)
def test_draws_have_the_mean_and_the_error_of_the_estimate(method):
    A = from_eigenvalues(SPECTRA["indefinite"])
    e = METHODS[method](SymmetricOperator.wrap(A), 30, generator(3))
    assert np.mean(e.draws) == pytest.approx(e.value, rel=1e-9)
    scatter = np.std(e.draws, ddof=1) / math.sqrt(len(e.draws))
    assert scatter == pytest.approx(e.probe_error, rel=1e-9 if method != "hutch++" else 0.7)


def test_sums_agree_however_they_are_asked_for():
    A = from_eigenvalues(SPECTRA["flat"])
    d = xdiag(SymmetricOperator.wrap(A), num_matvecs=20, generator=generator())
    assert isinstance(d, Diagonal)
    assert not d.exact
    assert d.dof == 9
    mask = torch.zeros(len(A), dtype=torch.bool)
    mask[[3, 50]] = True
    by_mask, by_number = d.sum(mask), d.sum(torch.tensor([50, 3]))
    assert by_mask.value == pytest.approx(d.values[mask].sum().item())
    assert by_mask.interval() == by_number.interval()
    trace = xtrace(
        SymmetricOperator.wrap(A), num_matvecs=20, vectors="signs", generator=generator()
    )
    whole = d.sum(torch.ones(len(A), dtype=torch.bool))
    assert whole.value == pytest.approx(trace.value, rel=1e-12)
    assert whole.probe_error == pytest.approx(trace.probe_error, rel=1e-9)
    assert d.sum(torch.zeros(0, dtype=torch.long)).value == 0
    for wrong in (torch.ones(7, dtype=torch.bool), torch.tensor([120]), torch.tensor([0.5])):
        with pytest.raises(ShapeError, match="mask of 120 booleans"):
            d.sum(wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A: xtrace(A, num_matvecs=7, generator=generator()), "to be even.* Got 7"),
        (lambda A: xtrace(A, num_matvecs=2, generator=generator()), "at least 4.* Got 2"),
        (lambda A: xtrace(A, num_matvecs=12, generator=generator()), "parameters, 10. Got 12"),
        (lambda A: xtrace(A, num_matvecs=4, vectors="cube", generator=generator()), "Got 'cube'"),
        (lambda A: xdiag(A, num_matvecs=5, generator=generator()), "to be even.* Got 5"),
        (lambda A: xdiag(A, num_matvecs=12, generator=generator()), "exact_diagonal"),
        (lambda A: hutch_plus_plus(A, num_matvecs=5, generator=generator()), "between 6 and"),
        (lambda A: hutch_plus_plus(A, num_matvecs=11, generator=generator()), "Got 11"),
    ],
)
def test_settings_out_of_range(call, message):
    with pytest.raises(SettingsError, match=message):
        call(SymmetricOperator.wrap(torch.eye(10)))
