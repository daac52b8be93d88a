"""SAM's sharpness: the largest rise of the loss over a Euclidean ball."""

from sharpkit.analysis import Analysis
from sharpkit.estimators.ascent import Norm
from sharpkit.geometry import EuclideanMetric
from sharpkit.measures._ball import worst_rise
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "sam_sharpness",
    symbol="max_{|d|<=rho} L(theta+d) - L(theta)",
    reference="Foret et al. 2021, arXiv:2010.01412",
    cost="steps + 1 gradients (21)",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=1,
    nonnegative=True,
)
def sam_sharpness(
    analysis: Analysis, *, rho: float = 0.05, norm: Norm = "l2", steps: int = 20
) -> Estimate:
    r"""Largest rise of the loss over a ball of radius rho, by multi-step ascent.

    .. math:: \max_{\|\delta\|_p \le \rho} L(\theta+\delta) - L(\theta)

    The value was attained, so the true maximum is at least as large; the error is the
    first-order room left at the best point. The default ball (l2, 0.05) is the paper's.
    Not invariant to rescaling the layers of a ReLU network.

    Args:
        analysis: What is measured.
        rho: Radius, in the units of the parameters.
        norm: ``"l2"`` or ``"linf"`` (which is not invariant to rotations).
        steps: Gradients to spend.
    """
    return worst_rise(
        analysis,
        EuclideanMetric(),
        rho=rho,
        norm=norm,
        steps=steps,
        purpose="sam_sharpness",
    )
