"""The effective rank of the Hessian."""

from sharpkit import estimators
from sharpkit.analysis import Analysis
from sharpkit.measures._entropy import MAX_STEPS, check_quadrature, with_error
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "effective_rank",
    symbol="exp H_1(|lambda|)",
    reference="Roy and Vetterli 2007, doi:10.5281/zenodo.40328",
    cost="24 Lanczos steps and num_probes x num_steps HVPs (48 to 384), shared with the entropies",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=0,
    nonnegative=True,
)
def effective_rank(
    analysis: Analysis, *, num_probes: int = 4, num_steps: int = 12, max_steps: int = MAX_STEPS
) -> Estimate:
    r"""Effective rank of the Hessian, the exponential of the entropy of its spectrum.

    .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \qquad
        p_i = |\lambda_i| \Big/ \sum_j |\lambda_j|

    The number of equal eigenvalues with the same entropy: between 1 and P. The bulk of very
    many small eigenvalues weighs in it, unlike in the stable rank.

    The error from the data is to first order in the change of the Hessian: where the data
    decide which eigenvalues are positive (few examples, a wide bulk), it was up to half too
    small.

    Lanczos runs go on until what they leave open of the many eigenvalues near zero is below
    the probes' error; where ``max_steps`` end them first, the estimate has not converged, and
    its error says how much is open.

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
        estimators.effective_rank,
        num_probes=num_probes,
        num_steps=num_steps,
        max_steps=max_steps,
    )
    first = spectral.quadrature(num_probes=num_probes, num_steps=num_steps)
    return with_error(spectral, quadrature, first, estimate, 1.0, "abs", estimate.value)
