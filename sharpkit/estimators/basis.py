"""Orthonormal vectors of a Krylov space: where they lie, and products with them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit.estimators.protocol import LARGE, Matrix
from sharpkit.team import SOLO, Team

__all__ = ["Basis", "Storage", "accurate_gram", "column_dots"]

ROWS = 16  # vectors of a chunk: memory grows by so many, and nothing is copied
LARGE_ROWS = 4  # of long vectors, so that what is forgotten is free
SHARED = 2**14  # entries of a vector from which on ranks share them out
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
    Where several ranks compute the same products, each holds its own entries of long vectors,
    and coefficients are summed over ranks: what :meth:`coefficients` and :meth:`subtract`
    take are own entries, by :meth:`part`.
    """

    def __init__(self, matrix: Matrix, storage: Storage | None = None):
        storage = storage or Storage()
        self.dim = matrix.dim
        self._team: Team = getattr(matrix, "team", SOLO) if self.dim >= SHARED else SOLO
        each = -(-self.dim // self._team.size)
        starts = [min(each * r, self.dim) for r in range(self._team.size + 1)]
        self._lengths = [b - a for a, b in itertools.pairwise(starts)]
        self._own = slice(*starts[self._team.rank : self._team.rank + 2])
        self._length = self._lengths[self._team.rank]
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
        kept = self.part(X).to(self._kept_device, self._kept_dtype)
        for column in kept.unbind(dim=1):
            chunk, row = divmod(self.size, self._rows_each)
            if chunk == len(self._chunks):
                self._chunks.append(
                    torch.empty(
                        min(self._rows_each, self.dim - self.size),
                        self._length,
                        dtype=self._kept_dtype,
                        device=self._kept_device,
                    )
                )
            self._chunks[chunk][row] = column
            self.size += 1
        return X.to(self._kept_dtype).to(self._dtype) if self._elsewhere else X

    def _rows(self, size: int) -> list[Tensor]:
        # The chunks, cut to the first vectors.
        starts = range(0, size, self._rows_each)
        return [c[: size - at] for at, c in zip(starts, self._chunks, strict=False)]

    def part(self, W: Tensor) -> Tensor:
        """Return this rank's entries of vectors ``[P, b]``: all of them if it is alone."""
        return W if self._team.alone else W[self._own]

    def whole(self, W: Tensor) -> Tensor:
        """Return vectors ``[P, b]`` from the entries that each rank has."""
        return W if self._team.alone else self._team.join(W, self._lengths)

    def summed(self, part: Tensor) -> Tensor:
        """Return the sum over ranks of what their entries give."""
        if self._team.alone:
            return part
        return self._team.sum(lambda: [part], [(part.shape, part.dtype)], part.device)[0]

    def norm(self, W: Tensor) -> float:
        """Return the Frobenius norm of vectors of which each rank has its entries."""
        if self._team.alone:
            return float(W.norm())
        return math.sqrt(float(self.summed(W.norm().double().square())))

    def coefficients(self, W: Tensor) -> Tensor:
        """Return ``V^T W [size, b]`` for own entries of W."""
        return self.summed(self._coefficients(W)) if self.size else W.new_zeros(0, W.shape[1])

    def _coefficients(self, W: Tensor) -> Tensor:
        rows = self._rows(self.size)
        if not self._elsewhere:
            one = W.shape[1] == 1
            return torch.cat([c.mv(W[:, 0])[:, None] if one else c @ W for c in rows])
        total = W.new_zeros(self.size, W.shape[1])
        for start in range(0, self._length, SLICE):
            part = slice(start, start + SLICE)
            total += torch.cat([self._near(c[:, part]) @ W[part] for c in rows])
        return total

    def subtract(self, W: Tensor, C: Tensor) -> Tensor:
        """Return ``W - V C`` for own entries of W."""
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
            for start in range(0, self._length, SLICE):
                part = slice(start, start + SLICE)
                W[part] -= self._near(chunk[:, part]).T @ piece
        return W

    def combine(self, S: Tensor) -> Tensor:
        """Return ``V S [P, j]`` for coefficients of the first ``len(S)`` vectors."""
        total = torch.zeros(self._length, S.shape[1], dtype=self._dtype, device=self._device)
        at = 0
        for chunk in self._rows(len(S)):
            piece = S[at : at + len(chunk)]
            at += len(chunk)
            if not self._elsewhere:
                total.addmm_(chunk.T, piece)
                continue
            for start in range(0, self._length, SLICE):
                part = slice(start, start + SLICE)
                total[part] += self._near(chunk[:, part]).T @ piece
        return self.whole(total)

    def rotate(self, S: Tensor) -> None:
        """Replace the vectors by ``V S``, a slice of entries at a time, and forget the rest."""
        rows = self._rows(self.size)
        count = S.shape[1]
        for start in range(0, self._length, SLICE):
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
