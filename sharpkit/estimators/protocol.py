"""What estimators need of a matrix or a function; they never see a network."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from sharpkit.errors import SettingsError

__all__ = [
    "Matrix",
    "RunningMoments",
    "block_size",
    "check_positive",
    "random_signs",
    "sphere_vector",
]


BLOCK = 8  # vectors multiplied together: batches are read once for all of them
LARGE = 2**23  # entries of a vector from which on blocks are small
LARGE_BLOCK = 2
PIECE = 2**18  # entries taken at a time, so that copies in double precision stay small


class Matrix(Protocol):
    """A symmetric matrix given by its products, such as a ``SymmetricOperator``."""

    dim: int
    dtype: torch.dtype
    device: torch.device
    num_matvecs: int

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        """Return ``A V``."""
        ...


class RunningMoments:
    """Mean and variance of each entry of vectors that come one block after another."""

    def __init__(self, matrix: Matrix):
        self.mean = torch.zeros(matrix.dim, dtype=torch.float64, device=matrix.device)
        self._squares = torch.zeros_like(self.mean)  # Welford's sums of squared deviations
        self.count = 0

    def add(self, columns: Tensor) -> None:
        """Take in the columns of a block ``[P, K]``."""
        for entries in columns.unbind(dim=1):
            self.count += 1
            pieces = (torch.split(t, PIECE) for t in (entries, self.mean, self._squares))
            for column, mean, squares in zip(*pieces, strict=True):
                column = column.double()
                delta = column - mean
                mean += delta / self.count
                squares += delta * (column - mean)

    @property
    def variances(self) -> Tensor:
        """The unbiased variance of each entry, ``[P]``."""
        return self._squares / (self.count - 1)


def block_size(matrix: Matrix) -> int:
    """Return how many vectors to multiply together: fewer where a few fill the memory."""
    return BLOCK if matrix.dim <= LARGE else LARGE_BLOCK


def random_signs(matrix: Matrix, count: int, generator: torch.Generator) -> Tensor:
    """Return ``[P, count]`` independent signs, probe after probe from the generator.

    Probe i is the same whatever ``count``, so a longer run continues a shorter one.
    """
    signs = torch.empty(count, matrix.dim, dtype=matrix.dtype, device=matrix.device)
    for row in signs:
        row.copy_(torch.randint(2, row.shape, generator=generator, device=matrix.device))
    return signs.mul_(2).sub_(1).T


def sphere_vector(matrix: Matrix, generator: torch.Generator) -> Tensor:
    """Return a uniform unit vector ``[P]``."""
    v = torch.randn(matrix.dim, generator=generator, dtype=matrix.dtype, device=matrix.device)
    return torch.nn.functional.normalize(v, dim=0)


def check_positive(name: str, value: float, *, minimum: float | None = None) -> None:
    """Raise SettingsError unless a setting is finite and positive (or at least ``minimum``)."""
    allowed = value >= minimum if minimum is not None else value > 0
    if not (allowed and math.isfinite(value)):
        bound = f"at least {minimum:g}" if minimum is not None else "greater than 0"
        raise SettingsError(f"Expected `{name}` to be finite and {bound}. Got {value!r}.")
