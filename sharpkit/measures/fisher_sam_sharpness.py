"""Fisher SAM's sharpness: the largest rise over the ball of a diagonal Fisher metric."""

from typing import Literal

from sharpkit.analysis import Analysis
from sharpkit.geometry import Metric, fisher_metric
from sharpkit.measures._ball import worst_rise
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "fisher_sam_sharpness",
    symbol="max_{d'Fd<=rho^2} L(theta+d) - L(theta), F diagonal",
    reference="Kim et al. 2022, arXiv:2206.04920; as in Jacobsen and Arvanitidis 2025",
    cost="(restarts + 1) steps + 1 gradients (21), 2 forwards",
    invariant_to={"permutation", "key_bias_shift"},
    degree=None,
    nonnegative=True,
)
def fisher_sam_sharpness(
    analysis: Analysis,
    *,
    rho: float = 0.05,
    fisher: Literal["batch", "examples"] = "batch",
    eta: float = 1.0,
    damping: float = 1e-3,
    steps: int = 20,
    restarts: int = 0,
    shard_size: int | None = None,
) -> Estimate:
    r"""Largest rise of the loss over the ball of a diagonal Fisher metric fixed at theta.

    .. math:: \max_{\delta^\top F \delta \le \rho^2} L(\theta+\delta) - L(\theta)

    Practical form, as arXiv:2502.08448 prints it (``"batch"``):
    :math:`F = 1 + \eta f` with f the square of the *mean* gradient of the data, or of each
    shard; near a critical point it is SAM's. The diagonal of the empirical Fisher matrix
    (``"examples"``): :math:`F = f + \text{damping}` with f the mean of the squares of the
    examples' gradients, at one backward pass an example. A diagonal F is not invariant to
    reparametrisation, whatever is said of the full one, and 1 and the damping break its
    invariance to rescaling too.

    Args:
        analysis: What is measured.
        rho: Radius in the metric.
        fisher: ``"batch"`` or ``"examples"``.
        eta: Weight of f, at least 0 (0 is SAM); our default, the papers tune it.
        damping: Added to f for ``"examples"``, above 0; what f hardly sees may move by
            ``rho / sqrt(damping)``.
        steps: Gradients of an ascent.
        restarts: Ascents from random points of the ball besides the one from theta.
        shard_size: Mean of the worst cases of shards of so many examples; None: one worst
            case for all data.
    """

    def metric(part: Analysis) -> Metric:
        if fisher == "examples":
            squares = part.objective.fisher_diagonal()
            return fisher_metric(squares, eta=None, damping=damping)
        return fisher_metric(part.gradient.square(), eta=eta, damping=damping)

    return worst_rise(
        analysis,
        metric,
        rho=rho,
        norm="l2",
        steps=steps,
        restarts=restarts,
        shard_size=shard_size,
        purpose="fisher_sam_sharpness",
    )
