"""The Frobenius norm of the Hessian."""

import math
from dataclasses import replace

from sharpkit.analysis import Analysis
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "frobenius_norm",
    symbol="||H||_F",
    reference="Hutchinson 1990, doi:10.1080/03610919008812866",
    cost="24 Lanczos steps and num_probes HVPs (16), shared with the trace",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=1,
    nonnegative=True,
)
def frobenius_norm(analysis: Analysis, *, num_probes: int = 16) -> Estimate:
    r"""Frobenius norm of the Hessian, the root of the sum of squared eigenvalues.

    .. math:: \|H\|_F^2 = \sum_i \lambda_i^2 = E\|Hz\|^2

    From the lengths of the trace's products, with the outliers counted exactly. It hardly
    sees anything but the outliers, and rescaling layers changes it at will.

    Args:
        analysis: What is measured.
        num_probes: Hessian-vector products, beside the Lanczos run's.
    """
    check_positive("num_probes", num_probes, minimum=2)
    estimate = analysis.spectral().frobenius_norm(num_probes=num_probes)
    wrong = analysis.product_error * estimate.value
    return replace(estimate, probe_error=math.hypot(estimate.probe_error or 0.0, wrong))
