"""The largest eigenvalues of a matrix that changes slowly, from those of a moment ago."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from sharpkit.errors import SettingsError, ShapeError
from sharpkit.estimators.basis import accurate_gram
from sharpkit.estimators.krylov import ROUNDING, Krylov
from sharpkit.estimators.lanczos import COARSEST, SMALL_SHARE, lanczos
from sharpkit.estimators.protocol import Matrix, check_positive

__all__ = ["TopEigenvalues", "coupled_bounds", "top_eigenvalues", "unseen_bound"]

MARGIN = 0.85  # of the tolerance, at which the search ends
GAP = 0.05  # relative distance to what lies below, for which V is made before a run
SETTLED = 0.1  # relative residual at which a value found beyond V is taken in
ALONE = 1e-3  # of a direction: less than this outside V is rounding
ZERO = 1e-300  # what no error of a zero matrix exceeds
BISECTIONS = 50


@dataclass(frozen=True)
class TopEigenvalues:
    """The largest eigenvalues of a matrix with their errors.

    Attributes:
        values: Descending.
        errors: Each eigenvalue lies within its error, see :func:`top_eigenvalues`.
        vectors: Unit vectors ``[P, k]``, with which the next matrix may be begun.
        converged: Whether every error met the tolerance.
        num_matvecs: Products that it took.
        warm: Whether vectors of an earlier matrix led to it.
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]
    vectors: Tensor
    converged: bool
    num_matvecs: int
    warm: bool


def top_eigenvalues(
    matrix: Matrix,
    start: Tensor | None = None,
    *,
    k: int = 1,
    tol: float = 1e-2,
    max_matvecs: int = 400,
    failure_probability: float = 1e-3,
    generator: torch.Generator,
) -> TopEigenvalues:
    r"""Compute the k algebraically largest eigenvalues, from eigenvectors of a nearby matrix.

    Without a start this is :func:`sharpkit.estimators.lanczos`. With one, the space V that it
    spans is widened by the residuals of its Ritz pairs. What was an eigenvector a moment ago
    has a small residual also when it is no longer the largest, so that a residual alone
    proves nothing here: a Lanczos run from a *random* vector orthogonal to V must show that
    nothing larger is left. With :math:`H = V^\top A V`, :math:`C = A V - V H` and an upper
    bound :math:`\mu` of A on the orthogonal complement (:func:`unseen_bound`), A has at most
    as many eigenvalues above :math:`t > \mu` as :math:`H + C^\top C / (t - \mu)` (Schur
    complement), which bounds each from above; the Ritz values bound them from below (Cauchy).
    The error is the difference. A value that the run finds beyond the Ritz values is taken
    into V, and another random run follows.

    The errors are too small with a probability of at most ``failure_probability`` over the
    random runs, whatever the start: vectors of another matrix cost products, and no truth.

    Args:
        matrix: The matrix ``A``.
        start: Vectors ``[P, k]``, the eigenvectors of a nearby matrix; None: a cold start.
        k: Eigenvalues.
        tol: Relative error (of values below 5% of the largest: of those 5%); at most 0.01.
        max_matvecs: Budget of products.
        failure_probability: That an error is too small, where there is a start.
        generator: Source of the random vectors.

    Raises:
        SettingsError: If k is less than 1 or more than P, a setting is not positive, or the
            start is not finite.
        ShapeError: If the start is not ``[P, k]``.

    Cost:
        For one eigenvalue of a network in training 7 to 16 products, where a cold start takes
        15 to 22; as many as that where eigenvalues crowd at the top. Memory of as many vectors,
        those of V twice.

    Example:
        >>> from sharpkit.operators import SymmetricOperator
        >>> A = torch.diag(torch.linspace(0, 1, 500) ** 8)
        >>> g = torch.Generator().manual_seed(0)
        >>> cold = top_eigenvalues(SymmetricOperator.wrap(A), generator=g)
        >>> warm = top_eigenvalues(SymmetricOperator.wrap(1.1 * A), cold.vectors, generator=g)
        >>> warm.converged, abs(warm.values[0] - 1.1) <= warm.errors[0]
        (True, True)
    """
    if not 1 <= k <= matrix.dim:
        raise SettingsError(
            f"Expected `k` between 1 and the number of parameters, {matrix.dim}. Got {k}."
        )
    check_positive("tol", tol)
    check_positive("max_matvecs", max_matvecs, minimum=1)
    if not 0 < failure_probability < 1:
        raise SettingsError(
            "Expected `failure_probability` between 0 and 1, both excluded. Got"
            f" {failure_probability!r}."
        )
    tol = min(tol, COARSEST)
    if start is None or max_matvecs <= k:
        pairs = lanczos(
            matrix, k=k, which="largest", tol=tol, max_matvecs=max_matvecs, generator=generator
        )
        return TopEigenvalues(
            values=pairs.largest,
            errors=pairs.largest_residuals,
            vectors=pairs.largest_vectors,
            converged=pairs.converged,
            num_matvecs=pairs.num_matvecs,
            warm=False,
        )
    if start.shape != (matrix.dim, k):
        raise ShapeError(
            f"Expected `start` of shape ({matrix.dim}, {k}). Got {tuple(start.shape)}."
        )
    if not bool(torch.isfinite(start).all()):
        raise SettingsError("Expected a finite `start`. Got NaN or inf in it.")
    return _Warm(matrix, start, k, tol, max_matvecs, failure_probability, generator).run()


def unseen_bound(
    values: np.ndarray, couplings: np.ndarray, dim: int, failure_probability: float
) -> float:
    r"""Return a bound of the largest eigenvalue, from a Lanczos run of a random start.

    The m-th vector after a start :math:`x` is :math:`p_m(A)x`, a unit vector, with
    :math:`p_m(t) = \prod (t - \theta_i) / \prod \beta_i`. Its share along the top eigenvector
    u is :math:`p_m(\lambda) u^\top x`, at most 1; so :math:`\lambda` is at most the root of
    :math:`p_m(t) = 1/\delta` beyond the Ritz values, unless :math:`|u^\top x| < \delta`
    (van Dorsselaer, Hochstenbach and van der Vorst 2000, doi:10.1137/S0895479800366859). For
    a uniform x the square of :math:`u^\top x` is Beta(1/2, (dim - 1)/2).

    Args:
        values: The m Ritz values.
        couplings: The m couplings beta, the one to the next vector included.
        dim: Dimension that the start was drawn in.
        failure_probability: That the bound is too small.

    Example:
        >>> bound = unseen_bound(np.array([0.0, 1.0]), np.array([0.4, 1e-9]), 100, 1e-3)
        >>> round(bound, 3)
        1.0
    """
    top = float(values.max())
    share = 0.5 * math.log(betaincinv(0.5, (dim - 1) / 2, failure_probability)) if dim > 1 else 0
    betas = np.maximum(couplings, np.finfo(float).tiny)
    missing = float(np.log(betas).sum()) - share

    def grown(t: float) -> bool:
        return float(np.log(np.maximum(t - values, np.finfo(float).tiny)).sum()) >= missing

    step = float(betas.max())
    while not grown(top + step):
        step *= 2
    low, high = 0.0, step
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if grown(top + middle) else (middle, high)
    return top + high


def coupled_bounds(H: np.ndarray, G: np.ndarray, mu: float, k: int) -> np.ndarray:
    r"""Return upper bounds of the k largest eigenvalues of :math:`[[H, C^\top], [C, B]]`.

    For :math:`B \preceq \mu` and :math:`G = C^\top C`: the smallest
    :math:`t \ge \mu` with :math:`\lambda_i(H + G/(t - \mu)) \le t`.

    Example:
        >>> bound = coupled_bounds(np.array([[2.0]]), np.array([[0.25]]), 1.0, 1)
        >>> round(float(bound[0]), 6), round(1.5 + 0.5**0.5, 6)  # of [[2, 0.5], [0.5, 1]]
        (2.207107, 2.207107)
    """
    values = np.linalg.eigvalsh(H)[::-1]
    if mu == -math.inf:
        return values[:k]
    reach = math.sqrt(max(float(np.linalg.eigvalsh(G)[-1]), 0.0))
    bounds = np.empty(k)
    for i in range(k):
        low = max(float(values[i]), mu)
        high = low + reach  # lambda_i(H + G/reach) <= low + reach
        for _ in range(BISECTIONS if reach > 0 else 0):
            t = (low + high) / 2
            if t <= low or t >= high:
                break
            within = np.linalg.eigvalsh(H + G / (t - mu))[-1 - i] <= t if t > mu else False
            low, high = (low, t) if within else (t, high)
        bounds[i] = high
    return bounds


class _Warm:
    # V, W = A V and what they say of A's top; random runs beyond V.

    def __init__(
        self,
        matrix: Matrix,
        start: Tensor,
        k: int,
        tol: float,
        budget: int,
        probability: float,
        generator: torch.Generator,
    ):
        self.matrix, self.k, self.tol, self.budget = matrix, k, tol, budget
        self.probability, self.generator = probability, generator
        self.before = matrix.num_matvecs
        self.mu, self.tau = math.inf, -math.inf  # beyond V: a bound, and the top Ritz value
        self.V = torch.linalg.qr(start.to(matrix.device, matrix.dtype))[0]
        self.W = matrix @ self.V
        self._look()

    def run(self) -> TopEigenvalues:
        runs = 0
        while True:
            while not self._fair() and self._widen():
                pass
            runs += 1
            # Chances of p/2, p/4, ... add up to p at most, however many runs there are.
            found = self._exclude(self.probability / 2**runs)
            if found is None or not self._add(found):
                return self._result()

    # -- V ---------------------------------------------------------------------------

    def _look(self) -> None:
        # Rayleigh-Ritz: values descending, C = A V - V H and its Gram matrix.
        H = accurate_gram(self.V, self.W)
        H = (H + H.T) / 2
        self.H = H.cpu().numpy()
        values, S = np.linalg.eigh(self.H)
        self.values, self.S = values[::-1], S[:, ::-1].copy()
        self.C = self.W - self.V @ H.to(self.V.dtype)
        self.G = accurate_gram(self.C, self.C).cpu().numpy()

    def _room(self) -> bool:
        return self.matrix.num_matvecs - self.before < self.budget

    @property
    def _scale(self) -> float:
        beyond = abs(self.tau) if math.isfinite(self.tau) else 0.0
        return float(max(abs(self.values[0]), abs(self.values[-1]), beyond))

    @property
    def _floor(self) -> float:
        return ROUNDING * torch.finfo(self.matrix.dtype).eps * self._scale

    @property
    def _allowed(self) -> np.ndarray:
        wanted = self.tol * np.maximum(abs(self.values[: self.k]), SMALL_SHARE * self._scale)
        allowed: np.ndarray = np.maximum(wanted, max(2 * self._floor, ZERO))
        return allowed

    def _errors(self, mu: float) -> np.ndarray:
        if mu == math.inf:
            return np.full(self.k, math.inf)
        bounds = coupled_bounds(self.H, self.G, mu, self.k)
        errors: np.ndarray = np.maximum(bounds - self.values[: self.k], 0.0) + self._floor
        return errors

    def _met(self, mu: float) -> bool:
        # Whether the errors are small enough; one comparison each in place of a bisection.
        if mu == -math.inf:
            return True
        most = self.values[: self.k] + MARGIN * self._allowed - self._floor
        return bool(
            all(
                t > mu and np.linalg.eigvalsh(self.H + self.G / (t - mu))[-1 - i] <= t
                for i, t in enumerate(most.tolist())
            )
        )

    def _residuals(self) -> np.ndarray:
        S = self.S[:, : self.k]
        sizes: np.ndarray = np.sqrt(np.maximum(np.einsum("ij,ik,kj->j", S, self.G, S), 0.0))
        return sizes

    def _fair(self) -> bool:
        # Whether r^2/gap, the error of a pair by itself, would do. Only the cost depends on it.
        sizes = np.maximum(abs(self.values[: self.k]), SMALL_SHARE * self._scale)
        return bool((self._residuals() ** 2 <= GAP * sizes * self._allowed).all())

    def _widen(self, mu: float | None = None) -> bool:
        # By the residual of the worst of the wanted pairs, or where a bound beyond V is given,
        # of the vector that makes the worst error. False if there is none, or no room.
        S = self.S
        i = int((self._residuals() / self._allowed).argmax())
        if mu is not None:
            bounds = coupled_bounds(self.H, self.G, mu, self.k)
            i = int(((bounds - self.values[: self.k]) / self._allowed).argmax())
            if bounds[i] > mu:
                S = np.linalg.eigh(self.H + self.G / (bounds[i] - mu))[1][:, ::-1]
        column = torch.as_tensor(S[:, i].copy(), dtype=self.V.dtype, device=self.V.device)
        return self._add(self.C @ column)

    def _add(self, direction: Tensor) -> bool:
        size = float(direction.norm())
        if not self._room() or self.V.shape[1] >= self.matrix.dim or size <= self._floor:
            return False
        d = direction[:, None] / size
        for _ in range(3):
            d = d - self.V @ (self.V.T @ d)
            left = float(d.norm())
            if not left > ALONE:
                return False
            d = d / left
        self.V = torch.cat([self.V, d], dim=1)
        self.W = torch.cat([self.W, self.matrix @ d], dim=1)
        self._look()
        return True

    # -- beyond V --------------------------------------------------------------------

    def _exclude(self, chance: float) -> Tensor | None:
        # A random run until nothing larger can be left beyond V. Returns what it found to be
        # larger, if it did; None where it has excluded that, or the budget is spent. V may be
        # widened meanwhile: what bounds A beyond V bounds it beyond more.
        self.mu, self.tau = math.inf, -math.inf
        locked = self.V
        krylov = Krylov(self.matrix, self.generator, locked)
        if krylov.exhausted:
            self.mu = -math.inf
        couplings: list[float] = []
        while not self._met(self.mu):
            hopeless = not self._met(self.tau) and self.tau < self.values[self.k - 1]
            if hopeless and self._widen(self.tau):
                continue  # no further step can make this bound small enough
            if not self._room() or krylov.exhausted or krylov.broke_down:
                break
            krylov.step()
            values, S, _ = krylov.ritz()
            coupling = krylov.steps[-1].coupling
            couplings.append(float(np.linalg.norm(coupling)))
            self.tau = float(values[-1])
            dim = self.matrix.dim - locked.shape[1]
            self.mu = unseen_bound(values, np.array(couplings), dim, chance) + krylov.floor()
            known = float(np.linalg.norm(coupling @ S[:, -1])) if coupling.size else 0.0
            # No further step lowers tau: where the errors are too large even with it, and it
            # is well known, V must have it. Values that agree within the tolerance stay out.
            larger = self.tau > self.values[self.k - 1] and known <= SETTLED * abs(self.tau)
            if larger and not self._met(self.tau):
                return krylov.vectors(S[:, -1:])[:, 0]
        return None

    def _result(self) -> TopEigenvalues:
        errors = self._errors(self.mu)
        converged = bool((errors <= self._allowed).all())
        if not converged:  # all that is known is that some eigenvalue is as near as this
            errors = np.where(np.isfinite(errors), errors, self._residuals() + self._floor)
        S = torch.as_tensor(self.S[:, : self.k].copy(), dtype=self.V.dtype, device=self.V.device)
        return TopEigenvalues(
            values=tuple(self.values[: self.k].tolist()),
            errors=tuple(errors.tolist()),
            vectors=self.V @ S,
            converged=converged,
            num_matvecs=self.matrix.num_matvecs - self.before,
            warm=True,
        )
