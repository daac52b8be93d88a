"""The diagonal of a symmetric matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.estimators.protocol import Matrix, RunningMoments, random_signs

__all__ = ["Diagonal", "exact_diagonal", "hutchinson_diagonal"]

BLOCK = 8


@dataclass(frozen=True)
class Diagonal:
    """A diagonal with its errors.

    Attributes:
        values: ``[P]``.
        errors: One standard error of each entry, ``[P]``; zeros if exact.
        num_probes: Probes used; 0 if exact.
        num_gradients: Gradients of the data that it took instead of products (the GGN's).
    """

    values: Tensor
    errors: Tensor
    num_probes: int
    num_gradients: int = field(default=0, kw_only=True)

    @property
    def exact(self) -> bool:
        """Whether the entries are exact up to rounding."""
        return self.num_probes == 0


def exact_diagonal(matrix: Matrix) -> Diagonal:
    """Return the diagonal from P products with unit vectors.

    Example:
        >>> from sharpkit.operators import SymmetricOperator
        >>> A = SymmetricOperator.wrap(torch.tensor([[1.0, 5.0], [5.0, 2.0]]))
        >>> exact_diagonal(A).values.tolist()
        [1.0, 2.0]
    """
    values = torch.zeros(matrix.dim, dtype=matrix.dtype, device=matrix.device)
    for start in range(0, matrix.dim, BLOCK):
        index = torch.arange(start, min(start + BLOCK, matrix.dim), device=matrix.device)
        units = torch.zeros(matrix.dim, len(index), dtype=matrix.dtype, device=matrix.device)
        units[index, index - start] = 1
        values[index] = (matrix @ units)[index, index - start]
    return Diagonal(values, torch.zeros_like(values), 0)


def hutchinson_diagonal(matrix: Matrix, *, num_probes: int, generator: torch.Generator) -> Diagonal:
    r"""Estimate the diagonal as the mean of ``z * A z`` (Bekas, Kokiopoulou, Saad 2007).

    Entry i has variance :math:`\frac1m\sum_{j\ne i}A_{ij}^2`: small entries beside large
    off-diagonal ones are mostly noise, and the errors say so.

    Args:
        matrix: The matrix ``A``.
        num_probes: Number m of random sign vectors, at least 2.
        generator: Source of the signs.

    Raises:
        SettingsError: If ``num_probes < 2``.
    """
    if num_probes < 2:
        raise SettingsError(
            f"Expected `num_probes` to be at least 2, to give errors. Got {num_probes}."
        )
    entries = RunningMoments(matrix)
    while entries.count < num_probes:
        Z = random_signs(matrix, min(BLOCK, num_probes - entries.count), generator)
        entries.add(Z * (matrix @ Z))
    errors = (entries.variances / num_probes).sqrt()
    return Diagonal(entries.mean.to(matrix.dtype), errors.to(matrix.dtype), num_probes)
