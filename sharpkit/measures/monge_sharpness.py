"""Sharpness in the Monge metric of the loss surface."""

from sharpkit.analysis import Analysis
from sharpkit.geometry import MongeMetric
from sharpkit.measures._ball import worst_rise
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "monge_sharpness",
    symbol="max_{d'Gd<=rho^2} L(theta+d) - L(theta), G = I + a^2 gg'",
    reference="Jacobsen and Arvanitidis 2025, arXiv:2502.08448",
    cost="(restarts + 1) steps + 1 gradients (21), 2 forwards",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=None,
    nonnegative=True,
)
def monge_sharpness(
    analysis: Analysis,
    *,
    rho: float = 0.05,
    alpha: float = 1.0,
    steps: int = 20,
    restarts: int = 0,
    shard_size: int | None = None,
) -> Estimate:
    r"""Largest rise of the loss over the ball of the Monge metric, by multi-step ascent.

    .. math:: \max_{\delta^\top G \delta \le \rho^2} L(\theta+\delta) - L(\theta),
        \qquad G = I + \alpha^2 g g^\top

    G is that of the full data (or of each shard), fixed at theta; the ascent runs in
    :math:`\zeta = G^{1/2}\delta`, where the ball is round. The scale alpha is our
    extension (the paper has 1; 0 gives SAM's sharpness). Despite the paper's title it is
    invariant to isometries only: rescaling layers changes it, and so does the scale of
    the loss. At a critical point it equals SAM's.

    Args:
        analysis: What is measured.
        rho: Radius in the metric.
        alpha: Scale of the loss axis, at least 0.
        steps: Gradients of an ascent.
        restarts: Ascents from random points of the ball besides the one from theta.
        shard_size: Mean of the worst cases of shards of so many examples; None: one worst
            case for all data.
    """
    return worst_rise(
        analysis,
        lambda part: MongeMetric(part.gradient, alpha),
        rho=rho,
        norm="l2",
        steps=steps,
        restarts=restarts,
        shard_size=shard_size,
        purpose="monge_sharpness",
    )
