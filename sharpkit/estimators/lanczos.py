"""Extreme eigenpairs of a symmetric matrix by the Lanczos method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.estimators.protocol import Matrix, check_positive, sphere_vector

__all__ = ["Eigenpairs", "Krylov", "Which", "lanczos", "tridiagonal", "unseen_share"]

Which: TypeAlias = Literal["both", "largest", "smallest"]

SMALL_SHARE = 0.05  # an eigenvalue below this share of the largest is "small"
STAGNATION_STEPS = 5
ROUNDING = 10  # products are wrong by a few eps of the matrix's norm


@dataclass(frozen=True)
class Eigenpairs:
    """Extreme eigenvalues with vectors, residuals and what is known beyond them.

    Attributes:
        largest: The algebraically largest eigenvalues, descending.
        smallest: The algebraically smallest ones, ascending.
        largest_vectors: Unit vectors ``[P, k]``.
        smallest_vectors: Unit vectors ``[P, k]``.
        largest_residuals: ``||A v - theta v||`` (at least the rounding level); an
            eigenvalue lies within this distance of each value.
        smallest_residuals: Likewise.
        largest_converged: Whether each residual met the tolerance and stood still.
        smallest_converged: Likewise.
        upper_bound: No eigenvalue is larger, with probability ``1 - failure_probability``
            over the random start; inf if nothing can be said yet.
        lower_bound: No eigenvalue is smaller, likewise.
        failure_probability: Of the two bounds.
        second_start: ``"agreed"``: a run from a second random start, orthogonal to the
            vectors found, met nothing beyond them. ``"found more"``: it did, and the
            results hold it. ``"not needed"``: the space was exhausted. ``"not run"``: the
            budget ended before.
        num_steps: Lanczos steps of the first run.
        num_matvecs: Products in all.
    """

    largest: tuple[float, ...]
    smallest: tuple[float, ...]
    largest_vectors: Tensor
    smallest_vectors: Tensor
    largest_residuals: tuple[float, ...]
    smallest_residuals: tuple[float, ...]
    largest_converged: tuple[bool, ...]
    smallest_converged: tuple[bool, ...]
    upper_bound: float
    lower_bound: float
    failure_probability: float
    second_start: str
    num_steps: int
    num_matvecs: int

    @property
    def converged(self) -> bool:
        """Whether every pair converged and a second start did not object."""
        checked = self.second_start in ("agreed", "found more", "not needed")
        return checked and all(self.largest_converged) and all(self.smallest_converged)


class Krylov:
    """One Lanczos run with full reorthogonalization, orthogonal to locked vectors."""

    def __init__(self, matrix: Matrix, generator: torch.Generator, locked: Tensor | None):
        self.matrix, self.generator, self.locked = matrix, generator, locked
        self.alphas: list[float] = []
        self.betas: list[float] = []  # betas[j] couples j and j+1
        self.basis = torch.empty(0, matrix.dim, dtype=matrix.dtype, device=matrix.device)
        self.exhausted = False
        self.scale = 0.0
        self._next: Tensor | None = self._fresh()

    @property
    def size(self) -> int:
        """Steps done."""
        return len(self.alphas)

    def _room(self) -> None:
        if self.size == len(self.basis):  # grow by half: amortised, no large first bite
            grown = torch.empty(
                min(max(16, len(self.basis) * 3 // 2), self.matrix.dim),
                self.matrix.dim,
                dtype=self.matrix.dtype,
                device=self.matrix.device,
            )
            grown[: self.size] = self.basis[: self.size]
            self.basis = grown

    def _orthogonalize(self, w: Tensor) -> Tensor:
        for _ in range(2):  # "twice is enough"
            V = self.basis[: self.size]
            w = w - V.T @ (V @ w)
            if self.locked is not None:
                w = w - self.locked @ (self.locked.T @ w)
        return w

    def _fresh(self) -> Tensor | None:
        taken = self.size + (0 if self.locked is None else self.locked.shape[1])
        if taken >= self.matrix.dim:
            return None
        for _ in range(5):
            w = self._orthogonalize(sphere_vector(self.matrix, self.generator))
            length = float(w.norm())
            if length > 1e-3 / math.sqrt(self.matrix.dim):
                return self._orthogonalize(w / length)
        return None

    def step(self) -> None:
        """Add one vector; sets ``exhausted`` when none is left."""
        if self._next is None:
            self.exhausted = True
            return
        v = self._next / self._next.norm()
        self._room()
        w = self.matrix @ v
        alpha = float(torch.dot(v.double(), w.double()))
        self.basis[self.size] = v
        self.alphas.append(alpha)
        w = self._orthogonalize(w)
        beta = float(w.norm())
        self.scale = max(self.scale, abs(alpha) + beta + (self.betas[-1] if self.betas else 0))
        eps = torch.finfo(self.matrix.dtype).eps
        if beta > ROUNDING * eps * max(self.scale, torch.finfo(self.matrix.dtype).tiny):
            self.betas.append(beta)
            self._next = w
        else:  # an invariant subspace: go on from a new random vector
            self.betas.append(0.0)
            self._next = self._fresh()
            self.exhausted = self._next is None

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return Ritz values (ascending), coefficient vectors and residuals."""
        values, vectors = tridiagonal(self.alphas, self.betas[:-1])
        return values, vectors, abs(self.betas[-1] * vectors[-1])

    def vectors(self, coefficients: np.ndarray) -> Tensor:
        """Return Ritz vectors ``[P, j]`` for columns of coefficients."""
        S = torch.as_tensor(coefficients, dtype=self.matrix.dtype, device=self.matrix.device)
        return self.basis[: self.size].T @ S


def tridiagonal(alphas: list[float], betas: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues (ascending) and eigenvectors of a symmetric tridiagonal matrix.

    Example:
        >>> tridiagonal([2.0, 2.0], [1.0])[0].tolist()
        [1.0, 3.0]
    """
    if len(alphas) == 1:
        return np.array(alphas), np.ones((1, 1))
    return scipy.linalg.eigh_tridiagonal(np.array(alphas), np.array(betas))


def unseen_share(dim: int, steps: int, failure_probability: float) -> float:
    r"""Return the share of the spectrum's width that may lie beyond the Ritz values.

    From a uniform random start, after k steps the relative error exceeds
    :math:`\epsilon` with probability at most
    :math:`1.648\sqrt{n}\,e^{-\sqrt\epsilon(2k-1)}` (Kuczynski and Wozniakowski 1992,
    doi:10.1137/0613066); solved for :math:`\epsilon`. 1 or more means: nothing known.

    Example:
        >>> round(unseen_share(10**8, 84, 1e-3), 4)
        0.0099
    """
    return float((math.log(1.648 * math.sqrt(dim) / failure_probability) / (2 * steps - 1)) ** 2)


def lanczos(
    matrix: Matrix,
    *,
    k: int = 1,
    which: Which = "both",
    tol: float = 1e-3,
    max_matvecs: int = 400,
    failure_probability: float = 1e-3,
    generator: torch.Generator,
) -> Eigenpairs:
    r"""Compute the k algebraically largest and smallest eigenpairs.

    Every new vector is orthogonalized twice against all former ones (one matrix-vector
    product with the basis each time). A pair has converged when its residual is at most
    ``tol`` times its value (or times 5% of the largest magnitude, for values below that)
    and the value stood still for 5 steps. As a small residual does not prove that nothing
    larger was missed, a second run from another random start, orthogonal to the pairs
    found, must then find nothing beyond them; what it finds (a repeated eigenvalue, say)
    is taken in.

    Args:
        matrix: The matrix ``A``.
        k: Pairs at each end.
        which: ``"both"`` ends, the ``"largest"`` or the ``"smallest"`` only.
        tol: Relative residual.
        max_matvecs: Budget of products, the second start included.
        failure_probability: Of the bounds beyond the Ritz values.
        generator: Source of the start vectors.

    Returns:
        Pairs, residuals, bounds and whether they converged. Memory: one vector of P
        numbers a step.

    Raises:
        SettingsError: If k is less than 1 or more than P, or a setting is not positive.

    Example:
        >>> from sharpkit.operators import SymmetricOperator
        >>> A = SymmetricOperator.wrap(torch.diag(torch.tensor([5.0, 1.0, 1.0, -2.0])))
        >>> pairs = lanczos(A, k=1, generator=torch.Generator().manual_seed(0))
        >>> [round(x, 4) for x in (*pairs.largest, *pairs.smallest)], pairs.converged
        ([5.0, -2.0], True)
    """
    if not 1 <= k <= matrix.dim:
        raise SettingsError(
            f"Expected `k` between 1 and the number of parameters, {matrix.dim}. Got {k}."
        )
    if which not in ("both", "largest", "smallest"):
        raise SettingsError(
            f"Expected `which` to be 'both', 'largest' or 'smallest'. Got {which!r}."
        )
    check_positive("tol", tol)
    check_positive("max_matvecs", max_matvecs, minimum=1)
    check_positive("failure_probability", failure_probability)
    return _Search(matrix, k, which, tol, max_matvecs, failure_probability, generator).run()


@dataclass
class _Found:
    # Pairs at one end, outermost first; sign is +1 for the largest, -1 for the smallest.
    sign: int
    values: list[float]
    vectors: Tensor
    residuals: list[float]
    converged: list[bool]

    def keep(self, k: int) -> None:
        order = sorted(range(len(self.values)), key=lambda i: -self.sign * self.values[i])[:k]
        self.values = [self.values[i] for i in order]
        self.residuals = [self.residuals[i] for i in order]
        self.converged = [self.converged[i] for i in order]
        self.vectors = self.vectors[:, order]


class _Search:
    def __init__(
        self,
        matrix: Matrix,
        k: int,
        which: Which,
        tol: float,
        max_matvecs: int,
        failure_probability: float,
        generator: torch.Generator,
    ):
        self.matrix, self.k, self.tol = matrix, k, tol
        self.signs = {"both": (1, -1), "largest": (1,), "smallest": (-1,)}[which]
        self.budget, self.probability, self.generator = (
            max_matvecs,
            failure_probability,
            generator,
        )
        self.before = matrix.num_matvecs

    def spent(self) -> int:
        return self.matrix.num_matvecs - self.before

    def run(self) -> Eigenpairs:
        krylov = Krylov(self.matrix, self.generator, None)
        ends = self._iterate(krylov, self.k, self.budget)
        steps = krylov.size
        values = krylov.ritz()[0]
        self.extent = [float(values[0]), float(values[-1])]
        if krylov.exhausted and steps == self.matrix.dim:
            second = "not needed"
        elif all(all(end.converged) for end in ends):
            second = self._second_starts(ends, steps)
        else:
            second = "not run"
        return self._result(ends, steps, second)

    def _iterate(self, krylov: Krylov, k: int, budget: int) -> list[_Found]:
        # Lanczos steps until k pairs at each end converged, or no step is left.
        history: list[np.ndarray] = []
        while True:
            krylov.step()
            values, S, residuals = krylov.ritz()
            history.append(self._wanted(values, k))
            done = self._done(values, residuals, history, k)
            if krylov.exhausted or self.spent() >= budget or all(all(d) for d in done):
                break
        floor = ROUNDING * torch.finfo(self.matrix.dtype).eps * max(abs(values[0]), abs(values[-1]))
        residuals = self._blurred(values, residuals)
        ends = []
        for sign, flags in zip(self.signs, done, strict=True):
            index = self._order(values, sign)[:k]
            ends.append(
                _Found(
                    sign,
                    [float(values[i]) for i in index],
                    krylov.vectors(S[:, index]),
                    [float(max(residuals[i], floor)) for i in index],
                    [bool(f or krylov.exhausted) for f in flags],
                )
            )
        return ends

    @staticmethod
    def _blurred(values: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        # Where the intervals of neighbours overlap, one eigenvalue may have been missed
        # between them: the error is then the width of the union, not of one interval.
        wide = residuals.copy()
        for i in range(len(values) - 1):
            gap = values[i + 1] - values[i]
            reach = residuals[i] + residuals[i + 1]
            if gap < reach:
                wide[i] = max(wide[i], gap + reach)
                wide[i + 1] = max(wide[i + 1], gap + reach)
        return wide

    @staticmethod
    def _order(values: np.ndarray, sign: int) -> list[int]:
        return list(range(len(values)))[:: -1 if sign > 0 else 1]

    def _wanted(self, values: np.ndarray, k: int) -> np.ndarray:
        return np.concatenate([values[self._order(values, sign)[:k]] for sign in self.signs])

    def _allowed(self, value: float, scale: float) -> float:
        return self.tol * max(abs(value), SMALL_SHARE * scale)

    def _done(
        self, values: np.ndarray, residuals: np.ndarray, history: list[np.ndarray], k: int
    ) -> list[list[bool]]:
        scale = max(abs(values[0]), abs(values[-1]))
        rounding = ROUNDING * torch.finfo(self.matrix.dtype).eps * scale
        done = []
        for which, sign in enumerate(self.signs):
            flags = []
            for place, i in enumerate(self._order(values, sign)[:k]):
                allowed = max(self._allowed(values[i], scale), rounding)
                still = False
                if len(history) > STAGNATION_STEPS:
                    past = history[-1 - STAGNATION_STEPS]
                    if len(past) == len(history[-1]):
                        drift = abs(past[which * k + place] - values[i])
                        still = drift <= allowed
                flags.append(bool(residuals[i] <= allowed) and still)
            done.append(flags + [False] * (min(k, self.matrix.dim) - len(flags)))
        return done

    def _second_starts(self, ends: list[_Found], steps: int) -> str:
        # Look for what the first start could not see, such as repeated eigenvalues.
        outcome = "agreed"
        while True:
            locked = torch.linalg.qr(torch.cat([end.vectors for end in ends], dim=1))[0]
            if locked.shape[1] >= self.matrix.dim:
                return outcome
            krylov = Krylov(self.matrix, self.generator, locked)
            for _ in range(max(8, (steps + 1) // 2)):
                if krylov.exhausted:
                    break
                if self.spent() >= self.budget:
                    return "not run"
                krylov.step()
            if krylov.size == 0 or not self._beyond(krylov, ends):
                return outcome
            outcome = "found more"
            found = self._iterate(krylov, 1, self.budget)
            for end, new in zip(ends, found, strict=True):
                self._measure_residuals(new)
                end.values += new.values
                end.vectors = torch.cat([end.vectors, new.vectors], dim=1)
                end.residuals += new.residuals
                end.converged += new.converged
                end.keep(self.k)
            if self.spent() >= self.budget:
                return "not run"

    def _measure_residuals(self, found: _Found) -> None:
        # The second run does not see the part of A v along the locked vectors, which are
        # exact only to their own residuals: one product each tells the whole residual.
        for i, v in enumerate(found.vectors.unbind(dim=1)):
            rest = self.matrix @ v
            found.values[i] = float(torch.dot(v.double(), rest.double()))
            residual = float((rest - found.values[i] * v).norm())
            found.residuals[i] = max(found.residuals[i], residual)
            scale = max(abs(x) for x in self.extent)
            rounding = ROUNDING * torch.finfo(self.matrix.dtype).eps * scale
            allowed = max(self._allowed(found.values[i], scale), rounding)
            found.converged[i] = found.converged[i] and residual <= allowed

    def _beyond(self, krylov: Krylov, ends: list[_Found]) -> bool:
        values = krylov.ritz()[0]
        self.extent = [
            min(self.extent[0], float(values[0])),
            max(self.extent[1], float(values[-1])),
        ]
        scale = max(abs(x) for x in self.extent)
        for end in ends:
            innermost, outermost = end.values[-1], values[-1 if end.sign > 0 else 0]
            if end.sign * (outermost - innermost) > self._allowed(innermost, scale):
                return True
        return False

    def _result(self, ends: list[_Found], steps: int, second: str) -> Eigenpairs:
        low, high = self.extent
        if second == "not needed":
            upper, lower = high, low
        else:
            share = unseen_share(self.matrix.dim, steps, self.probability / 2)
            # Each end may miss a share of the true width W: W (1 - 2 share) <= high - low.
            width = (high - low) / (1 - 2 * share) if share < 0.5 else math.inf
            missed = share * width if math.isfinite(width) else math.inf
            upper, lower = high + missed, low - missed
        empty = _Found(0, [], torch.empty(self.matrix.dim, 0), [], [])
        by_sign = {end.sign: end for end in ends}
        top, bottom = by_sign.get(1, empty), by_sign.get(-1, empty)
        return Eigenpairs(
            largest=tuple(top.values),
            smallest=tuple(bottom.values),
            largest_vectors=top.vectors,
            smallest_vectors=bottom.vectors,
            largest_residuals=tuple(top.residuals),
            smallest_residuals=tuple(bottom.residuals),
            largest_converged=tuple(top.converged),
            smallest_converged=tuple(bottom.converged),
            upper_bound=upper,
            lower_bound=lower,
            failure_probability=self.probability,
            second_start=second,
            num_steps=steps,
            num_matvecs=self.spent(),
        )
