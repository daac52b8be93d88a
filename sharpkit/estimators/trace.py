"""Stochastic estimates of the trace of a symmetric matrix."""

from __future__ import annotations

import math

import torch

from sharpkit.errors import SettingsError
from sharpkit.estimators.protocol import Matrix, RunningMoments, check_positive, random_signs
from sharpkit.results import Cost, Estimate

__all__ = ["hutchinson_trace"]

BLOCK = 8  # probes applied together: batches are read once for all of them
FEWEST_FOR_TARGET = 16  # a standard error from fewer samples stops too early too often


def hutchinson_trace(
    matrix: Matrix,
    *,
    num_probes: int = 64,
    target_error: float | None = None,
    generator: torch.Generator,
) -> Estimate:
    r"""Estimate ``tr A`` with random signs (Girard 1989; Hutchinson 1990).

    .. math::
        \operatorname{tr} A \approx \frac1m \sum_{i=1}^m z_i^\top A z_i,
        \qquad z_i \in \{-1, 1\}^P \text{ uniform.}

    Unbiased, with variance :math:`\frac2m \sum_{i \ne j} A_{ij}^2`, which is estimated from
    the scatter of every entry of :math:`z \odot Az`; exact for a diagonal matrix. With a
    budget alone the standard error means what it says. With a target the
    probes are doubled until the standard error is below it or the budget is spent; the
    doubling, and the 16 probes before the first test, keep the bias of stopping small.

    Args:
        matrix: The matrix ``A``.
        num_probes: The budget m of products, at least 2.
        target_error: Stop when the standard error is at most this fraction of the
            estimate's size.
        generator: Source of the signs, on the matrix's device.

    Returns:
        The mean with its standard error; ``converged`` is False if a target was missed.
        ``details`` hold the number of probes and an estimate of the Frobenius norm, which
        comes from the same products.

    Raises:
        SettingsError: If ``num_probes < 2``, or the target is not positive.

    Example:
        >>> from sharpkit.operators import SymmetricOperator
        >>> A = SymmetricOperator.wrap(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        >>> t = hutchinson_trace(A, num_probes=2, generator=torch.Generator())
        >>> t.value, t.probe_error < 1e-6
        (7.0, True)
    """
    if num_probes < 2:
        raise SettingsError(
            f"Expected `num_probes` to be at least 2, to give an error. Got {num_probes}."
        )
    if target_error is not None:
        check_positive("target_error", target_error)
    before = matrix.num_matvecs
    entries = RunningMoments(matrix)
    squares: list[float] = []
    checkpoint = num_probes if target_error is None else min(FEWEST_FOR_TARGET, num_probes)
    while True:
        while entries.count < checkpoint:
            Z = random_signs(matrix, min(BLOCK, checkpoint - entries.count), generator)
            AZ = matrix @ Z
            entries.add(Z * AZ)
            squares += AZ.double().square().sum(dim=0).tolist()
        value = float(entries.mean.sum())
        # Var z.Az = 2 sum_{i != j} A_ij^2 = 2 sum_i Var(z_i (Az)_i): the entries' variances
        # know it far better than the scatter of a few sums does.
        error = math.sqrt(2 * float(entries.variances.sum()) / entries.count)
        met = target_error is None or error <= target_error * abs(value)
        if met or checkpoint >= num_probes:
            break
        checkpoint = min(2 * checkpoint, num_probes)
    # Sums of P products in the matrix's precision: no standard error is below this.
    rounding = torch.finfo(matrix.dtype).eps * math.sqrt(max(squares))
    notes: tuple[str, ...] = ()
    if not met:
        notes = (
            f"The target error {target_error:g} was not reached with {num_probes} probes:"
            f" the relative standard error is {error / abs(value) if value else math.inf:.2g}."
            " Give a larger `num_probes`.",
        )
    frobenius = math.sqrt(sum(squares) / len(squares))
    return Estimate(
        value=value,
        probe_error=max(error, rounding),
        error_kind="stderr",
        converged=met,
        cost=Cost(hvps=matrix.num_matvecs - before),
        details={"num_probes": entries.count, "frobenius_norm": frobenius},
        notes=notes,
    )
