"""Extreme eigenpairs of a symmetric matrix by the Lanczos method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sharpkit.errors import SettingsError, ShapeError
from sharpkit.estimators.basis import Storage
from sharpkit.estimators.eigenpairs import Eigenpairs, distinct_errors
from sharpkit.estimators.krylov import Krylov, unseen_share
from sharpkit.estimators.protocol import Matrix, check_positive

__all__ = ["Which", "lanczos"]

Which: TypeAlias = Literal["both", "largest", "smallest"]

SMALL_SHARE = 0.05  # an eigenvalue below this share of the largest is "small"
COARSEST = 0.01  # a larger relative residual cannot tell an eigenvalue from its neighbour
MARGIN = 0.85  # of the tolerance: where the first start stops, to leave room for a doubt
DOUBTED = 1.75  # times the tolerance: what a doubt may add to an error that met it
STAGNATION_STEPS = 4
SECOND_SHARE = 0.5  # of the first start's steps, what the second makes before it may say so
FEWEST_STEPS = 8  # of a second start, before it may say that nothing was missed


def lanczos(
    matrix: Matrix,
    *,
    k: int = 1,
    which: Which = "both",
    tol: float = 1e-3,
    max_matvecs: int = 400,
    max_basis: int | None = None,
    block_size: int = 1,
    start: Tensor | None = None,
    storage: Storage | None = None,
    failure_probability: float = 1e-3,
    generator: torch.Generator,
    krylov: Krylov | None = None,
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

    With ``max_basis`` memory is bounded: a full basis is compressed to its outermost Ritz
    vectors (thick restart, Wu and Simon 2000, doi:10.1137/S0895479898334605), at the price
    of more products. A block of two or more tells repeated and clustered eigenvalues apart
    sooner and reads streamed data less often; single vectors need the fewest products.

    Args:
        matrix: The matrix ``A``.
        k: Pairs at each end.
        which: ``"both"`` ends, the ``"largest"`` or the ``"smallest"`` only.
        tol: Relative error; one above 0.01 is taken as 0.01.
        max_matvecs: Budget of products, the second start included.
        max_basis: Most vectors of P numbers to hold at a time; None: one a step.
        block_size: Vectors that each step multiplies together.
        start: Vectors ``[P, j]`` to start from, such as the eigenvectors at an earlier step
            of training; the second start is random all the same.
        storage: Where the basis lies: on the CPU, or in bfloat16.
        failure_probability: Of the bounds beyond the Ritz values.
        generator: Source of the start vectors.
        krylov: A run to go on from: its steps are taken as this search's own first ones. The
            block, the storage and the start are its own.

    Returns:
        Pairs, residuals, bounds and whether they converged.

    Raises:
        SettingsError: If k, the block or the basis is less than 1 or more than P, the basis
            is too small for k, a setting is not positive, the start is not finite, or
            settings of a run are given beside ``krylov``.

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
    if not 1 <= block_size <= matrix.dim:
        raise SettingsError(
            f"Expected `block_size` between 1 and the number of parameters, {matrix.dim}. Got"
            f" {block_size}."
        )
    if start is not None and (start.ndim != 2 or start.shape[0] != matrix.dim):
        raise ShapeError(f"Expected `start` of shape ({matrix.dim}, j). Got {tuple(start.shape)}.")
    if start is not None and not bool(torch.isfinite(start).all()):
        raise SettingsError("Expected a finite `start`. Got NaN or inf in it.")
    if krylov is not None:
        if start is not None or storage is not None:
            raise SettingsError(
                "Expected no `start` and no `storage` beside `krylov`: they belong to the run."
                " Make the Krylov with them, or leave `krylov` out."
            )
        if block_size != krylov.block:
            raise SettingsError(
                f"Expected `block_size` to be that of the run, {krylov.block}. Got {block_size}."
            )
    ends = 2 if which == "both" else 1
    if max_basis is not None:
        fewest = min(ends * k + 2 * block_size + 2, matrix.dim)
        if not fewest <= max_basis <= matrix.dim:
            raise SettingsError(
                f"Expected `max_basis` between {fewest} (for {ends * k} pairs) and the number"
                f" of parameters, {matrix.dim}. Got {max_basis}."
            )
    settings = _Settings(
        k, which, min(tol, COARSEST), max_matvecs, failure_probability, max_basis, block_size,
        storage,
    )  # fmt: skip
    return _Search(matrix, settings, generator).run(krylov, start)


@dataclass(frozen=True)
class _Settings:
    k: int
    which: Which
    tol: float
    budget: int
    probability: float
    max_basis: int | None
    block: int
    storage: Storage | None

    @property
    def signs(self) -> tuple[int, ...]:
        """+1 for the largest end, -1 for the smallest."""
        return {"both": (1, -1), "largest": (1,), "smallest": (-1,)}[self.which]

    @property
    def keep(self) -> tuple[int, int]:
        """Pairs that a restart must keep at the (smallest, largest) end."""
        return (self.k + 1) * (-1 in self.signs), (self.k + 1) * (1 in self.signs)


@dataclass
class _End:
    # Pairs at one end, outermost first; sign is +1 for the largest, -1 for the smallest.
    sign: int
    values: list[float]
    vectors: Tensor
    errors: list[float]
    converged: list[bool]


class _Search:
    def __init__(self, matrix: Matrix, settings: _Settings, generator: torch.Generator):
        self.matrix, self.settings, self.generator = matrix, settings, generator
        self.k, self.tol, self.signs = settings.k, settings.tol, settings.signs
        self.low, self.high = math.inf, -math.inf  # the Ritz values' extent
        self.floor = 0.0  # rounding level of values
        self.blur = 0.0  # what a rounded basis does to the extent
        self._before = 0

    def spent(self) -> int:
        return self.matrix.num_matvecs - self._before

    def _krylov(self, locked: Tensor | None, start: Tensor | None, room: int | None) -> Krylov:
        return Krylov(
            self.matrix, self.generator, locked, block=self.settings.block, start=start,
            max_basis=room, keep=self.settings.keep, storage=self.settings.storage,
        )  # fmt: skip

    def run(self, krylov: Krylov | None, start: Tensor | None) -> Eigenpairs:
        own = krylov is None
        krylov = krylov or self._krylov(None, start, self.settings.max_basis)
        krylov.keep = self.settings.keep
        head = len(krylov.steps)
        step, at, ends = self._first_start(krylov)
        # What others did of the run counts as done here: the same steps, the same budget.
        self._before = self.matrix.num_matvecs - at.products
        if krylov.basis.lossy:
            ends = self._rotate(self._purified(ends))
        exact = krylov.restarts == 0 and not krylov.basis.lossy
        whole = exact and at.size == self.matrix.dim
        fresh = not krylov.warm and krylov.restarts == 0
        steps = step if fresh else 0
        products, restarts = at.products, krylov.restarts
        if own:
            krylov.release()
        elif krylov.restarts == 0 and len(krylov.steps) > head:
            krylov.truncate(max(head, 1))
        if whole:
            second = "not needed"
        elif all(all(end.converged) for end in ends):
            room = self.settings.max_basis
            if room is not None and not own and krylov.restarts == 0:
                room = max(room - krylov.size, sum(self.settings.keep) + 2 * self.settings.block)
            ends, second = self._second_starts(ends, steps or products, room)
        else:
            second = "not run"
        return self._result(ends, steps, products, restarts, second)

    def _ritz(
        self, krylov: Krylov, steps: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values, S, residuals = krylov.ritz(steps)
        self.low, self.high = min(self.low, values[0]), max(self.high, values[-1])
        self.floor = max(self.floor, krylov.floor(steps))
        if krylov.basis.lossy:
            self.blur = max(self.blur, 2 * krylov.noise(steps))
        return values, S, residuals

    def _allowed(self, values: np.ndarray) -> np.ndarray:
        scale = max(abs(self.low), abs(self.high))
        allowed = self.tol * np.maximum(abs(values), SMALL_SHARE * scale)
        result: np.ndarray = np.maximum(allowed, 2 * self.floor)
        return result

    # -- the first start -------------------------------------------------------------

    def _first_start(self, krylov: Krylov) -> tuple[int, Any, list[_End]]:
        # Lanczos steps until k pairs at each end converged, or no step is left. Steps that
        # the run has already made are gone through like new ones.
        history: list[np.ndarray] = []
        step = 0
        while True:
            step = min(step, len(krylov.steps)) + 1
            if step > len(krylov.steps):
                krylov.step()
                step = len(krylov.steps)
            values, S, residuals = self._ritz(krylov, step)
            at = krylov.steps[step - 1]
            history.append(values)
            errors = [self._errors(s, values, residuals, history, at.exhausted) for s in self.signs]
            done = all(
                len(e) == self.k
                and bool((e <= MARGIN * self._allowed(self._outer(s, values))).all())
                for s, e in zip(self.signs, errors, strict=True)
            )
            # The next step makes as many products as the coupling to it has rows.
            spent = at.products + len(at.coupling) > self.settings.budget
            if at.exhausted or spent or done:
                break
        ends = []
        for sign, e in zip(self.signs, errors, strict=True):
            kept = self._outer(sign, values)
            met = (e <= self._allowed(kept)) & (len(kept) == self.k)
            plain = self._outer(sign, residuals) + self.floor
            stated = np.where(np.isfinite(e), e, plain)
            vectors = krylov.vectors(self._outer(sign, S.T).T)
            ends.append(_End(sign, kept.tolist(), vectors, stated.tolist(), met.tolist()))
        return step, at, ends

    def _purified(self, ends: list[_End]) -> Tensor:
        # Vectors put together from a rounded basis, with the directions of their residuals.
        Y = _orthonormal([end.vectors for end in ends])
        W = self.matrix @ Y
        for _ in range(2):
            W = W - Y @ (Y.T @ W)
        sizes = W.norm(dim=0)
        W = W[:, sizes > 0] / sizes[sizes > 0]
        basis: Tensor = torch.linalg.qr(torch.cat([Y, W], dim=1)[:, : self.matrix.dim])[0]
        return basis

    def _outer(self, sign: int, ascending: np.ndarray) -> np.ndarray:
        # The k outermost of an end, outermost first.
        return ascending[::-1][: self.k] if sign > 0 else ascending[: self.k]

    def _errors(
        self,
        sign: int,
        values: np.ndarray,
        residuals: np.ndarray,
        history: list[np.ndarray],
        exhausted: bool,
    ) -> np.ndarray:
        # Outermost first; inf while it is not known whether a value stands still.
        v, r = self._outer(sign, values), self._outer(sign, residuals)
        errors = distinct_errors(v[::-sign], r[::-sign])[::-sign] + self.floor
        if exhausted:
            return errors
        drift = np.full(len(v), math.inf)
        if len(history) > STAGNATION_STEPS:
            past = self._outer(sign, history[-1 - _window(len(history))])
            drift[: len(past)] = abs(v[: len(past)] - past)
        still: np.ndarray = np.maximum(errors, drift)
        return still

    # -- the second start ------------------------------------------------------------

    def _second_starts(
        self, ends: list[_End], steps: int, room: int | None
    ) -> tuple[list[_End], str]:
        # Look for what the first start could not see, such as repeated eigenvalues.
        outcome = "agreed"
        while True:
            locked = _orthonormal([end.vectors for end in ends])
            if locked.shape[1] >= self.matrix.dim:
                return ends, outcome
            krylov = self._krylov(locked, None, room)
            if krylov.exhausted:
                return ends, outcome
            finished = self._search_beyond(
                krylov, ends, max(FEWEST_STEPS, int(SECOND_SHARE * steps))
            )
            if not finished:
                return ends, "not run"
            values, S, residuals = self._ritz(krylov)
            beyond = self._beyond(values, ends) & (residuals <= self._allowed(values))
            if not beyond.any():
                self._doubt(values, residuals, ends)
                return ends, outcome
            outcome = "found more"
            Y = _orthonormal([locked, krylov.vectors(S[:, beyond])])
            if self.spent() + Y.shape[1] > self.settings.budget:
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
            if self.spent() + self.settings.block > self.settings.budget:
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
                enough = max(min(self._allowed(values)[i] / 4, end.errors[-1]), self.floor)
                settled = max(residuals[i], drift) <= enough
                clear = m >= fewest and gap > growth + residuals[i]
                finished &= bool(settled or clear)
            if finished:
                return True
        return True

    def _doubt(self, values: np.ndarray, residuals: np.ndarray, ends: list[_End]) -> None:
        # What the second start found beside the innermost pair may lie a little beyond it.
        # The sorted eigenvalues of A are those found and those of the rest, up to the
        # residuals (Weyl): what the rest may reach beyond comes on top of these.
        for end in ends:
            i = -1 if end.sign > 0 else 0
            beyond = end.sign * (values[i] - end.values[-1]) + 2 * residuals[i]
            if beyond > -end.errors[-1]:
                reach = float(max(beyond, 0.0))
                end.errors = [
                    e + max(reach - end.sign * (v - end.values[-1]), 0.0)
                    for v, e in zip(end.values, end.errors, strict=True)
                ]
                met = np.array(end.errors) <= DOUBTED * self._allowed(np.array(end.values))
                end.converged = [a and bool(b) for a, b in zip(end.converged, met, strict=True)]

    def _rotate(self, Y: Tensor) -> list[_End]:
        # Rayleigh-Ritz with explicit products: eigenvalues, vectors and true residuals.
        AY = self.matrix @ Y
        M = (Y.T @ AY).double().cpu().numpy()
        values, S = np.linalg.eigh((M + M.T) / 2)
        self.low, self.high = min(self.low, values[0]), max(self.high, values[-1])
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

    def _result(
        self, ends: list[_End], steps: int, products: int, restarts: int, second: str
    ) -> Eigenpairs:
        low, high = self.low - self.floor - self.blur, self.high + self.floor + self.blur
        if second != "not needed":
            share = math.inf
            if steps:
                share = unseen_share(self.matrix.dim, steps, self.settings.probability / 2)
            # Each end may miss a share of the true width W: W (1 - 2 share) <= high - low.
            missed = share * (high - low) / (1 - 2 * share) if share < 0.5 else math.inf
            low, high = low - missed, high + missed
        nothing = torch.empty(
            self.matrix.dim, 0, dtype=self.matrix.dtype, device=self.matrix.device
        )
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
            failure_probability=self.settings.probability,
            second_start=second,
            num_steps=products,
            num_matvecs=self.spent(),
            num_restarts=restarts,
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
