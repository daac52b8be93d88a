"""Extreme eigenpairs with what is known of their errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

__all__ = ["Eigenpairs", "distinct_errors"]


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
        num_steps: Products of the first run.
        num_matvecs: Products in all.
        num_restarts: How often the basis of the first run was full.
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
    num_restarts: int = 0

    @property
    def converged(self) -> bool:
        """Whether every pair converged and a second start did not object."""
        checked = self.second_start in ("agreed", "found more", "not needed")
        return checked and all(self.largest_converged) and all(self.smallest_converged)


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
