"""The Lanczos recurrence, and what it says about the spectrum."""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from sharpkit.estimators.protocol import Matrix, sphere_vector

__all__ = ["ROUNDING", "Krylov", "tridiagonal", "unseen_share"]

ROUNDING = 10  # products are wrong by a few eps of the matrix's norm, at least


class Krylov:
    """One Lanczos run with full reorthogonalization, orthogonal to locked vectors.

    Attributes:
        scale: The largest row sum of the tridiagonal matrix: about the matrix's norm.
        noise: How far the products are from those of one symmetric matrix: the largest
            coefficient that would be zero without rounding.
    """

    def __init__(self, matrix: Matrix, generator: torch.Generator, locked: Tensor | None):
        self.matrix, self.generator, self.locked = matrix, generator, locked
        self.alphas: list[float] = []
        self.betas: list[float] = []  # betas[j] couples j and j+1
        self.couplings: list[np.ndarray] = []  # what each product had along locked vectors
        self.basis = torch.empty(0, matrix.dim, dtype=matrix.dtype, device=matrix.device)
        self.exhausted = False
        self.scale = self.noise = 0.0
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

    def _orthogonalize(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # Returns what is left, and the first pass's coefficients.
        first: tuple[Tensor, Tensor | None] | None = None
        V = self.basis[: self.size]
        for _ in range(2):  # "twice is enough"
            along = V @ w
            w = w - V.T @ along
            held = None
            if self.locked is not None:
                held = self.locked.T @ w
                w = w - self.locked @ held
            first = first or (along, held)
        assert first is not None
        return w, *first

    def _fresh(self) -> Tensor | None:
        taken = self.size + (0 if self.locked is None else self.locked.shape[1])
        if taken >= self.matrix.dim:
            return None
        for _ in range(5):
            w = self._orthogonalize(sphere_vector(self.matrix, self.generator))[0]
            length = float(w.norm())
            if length > 1e-3 / math.sqrt(self.matrix.dim):
                return self._orthogonalize(w / length)[0]
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
        w, along, held = self._orthogonalize(w)
        unexpected = along[:-1].double()
        if len(unexpected):
            unexpected[-1] -= self.betas[-1]
            self.noise = max(self.noise, float(unexpected.norm()))
        if held is not None:
            self.couplings.append(held.double().cpu().numpy())
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

    def floor(self) -> float:
        """Return the rounding level of Ritz values."""
        return max(ROUNDING * torch.finfo(self.matrix.dtype).eps * self.scale, 2 * self.noise)

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return Ritz values (ascending), coefficient vectors and residuals of A."""
        values, S = tridiagonal(self.alphas, self.betas[:-1])
        residuals = abs(self.betas[-1] * S[-1])
        if self.couplings:
            residuals = np.hypot(residuals, np.linalg.norm(np.array(self.couplings).T @ S, axis=0))
        return values, S, residuals

    def vectors(self, coefficients: np.ndarray) -> Tensor:
        """Return Ritz vectors ``[P, j]`` for columns of coefficients."""
        S = torch.as_tensor(coefficients.copy(), dtype=self.matrix.dtype, device=self.matrix.device)
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
