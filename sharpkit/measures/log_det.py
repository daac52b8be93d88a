"""The log-determinant of the shifted Hessian."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np

from sharpkit import estimators
from sharpkit.analysis import Analysis
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures._entropy import MAX_STEPS, check_quadrature
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "log_det",
    symbol="log det(|H| + tau I)",
    reference="MacKay 1992, doi:10.1162/neco.1992.4.3.448",
    cost="24 Lanczos steps and num_probes x num_steps HVPs (48 to 384), shared with the entropies",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=None,
    nonnegative=False,
)
def log_det(
    analysis: Analysis,
    *,
    tau: float = 1.0,
    spectrum: Literal["abs", "signed"] = "abs",
    num_probes: int = 4,
    num_steps: int = 12,
    max_steps: int = MAX_STEPS,
) -> Estimate:
    r"""Logarithm of the determinant of the shifted Hessian, the volume of the minimum.

    .. math:: \log\det(|H| + \tau I) = \sum_i \log(|\lambda_i| + \tau)

    In a Laplace approximation with prior precision tau (times the number of examples) it is
    the Occam factor. With tau = 1 it is zero for a flat loss, whatever P.

    The error from the data is to first order in the change of the Hessian: where the data
    decide which eigenvalues are positive (few examples, a wide bulk), it was up to half too
    small.

    Args:
        analysis: What is measured.
        tau: Shift, greater than 0.
        spectrum: ``"abs"``: magnitudes of eigenvalues; ``"signed"``: eigenvalues as they are,
            which must all be greater than ``-tau``.
        num_probes: Random vectors, beside the Lanczos run's.
        num_steps: Lanczos steps of each to begin with.
        max_steps: Up to how many they go on, while what they leave open of eigenvalues near
            zero is more than the probes' error.

    Raises:
        MeasureError: If an eigenvalue is at most ``-tau``, with ``"signed"``.
    """
    check_quadrature(num_probes, num_steps, max_steps)
    check_positive("tau", tau)
    spectral = analysis.spectral()
    estimate, quadrature = spectral.resolved(
        lambda runs: estimators.log_det(runs, tau=tau, spectrum=spectrum),
        num_probes=num_probes,
        num_steps=num_steps,
        max_steps=max_steps,
    )
    first = spectral.quadrature(num_probes=num_probes, num_steps=num_steps)
    wrong = analysis.product_error * float(quadrature.sums(lambda x: abs(x) / tau).mean())
    estimate = replace(estimate, probe_error=math.hypot(estimate.probe_error or 0.0, wrong))

    def logarithms(x: np.ndarray) -> np.ndarray:
        size = abs(x) if spectrum == "abs" else x
        result: np.ndarray = np.log1p(np.maximum(size / tau, -0.99))
        return result

    return spectral.with_shape_data_error(estimate, first, logarithms)
