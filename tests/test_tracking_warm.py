"""Eigenvalues from those of a nearby matrix: against dense ones, whatever the start."""

import math

import numpy as np
import pytest
import torch

from sharpkit.errors import SettingsError, ShapeError
from sharpkit.operators import SymmetricOperator
from sharpkit.tracking import top_eigenvalues
from sharpkit.tracking.warm import coupled_bounds, unseen_bound

F64 = torch.float64


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def orthogonal(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, generator=gen(seed), dtype=F64))[0]


def bulk(n, seed=0):
    """Many small eigenvalues of both signs and some outliers, as a network's Hessian has."""
    values = 0.15 * torch.randn(n, generator=gen(seed), dtype=F64).abs() - 0.03
    values[:6] = torch.tensor([0.7, 0.6, 0.5, 0.45, 0.4, 0.3])
    return values


def with_top(top, n=300, seed=0, Q=None):
    values = bulk(n, seed)
    values[: len(top)] = torch.tensor(top, dtype=F64)
    Q = orthogonal(n, seed) if Q is None else Q
    return Q, Q @ torch.diag(values) @ Q.T


def of(A, start, seed=0, **settings):
    return top_eigenvalues(SymmetricOperator.wrap(A), start, generator=gen(seed), **settings)


def holds(A, found, k=1):
    true = torch.linalg.eigvalsh(A.double()).flip(0)[:k].numpy()
    return bool((abs(np.array(found.values) - true) <= np.array(found.errors)).all())


# -- the two bounds ------------------------------------------------------------------------


def lanczos(A, x, m):
    """The plain recurrence: Ritz values, couplings and the vectors."""
    Q, alphas, betas = [x / np.linalg.norm(x)], [], []
    for _ in range(m):
        w = A @ Q[-1]
        alphas.append(Q[-1] @ w)
        for _ in range(2):
            w = w - np.array(Q).T @ (np.array(Q) @ w)
        betas.append(np.linalg.norm(w))
        Q.append(w / betas[-1])
    T = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    return np.linalg.eigvalsh(T), np.array(betas), np.array(Q)


def test_the_last_vector_is_the_polynomial_of_the_bound():
    rng = np.random.default_rng(0)
    values = np.sort(rng.normal(size=40))
    x = rng.normal(size=40)
    x /= np.linalg.norm(x)
    ritz, betas, Q = lanczos(np.diag(values), x, 5)
    p = np.prod(values[:, None] - ritz, axis=1) / np.prod(betas)
    assert np.allclose(p * x, Q[-1], atol=1e-10)
    share = abs(x[-1])  # along the top eigenvector: a bound with just this share is met
    mu = unseen_bound(ritz, betas, 40, 0.5)
    delta = 1 / (np.prod(mu - ritz) / np.prod(betas))
    draws = rng.normal(size=(20000, 40))
    shares = abs(draws[:, 0]) / np.linalg.norm(draws, axis=1)
    assert np.mean(shares < delta) == pytest.approx(0.5, abs=0.02)
    assert (mu >= values[-1]) == (share >= delta) or mu >= values[-1]


@pytest.mark.parametrize(("steps", "chance"), [(3, 0.3), (6, 0.3), (6, 0.05)])
def test_the_bound_of_what_is_unseen_fails_as_seldom_as_it_says(steps, chance):
    """A top that is one step away from being seen: the hardest case."""
    rng = np.random.default_rng(1)
    values = np.r_[np.linspace(0, 1, 199), 1.05]
    A, missed = np.diag(values), 0
    for _ in range(400):
        ritz, betas, _ = lanczos(A, rng.normal(size=200), steps)
        missed += unseen_bound(ritz, betas, 200, chance) < values[-1]
    assert missed <= 400 * chance + 3 * math.sqrt(400 * chance * (1 - chance))


def test_the_bound_is_not_too_wide_to_be_of_use():
    values = np.r_[np.linspace(0, 1, 199), 3.0]
    ritz, betas, _ = lanczos(np.diag(values), np.random.default_rng(0).normal(size=200), 12)
    assert 3.0 <= unseen_bound(ritz, betas, 200, 1e-3) < 3.01


@pytest.mark.parametrize("k", [1, 2, 3])
def test_coupled_bounds_are_exact_for_a_multiple_of_the_identity_beyond(k):
    rng = np.random.default_rng(k)
    H, C = rng.normal(size=(4, 4)), rng.normal(size=(9, 4))
    H, mu = H + H.T + 3 * np.eye(4), 0.3
    A = np.block([[H, C.T], [C, mu * np.eye(9)]])
    assert np.allclose(coupled_bounds(H, C.T @ C, mu, k), np.linalg.eigvalsh(A)[::-1][:k])


def test_coupled_bounds_hold_for_any_matrix_below_mu():
    rng = np.random.default_rng(0)
    for _ in range(50):
        H, B = rng.normal(size=(3, 3)), rng.normal(size=(8, 8))
        C = 0.5 * rng.normal(size=(8, 3))
        H, B = H + H.T, B + B.T
        mu = np.linalg.eigvalsh(B)[-1]
        true = np.linalg.eigvalsh(np.block([[H, C.T], [C, B]]))[::-1][:3]
        assert (coupled_bounds(H, C.T @ C, mu, 3) >= true - 1e-12).all()


# -- eigenvalues ---------------------------------------------------------------------------


def test_a_crossing_is_seen():
    """The largest sinks and the second rises through it, a little at a time."""
    Q = orthogonal(300)
    start, tops = None, []
    for t in np.linspace(0, 1, 21):
        _, A = with_top([1.2 - 0.4 * t, 0.8 + 0.4 * t], Q=Q)
        found = of(A, start, seed=int(100 * t))
        assert found.converged
        assert holds(A, found)
        assert found.errors[0] <= 0.01 * found.values[0]
        start = found.vectors
        tops.append(int((Q.T @ start)[:, 0].abs().argmax()))
    assert tops[0] == 0
    assert tops[-1] == 1


@pytest.mark.parametrize("margin", [0.02, 0.05, 0.2, 1.0])
def test_an_eigenvector_that_is_no_longer_the_largest_does_not_stop_the_search(margin):
    """Its residual is zero from the first product on, and says nothing."""
    missed = 0
    for seed in range(25):
        Q, A = with_top([1.0, 1.0 + margin], seed=seed % 5)
        start = Q[:, :1].clone()
        assert float((A @ start - start).norm()) < 1e-12
        found = of(A, start, seed=seed)
        missed += not (found.converged and holds(A, found))
    assert missed == 0


def test_with_chances_that_are_large_it_does_fail_so_the_chance_is_what_protects():
    missed = sum(
        not holds(A, of(A, Q[:, :1].clone(), seed=seed, failure_probability=0.9))
        for seed in range(40)
        for Q, A in [with_top([1.0, 1.05], seed=seed % 5)]
    )
    assert 0 < missed <= 38


@pytest.mark.parametrize("column", [1, 5, 150, None])
def test_any_start_ends_at_the_truth(column):
    Q, A = with_top([1.0, 0.9])
    start = torch.randn(300, 1, generator=gen(3), dtype=F64) if column is None else Q[:, [column]]
    found = of(A, start)
    assert found.converged
    assert found.warm
    assert holds(A, found)


@pytest.mark.parametrize("k", [2, 4])
def test_several_eigenvalues(k):
    Q, A = with_top([1.0, 0.95, 0.9])
    for seed in range(5):
        start = Q[:, [5, 3, 1, 2][:k]]  # the largest is not among them
        found = of(A, start, k=k, seed=seed)
        assert found.converged
        assert holds(A, found, k)
        assert found.vectors.shape == (300, k)


@pytest.mark.parametrize(
    "values",
    [[2.0], [1.0, 1.0], [0.0] * 5, [1.0] * 8, [-1.0, -2.0, -3.0], [3.0, 3.0, 1.0, 0.0, 0.0]],
)
def test_small_repeated_and_negative_spectra(values):
    A = torch.diag(torch.tensor(values, dtype=F64))
    start = torch.zeros(len(values), 1, dtype=F64)
    start[-1] = 1
    found = of(A, start)
    assert found.converged
    assert found.values[0] == pytest.approx(max(values), abs=max(found.errors[0], 1e-12))


@pytest.mark.parametrize("gap", [1e-6, 1e-3, 0.01])
def test_two_that_are_nearly_equal_cost_little(gap):
    _, A = with_top([1.0, 1.0 - gap])
    Q = orthogonal(300)
    start = (Q[:, :1] + 0.1 * Q[:, 2:3]) / math.sqrt(1.01)
    found = of(A, start)
    assert found.converged
    assert holds(A, found)
    assert found.num_matvecs <= 30


def test_float32_states_its_rounding():
    _, A = with_top([1.0])
    start = torch.linalg.eigh(A)[1][:, -1:].float()
    found = of(A.float(), start)
    assert found.converged
    assert found.errors[0] >= 1e-6
    assert holds(A, found)


def test_a_warm_start_takes_fewer_products():
    Q, A = with_top([1.0])
    E = torch.randn(300, 300, generator=gen(9), dtype=F64)
    warm = cold = 0
    for seed in range(8):
        B = A + 0.002 * (seed + 1) * (E + E.T) / math.sqrt(600)
        cold += of(B, None, seed=seed).num_matvecs
        found = of(B, Q[:, :1], seed=seed)
        assert found.converged
        assert holds(B, found)
        warm += found.num_matvecs
    assert warm <= 0.75 * cold


def test_a_spent_budget_is_said():
    _, A = with_top([1.0, 0.99, 0.98])
    start = torch.randn(300, 1, generator=gen(3), dtype=F64)
    found = of(A, start, max_matvecs=6)
    assert not found.converged
    assert found.num_matvecs <= 6
    assert math.isfinite(found.errors[0])


def test_products_are_counted():
    calls = []
    _, A = with_top([1.0])

    def matmat(V):
        calls.append(V.shape[1])
        return A @ V

    operator = SymmetricOperator(matmat, 300, dtype=F64, device=torch.device("cpu"))
    found = top_eigenvalues(operator, torch.ones(300, 1, dtype=F64), generator=gen())
    assert found.num_matvecs == sum(calls)


def test_wrong_settings():
    A = torch.eye(5)
    for settings, match in [
        ({"k": 6}, "Expected `k`"),
        ({"tol": 0.0}, "`tol`"),
        ({"max_matvecs": 0}, "`max_matvecs`"),
        ({"failure_probability": 1.0}, "`failure_probability`"),
    ]:
        with pytest.raises(SettingsError, match=match):
            of(A, None, **settings)
    with pytest.raises(ShapeError, match="Expected `start` of shape"):
        of(A, torch.ones(5, 2))
    with pytest.raises(SettingsError, match="finite `start`"):
        of(A, torch.full((5, 1), math.nan))
