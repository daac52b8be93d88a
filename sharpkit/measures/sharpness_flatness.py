"""Sharpness flatness: how large a worst-case perturbation the network bears."""

from sharpkit.analysis import Analysis
from sharpkit.measures._drop import Drop, alpha_of, of_alpha
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "sharpness_flatness",
    symbol="1/alpha^2",
    reference="Jiang et al. 2020, arXiv:1912.02178, eq. 54",
    cost="about 8 ascents of steps gradients and forwards (160 each)",
    invariant_to={"permutation", "key_bias_shift"},
    degree=0,
    nonnegative=True,
    needs={"labels"},
    dear=True,
)
def sharpness_flatness(
    analysis: Analysis,
    *,
    drop: Drop = "accuracy",
    target: float = 0.1,
    steps: int = 20,
    largest: float = 2.0,
) -> Estimate:
    r"""Inverse square of the largest box around theta in which accuracy drops by a tenth at most.

    .. math:: 1/\alpha^2, \qquad \alpha = \max\Big\{a : \max_{\|\delta\|_\infty \le a}
        \operatorname{err}(\theta+\delta) - \operatorname{err}(\theta) \le 0.1\Big\}

    Ascents look for a larger drop in boxes of bisected size: they climb the loss, or for the
    accuracy the margins of as many labels as must be missed. A point found proves that alpha is
    smaller; none found proves nothing, so the value is a lower bound. The error is what the
    last box without a find would give, and does not tell what the ascents missed: on networks
    with 12 examples a search for every pair of labels found up to 2.3 times as much.
    Misleads between networks of other scale.

    Args:
        analysis: What is measured.
        drop: ``"accuracy"``, the share of labels that are right; or ``"loss"``, which any
            criterion has, to rise by ``target`` in its own units.
        target: The drop that is still allowed.
        steps: Gradients of each ascent.
        largest: Largest alpha to try. If no drop is found in it, the value is that of the
            largest and has not converged.
    """
    radius = alpha_of(
        analysis, magnitude=False, drop=drop, target=target, steps=steps, largest=largest
    )
    return of_alpha(
        analysis, radius, lambda alpha: 1 / alpha**2, drop=drop, target=target, magnitude=False
    )
