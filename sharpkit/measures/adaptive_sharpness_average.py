"""Average-case adaptive sharpness: random perturbations relative to each weight."""

from typing import Literal

from sharpkit.analysis import Analysis
from sharpkit.geometry import Scaling, scale_of
from sharpkit.measures._andriushchenko import check_published, published_average
from sharpkit.measures._average import mean_rise
from sharpkit.measures.registry import register
from sharpkit.results import Estimate

DEFAULT_RHO = {"l2": 0.1, "linf": 0.2}  # within the grids of arXiv:2302.07011
COARSER = 0.1  # of those radii: norms of filters and layers are that much larger


@register(
    "adaptive_sharpness_average",
    symbol="E_d L(theta+d) - L(theta), d ~ N(0, rho^2 w^2)",
    reference="Andriushchenko et al. 2023, arXiv:2302.07011",
    cost="2 num_pairs forwards (200), 21 more for the data error, 2 gradients",
    invariant_to={
        "permutation",
        "layer_scale",
        "node_scale",
        "pair_scale",
        "batch_norm_scale",
        "logit_scale",
        "key_bias_shift",
    },
    degree=1,
    nonnegative=False,
)
def adaptive_sharpness_average(
    analysis: Analysis,
    *,
    rho: float | None = None,
    norm: Literal["l2", "linf"] = "l2",
    scaling: Scaling = "elementwise",
    num_pairs: int = 100,
    num_draws: int = 20,
    shard_size: int | None = None,
    compat: Literal["andriushchenko2023"] | None = None,
) -> Estimate:
    r"""Mean rise of the loss under random perturbations relative to the weights.

    .. math:: E_{\delta \sim N(0, \rho^2 \operatorname{diag}(c^2))}
        [L(\theta+\delta)] - L(\theta) \approx \tfrac{\rho^2}{2}\sum_i c_i^2 H_{ii},
        \qquad c = |w|

    For ``norm="linf"`` the perturbation is uniform on :math:`[-\rho c, \rho c]`. Draws
    come in pairs of opposite sign, so the gradient cancels; rho is the standard deviation
    of one relative entry and is not divided by the square root of P. With the scaling of
    filters or layers it is invariant to rescaling whole layers only.

    ``compat="andriushchenko2023"`` follows the published code of that paper: for each batch
    of the data (or each shard of ``shard_size``) the mean of ``num_draws`` single draws of
    its own, then the plain mean; without pairs its error is larger. Its radii: 0.05, 0.1,
    0.2, 0.4 (ResNet-18) and 0.1, 0.2, 0.4, 0.8 (ViT) for l2; 0.1, 0.2, 0.4, 0.8 for linf
    (``sharpkit.measures.RHO_GRIDS``).

    Args:
        analysis: What is measured.
        rho: Relative scale; default 0.1 for l2, 0.2 for linf, and a tenth of it for filters
            and layers.
        norm: ``"l2"`` or ``"linf"``.
        scaling: What c is: ``"elementwise"``, ``"filter"`` or ``"layer"``, as for
            ``adaptive_sharpness_worst``.
        num_pairs: Pairs of perturbed losses. The rises are skewed: with 20 pairs the standard
            error comes out some 20% small, with 100 it is right.
        num_draws: Single draws for each batch with compat, at least 2 (published: 20).
        shard_size: Examples of a batch with compat; None: the batches as they come. The
            mean over draws of our way does not depend on batches.
        compat: ``"andriushchenko2023"``: as the published code does; None: our way.
    """
    radius = DEFAULT_RHO.get(norm, 0.0) * (1 if scaling == "elementwise" else COARSER)
    radius = radius if rho is None else rho
    if compat is not None:
        check_published(scaling)
        return published_average(
            analysis,
            rho=radius,
            norm=norm,
            draws=num_draws,
            shard_size=shard_size,
            purpose="adaptive_sharpness_average",
        )
    return mean_rise(
        analysis,
        scale_of(analysis.objective.space, analysis.theta, scaling),
        rho=radius,
        norm=norm,
        num_pairs=num_pairs,
        purpose="adaptive_sharpness_average",
    )
