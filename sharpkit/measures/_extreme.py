"""The largest eigenvalue of the Hessian in other coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.estimators.protocol import check_positive
from sharpkit.results import Cost, Estimate


def largest_eigenvalue(
    analysis: Analysis,
    purpose: str,
    root: Callable[[Tensor], Tensor],
    *,
    tol: float,
    max_matvecs: int,
) -> Estimate:
    """Return the largest eigenvalue of ``T H T`` with the error of its Ritz pair.

    Args:
        analysis: What is measured.
        purpose: Names the map T.
        root: Maps ``V [P, K]`` to ``T V``.
        tol: Relative error at which the pair has converged.
        max_matvecs: Budget of products.
    """
    check_positive("tol", tol)
    check_positive("max_matvecs", max_matvecs, minimum=1)
    spectral = analysis.congruent(purpose, root)
    pairs = spectral.eigenpairs(k=1, which="largest", tol=tol, max_matvecs=max_matvecs)
    vector = pairs.largest_vectors
    # A product is wrong relative to its own length, which T may make far longer than the
    # eigenvalue: v.T(HTv + d) is off by |Tv| |d|.
    u = root(vector)
    wrong = analysis.product_error * float(
        u.double().norm() * (analysis.hessian @ u).double().norm()
    )
    notes: list[str] = []
    if not pairs.converged:
        notes.append(
            f"The eigenvalue did not converge: {pairs.num_matvecs} of {max_matvecs} products were"
            " used. Give a larger `max_matvecs` or a larger `tol`."
        )
    notes += analysis.saturation_note()
    details: dict[str, Any] = {
        "upper_bound": pairs.upper_bound + wrong,
        "failure_probability": pairs.failure_probability,
        "second_start": pairs.second_start,
        "num_steps": pairs.num_steps,
    }
    estimate = Estimate(
        value=pairs.largest[0],
        probe_error=pairs.largest_residuals[0] + wrong,
        error_kind="bound",
        converged=pairs.converged and not analysis.saturated,
        cost=Cost(hvps=pairs.num_matvecs + 1),
        details=details,
        notes=tuple(notes),
    )
    return spectral.eigenvalue_data_error(estimate, vector[:, 0])
