"""What estimators need of a matrix or a function; they never see a network."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sharpkit.errors import SettingsError

__all__ = ["Matrix", "check_positive", "random_signs", "sphere_vector"]


class Matrix(Protocol):
    """A symmetric matrix given by its products, such as a ``SymmetricOperator``."""

    dim: int
    dtype: torch.dtype
    device: torch.device
    num_matvecs: int

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        """Return ``A V``."""
        ...


def random_signs(matrix: Matrix, count: int, generator: torch.Generator) -> Tensor:
    """Return ``[P, count]`` independent signs, probe after probe from the generator.

    Probe i is the same whatever ``count``, so a longer run continues a shorter one.
    """
    columns = [
        torch.randint(2, (matrix.dim,), generator=generator, device=matrix.device)
        for _ in range(count)
    ]
    return (2 * torch.stack(columns, dim=1) - 1).to(matrix.dtype)


def sphere_vector(matrix: Matrix, generator: torch.Generator) -> Tensor:
    """Return a uniform unit vector ``[P]``."""
    v = torch.randn(matrix.dim, generator=generator, dtype=matrix.dtype, device=matrix.device)
    return torch.nn.functional.normalize(v, dim=0)


def check_positive(name: str, value: float, *, minimum: float | None = None) -> None:
    """Raise SettingsError unless a setting is positive (or at least ``minimum``)."""
    allowed = value >= minimum if minimum is not None else value > 0
    if not allowed:
        bound = f"at least {minimum:g}" if minimum is not None else "greater than 0"
        raise SettingsError(f"Expected `{name}` to be {bound}. Got {value!r}.")
