"""SAM's sharpness: the largest rise of the loss over a ball around theta."""

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
    cost="(restarts + 1) steps + 1 gradients (21), 2 forwards",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=1,
    nonnegative=True,
)
def sam_sharpness(
    analysis: Analysis,
    *,
    rho: float = 0.05,
    norm: Norm = "l2",
    steps: int = 20,
    restarts: int = 0,
    shard_size: int | None = None,
) -> Estimate:
    r"""Largest rise of the loss over a ball of radius rho, by multi-step ascent.

    .. math:: \max_{\|\delta\|_p \le \rho} L(\theta+\delta) - L(\theta)

    The value was attained, so the true maximum is at least as large; the error is the
    first-order room left at the best point. The default ball (l2, 0.05) is the paper's.
    Not invariant to rescaling the layers of a ReLU network. For l1 a convex loss is largest
    where a single parameter moves; the ascent finds a good one, seldom the best. The data
    error is that of the rise at the perturbation found, not of the choice of it: where a
    sample has a slope that the population has not, its worst case is larger on average.
    With shards it is the error of their mean.

    Args:
        analysis: What is measured.
        rho: Radius, in the units of the parameters.
        norm: ``"l1"``, ``"l2"`` or ``"linf"`` (only l2 is invariant to rotations).
        steps: Gradients of an ascent.
        restarts: Ascents from random points of the ball besides the one from theta; the
            highest counts, and ``details`` tells how far they differ.
        shard_size: Mean of the worst cases of shards of so many examples (m-sharpness, see
            ``m_sharpness``); None: one worst case for all data.
    """
    return worst_rise(
        analysis,
        lambda _: EuclideanMetric(),
        rho=rho,
        norm=norm,
        steps=steps,
        restarts=restarts,
        shard_size=shard_size,
        purpose="sam_sharpness",
    )
