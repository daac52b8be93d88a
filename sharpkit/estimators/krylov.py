"""The Lanczos recurrence, and what it says about the spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from sharpkit.estimators.basis import Basis, Storage, accurate_gram
from sharpkit.estimators.protocol import Matrix, sphere_vector

__all__ = ["ROUNDING", "Krylov", "tridiagonal", "unseen_share"]

ROUNDING = 10  # products are wrong by a few eps of the matrix's norm, at least
ONE_PASS = 0.1  # of a vector: what one pass may take away and leave the rest orthogonal
CANCELLED = 1e-3  # of a product: when so little is left, it is orthogonalized once more
KEPT_SHARE = 0.6  # of a full basis, what a restart keeps


@dataclass(frozen=True)
class _Step:
    # What is known after a step: sizes of the basis, coupling to the next block, levels.
    size: int
    products: int
    coupling: np.ndarray  # [b, size]: A V = V T + X coupling
    scale: float
    noise: float
    exhausted: bool


class Krylov:
    r"""A Lanczos run with full reorthogonalization, in blocks, with thick restarts.

    It holds :math:`A V = V T + X R` for orthonormal :math:`V` and the next block
    :math:`X`. When the basis is full, V is replaced by its outermost Ritz vectors, for
    which the same equation holds, and the run goes on (Wu and Simon 2000,
    doi:10.1137/S0895479898334605). Ritz values only move outwards.

    Args:
        matrix: The matrix ``A``.
        generator: Source of random vectors.
        locked: Orthonormal columns ``[P, q]`` to which everything stays orthogonal.
        block: Width of the block; more than one sees repeated eigenvalues.
        start: Vectors ``[P, j]`` to start from, such as eigenvectors of a nearby matrix;
            their mean, with a tenth of a random vector, leads the first block.
        max_basis: Most vectors to hold; None: no limit.
        keep: Ritz pairs wanted at the (smallest, largest) end, which a restart keeps.
        storage: Where the basis lies.

    Attributes:
        steps: What was known after each step since the last restart.
        restarts: How often the basis was full.
        keep: As given; it may change as the run goes on.
        warm: Whether it started from given vectors, so that no bound of chance holds.
    """

    def __init__(
        self,
        matrix: Matrix,
        generator: torch.Generator,
        locked: Tensor | None = None,
        *,
        block: int = 1,
        start: Tensor | None = None,
        max_basis: int | None = None,
        keep: tuple[int, int] = (1, 1),
        storage: Storage | None = None,
    ):
        self.matrix, self.generator, self.locked = matrix, generator, locked
        self.basis = Basis(matrix, storage)
        self.steps: list[_Step] = []
        self.restarts = 0
        self.keep, self.warm = keep, start is not None
        self.block, self._most = block, max_basis
        self._T = np.zeros((0, 0))
        self._couplings: list[np.ndarray] = []  # what each product had along locked vectors
        self._products = 0
        self._scale = self._noise = 0.0
        self._last: Tensor | None = None  # the block before, while the coupling is to it alone
        self._next: Tensor | None = self._first(start)
        self._R = np.zeros((0 if self._next is None else self._next.shape[1], 0))

    @property
    def size(self) -> int:
        """Vectors in the basis."""
        return self.basis.size

    @property
    def exhausted(self) -> bool:
        """Whether no direction is left."""
        return self._next is None

    @property
    def broke_down(self) -> bool:
        """Whether the last step met an invariant subspace."""
        return bool(self.steps) and not self.steps[-1].coupling.any()

    @property
    def num_products(self) -> int:
        """Products that led to the present basis; going back takes them back."""
        return self._products

    # -- vectors ---------------------------------------------------------------------

    def _taken(self) -> int:
        return self.size + (0 if self.locked is None else self.locked.shape[1])

    def _first(self, start: Tensor | None) -> Tensor | None:
        if start is None:
            return self._fresh()
        mean = start.to(self.matrix.device, self.matrix.dtype).sum(dim=1)
        mean = torch.nn.functional.normalize(mean, dim=0)
        lead = (mean + 0.1 * sphere_vector(self.matrix, self.generator))[:, None]
        others = self._fresh(self.block - 1) if self.block > 1 else None
        return self._independent(lead if others is None else torch.cat([lead, others], 1))

    def _fresh(self, count: int | None = None) -> Tensor | None:
        # Random orthonormal vectors, orthogonal to all that there are; fewer if none is left.
        count = min(count or self.block, self.matrix.dim - self._taken())
        if count <= 0:
            return None
        for _ in range(5):
            columns = [sphere_vector(self.matrix, self.generator) for _ in range(count)]
            X = self._independent(torch.stack(columns, dim=1))
            if X is not None:
                return X
        return None

    def _independent(self, W: Tensor) -> Tensor | None:
        W, _, _ = self._orthogonalize(W)
        X, sizes, _ = _orthonormal(W)
        kept = sizes > 1e-3 / math.sqrt(self.matrix.dim)
        if not kept.any():
            return None
        return _polished(self._orthogonalize(X[:, torch.as_tensor(kept, device=X.device)])[0])

    def _orthogonalize(
        self, W: Tensor, enough: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # Returns what is left, and the first pass's coefficients. One pass is enough where
        # it takes away less than the share of what is left; twice is always enough.
        first: tuple[Tensor, Tensor | None] | None = None
        basis, W = self.basis, self.basis.part(W)
        locked = None if self.locked is None else basis.part(self.locked)
        for _ in range(2):
            along = basis.coefficients(W)
            W = basis.subtract(W, along)
            held = None
            if locked is not None:
                held = basis.summed(locked.T @ W)
                W = torch.addmm(W, locked, held, alpha=-1)
            first = first or (along, held)
            taken = float(along.norm()) + (0.0 if held is None else float(held.norm()))
            if taken <= enough * basis.norm(W):
                break
        assert first is not None
        return basis.whole(W), *first

    # -- steps -----------------------------------------------------------------------

    def step(self) -> None:
        """Add one block; sets ``exhausted`` when none is left."""
        if self._next is None:
            return
        width = self._next.shape[1]
        if self._most is not None and self.size + width > self._most:
            self._restart(width)
        before = self.size
        X = self.basis.append(self._next)
        self._next = None  # the same memory is the basis's now
        try:
            W = self.matrix @ X
        except BaseException:  # as before the step, for whoever shares the run
            self._next = X.clone()
            self.basis.truncate(before)
            raise
        self._products += width
        own, length = accurate_gram(X, W).cpu().numpy(), float(W.norm())
        own = (own + own.T) / 2
        # Take out what the recurrence knows first: the rest is rounding, for one pass.
        W = torch.addmm(W, X, torch.as_tensor(own, dtype=X.dtype, device=X.device), alpha=-1)
        if self._last is not None and before:
            known = torch.as_tensor(self._R[:, -self._last.shape[1] :].T.copy(), device=X.device)
            W.addmm_(self._last, known.to(X.dtype), alpha=-1)
        expected = np.zeros((before, width)) if self._last is not None else self._R.T
        W, along, held = self._orthogonalize(W, ONE_PASS)
        self._last = X
        if before:
            unexpected = along[:before].double().cpu().numpy() - expected
            self._noise = max(self._noise, float(np.linalg.norm(unexpected)))
        if held is not None:
            self._couplings.append(held.double().cpu().numpy())
        T = np.zeros((self.size, self.size))
        T[:before, :before] = self._T
        T[before:, before:], T[:before, before:], T[before:, :before] = own, self._R.T, self._R
        self._T = T
        X, sizes, right = _orthonormal(W)
        reach = float(np.linalg.norm(own, 2) + sizes.max(initial=0.0))
        reach += float(np.linalg.norm(self._R, 2)) if self._R.size else 0.0
        self._scale = max(self._scale, reach)
        eps = torch.finfo(self.matrix.dtype).eps
        kept = sizes > ROUNDING * eps * max(self._scale, torch.finfo(self.matrix.dtype).tiny)
        kept[max(self.matrix.dim - self._taken(), 0) :] = False  # what is left is rounding
        if kept.any():
            self._next = X if kept.all() else X[:, torch.as_tensor(kept, device=X.device)]
            if sizes[kept].min() < CANCELLED * length:  # rounding brought old ones back
                left = self._orthogonalize(self._next)[0]
                real = (left.norm(dim=0) > 0.5).cpu().numpy()  # else it was all rounding
                kept[kept] = real
                left = left if real.all() else left[:, torch.as_tensor(real, device=X.device)]
                self._next = _polished(left) if real.any() else None
        if not kept.any():  # an invariant subspace: go on from new random vectors
            self._next = self._fresh()
        count = 0 if self._next is None else self._next.shape[1]
        self._R = np.zeros((count, self.size))
        if kept.any():
            self._R[:, before:] = (sizes[:, None] * right)[kept]
        self.steps.append(
            _Step(self.size, self._products, self._R, self._scale, self._noise, self._next is None)
        )

    def _restart(self, width: int) -> None:
        # Thick restart: the outermost Ritz vectors stay, and with them what was learnt.
        assert self._most is not None
        values, S = np.linalg.eigh(self._T)
        low, high = self.keep
        room = max(int(KEPT_SHARE * self._most), low + high + 1)
        room = max(min(room, self._most - 2 * width, self.size - 1), 1)
        spare = max(room - low - high, 0)
        low += spare * low // max(low + high, 1)
        low = min(low, room)
        index = np.r_[np.arange(low), np.arange(self.size - (room - low), self.size)]
        S = S[:, index]
        self.basis.rotate(torch.as_tensor(S, dtype=self.matrix.dtype, device=self.matrix.device))
        self._T, self._R = np.diag(values[index]), self._R @ S
        if self._couplings:
            self._couplings = [np.concatenate(self._couplings, axis=1) @ S]
        self.restarts += 1
        self.steps.clear()
        self._last = None

    def truncate(self, steps: int) -> None:
        """Go back to what was known after the first steps, and free the rest's memory."""
        at = self.steps[steps - 1]
        if steps < len(self.steps):
            # After a breakdown the block was a fresh one, and the coupling is zero.
            self._next = self._block_after(at)
        self.basis.truncate(at.size)
        self._T, self._R = self._T[: at.size, : at.size], at.coupling
        self._scale, self._noise, self._products = at.scale, at.noise, at.products
        self._last = None
        if not self.restarts:  # so that the steps to come are the same to the last bit
            before = self.steps[steps - 2].size if steps > 1 else 0
            self._last = self._block_at(before, at.size - before)
        # After a restart the first entry is that of the vectors kept, so count from the end.
        self._couplings = self._couplings[: len(self._couplings) - len(self.steps) + steps]
        del self.steps[steps:]

    def release(self) -> None:
        """Free the basis; the run cannot be continued."""
        self.basis.truncate(0)
        self._next = self._last = None

    # -- what it says ----------------------------------------------------------------

    def floor(self, steps: int | None = None) -> float:
        """Return the rounding level of Ritz values."""
        at = self._at(steps)
        eps = torch.finfo(self.matrix.dtype).eps
        # A basis that is rounded makes noise of its own, but no values are taken from it.
        return max(ROUNDING * eps * at.scale, 0.0 if self.basis.lossy else 2 * at.noise)

    def noise(self, steps: int | None = None) -> float:
        """Return how far products were from what the recurrence says of them."""
        return self._at(steps).noise

    def _at(self, steps: int | None) -> _Step:
        return self.steps[-1 if steps is None else steps - 1]

    def ritz(self, steps: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return Ritz values (ascending), coefficient vectors and residuals of A.

        Args:
            steps: After so many steps since the last restart; None: the last one.
        """
        at = self._at(steps)
        T = self._T[: at.size, : at.size]
        if self.block == 1 and not self.restarts:
            values, S = tridiagonal(np.diag(T), np.diag(T, 1))
        else:
            values, S = np.linalg.eigh(T)
        residuals = np.linalg.norm(at.coupling @ S, axis=0)
        if self._couplings:
            along = np.concatenate(self._couplings, axis=1)[:, : at.size] @ S
            residuals = np.hypot(residuals, np.linalg.norm(along, axis=0))
        return values, S, residuals

    def beyond(self, steps: int | None = None) -> tuple[Tensor | None, np.ndarray]:
        """Return the block after a step and its coupling: ``A V = V T + X R``."""
        at = self._at(steps)
        if not at.coupling.any():
            return None, at.coupling
        if len(self.steps) == (steps or len(self.steps)):
            return self._next, at.coupling
        return self._block_after(at), at.coupling

    def _block_after(self, at: _Step) -> Tensor:
        return self._block_at(at.size, len(at.coupling))

    def _block_at(self, start: int, width: int) -> Tensor:
        unit = torch.zeros(start + width, width, dtype=self.matrix.dtype, device=self.matrix.device)
        unit[start:].fill_diagonal_(1)
        return self.basis.combine(unit)

    def vectors(self, coefficients: np.ndarray) -> Tensor:
        """Return Ritz vectors ``[P, j]`` for columns of coefficients."""
        S = torch.as_tensor(coefficients.copy(), dtype=self.matrix.dtype, device=self.matrix.device)
        return self.basis.combine(S)


def _orthonormal(W: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray]:
    # W = X diag(sizes) right, with orthonormal X.
    if W.shape[1] == 1:
        length = math.sqrt(float(accurate_gram(W, W)))
        return (W / length if length > 0 else W), np.array([length]), np.ones((1, 1))
    Q, R = torch.linalg.qr(W)
    U, sizes, right = torch.linalg.svd(R.double())
    return Q @ U.to(Q.dtype), sizes.cpu().numpy(), right.cpu().numpy()


def _polished(W: Tensor) -> Tensor:
    # The orthonormal block nearest to one that is nearly so: no rotation, no change of sign.
    if W.shape[1] == 1:
        return _orthonormal(W)[0]
    Q, R = torch.linalg.qr(W)
    polished: Tensor = Q * R.diagonal().sign()
    return polished


def tridiagonal(alphas: np.ndarray, betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues (ascending) and eigenvectors of a symmetric tridiagonal matrix.

    Example:
        >>> tridiagonal(np.array([2.0, 2.0]), np.array([1.0]))[0].tolist()
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
