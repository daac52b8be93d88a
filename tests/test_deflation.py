"""Traces, norms and quadratures beside locked eigenpairs: exactness and coverage."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from test_estimators import from_eigenvalues, generator

from sharpkit.errors import SettingsError
from sharpkit.estimators import (
    Locked,
    Probing,
    deflated_quadrature,
    deflated_trace,
    frobenius_norm,
    lock,
    renyi_entropy,
    renyi_entropy_of_probes,
)
from sharpkit.estimators.deflation import trace_of
from sharpkit.estimators.krylov import Krylov
from sharpkit.operators import SymmetricOperator

SPECTRA = {
    "decaying": [*np.geomspace(100, 10, 10), *np.geomspace(1, 1e-4, 190)],
    "flat": list(np.linspace(0.5, 1.5, 200)),
}
INDEFINITE = [40.0, -30.0, 20.0, *np.random.default_rng(1).normal(0, 1, 57)]
BLOCKS = {"a": [slice(0, 30)], "b": [slice(30, 150), slice(190, 200)], "c": [slice(150, 190)]}


def wrap(A):
    return SymmetricOperator.wrap(A)


def locked_by(operator, steps=24, seed=1000):
    krylov = Krylov(operator, generator(seed))
    while len(krylov.steps) < steps and not krylov.exhausted:
        krylov.step()
    return lock(krylov, len(krylov.steps))


def locked_by_hand(A, Q):
    """Ritz pairs of any subspace, with the residual vectors' diagonal."""
    values, S = torch.linalg.eigh(Q.T @ A @ Q)
    Q = Q @ S
    R = A @ Q - Q * values
    return Locked(Q, values.numpy(), R.norm(dim=0).numpy(), 1e-14, 0, 2 * (R * Q).sum(dim=1))


def nothing(A):
    return Locked(A[:, :0], np.zeros(0), np.zeros(0), 1e-14 * float(A.norm()), 0)


def exact_entropy(values, alpha):
    p = np.abs(values) / np.abs(values).sum()
    return math.log((p**alpha).sum()) / (1 - alpha)


# -- calibration ----------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_intervals_hold_the_truth_as_often_as_they_say(spectrum):
    values = np.array(SPECTRA[spectrum])
    A = from_eigenvalues(values)
    operator, diagonal = wrap(A), A.diagonal()
    truth = {
        "trace": values.sum(),
        "norm": math.sqrt((values**2).sum()),
        "H1.5": exact_entropy(values, 1.5),
        "H2": exact_entropy(values, 2),
        "H2 of probes": exact_entropy(values, 2),
        **{n: sum(float(diagonal[s].sum()) for s in parts) for n, parts in BLOCKS.items()},
    }
    hits, z, deviations = ({name: [] for name in truth} for _ in range(3))

    def add(name, value, error, interval):
        hits[name].append(interval[0] <= truth[name] <= interval[1])
        z[name].append((value - truth[name]) / error)
        deviations[name].append(value - truth[name])

    for seed in range(300):
        if seed % 10 == 0:
            locked = locked_by(operator, seed=1000 + seed)
            assert 10 <= locked.size <= 12 if spectrum == "decaying" else locked.size <= 4
        probing = Probing(operator, locked, generator(seed), BLOCKS)
        trace = deflated_trace(probing, num_probes=16)
        probes = probing.until(16)
        quadrature = deflated_quadrature(
            operator, locked, num_probes=4, num_steps=12, generator=generator(5000 + seed)
        )
        for name, e in [
            ("trace", trace),
            ("norm", frobenius_norm(probes)),
            ("H1.5", renyi_entropy(quadrature, alpha=1.5)),
            ("H2", renyi_entropy(quadrature, alpha=2)),
            ("H2 of probes", renyi_entropy_of_probes(probes)),
        ]:
            add(name, e.value, e.probe_error, e.interval())
        for part in trace.parts:
            assert part.dof == 15
            half = scipy.stats.t.ppf(0.975, part.dof) * part.probe_error
            add(part.label, part.value, part.probe_error, (part.value - half, part.value + half))
        total = sum(part.value for part in trace.parts)
        assert total == pytest.approx(trace.value, rel=1e-12)
    for name in truth:
        covered = np.mean(hits[name])
        assert 0.92 <= covered <= 0.98, (name, covered)
        assert abs(np.mean(deviations[name])) < 3.5 * np.std(deviations[name]) / math.sqrt(300)
        assert abs(np.mean(z[name])) < (0.4 if name in ("H1.5", "H2") else 0.25), name
    assert 0.85 < np.std(z["trace"]) < 1.15  # the variance of the entries, not of the sums
    assert 0.85 < np.std(z["norm"]) < 1.25


def test_a_norm_from_few_probes_has_the_error_of_few_samples():
    values = SPECTRA["decaying"]
    A = from_eigenvalues(values)
    operator, truth = wrap(A), math.sqrt((np.array(values) ** 2).sum())
    hits = []
    for seed in range(300):
        e = frobenius_norm(Probing(operator, nothing(A), generator(seed)).until(4))
        assert e.dof == 3
        hits.append(e.interval()[0] <= truth <= e.interval()[1])
    assert 0.88 <= np.mean(hits) <= 0.99  # squares are skewed where no outlier is locked


@pytest.mark.parametrize("kind", ["random", "rough", "unconverged", "exact", "none"])
def test_it_is_unbiased_whatever_is_locked(kind):
    A = from_eigenvalues(INDEFINITE)
    n, operator = len(A), wrap(A)
    U = torch.linalg.eigh(A)[1]
    noise = torch.randn(n, 3, generator=generator(7), dtype=A.dtype)
    basis = {
        "random": noise,
        "rough": U[:, [0, -2, -1]] + 0.05 * noise,
        "exact": U[:, [0, -2, -1]],
    }
    if kind == "unconverged":
        krylov = Krylov(operator, generator())
        for _ in range(3):
            krylov.step()
        _, S, residuals = krylov.ritz()
        locked = locked_by_hand(A, krylov.vectors(S))
        assert locked.residuals == pytest.approx(residuals)
        assert min(residuals) > 0.1
    elif kind == "none":
        locked = nothing(A)
    else:
        locked = locked_by_hand(A, torch.linalg.qr(basis[kind])[0])
    blocks = {"a": [slice(0, 7)], "b": [slice(7, 20), slice(50, 60)], "c": [slice(20, 50)]}
    probes = Probing(operator, locked, generator(1), blocks).until(4000)
    trace = trace_of(probes)
    parts = {part.label: part for part in trace.parts}
    norm = frobenius_norm(probes)
    assert abs(trace.value - float(A.trace())) < 3.5 * trace.probe_error
    assert abs(norm.value - float(A.norm())) < 3.5 * norm.probe_error
    for name, slices in blocks.items():
        truth = sum(float(A.diagonal()[s].sum()) for s in slices)
        assert abs(parts[name].value - truth) < 3.5 * parts[name].probe_error
    assert sum(p.value for p in trace.parts) == pytest.approx(trace.value, rel=1e-9)
    # The errors are those of the deflated matrix, from its entries.
    beyond = torch.eye(n, dtype=A.dtype) - locked.vectors @ locked.vectors.T
    rest = beyond @ A @ beyond
    variance = 2 * float(rest.square().sum() - rest.diagonal().square().sum())
    assert probes.variance == pytest.approx(variance, rel=0.1)
    assert trace.probe_error == pytest.approx(math.sqrt(variance / 4000), rel=0.05)
    assert np.std(probes.traces) == pytest.approx(math.sqrt(variance), rel=0.1)
    assert np.mean(probes.squares) == pytest.approx(float(rest.square().sum()), rel=0.1)


def test_lock_gives_ritz_pairs_with_residuals_orthogonal_to_all():
    A = from_eigenvalues(INDEFINITE)
    for steps, seed in [(6, 0), (12, 1), (24, 2)]:
        operator = wrap(A)
        krylov = Krylov(operator, generator(seed))
        for _ in range(steps + 5):  # what came later does not count
            krylov.step()
        locked = lock(krylov, steps)
        Q = locked.vectors
        eye = torch.eye(locked.size, dtype=A.dtype)
        assert locked.num_matvecs == steps
        assert locked.size > 0
        assert (Q.T @ Q - eye).abs().max() < 1e-12
        assert (Q.T @ A @ Q - torch.diag(torch.tensor(locked.values))).abs().max() < 1e-10
        R = A @ Q - Q * torch.tensor(locked.values)
        assert R.norm(dim=0).numpy() == pytest.approx(locked.residuals, rel=1e-6, abs=1e-10)
        assert (locked.residuals <= np.maximum(0.01 * abs(locked.values), locked.floor * 2)).all()
        assert torch.allclose(locked.cross, 2 * (R * Q).sum(dim=1), atol=1e-10)
        assert abs(float(locked.cross.sum())) < 1e-10
        X = torch.randn(len(A), 2, generator=generator(), dtype=A.dtype)
        assert (Q.T @ locked.project(X)).abs().max() < 1e-12


def test_more_probes_go_on_from_fewer():
    A = from_eigenvalues(INDEFINITE)
    locked = locked_by(wrap(A))
    once = Probing(wrap(A), locked, generator(3), {"a": [slice(0, 9)]}).until(21)
    operator = wrap(A)
    twice = Probing(operator, locked, generator(3), {"a": [slice(0, 9)]})
    few = twice.until(3)
    assert few.cost.hvps == 3
    many = twice.until(21)
    assert operator.num_matvecs == many.cost.hvps == 21
    assert many.traces == pytest.approx(once.traces, rel=1e-12)
    assert many.squares == pytest.approx(once.squares, rel=1e-12)
    assert many.blocks["a"] == pytest.approx(once.blocks["a"], rel=1e-12)
    assert many.variance == pytest.approx(once.variance, rel=1e-12)
    assert len(few.traces) == 3
    assert twice.until(5).traces == pytest.approx(once.traces)  # never fewer than there are
    e = trace_of(many)
    assert np.mean(e.draws) == pytest.approx(e.value, rel=1e-12)
    assert e.details["num_locked"] == locked.size
    assert e.details["frobenius_norm"] == frobenius_norm(many).value
    norm = frobenius_norm(many)
    assert np.mean(norm.draws) == pytest.approx(norm.value, rel=1e-12)
    assert np.std(norm.draws, ddof=1) / math.sqrt(21) == pytest.approx(norm.probe_error, rel=1e-9)


def test_a_target_is_met_or_said_to_be_missed():
    A = from_eigenvalues(SPECTRA["flat"])
    operator, truth = wrap(A), 200.0
    z, spent = [], []
    for seed in range(100):
        locked = nothing(A)
        e = deflated_trace(
            Probing(operator, locked, generator(seed)), num_probes=500, target_error=2.5e-3
        )
        assert e.converged
        assert e.notes == ()
        assert e.probe_error <= 2.5e-3 * e.value
        z.append((e.value - truth) / e.probe_error)
        spent.append(e.cost.hvps)
    assert set(spent) <= {16, 32, 64, 128, 256}
    assert max(spent) > 16
    assert np.mean(np.abs(z) <= 1.96) >= 0.9
    missed = deflated_trace(
        Probing(operator, locked, generator()), num_probes=40, target_error=1e-9
    )
    best = deflated_trace(Probing(operator, locked, generator()), num_probes=40)
    assert not missed.converged
    assert missed.cost.hvps == 40  # not one more than the budget
    assert (missed.value, missed.probe_error) == (best.value, best.probe_error)
    assert best.converged
    assert "1e-09 was not reached with 40 probes" in missed.notes[0]
    assert f"{best.probe_error / best.value:.2g}" in missed.notes[0]
    few = deflated_trace(Probing(operator, locked, generator()), num_probes=5, target_error=0.5)
    assert few.details["num_probes"] == 5
    for settings in ({"num_probes": 1}, {"target_error": 0.0}, {"target_error": -1.0}):
        with pytest.raises(SettingsError, match=next(iter(settings))):
            deflated_trace(Probing(operator, locked, generator()), **settings)


# -- special matrices -----------------------------------------------------------------------

SPECIAL = {
    "low rank": [*np.linspace(1, 10, 5), *[0.0] * 45],
    "zero": [0.0] * 20,
    "identity": [1.0] * 20,
    "one": [-3.0],
    "three": [3.0, 1.0, -2.0],
    "two levels": [1.0] * 12 + [2.0] * 8,
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_special_matrices(name, dtype):
    values = np.array(SPECIAL[name])
    A = from_eigenvalues(values, dtype=dtype)
    operator, eps = wrap(A), torch.finfo(dtype).eps
    tiny = 1000 * eps * max(abs(values).max(), 1e-30)
    locked = locked_by(operator)
    blocks = {"first": [slice(0, 1)], "rest": [slice(1, None)]}
    probing = Probing(operator, locked, generator(), blocks)
    trace, norm = deflated_trace(probing, num_probes=16), frobenius_norm(probing.until(16))
    error = max(4 * trace.probe_error, tiny)
    assert abs(trace.value - values.sum()) <= error
    assert trace.probe_error <= tiny or name == "two levels"
    assert norm.value == pytest.approx(np.linalg.norm(values), abs=max(4 * norm.probe_error, tiny))
    assert sum(p.value for p in trace.parts) == pytest.approx(trace.value, abs=tiny)
    for held in (locked, nothing(A)):
        before = operator.num_matvecs
        quadrature = deflated_quadrature(
            operator, held, num_probes=3, num_steps=50, generator=generator()
        )  # fewer numbers than steps
        assert quadrature.cost.hvps == operator.num_matvecs - before <= 3 * (len(A) - held.size)
        for zero in (False, True):
            for x, w in quadrature.rules(place="zero" if zero else "gauss"):
                assert np.isfinite(x).all()
                assert (w >= 0).all()
                assert w.sum() == pytest.approx(1)
        for power in (1, 2, 3):
            sums = quadrature.sums(lambda x, power=power: x**power)
            assert np.isfinite(sums).all()
            if held is locked and name != "two levels":
                assert sums == pytest.approx([(values**power).sum()] * 3, abs=1e3 * tiny)
        low, high = quadrature.extremes()
        assert values.min() - tiny <= low <= values.min() + max(abs(values).max(), tiny)
        assert high <= values.max() + tiny
    if name in ("identity", "one", "three") and locked.size == len(A):
        assert quadrature_of(operator, locked).extremes() == pytest.approx(
            (values.min(), values.max()), abs=tiny
        )  # not the zero that stands for no rest


def quadrature_of(operator, locked, probes=3, steps=5, seed=0):
    return deflated_quadrature(
        operator, locked, num_probes=probes, num_steps=steps, generator=generator(seed)
    )


def test_a_probe_in_the_span_of_what_is_locked_counts_nothing():
    # One sign vector in eight is (1, 1, 1, 1) up to its sign: nothing is left of it.
    q = torch.full((4, 1), 0.5, dtype=torch.float64)
    beyond = torch.eye(4, dtype=torch.float64) - q @ q.T
    A = 7 * q @ q.T + beyond @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]).double()) @ beyond
    held = Locked(q, np.array([7.0]), np.zeros(1), 1e-15, 0)
    quadrature = deflated_quadrature(
        wrap(A), held, num_probes=400, num_steps=3, generator=generator()
    )
    for power in (0, 1, 2, 3):
        sums = quadrature.sums(lambda x, power=power: x**power)
        truth = float(torch.linalg.matrix_power(A, power).trace())
        assert abs(sums.mean() - truth) <= 3.5 * sums.std() / 20 + 1e-9
    dead = quadrature.masses == 0
    assert 20 < dead.sum() < 90
    assert quadrature.extremes()[0] > 0.5
    for seed in range(40):  # bases belong to their probes even then
        few = quadrature_of(wrap(A), held, steps=3, seed=seed)
        for i, basis in enumerate(few.bases):
            assert few.slopes(np.ones_like, i) @ few.slopes(np.ones_like, i) == pytest.approx(
                few.masses[i]
            )
            assert len(few.alphas[i]) == len(basis)


# -- quadrature -----------------------------------------------------------------------------


def probes_of(n, count, seed):
    columns, random = [], generator(seed)
    for _ in range(count):
        columns.append(2 * torch.randint(2, (n,), generator=random) - 1)
    return torch.stack(columns).T.double()


@pytest.mark.parametrize("held", ["nothing", "eigenvectors", "rough"])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_quadratures_are_exact_for_polynomials(held, steps):
    A = from_eigenvalues([4.0, -3.5, 3.0, *INDEFINITE[3:]])
    outer = torch.linalg.eigh(A)[1][:, [0, -2, -1]] + 0.02 * A[:, :3] * (held == "rough")
    locked = nothing(A) if held == "nothing" else locked_by_hand(A, torch.linalg.qr(outer)[0])
    beyond = torch.eye(len(A), dtype=A.dtype) - locked.vectors @ locked.vectors.T
    rest = beyond @ A @ beyond  # what is probed
    quadrature = quadrature_of(wrap(A), locked, probes=11, steps=steps, seed=4)
    assert quadrature.num_steps == steps
    assert quadrature.cost.hvps == 11 * steps
    Z = locked.project(probes_of(len(A), 11, 4))
    assert quadrature.masses == pytest.approx(Z.square().sum(dim=0).numpy(), rel=1e-12)
    for used in {steps, max(steps // 2, 1)}:
        for zero, degree in ((False, 2 * used - 1), (True, 2 * used)):
            for power in range(degree + 2):
                AZ = torch.linalg.matrix_power(rest, power) @ Z
                truth = (Z * AZ).sum(dim=0).numpy() + (locked.values**power).sum()
                sums = quadrature.sums(
                    lambda x, power=power: x**power, used, place="zero" if zero else "gauss"
                )
                if power <= degree:
                    assert sums == pytest.approx(truth, rel=1e-9, abs=1e-9)
                else:  # and no further
                    assert np.abs(sums - truth).max() > 1e-5
            for x, w in quadrature.rules(used, place="zero" if zero else "gauss"):
                assert len(x) == used + zero
                assert w.sum() == pytest.approx(1)
                assert (abs(x).min() < 1e-10 * abs(x).max()) == zero


def test_few_steps_of_a_long_run_are_a_short_run():
    A = from_eigenvalues(INDEFINITE)
    long = quadrature_of(wrap(A), nothing(A), steps=9, seed=2)
    short = quadrature_of(wrap(A), nothing(A), steps=4, seed=2)
    for zero in (False, True):
        for (x, w), (y, v) in zip(
            long.rules(4, place="zero" if zero else "gauss"),
            short.rules(place="zero" if zero else "gauss"),
            strict=True,
        ):
            assert x == pytest.approx(y, rel=1e-9, abs=1e-9)
            assert w == pytest.approx(v, rel=1e-6, abs=1e-12)
    assert long.extremes()[0] == min(x.min() for x, _ in long.rules())
    assert long.extremes()[1] == max(x.max() for x, _ in long.rules())


def test_a_zero_node_where_there_is_one_already():
    # Odd steps on a spectrum symmetric about zero: the middle node is zero, and the node
    # that would be added lies at infinity.
    half = np.linspace(1, 2, 20)
    A = torch.diag(torch.tensor(np.r_[half, -half]))
    quadrature = quadrature_of(wrap(A), nothing(A), steps=5)
    for x, w in quadrature.rules(place="zero"):
        assert np.isfinite(x).all()
        assert abs(x).min() < 1e-8
        assert w @ x**2 == pytest.approx((half**2).mean(), rel=1e-9)


def test_quadratures_are_unbiased():
    A = from_eigenvalues(INDEFINITE)
    locked = locked_by(wrap(A))
    quadrature = quadrature_of(wrap(A), locked, probes=300, steps=12)
    for function in (np.abs, np.square, np.cos):
        sums = quadrature.sums(function)
        truth = function(np.array(INDEFINITE)).sum()
        assert abs(sums.mean() - truth) < 4 * sums.std() / math.sqrt(300) + 0.005 * abs(truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_single_precision_quadratures_stay_near(dtype):
    values = SPECTRA["decaying"]
    A = from_eigenvalues(values)
    truth = quadrature_of(wrap(A), nothing(A), steps=12).sums(np.abs)
    found = quadrature_of(wrap(A.to(dtype)), nothing(A.to(dtype)), steps=12).sums(np.abs)
    assert found == pytest.approx(truth, rel=1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("values", [INDEFINITE, SPECIAL["two levels"], SPECIAL["three"]])
@pytest.mark.parametrize("held", [False, True])
def test_slopes_are_those_of_the_matrix(values, held):
    A = from_eigenvalues(values)
    n = len(A)
    operator = wrap(A)
    locked = locked_by_hand(A, torch.linalg.eigh(A)[1][:, -1:]) if held else nothing(A)
    quadrature = quadrature_of(operator, locked, steps=6, seed=8)
    assert len(quadrature.bases) == 2
    Z = locked.project(probes_of(n, 3, 8))
    for probe, basis in enumerate(quadrature.bases):
        V = basis.T
        assert (V.T @ V - torch.eye(V.shape[1], dtype=V.dtype)).abs().max() < 1e-10
        assert (locked.vectors.T @ V).abs().sum() < 1e-10
        for power in (0, 1, 2, 3):
            coefficients = quadrature.slopes(lambda x, power=power: x**power, probe)
            truth = torch.linalg.matrix_power(A, power) @ Z[:, probe]
            assert torch.allclose(V @ torch.tensor(coefficients), truth, atol=1e-7)
        ended = len(quadrature.betas[probe]) < len(quadrature.alphas[probe])
        assert ended == (n < 60)
        # A run that could go on has a node at zero, where the slopes of magnitudes jump.
        met = []
        quadrature.slopes(lambda x, met=met: met.append(x) or x, probe)
        assert ended or abs(met[0]).min() < 1e-10


def test_quadratures_without_two_probes_or_a_step_are_refused():
    A = torch.eye(5)
    with pytest.raises(SettingsError, match="`num_probes` to be at least 2"):
        quadrature_of(wrap(A), nothing(A), probes=1)
    with pytest.raises(SettingsError, match="`num_steps`"):
        quadrature_of(wrap(A), nothing(A), steps=0)
