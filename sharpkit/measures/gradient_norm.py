"""The norm of the gradient."""

from sharpkit.analysis import Analysis
from sharpkit.measures.registry import register
from sharpkit.results import Cost, Estimate

LARGEST_SHARE = 0.5  # of the value: with more rounding than this it is mostly rounding


@register(
    "gradient_norm",
    symbol="|g|_2",
    reference="Zhao, Zhang, Hu 2022, arXiv:2202.03599",
    cost="2 gradients, the second for the error",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=1,
    nonnegative=True,
)
def gradient_norm(analysis: Analysis) -> Estimate:
    r"""Euclidean norm of the gradient of the loss, which says how far from critical.

    .. math:: \|g\|_2, \quad g = \nabla L(\theta)

    The first-order rise of the loss over a ball of radius rho is rho times this norm. The
    error is the rounding of the gradient in the model's precision, estimated by moving the
    weights by their last digit: near a minimum the examples' gradients cancel, their
    rounding does not.

    Args:
        analysis: What is measured.
    """
    value, noise = float(analysis.gradient.double().norm()), analysis.noise[1]
    notes: tuple[str, ...] = ()
    if value > 0 and noise > LARGEST_SHARE * value:
        notes = (
            "The gradient is no larger than its own rounding. Measure with dtype=torch.float64"
            " to see it.",
        )
    return Estimate(
        value=value,
        probe_error=noise,
        error_kind="rounding",
        converged=not notes,
        cost=Cost(gradients=2),
        notes=notes,
    )
