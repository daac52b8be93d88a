"""The stable rank of the Hessian."""

import numpy as np

from sharpkit.analysis import Analysis
from sharpkit.errors import MeasureError
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "stable_rank",
    symbol="||H||_F^2 / ||H||_2^2",
    reference="Rudelson and Vershynin 2007, doi:10.1145/1255443.1255449",
    cost="24 Lanczos steps and num_probes HVPs (16), shared with the trace",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=0,
    nonnegative=True,
)
def stable_rank(analysis: Analysis, *, num_probes: int = 16) -> Estimate:
    r"""Stable rank of the Hessian, how many eigenvalues as large as the largest it is worth.

    .. math:: \|H\|_F^2 \,/\, \max_i \lambda_i^2

    At least 1 and at most the rank. The largest magnitude is that of the Lanczos run's
    first steps; where it has not converged there, the estimate says so.

    Args:
        analysis: What is measured.
        num_probes: Hessian-vector products, beside the Lanczos run's.

    Raises:
        MeasureError: If the Hessian is zero.
    """
    check_positive("num_probes", num_probes, minimum=2)
    spectral = analysis.spectral()
    norm = spectral.frobenius_norm(num_probes=num_probes)
    low, high, error, settled = spectral.ritz_extremes()
    largest = max(abs(low), abs(high))
    if largest <= spectral.locked.floor:
        raise MeasureError("Expected a Hessian that is not zero. All its eigenvalues are.")
    value = (norm.value / largest) ** 2
    relative = 2 * ((norm.probe_error or 0.0) / norm.value + error / largest)
    estimate = Estimate(
        value=value,
        probe_error=value * (relative + 2 * analysis.product_error),
        error_kind="stderr",
        converged=settled,
        details={**norm.details, "largest_magnitude": largest},
        notes=() if settled else ("The largest eigenvalue did not converge in 24 steps.",),
        dof=norm.dof,
        draws=tuple(value * (2 * d / norm.value - 1) for d in norm.draws),
    )

    def of_the_largest(values: np.ndarray) -> np.ndarray:
        # The denominator moves with one eigenvalue.
        slopes = np.zeros_like(values)
        if len(values):
            at = int(np.argmax(abs(values)))
            slopes[at] = -2 * value / values[at]
        return slopes

    return spectral.with_data_error(estimate, lambda x: x**2 / largest**2, of_the_largest)
