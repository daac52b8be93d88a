"""The best scales of noise for the rows and columns of a matrix of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ROUNDS = 2000


@dataclass(frozen=True)
class Scales:
    """Noise variances ``rows_i * columns_j`` and what they reach.

    Attributes:
        value: The sum at these scales.
        remaining: How far the sum is above its infimum, at most about.
        rows: ``[R]``: positive; 0 or inf where the best scale has no finite logarithm.
        columns: ``[C]``, likewise.
    """

    value: float
    remaining: float
    rows: Tensor
    columns: Tensor

    @property
    def products(self) -> Tensor:
        """The variances ``[R, C]``; 0 where a scale is 0 or inf."""
        rows, columns = (torch.where(x.isfinite(), x, 0.0) for x in (self.rows, self.columns))
        return rows[:, None] * columns


def best_scales(
    curvature: Tensor, squares: Tensor, *, start: Tensor | None = None, tol: float = 1e-10
) -> Scales:
    r"""Minimize over positive x and y, for matrices h and q that are not negative,

    .. math:: \tfrac12 \sum_{ij} x_i y_j h_{ij} + \frac{q_{ij}}{x_i y_j}.

    Convex in the logarithms of x and y, as every term is an exponential of a linear
    function, so minimizing over x and y in turn, each in closed form, falls to the
    infimum. A row whose h is all zero adds nothing to it (its x grows for ever), nor one whose
    q is all zero; such rows and columns are left out first, until there are none.

    Args:
        curvature: h ``[R, C]``, float64.
        squares: q ``[R, C]``, float64.
        start: y ``[C]`` to start from.
        tol: Stop when about so much of the value is left to gain.
    """
    h, q = curvature, squares
    rows = torch.ones(h.shape[0], dtype=torch.bool, device=h.device)
    columns = torch.ones(h.shape[1], dtype=torch.bool, device=h.device)
    positive = [(h > 0), (q > 0)]
    while True:
        kept = torch.ones_like(rows)
        for p in positive:
            kept &= (p & columns).any(dim=1)
        kept_columns = torch.ones_like(columns)
        for p in positive:
            kept_columns &= (p & kept[:, None]).any(dim=0)
        same = bool((kept == rows).all()) and bool((kept_columns == columns).all())
        rows, columns = kept, kept_columns
        if same:
            break
    x, y = torch.zeros_like(h[:, 0]), torch.zeros_like(h[0])
    if not rows.any():
        return Scales(0.0, 0.0, x, y)
    if not (rows.all() and columns.all()):
        h, q = h[rows][:, columns], q[rows][:, columns]
    b = torch.ones_like(h[0])
    if start is not None:
        given = start[columns]
        b = torch.where(given.isfinite() & (given > 0), given, 1.0)
    value, last, remaining = float("inf"), float("inf"), float("inf")
    for _ in range(MOST_ROUNDS):
        a = ((q @ b.reciprocal()) / (h @ b)).sqrt()
        curved, weighed = a @ h, a.reciprocal() @ q
        b = (weighed / curved).sqrt()
        # At the best y for this x both terms of a column are equal.
        now = float((weighed * curved).sqrt().sum())
        gained = value - now
        value = now
        if gained <= 1e-15 * value:
            remaining = 0.0
            break
        if gained < last < float("inf"):
            # One rate of gaining would leave a third of this, and half where no finite scales
            # reach the infimum, as the rest then falls as slowly as 1/rounds.
            remaining = 3 * gained * gained / (last - gained)
            if remaining <= tol * value:
                break
        last = gained
    x[rows], y[columns] = a, b
    return Scales(value, remaining, x, y)
