"""Orthonormal vectors of a Krylov space: where they lie, and products with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit.estimators.protocol import LARGE, Matrix

__all__ = ["Basis", "Storage", "accurate_gram", "column_dots"]

ROWS = 16  # vectors of a chunk: memory grows by so many, and nothing is copied
LARGE_ROWS = 4  # of long vectors, so that what is forgotten is free
SLICE = 2**20  # entries of each vector taken at a time where all of them would not fit


@dataclass(frozen=True)
class Storage:
    """Where a basis is kept.

    Attributes:
        device: ``None`` is the matrix's own; ``"cpu"`` frees an accelerator's memory.
        dtype: ``None`` is the matrix's own; ``torch.bfloat16`` halves float32. Vectors are
            rounded before they are multiplied, so the relations hold to that rounding only,
            and eigenpairs are recomputed from products before anything is said of them.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


def accurate_gram(X: Tensor, W: Tensor) -> Tensor:
    """Return ``X^T W`` summed in float64, for tall matrices, without a copy of either.

    Example:
        >>> accurate_gram(torch.ones(3, 1), torch.ones(3, 2)).tolist()
        [[3.0, 3.0]]
    """
    total = torch.zeros(X.shape[1], W.shape[1], dtype=torch.float64, device=X.device)
    for x, w in zip(torch.split(X, SLICE), torch.split(W, SLICE), strict=True):
        total += x.double().T @ w.double()
    return total


def column_dots(X: Tensor, W: Tensor) -> Tensor:
    """Return ``x_k . w_k`` of the columns, summed in float64, without a copy of either.

    Example:
        >>> column_dots(torch.ones(3, 2), torch.ones(3, 2)).tolist()
        [3.0, 3.0]
    """
    total = torch.zeros(X.shape[1], dtype=torch.float64, device=X.device)
    for x, w in zip(torch.split(X, SLICE), torch.split(W, SLICE), strict=True):
        total += (x.double() * w).sum(dim=0)
    return total


class Basis:
    """Orthonormal vectors that come one block after another.

    Memory: the vectors, in chunks of 16 (4 of long ones); nothing is ever copied to grow.
    """

    def __init__(self, matrix: Matrix, storage: Storage | None = None):
        storage = storage or Storage()
        self.dim = matrix.dim
        self._rows_each = ROWS if matrix.dim <= LARGE else LARGE_ROWS
        self._dtype, self._device = matrix.dtype, matrix.device
        self._kept_dtype = storage.dtype or matrix.dtype
        self._kept_device = torch.device(storage.device or matrix.device)
        self._elsewhere = (self._kept_dtype, self._kept_device.type) != (
            matrix.dtype,
            matrix.device.type,
        )
        self.lossy = torch.finfo(self._kept_dtype).eps > torch.finfo(matrix.dtype).eps
        self._chunks: list[Tensor] = []
        self.size = 0

    def append(self, X: Tensor) -> Tensor:
        """Add the columns of ``X [P, b]``; returns them as they are remembered."""
        kept = X.to(self._kept_device, self._kept_dtype)
        for column in kept.unbind(dim=1):
            chunk, row = divmod(self.size, self._rows_each)
            if chunk == len(self._chunks):
                self._chunks.append(
                    torch.empty(
                        min(self._rows_each, self.dim - self.size),
                        self.dim,
                        dtype=self._kept_dtype,
                        device=self._kept_device,
                    )
                )
            self._chunks[chunk][row] = column
            self.size += 1
        return kept.to(self._device, self._dtype) if self._elsewhere else X

    def _rows(self, size: int) -> list[Tensor]:
        # The chunks, cut to the first vectors.
        starts = range(0, size, self._rows_each)
        return [c[: size - at] for at, c in zip(starts, self._chunks, strict=False)]

    def coefficients(self, W: Tensor) -> Tensor:
        """Return ``V^T W [size, b]``."""
        rows = self._rows(self.size)
        if not rows:
            return W.new_zeros(0, W.shape[1])
        if not self._elsewhere:
            one = W.shape[1] == 1
            return torch.cat([c.mv(W[:, 0])[:, None] if one else c @ W for c in rows])
        total = W.new_zeros(self.size, W.shape[1])
        for start in range(0, self.dim, SLICE):
            part = slice(start, start + SLICE)
            total += torch.cat([self._near(c[:, part]) @ W[part] for c in rows])
        return total

    def subtract(self, W: Tensor, C: Tensor) -> Tensor:
        """Return ``W - V C``."""
        rows, at = self._rows(self.size), 0
        if self._elsewhere:
            W = W.clone()
        for chunk in rows:
            piece = C[at : at + len(chunk)]
            at += len(chunk)
            if not self._elsewhere:
                if W.shape[1] == 1:
                    W = torch.addmv(W[:, 0], chunk.T, piece[:, 0], alpha=-1)[:, None]
                else:
                    W = torch.addmm(W, chunk.T, piece, alpha=-1)
                continue
            for start in range(0, self.dim, SLICE):
                part = slice(start, start + SLICE)
                W[part] -= self._near(chunk[:, part]).T @ piece
        return W

    def combine(self, S: Tensor) -> Tensor:
        """Return ``V S [P, j]`` for coefficients of the first ``len(S)`` vectors."""
        total = torch.zeros(self.dim, S.shape[1], dtype=self._dtype, device=self._device)
        at = 0
        for chunk in self._rows(len(S)):
            piece = S[at : at + len(chunk)]
            at += len(chunk)
            if not self._elsewhere:
                total.addmm_(chunk.T, piece)
                continue
            for start in range(0, self.dim, SLICE):
                part = slice(start, start + SLICE)
                total[part] += self._near(chunk[:, part]).T @ piece
        return total

    def rotate(self, S: Tensor) -> None:
        """Replace the vectors by ``V S``, a slice of entries at a time, and forget the rest."""
        rows = self._rows(self.size)
        count = S.shape[1]
        for start in range(0, self.dim, SLICE):
            part = slice(start, start + SLICE)
            old = torch.cat([self._near(c[:, part]) for c in rows])
            new = (S.T @ old).to(self._kept_device, self._kept_dtype)
            for i, chunk in enumerate(self._rows(count)):
                chunk[:, part] = new[self._rows_each * i : self._rows_each * i + len(chunk)]
        self.truncate(count)

    def truncate(self, size: int) -> None:
        """Forget all but the first vectors, and free whole chunks."""
        self.size = min(size, self.size)
        del self._chunks[-(-self.size // self._rows_each) :]

    def _near(self, piece: Tensor) -> Tensor:
        return piece.to(self._device, self._dtype)
