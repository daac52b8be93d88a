"""Hutch++: the trace on a random subspace exactly, and the rest by Hutchinson."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.estimators.protocol import Matrix, RunningMoments, random_signs
from sharpkit.results import Cost, Estimate

__all__ = ["hutch_plus_plus", "inner", "orthonormal_range", "products"]

BLOCK = 8  # vectors applied together: batches are read once for all of them
ROWS = 65536  # rows turned to double precision together
ROUNDING = 4  # sums are wrong by a few eps of the vectors they come from
RANK = 10  # singular values below this many eps of the largest are rounding


def products(matrix: Matrix, vectors: Tensor) -> Tensor:
    """Return ``A V``, a few columns at a time; no product for no columns."""
    starts = range(0, vectors.shape[1], BLOCK)
    blocks = [matrix @ vectors[:, start : start + BLOCK] for start in starts]
    return torch.cat([vectors[:, :0], *blocks], dim=1)


def inner(X: Tensor, Y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return ``X^T diag(weights) Y`` on the CPU, summed in double precision.

    Example:
        >>> inner(torch.eye(2), torch.ones(2, 1), torch.tensor([3.0, 4.0])).tolist()
        [[3.0], [4.0]]
    """
    total = torch.zeros(X.shape[1], Y.shape[1], dtype=torch.float64, device=X.device)
    for start in range(0, len(X), ROWS):
        rows = slice(start, start + ROWS)
        left = X[rows].double()
        if weights is not None:
            left = left * weights[rows, None].double()
        total += left.T @ Y[rows].double()
    return total.cpu()


def orthonormal_range(Y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return Q with orthonormal columns and the B of ``Y = Q B``, without rounding's directions.

    Example:
        >>> Y = torch.tensor([[3.0, 6.0], [4.0, 8.0], [0.0, 0.0]])
        >>> Q, B = orthonormal_range(Y)
        >>> Q.shape[1], torch.allclose(Q @ B.float(), Y)
        (1, True)
    """
    Q, R = torch.linalg.qr(Y)
    R = R.double().cpu()
    U, sizes, _ = torch.linalg.svd(R)
    rank = int((sizes > RANK * torch.finfo(Y.dtype).eps * sizes[0]).sum())
    if rank == Y.shape[1]:
        return Q, R
    U = U[:, :rank]
    return Q @ U.to(Q), U.T @ R


def hutch_plus_plus(matrix: Matrix, *, num_matvecs: int, generator: torch.Generator) -> Estimate:
    r"""Estimate ``tr A`` by Hutch++ (Meyer, Musco, Musco, Woodruff 2021, arXiv:2010.09649).

    .. math::
        \operatorname{tr} A \approx \operatorname{tr}(Q^\top A Q) + \frac1g \sum_{i=1}^g
        z_i^\top B z_i, \qquad Q = \operatorname{orth}(A S),
        \quad B = (I - Q Q^\top) A (I - Q Q^\top)

    with signs in S and :math:`z_i`. A third of the products finds Q, a third is spent on
    :math:`A Q`, the rest on the :math:`z_i`. Unbiased for any symmetric matrix, and exact up to
    rounding when the rank is at most a third of the products. Given Q the variance is that of
    Hutchinson's estimate of :math:`\operatorname{tr} B`, and is estimated in the same way, from
    the scatter of every entry of :math:`z \odot Bz`; its degrees of freedom follow from how much
    these differ between probes, and are at least :math:`g - 1`. Two thirds as many vectors as
    products are kept; ``xtrace`` is mostly better at the same cost, and keeps more.

    Args:
        matrix: The matrix ``A``.
        num_matvecs: The number of products, from 6 to the number of parameters.
        generator: Source of the signs, on the matrix's device.

    Returns:
        The estimate with its standard error. ``details`` hold the rank of Q and its trace.

    Raises:
        SettingsError: If ``num_matvecs`` is out of range.

    Example:
        >>> from sharpkit.operators import SymmetricOperator
        >>> ones = SymmetricOperator.wrap(torch.ones(9, 9, dtype=torch.float64))
        >>> round(hutch_plus_plus(ones, num_matvecs=6, generator=torch.Generator()).value, 9)
        9.0
    """
    if not 6 <= num_matvecs <= matrix.dim:
        raise SettingsError(
            f"Expected `num_matvecs` between 6 and the number of parameters, {matrix.dim}."
            f" Got {num_matvecs}. In a small space take exact_diagonal."
        )
    before = matrix.num_matvecs
    third = num_matvecs // 3
    Q, _ = orthonormal_range(products(matrix, random_signs(matrix, third, generator)))
    AQ = products(matrix, Q)
    inside = float(inner(Q, AQ).trace())
    entries = RunningMoments(matrix)
    quadratic: list[float] = []
    squares: list[float] = []
    largest, probes = 0.0, num_matvecs - 2 * third
    while entries.count < probes:
        Z = random_signs(matrix, min(BLOCK, probes - entries.count), generator)
        AZ = matrix @ (Z - Q @ (Q.T @ Z))
        rows = Z.double() * (AZ - Q @ (Q.T @ AZ)).double()
        entries.add(rows)
        quadratic += rows.sum(dim=0).tolist()
        squares += rows.square().sum(dim=0).tolist()
        largest = max(largest, float(AZ.double().norm(dim=0).max()))
    error = math.sqrt(2 * float(entries.variances.sum()) / probes)
    # Satterthwaite: the error is a mean of these squares, and as sure as they are alike.
    mean, variance = statistics.fmean(squares), statistics.variance(squares)
    dof = max(2 * probes * mean**2 / variance, probes - 1) if variance > 0 else None
    eps = torch.finfo(matrix.dtype).eps
    rounding = ROUNDING * eps * (largest + float(AQ.double().norm(dim=0).sum()))
    return Estimate(
        value=inside + float(entries.mean.sum()),
        probe_error=max(error, rounding),
        error_kind="stderr",
        cost=Cost(hvps=matrix.num_matvecs - before),
        details={"num_probes": probes, "rank": Q.shape[1], "trace_inside": inside},
        dof=dof,
        draws=tuple(inside + q for q in quadratic),
    )
