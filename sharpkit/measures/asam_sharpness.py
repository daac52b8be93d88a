"""ASAM's sharpness: the largest rise over perturbations relative to the weights, with eta."""

from typing import Literal

from sharpkit.analysis import Analysis
from sharpkit.geometry import ElementwiseMetric, asam_scale
from sharpkit.measures._ball import worst_rise
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "asam_sharpness",
    symbol="max_{|d/T|<=rho} L(theta+d) - L(theta), T = |w| + eta",
    reference="Kwon et al. 2021, arXiv:2102.11600",
    cost="(restarts + 1) steps + 1 gradients (21), 2 forwards",
    invariant_to={"permutation", "key_bias_shift"},
    degree=1,
    nonnegative=True,
)
def asam_sharpness(
    analysis: Analysis,
    *,
    rho: float = 0.5,
    eta: float = 0.01,
    weights_only: bool = True,
    norm: Literal["l2", "linf"] = "l2",
    steps: int = 20,
    restarts: int = 0,
    shard_size: int | None = None,
) -> Estimate:
    r"""Largest rise of the loss over the ball that ASAM's optimizer perturbs in.

    .. math:: \max_{\|T_w^{-1}\delta\|_p \le \rho} L(\theta+\delta) - L(\theta),
        \qquad T_w = |w| + \eta

    With the defaults T is 1 for parameters whose name does not contain "weight", as in the
    code of the paper. Both that and eta break the invariance to rescaling which ``|w|``
    alone has: ``eta=0, weights_only=False`` is ``adaptive_sharpness_worst``. The default
    rho is that of the code; it is for l2, and far too large for linf.

    Args:
        analysis: What is measured.
        rho: Radius.
        eta: Added to the size of each weight.
        weights_only: Whether parameters not called "weight" are measured as they are.
        norm: ``"l2"`` or ``"linf"``.
        steps: Gradients of an ascent.
        restarts: Ascents from random points of the ball besides the one from theta.
        shard_size: Mean of the worst cases of shards of so many examples; None: one worst
            case for all data.
    """
    scale = asam_scale(analysis.objective.space, analysis.theta, eta, weights_only=weights_only)
    return worst_rise(
        analysis,
        lambda _: ElementwiseMetric(scale),
        rho=rho,
        norm=norm,
        steps=steps,
        restarts=restarts,
        shard_size=shard_size,
        purpose="asam_sharpness",
    )
