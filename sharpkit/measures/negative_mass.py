"""How much of the Hessian's curvature is negative."""

import numpy as np

from sharpkit import estimators
from sharpkit.analysis import Analysis
from sharpkit.measures._entropy import MAX_STEPS, check_quadrature
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "negative_mass",
    symbol="sum |lambda_-| / sum |lambda|",
    reference="Ghorbani et al. 2019, arXiv:1901.10159",
    cost="24 Lanczos steps and num_probes x num_steps HVPs (48 to 384), shared with the entropies",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=0,
    nonnegative=True,
)
def negative_mass(
    analysis: Analysis, *, num_probes: int = 4, num_steps: int = 12, max_steps: int = MAX_STEPS
) -> Estimate:
    r"""Negative share of the Hessian's curvature: 0 at a minimum, 1 at a maximum.

    .. math:: \sum_{\lambda_i<0} |\lambda_i| \Big/ \sum_i |\lambda_i|

    How far from a minimum the point is, in magnitudes rather than counts: most eigenvalues
    are so near to zero that their signs say nothing.

    The error from the data is to first order in the change of the Hessian: where the data
    decide which eigenvalues are positive (few examples, a wide bulk), it was up to half too
    small.

    Args:
        analysis: What is measured.
        num_probes: Random vectors, beside the Lanczos run's.
        num_steps: Lanczos steps of each to begin with.
        max_steps: Up to how many they go on, while what they leave open of eigenvalues near
            zero is more than the probes' error.

    Raises:
        MeasureError: If the Hessian is zero.
    """
    check_quadrature(num_probes, num_steps, max_steps)
    spectral = analysis.spectral()
    estimate, quadrature = spectral.resolved(
        estimators.negative_mass,
        num_probes=num_probes,
        num_steps=num_steps,
        max_steps=max_steps,
    )
    first = spectral.quadrature(num_probes=num_probes, num_steps=num_steps)
    total = float(quadrature.sums(abs, place="zero").mean()) or 1.0

    def linear(x: np.ndarray) -> np.ndarray:
        result: np.ndarray = (np.maximum(-x, 0.0) - estimate.value * abs(x)) / total
        return result

    return spectral.with_shape_data_error(estimate, first, linear)
