"""m-sharpness: the mean of SAM's sharpness over shards of the data."""

from sharpkit.analysis import Analysis
from sharpkit.errors import SettingsError
from sharpkit.estimators.ascent import Norm
from sharpkit.geometry import EuclideanMetric
from sharpkit.measures._ball import worst_rise
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "m_sharpness",
    symbol="mean_S max_{|d|<=rho} L_S(theta+d) - L_S(theta), |S| = m",
    reference="Foret et al. 2021, arXiv:2010.01412, section 4.1",
    cost="(restarts + 1) steps + 2 gradients (22)",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=1,
    nonnegative=True,
)
def m_sharpness(
    analysis: Analysis,
    *,
    m: int = 128,
    rho: float = 0.05,
    norm: Norm = "l2",
    steps: int = 20,
    restarts: int = 0,
) -> Estimate:
    r"""Mean over shards of m examples of the largest rise of each shard's own loss.

    .. math:: \frac1K \sum_{k=1}^K \max_{\|\delta_k\|_p \le \rho}
        L_{S_k}(\theta+\delta_k) - L_{S_k}(\theta), \qquad |S_k| = m

    Each shard has a perturbation of its own, so it is at least the sharpness of all data
    together, and larger for smaller m: numbers compare at the same m only. Shards follow
    the order of the data; the last may be smaller, and they are weighed by their loss
    terms. As shards are disjoint samples, the spread of their values gives the data error
    (with four shards or more). With one shard it is ``sam_sharpness``.

    Args:
        analysis: What is measured.
        m: Examples of a shard, at most all there are.
        rho: Radius, in the units of the parameters.
        norm: ``"l1"``, ``"l2"`` or ``"linf"``.
        steps: Gradients of an ascent.
        restarts: Ascents from random points of the ball besides the one from theta.
    """
    if m < 1:
        raise SettingsError(f"Expected `m` to be at least 1. Got {m!r}.")
    size = min(m, analysis.objective.num_examples)
    return worst_rise(
        analysis,
        lambda _: EuclideanMetric(),
        rho=rho,
        norm=norm,
        steps=steps,
        restarts=restarts,
        shard_size=size if size < analysis.objective.num_examples else None,
        purpose="m_sharpness",
    )
