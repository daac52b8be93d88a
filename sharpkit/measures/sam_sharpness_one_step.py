"""SAM's sharpness as its optimizer sees it: one ascent step."""

from sharpkit.analysis import Analysis
from sharpkit.estimators.ascent import Norm
from sharpkit.geometry import EuclideanMetric
from sharpkit.measures._ball import one_step_rise
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "sam_sharpness_one_step",
    symbol="L(theta + rho g/|g|) - L(theta)",
    reference="Foret et al. 2021, arXiv:2010.01412",
    cost="3 gradients and 2 forwards, all but two gradients for the error",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=1,
    nonnegative=False,
)
def sam_sharpness_one_step(analysis: Analysis, *, rho: float = 0.05, norm: Norm = "l2") -> Estimate:
    r"""Rise of the loss at the point that one SAM step perturbs to.

    .. math:: L\bigl(\theta + \rho\, g/\|g\|_2\bigr) - L(\theta) \qquad
        (\rho\operatorname{sign} g \text{ for } \ell_\infty)

    Badly underestimates the maximum over the ball near convergence, where the gradient is
    small and points anywhere (the paper's own 5-step value is 13 times the 1-step one on
    CIFAR-10); use ``sam_sharpness`` for that.

    Args:
        analysis: What is measured.
        rho: Radius, in the units of the parameters.
        norm: ``"l1"``, ``"l2"`` or ``"linf"``.
    """
    return one_step_rise(analysis, EuclideanMetric(), rho, norm)
