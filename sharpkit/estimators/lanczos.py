"""Extreme eigenpairs of a symmetric matrix by the Lanczos method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.estimators.krylov import Krylov, unseen_share
from sharpkit.estimators.protocol import Matrix, check_positive

__all__ = ["Eigenpairs", "Which", "distinct_errors", "lanczos"]

Which: TypeAlias = Literal["both", "largest", "smallest"]

SMALL_SHARE = 0.05  # an eigenvalue below this share of the largest is "small"
COARSEST = 0.01  # a larger relative residual cannot tell an eigenvalue from its neighbour
STAGNATION_STEPS = 5
FEWEST_STEPS = 8  # of a second start, before it may say that nothing was missed


@dataclass(frozen=True)
class Eigenpairs:
    """Extreme eigenvalues with vectors, residuals and what is known beyond them.

    Attributes:
        largest: The algebraically largest eigenvalues, descending.
        smallest: The algebraically smallest ones, ascending.
        largest_vectors: Unit vectors ``[P, k]``.
        smallest_vectors: Unit vectors ``[P, k]``.
        largest_residuals: Errors: at least ``||A v - theta v||`` and the rounding level,
            more where neighbours are not told apart or the value still moved.
        smallest_residuals: Likewise.
        largest_converged: Whether each error met the tolerance.
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
    product with the basis each time). The error of a pair is its residual, that of its
    whole group where pairs are not told apart, or what the value moved in the last quarter
    of the steps, whichever is largest; it has converged when this is at most ``tol`` times
    its value (or times 5% of the largest magnitude, for values below that). As a small
    residual does not prove that nothing larger was missed, a second run from another
    random start, orthogonal to the pairs found, must then find nothing beyond them; what
    it finds (a repeated eigenvalue, say) is taken in. No method that sees products only
    can exclude a miss: a vector to which both starts are nearly orthogonal stays unseen.

    Args:
        matrix: The matrix ``A``.
        k: Pairs at each end.
        which: ``"both"`` ends, the ``"largest"`` or the ``"smallest"`` only.
        tol: Relative error; one above 0.01 is taken as 0.01.
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
    if not 0 < failure_probability < 1:
        raise SettingsError(
            "Expected `failure_probability` between 0 and 1, both excluded. Got"
            f" {failure_probability!r}."
        )
    return _Search(matrix, k, which, tol, max_matvecs, failure_probability, generator).run()


@dataclass
class _End:
    # Pairs at one end, outermost first; sign is +1 for the largest, -1 for the smallest.
    sign: int
    values: list[float]
    vectors: Tensor
    errors: list[float]
    converged: list[bool]


def distinct_errors(values: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Return errors within which as many eigenvalues lie as there are values.

    A residual alone says that *an* eigenvalue is near; two pairs may mean the same one.
    For orthonormal vectors with residual matrix R as many eigenvalues as vectors lie within
    ``||R||`` (Kahan 1967), so pairs whose intervals meet share the norm of their residuals.

    Args:
        values: Ritz values, ascending.
        residuals: Their residuals.

    Example:
        >>> distinct_errors(np.array([1.0, 1.5, 9.0]), np.array([0.3, 0.4, 0.1])).tolist()
        [0.5, 0.5, 0.1]
    """
    groups: list[list[int]] = []
    for i in range(len(values)):
        groups.append([i])
        while len(groups) > 1:
            above, below = groups[-1], groups[-2]
            reach = np.linalg.norm(residuals[above]) + np.linalg.norm(residuals[below])
            if values[above[0]] - values[below[-1]] > reach:
                break
            groups[-2:] = [below + above]
    errors = residuals.copy()
    for group in groups:
        if len(group) > 1:
            errors[group] = np.linalg.norm(residuals[group])
    return errors


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
        self.matrix, self.k, self.tol = matrix, k, min(tol, COARSEST)
        self.signs = {"both": (1, -1), "largest": (1,), "smallest": (-1,)}[which]
        self.budget, self.probability, self.generator = (
            max_matvecs,
            failure_probability,
            generator,
        )
        self.before = matrix.num_matvecs
        self.low, self.high = math.inf, -math.inf  # the Ritz values' extent
        self.floor = 0.0  # rounding level of values

    def spent(self) -> int:
        return self.matrix.num_matvecs - self.before

    def run(self) -> Eigenpairs:
        krylov = Krylov(self.matrix, self.generator, None)
        ends = self._first_start(krylov)
        if krylov.size == self.matrix.dim:
            second = "not needed"
        elif all(all(end.converged) for end in ends):
            ends, second = self._second_starts(ends, krylov.size)
        else:
            second = "not run"
        return self._result(ends, krylov.size, second)

    def _ritz(self, krylov: Krylov) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values, S, residuals = krylov.ritz()
        self.low, self.high = min(self.low, values[0]), max(self.high, values[-1])
        self.floor = max(self.floor, krylov.floor())
        return values, S, residuals

    def _allowed(self, values: np.ndarray) -> np.ndarray:
        scale = max(abs(self.low), abs(self.high))
        allowed = self.tol * np.maximum(abs(values), SMALL_SHARE * scale)
        result: np.ndarray = np.maximum(allowed, 2 * self.floor)
        return result

    # -- the first start -------------------------------------------------------------

    def _first_start(self, krylov: Krylov) -> list[_End]:
        # Lanczos steps until k pairs at each end converged, or no step is left.
        history: list[np.ndarray] = []
        while True:
            krylov.step()
            values, S, residuals = self._ritz(krylov)
            history.append(values)
            errors = [self._errors(s, values, residuals, history, krylov) for s in self.signs]
            done = all(
                len(e) == self.k and bool((e <= self._allowed(self._outer(s, values))).all())
                for s, e in zip(self.signs, errors, strict=True)
            )
            if krylov.exhausted or self.spent() >= self.budget or done:
                break
        ends = []
        for sign, e in zip(self.signs, errors, strict=True):
            kept = self._outer(sign, values)
            met = (e <= self._allowed(kept)) & (len(kept) == self.k)
            plain = self._outer(sign, residuals) + self.floor
            stated = np.where(np.isfinite(e), e, plain)
            vectors = krylov.vectors(self._outer(sign, S.T).T)
            ends.append(_End(sign, kept.tolist(), vectors, stated.tolist(), met.tolist()))
        return ends

    def _outer(self, sign: int, ascending: np.ndarray) -> np.ndarray:
        # The k outermost of an end, outermost first.
        return ascending[::-1][: self.k] if sign > 0 else ascending[: self.k]

    def _errors(
        self,
        sign: int,
        values: np.ndarray,
        residuals: np.ndarray,
        history: list[np.ndarray],
        krylov: Krylov,
    ) -> np.ndarray:
        # Outermost first; inf while it is not known whether a value stands still.
        v, r = self._outer(sign, values), self._outer(sign, residuals)
        errors = distinct_errors(v[::-sign], r[::-sign])[::-sign] + self.floor
        if krylov.exhausted:
            return errors
        drift = np.full(len(v), math.inf)
        if len(history) > STAGNATION_STEPS:
            past = self._outer(sign, history[-1 - _window(len(history))])
            drift[: len(past)] = abs(v[: len(past)] - past)
        still: np.ndarray = np.maximum(errors, drift)
        return still

    # -- the second start ------------------------------------------------------------

    def _second_starts(self, ends: list[_End], steps: int) -> tuple[list[_End], str]:
        # Look for what the first start could not see, such as repeated eigenvalues.
        outcome = "agreed"
        while True:
            locked = _orthonormal([end.vectors for end in ends])
            if locked.shape[1] >= self.matrix.dim:
                return ends, outcome
            krylov = Krylov(self.matrix, self.generator, locked)
            if krylov.exhausted:
                return ends, outcome
            finished = self._search_beyond(krylov, ends, max(FEWEST_STEPS, 3 * steps // 4))
            if not finished:
                return ends, "not run"
            values, S, residuals = self._ritz(krylov)
            beyond = self._beyond(values, ends) & (residuals <= self._allowed(values))
            if not beyond.any():
                self._doubt(values, residuals, ends)
                return ends, outcome
            outcome = "found more"
            Y = _orthonormal([locked, krylov.vectors(S[:, beyond])])
            if self.spent() + Y.shape[1] > self.budget:
                return ends, "not run"
            ends = self._rotate(Y)
            if not all(all(end.converged) for end in ends):
                return ends, outcome

    def _beyond(self, values: np.ndarray, ends: list[_End]) -> np.ndarray:
        flags = np.zeros(len(values), dtype=bool)
        for end in ends:
            flags |= end.sign * (values - end.values[-1]) > end.errors[-1]
        return flags

    def _search_beyond(self, krylov: Krylov, ends: list[_End], fewest: int) -> bool:
        # Steps until each end is clear (what it would still grow does not reach the pairs
        # found) or its outermost pair stands still; False if the budget ends before.
        history: list[np.ndarray] = []
        while not krylov.exhausted:
            if self.spent() >= self.budget:
                return False
            krylov.step()
            values, _, residuals = self._ritz(krylov)
            history.append(values)
            m = len(history)
            if m < FEWEST_STEPS:
                continue
            half, past = history[m // 2 - 1], history[-1 - _window(m)]
            finished = True
            for end in ends:
                i = -1 if end.sign > 0 else 0
                growth, drift = abs(values[i] - half[i]), abs(values[i] - past[i])
                gap = end.sign * (end.values[-1] - values[i])
                enough = max(min(self._allowed(values)[i], end.errors[-1]), 2 * self.floor)
                settled = max(residuals[i], drift) <= enough
                clear = m >= fewest and gap > growth + residuals[i]
                finished &= bool(settled or clear)
            if finished:
                return True
        return True

    def _doubt(self, values: np.ndarray, residuals: np.ndarray, ends: list[_End]) -> None:
        # A pair that meets the innermost one found: there may be a whole cluster, whose
        # edge is farther off than the residuals of vectors that mix its members.
        for end in ends:
            i = -1 if end.sign > 0 else 0
            gap = abs(end.values[-1] - values[i])
            width = float(gap + 2 * (residuals[i] + end.errors[-1]))
            if gap <= residuals[i] + end.errors[-1]:
                end.errors = [
                    max(e, width) if end.sign * (v - values[i]) <= width else e
                    for v, e in zip(end.values, end.errors, strict=True)
                ]

    def _rotate(self, Y: Tensor) -> list[_End]:
        # Rayleigh-Ritz with explicit products: eigenvalues, vectors and true residuals.
        AY = self.matrix @ Y
        M = (Y.T @ AY).double().cpu().numpy()
        values, S = np.linalg.eigh((M + M.T) / 2)
        rotation = torch.as_tensor(S, dtype=Y.dtype, device=Y.device)
        X = Y @ rotation
        scale = torch.as_tensor(values, dtype=Y.dtype, device=Y.device)
        residuals = (AY @ rotation - X * scale).norm(dim=0).double().cpu().numpy()
        ends = []
        for sign in self.signs:
            v, r = self._outer(sign, values), self._outer(sign, residuals)
            e = distinct_errors(v[::-sign], r[::-sign])[::-sign] + self.floor
            index = self._outer(sign, np.arange(len(values))).tolist()
            met = (e <= self._allowed(v)).tolist()
            ends.append(_End(sign, v.tolist(), X[:, index], e.tolist(), met))
        return ends

    def _result(self, ends: list[_End], steps: int, second: str) -> Eigenpairs:
        low, high = self.low - self.floor, self.high + self.floor
        if second != "not needed":
            share = unseen_share(self.matrix.dim, steps, self.probability / 2)
            # Each end may miss a share of the true width W: W (1 - 2 share) <= high - low.
            missed = share * (high - low) / (1 - 2 * share) if share < 0.5 else math.inf
            low, high = low - missed, high + missed
        nothing = torch.empty(self.matrix.dim, 0, dtype=self.matrix.dtype)
        empty = _End(0, [], nothing, [], [])
        by_sign = {end.sign: end for end in ends}
        top, bottom = by_sign.get(1, empty), by_sign.get(-1, empty)
        return Eigenpairs(
            largest=tuple(top.values),
            smallest=tuple(bottom.values),
            largest_vectors=top.vectors,
            smallest_vectors=bottom.vectors,
            largest_residuals=tuple(top.errors),
            smallest_residuals=tuple(bottom.errors),
            largest_converged=tuple(top.converged),
            smallest_converged=tuple(bottom.converged),
            upper_bound=float(high),
            lower_bound=float(low),
            failure_probability=self.probability,
            second_start=second,
            num_steps=steps,
            num_matvecs=self.spent(),
        )


def _window(steps: int) -> int:
    # Without a gap below it a Ritz value nears its limit like 1/steps^2: what it moved in
    # the last quarter of the run is about what it still has to go.
    return max(STAGNATION_STEPS, steps // 4)


def _orthonormal(blocks: list[Tensor]) -> Tensor:
    # An orthonormal basis; directions that came twice count once.
    Y = torch.cat(blocks, dim=1)
    U, sizes, _ = torch.linalg.svd(Y, full_matrices=False)
    basis: Tensor = U[:, sizes > 0.5]
    return basis
