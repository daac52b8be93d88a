"""Estimators on matrices made from chosen eigenvalues."""

import math

import numpy as np
import pytest
import torch

from sharpkit.errors import MeasureError, OperatorError, SettingsError, ShapeError
from sharpkit.estimators import (
    average_rise,
    exact_diagonal,
    hutchinson_diagonal,
    hutchinson_trace,
    lanczos,
    maximize_in_ball,
    spectral_density,
)
from sharpkit.estimators.eigenpairs import distinct_errors
from sharpkit.estimators.krylov import Krylov
from sharpkit.geometry import ElementwiseMetric, EuclideanMetric, MongeMetric
from sharpkit.operators import SymmetricOperator
from sharpkit.testing import check_operator


def from_eigenvalues(eigenvalues, seed=0, dtype=torch.float64):
    values = torch.as_tensor(np.array(eigenvalues), dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64))[0]
    return ((Q * values) @ Q.T).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


rng = np.random.default_rng(0)
SPECTRA = {
    "outliers and bulk": [*np.geomspace(50, 3, 10), *np.geomspace(1, 1e-4, 190)],
    "indefinite, near ties": [10, -9.9, 9.8, 9.75, 9.7, *rng.uniform(-1, 1, 150)],
    "clustered": [*(5 + 1e-3 * np.arange(6)), *rng.uniform(-1, 1, 100)],
    "duplicates": [5.0] * 3 + [4.0] * 2 + [-1.0] * 2 + [0.0] * 80,
    "low rank": [*np.linspace(1, 10, 8), *[0.0] * 150],
    "zero": [0.0] * 30,
    "identity": [1.0] * 40,
    "semicircle": list(rng.normal(0, 1, 150)),
    "one": [-3.0],
    "five": [1.0, 2.0, 3.0, 4.0, -5.0],
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("tol", [1e-3, 1e-8])
def test_converged_eigenpairs_are_within_their_errors(name, tol):
    values = np.sort(SPECTRA[name])
    k = min(4, len(values))
    converged = 0
    for seed in range(10):
        A = from_eigenvalues(values, seed)
        pairs = lanczos(SymmetricOperator.wrap(A), k=k, tol=tol, generator=generator(seed))
        found = [*pairs.largest, *pairs.smallest]
        truth = [*values[::-1][:k], *values[:k]]
        errors = [*pairs.largest_residuals, *pairs.smallest_residuals]
        assert pairs.upper_bound >= values[-1] - 1e-9
        assert pairs.lower_bound <= values[0] + 1e-9
        vectors = torch.cat([pairs.largest_vectors, pairs.smallest_vectors], dim=1)
        residuals = (A @ vectors - vectors * torch.tensor(found, dtype=A.dtype)).norm(dim=0)
        assert (residuals <= torch.tensor(errors, dtype=A.dtype) * (1 + 1e-6) + 1e-12).all()
        assert torch.allclose(vectors.norm(dim=0), torch.ones(2 * k).double(), atol=1e-6)
        if pairs.converged:
            converged += 1
            scale = max(abs(values))
            gaps = np.abs(np.array(found) - np.array(truth))
            assert (gaps <= np.array(errors) + 1e-12 * scale).all(), (seed, gaps, errors)
            if tol == 1e-8:
                assert gaps.max() <= 1e-6 * max(scale, 1e-30)
    assert converged == 10


def test_a_repeated_eigenvalue_is_found_by_the_second_start():
    A = from_eigenvalues([9.0, 9.0, *np.linspace(-4, 4, 300)])
    outcomes = set()
    for seed in range(10):
        pairs = lanczos(
            SymmetricOperator.wrap(A), k=2, which="largest", tol=1e-2, generator=generator(seed)
        )
        assert pairs.largest == pytest.approx((9.0, 9.0), abs=1e-3)
        assert pairs.converged
        outcomes.add(pairs.second_start)
    assert "found more" in outcomes


def test_eigenvalues_in_single_precision_state_their_rounding():
    values = SPECTRA["outliers and bulk"]
    for seed in range(10):
        A = from_eigenvalues(values, seed, torch.float32)
        pairs = lanczos(SymmetricOperator.wrap(A), k=3, tol=1e-9, generator=generator(seed))
        gaps = np.abs(np.array(pairs.largest) - np.array(values[:3]))
        assert (gaps <= np.array(pairs.largest_residuals)).all()
        assert min(pairs.largest_residuals) >= 1e-6 * 50 / 10


def test_a_small_budget_is_not_convergence():
    A = SymmetricOperator.wrap(from_eigenvalues(rng.normal(0, 1, 300)))
    pairs = lanczos(A, k=5, max_matvecs=8, generator=generator())
    assert not pairs.converged
    assert pairs.num_matvecs <= 8
    assert A.num_matvecs == pairs.num_matvecs
    assert pairs.second_start == "not run"
    assert len(pairs.largest) >= 1


def test_top_end_alone_is_cheaper():
    A = from_eigenvalues(SPECTRA["outliers and bulk"])
    both = lanczos(SymmetricOperator.wrap(A), k=2, generator=generator())
    top = lanczos(SymmetricOperator.wrap(A), k=2, which="largest", generator=generator())
    assert top.num_matvecs < both.num_matvecs
    assert top.smallest == ()
    assert top.largest == pytest.approx(both.largest, rel=1e-5)


@pytest.mark.parametrize("steps", [3, 6])
def test_the_probabilistic_bound_fails_no_more_often_than_it_says(steps):
    values = np.sort(rng.normal(0, 1, 200))
    A = SymmetricOperator.wrap(from_eigenvalues(values))
    beyond = 0
    for seed in range(200):
        pairs = lanczos(
            A, k=1, max_matvecs=steps, failure_probability=0.2, generator=generator(seed)
        )
        beyond += pairs.upper_bound < values[-1] or pairs.lower_bound > values[0]
    assert beyond <= 200 * 0.2


@pytest.mark.parametrize("spectrum", ["outliers and bulk", "semicircle"])
def test_trace_is_calibrated(spectrum):
    A = from_eigenvalues(SPECTRA[spectrum])
    z = []
    for seed in range(300):
        e = hutchinson_trace(SymmetricOperator.wrap(A), num_probes=32, generator=generator(seed))
        z.append((e.value - A.trace().item()) / e.probe_error)
    z = torch.tensor(z)
    assert abs(z.mean()) < 0.15
    assert 0.85 < z.std() < 1.2


def test_trace_with_a_target_stops_and_stays_honest():
    A = from_eigenvalues(SPECTRA["outliers and bulk"])
    z, spent = [], []
    for seed in range(200):
        e = hutchinson_trace(
            SymmetricOperator.wrap(A), num_probes=2048, target_error=0.05, generator=generator(seed)
        )
        assert e.converged
        assert e.probe_error <= 0.05 * e.value
        z.append((e.value - A.trace().item()) / e.probe_error)
        spent.append(e.cost.hvps)
    z = torch.tensor(z)
    assert max(spent) < 2048
    assert min(spent) >= 16
    assert abs(z.mean()) < 0.5
    assert z.std() < 1.35
    short = hutchinson_trace(
        SymmetricOperator.wrap(A), num_probes=8, target_error=1e-6, generator=generator()
    )
    assert not short.converged
    assert "Give a larger `num_probes`" in short.notes[0]


def test_trace_of_a_longer_run_continues_the_shorter_one():
    A = from_eigenvalues(SPECTRA["semicircle"])
    seen = []
    operator = SymmetricOperator(lambda V: seen.append(V) or A @ V, len(A), dtype=A.dtype)
    hutchinson_trace(operator, num_probes=5, generator=generator(1))
    short = torch.cat(seen, dim=1)
    seen.clear()
    hutchinson_trace(operator, num_probes=20, generator=generator(1))
    assert torch.equal(torch.cat(seen, dim=1)[:, :5], short)


def test_diagonal():
    A = from_eigenvalues(SPECTRA["outliers and bulk"])
    operator = SymmetricOperator.wrap(A)
    exact = exact_diagonal(operator)
    assert torch.allclose(exact.values, A.diagonal(), atol=1e-12)
    assert exact.exact
    z = []
    for seed in range(20):
        d = hutchinson_diagonal(operator, num_probes=50, generator=generator(seed))
        z.append((d.values - A.diagonal()) / d.errors)
    z = torch.stack(z)
    assert abs(z.mean()) < 0.05
    assert 0.9 < z.std() < 1.15


@pytest.mark.parametrize("num_steps", [5, 30])
def test_density_has_the_moments_of_the_start_vectors(num_steps):
    values = np.array(SPECTRA["semicircle"])
    A = from_eigenvalues(values)
    s = spectral_density(
        SymmetricOperator.wrap(A), num_probes=3, num_steps=num_steps, generator=generator()
    )
    for nodes, weights in zip(s.nodes, s.weights, strict=True):
        assert len(nodes) == num_steps
        assert sum(weights) == pytest.approx(1)
    many = spectral_density(
        SymmetricOperator.wrap(A), num_probes=300, num_steps=num_steps, generator=generator()
    )
    for power in (1, 2, 3):
        moments = [
            np.dot(np.array(n) ** power, w) for n, w in zip(many.nodes, many.weights, strict=True)
        ]
        error = np.std(moments) / math.sqrt(len(moments))
        assert abs(np.mean(moments) - np.mean(values**power)) < 4 * error


def test_operator_battery_and_wrapping():
    A = from_eigenvalues(SPECTRA["semicircle"])
    check_operator(SymmetricOperator.wrap(A), A)
    check_operator(SymmetricOperator.from_matvec(lambda v: A @ v, len(A), dtype=A.dtype), A)
    assert torch.allclose(SymmetricOperator.wrap(A).to_dense(), A)

    class Foreign:
        size, dtype = len(A), A.dtype

        def matvec(self, v):
            return A @ v

    check_operator(SymmetricOperator.wrap(Foreign()), A)
    with pytest.raises(AssertionError, match=r"another matrix|not those of the dense"):
        check_operator(SymmetricOperator.wrap(A), A + 1e-3 * torch.eye(len(A)))


def test_what_is_no_symmetric_operator_is_refused():
    A = from_eigenvalues(SPECTRA["semicircle"])
    skewed = A.clone()
    skewed[0] += 1
    with pytest.raises(OperatorError, match=r"u\.Av and v\.Au differ"):
        SymmetricOperator.wrap(skewed).check_symmetric(generator())
    assert SymmetricOperator.wrap(A).check_symmetric(generator()) < 1e-12
    nan = SymmetricOperator(lambda V: V * float("nan"), 5)
    with pytest.raises(OperatorError, match="Expected finite"):
        nan @ torch.ones(5)
    with pytest.raises(ShapeError, match=r"Expected vectors of shape \(5,\)"):
        nan @ torch.ones(4)
    with pytest.raises(ShapeError, match="The operator returned"):
        SymmetricOperator(lambda V: V[:-1], 5) @ torch.ones(5)
    with pytest.raises(OperatorError, match="square"):
        SymmetricOperator.wrap(torch.ones(2, 3))
    with pytest.raises(OperatorError, match="Got str"):
        SymmetricOperator.wrap("matrix")


@pytest.mark.parametrize(
    "metric",
    [
        EuclideanMetric(),
        ElementwiseMetric(torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)),
        MongeMetric(torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64), 1.5),
    ],
)
def test_metrics_round_trip_and_are_symmetric(metric):
    u, v = torch.randn(2, 4, dtype=torch.float64, generator=generator())
    assert torch.allclose(metric.whiten(metric.unwhiten(u)), u)
    assert torch.allclose(metric.unwhiten(metric.whiten(u)), u)
    assert float(u @ metric.unwhiten(v)) == pytest.approx(float(v @ metric.unwhiten(u)))


def test_monge_metric_is_the_metric():
    g, d = torch.randn(2, 6, dtype=torch.float64, generator=generator())
    for alpha in (0.0, 1.0, 3.0):
        w = MongeMetric(g, alpha).whiten(d)
        assert float(w @ w) == pytest.approx(float(d @ d + (alpha * (g @ d)) ** 2))
    flat = MongeMetric(torch.zeros(6, dtype=torch.float64))
    assert torch.equal(flat.whiten(d), d)


def test_zero_weights_are_frozen():
    metric = ElementwiseMetric(torch.tensor([0.0, 2.0]))
    assert metric.unwhiten(torch.ones(2)).tolist() == [0.0, 2.0]
    assert metric.whiten(torch.ones(2)).tolist() == [0.0, 0.5]


def test_ascent_starts_at_random_where_the_gradient_is_zero_and_keeps_what_is_finite():
    A = torch.diag(torch.tensor([4.0, 1.0, -1.0], dtype=torch.float64))

    def function(z):
        return float(0.5 * z @ A @ z), A @ z

    zero = torch.zeros(3, dtype=torch.float64)
    best = maximize_in_ball(
        function, start_value=0.0, start_gradient=zero, rho=0.5, norm="l2", steps=60,
        generator=generator(),
    )  # fmt: skip
    assert best.value == pytest.approx(0.5, rel=1e-6)
    assert best.converged

    def cliff(z):
        value, slope = function(z)
        return (float("inf") if z.norm() > 0.3 else value), slope

    held = maximize_in_ball(
        cliff, start_value=0.0, start_gradient=torch.tensor([1e-3, 0.0, 0.0]).double(), rho=0.5,
        norm="l2", steps=60, generator=generator(),
    )  # fmt: skip
    assert held.non_finite > 0
    assert 0.1 < held.value <= 0.5 * 4 * 0.3**2
    assert not held.converged


def test_an_ascent_on_a_downhill_ball_stays_at_the_start():
    def function(z):
        return float(-(z @ z)), -2 * z

    best = maximize_in_ball(
        function, start_value=0.0, start_gradient=torch.zeros(3), rho=0.5, norm="l2", steps=10,
        generator=generator(),
    )  # fmt: skip
    assert best.value == 0.0
    assert not bool(best.point.any())


def test_an_average_over_infinite_losses_is_refused():
    with pytest.raises(MeasureError, match=r"2 of 4 perturbed losses are not finite"):
        average_rise(
            lambda z: math.inf if z[0] > 0 else 0.0, start_value=0.0, like=torch.zeros(3),
            rho=1.0, norm="l2", num_pairs=2, generator=generator(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A: lanczos(A, k=0, generator=generator()), "`k` between 1 and"),
        (lambda A: lanczos(A, k=6, generator=generator()), "parameters, 5. Got 6"),
        (lambda A: lanczos(A, tol=-1, generator=generator()), "`tol`"),
        (lambda A: lanczos(A, max_matvecs=0, generator=generator()), "`max_matvecs`"),
        (lambda A: lanczos(A, which="LM", generator=generator()), "`which`"),
        (lambda A: hutchinson_trace(A, num_probes=1, generator=generator()), "at least 2"),
        (lambda A: hutchinson_diagonal(A, num_probes=1, generator=generator()), "at least 2"),
        (lambda A: spectral_density(A, num_probes=0, generator=generator()), "`num_probes`"),
    ],
)
def test_settings_out_of_range(call, message):
    with pytest.raises(SettingsError, match=message):
        call(SymmetricOperator.wrap(torch.eye(5)))


# -- more that was once wrong --------------------------------------------------------------

HARD = {
    "pm 10": [10, -10, 9.9, -9.9, 9.8, 9.75, *rng.uniform(-9, 9, 100)],
    "tight cluster": [*(5 + 1e-5 * np.arange(6)), *rng.uniform(-1, 1, 100)],
    "cluster at an edge": [*(5 + 1e-4 * np.arange(30)), *rng.uniform(-1, 4.9, 100)],
    "twins": [5.0] * 4 + [4.999] * 4 + list(rng.uniform(-4.9, 4.9, 90)),
    "repeated bulk": [1.0] * 200 + [0.999] * 50 + [-0.5] * 100,
    "square-root edge": list(2 - 5e-3 * np.sqrt(np.arange(200))),
    "two": [1.0, 1.0],
}


@pytest.mark.parametrize("name", HARD)
def test_errors_hold_where_neighbours_are_hard_to_tell_apart(name):
    values, wrong, runs = np.sort(HARD[name]), 0, 0
    for seed in range(6):
        A = from_eigenvalues(values, seed)
        for k, tol, which in [(1, 1e-2, "both"), (2, 1e-3, "both"), (5, 1e-3, "largest")]:
            if k > len(values):
                continue
            pairs = lanczos(
                SymmetricOperator.wrap(A), k=k, tol=tol, which=which, generator=generator(seed)
            )
            vectors = torch.cat([pairs.largest_vectors, pairs.smallest_vectors], dim=1)
            found = np.array([*pairs.largest, *pairs.smallest])
            errors = np.array([*pairs.largest_residuals, *pairs.smallest_residuals])
            residuals = (A @ vectors - vectors * torch.tensor(found)).norm(dim=0).numpy()
            assert (residuals <= errors * (1 + 1e-9) + 1e-13).all()
            truth = np.array([*values[::-1][:k], *values[: len(pairs.smallest)]])
            runs += pairs.converged
            wrong += bool(pairs.converged and (abs(found - truth) > errors + 1e-12).any())
    assert runs > 0
    assert wrong == 0


def test_fewer_steps_than_pairs_give_what_there_is():
    A = SymmetricOperator.wrap(from_eigenvalues(SPECTRA["semicircle"]))
    pairs = lanczos(A, k=10, max_matvecs=3, generator=generator())
    assert len(pairs.largest) == len(pairs.largest_converged) == 3
    assert not pairs.converged
    assert not any(pairs.largest_converged)


def test_a_trace_error_from_few_probes_is_calibrated():
    A = from_eigenvalues(SPECTRA["outliers and bulk"])
    for m in (4, 8):
        z = []
        for seed in range(300):
            e = hutchinson_trace(SymmetricOperator.wrap(A), num_probes=m, generator=generator(seed))
            z.append((e.value - A.trace().item()) / e.probe_error)
        assert abs(np.mean(z)) < 0.25
        assert 0.85 < np.std(z) < 1.25


def test_average_rise_is_calibrated():
    A = from_eigenvalues(rng.uniform(0.5, 1.5, 100))
    for norm, truth in (("l2", 0.5 * A.trace().item()), ("linf", A.trace().item() / 6)):
        z = []
        for seed in range(300):
            e = average_rise(
                lambda z: float(0.5 * z @ A @ z + z.sum()), start_value=0.0, like=A[0], rho=1.0,
                norm=norm, num_pairs=20, generator=generator(seed),
            )  # fmt: skip
            z.append((e.value - truth) / e.probe_error)
        assert abs(np.mean(z)) < 0.15
        assert 0.85 < np.std(z) < 1.2


def test_an_asymmetry_is_seen_in_a_large_space():
    n = 4000
    row = torch.randn(n, generator=generator(3), dtype=torch.float64)
    skewed = SymmetricOperator(
        lambda V: V + 0.1 * (row[:, None] * V.roll(1, 0)), n, dtype=torch.float64
    )
    with pytest.raises(OperatorError, match="differ"):
        skewed.check_symmetric(generator())


def test_residuals_beside_locked_vectors_are_those_of_the_whole_matrix():
    A = from_eigenvalues(SPECTRA["semicircle"])
    rough = torch.linalg.qr(torch.linalg.eigh(A)[1][:, -2:] + 0.02 * A[:, :2])[0]
    krylov = Krylov(SymmetricOperator.wrap(A), generator(), rough)
    for _ in range(60):
        krylov.step()
    values, S, residuals = krylov.ritz()
    vectors = krylov.vectors(S)
    true = (A @ vectors - vectors * torch.tensor(values)).norm(dim=0).numpy()
    assert true == pytest.approx(residuals, rel=1e-6, abs=1e-10)
    assert residuals[-1] > 1e-4  # the rough vectors are felt


def test_pairs_whose_intervals_meet_share_an_error():
    # Both Ritz values of the span may belong to one eigenvalue; Kahan's bound covers two.
    for seed in range(200):
        A = from_eigenvalues([1.0, 1.1, 1.2, -1.0, 3.0], seed)
        Y = torch.linalg.qr(torch.randn(5, 3, generator=generator(seed), dtype=torch.float64))[0]
        values, S = torch.linalg.eigh(Y.T @ A @ Y)
        residuals = (A @ Y @ S - Y @ S * values).norm(dim=0).numpy()
        errors = distinct_errors(values.numpy(), residuals)
        truth, used = [-1.0, 1.0, 1.1, 1.2, 3.0], 0
        for value, error in zip(values.tolist(), errors, strict=True):  # match greedily
            while used < 5 and truth[used] < value - error - 1e-12:
                used += 1
            assert used < 5
            assert truth[used] <= value + error + 1e-12
            used += 1
