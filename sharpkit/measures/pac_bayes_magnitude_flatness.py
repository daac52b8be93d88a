"""PAC-Bayes flatness relative to each weight: how much relative noise the network bears."""

from sharpkit.analysis import Analysis
from sharpkit.measures._drop import Drop, of_sigma, sigma_of
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "pac_bayes_magnitude_flatness",
    symbol="1/sigma'^2",
    reference="Jiang et al. 2020, arXiv:1912.02178, eq. 61; Dziugaite et al. 2020,"
    " arXiv:2010.11924",
    cost="about 11 num_pairs + 30 forwards (380)",
    invariant_to={
        "permutation",
        "layer_scale",
        "node_scale",
        "pair_scale",
        "batch_norm_scale",
        "logit_scale",
        "key_bias_shift",
    },
    degree=0,
    nonnegative=True,
    needs={"labels"},
    dear=True,
)
def pac_bayes_magnitude_flatness(
    analysis: Analysis,
    *,
    drop: Drop = "accuracy",
    target: float = 0.1,
    num_pairs: int = 32,
    largest: float = 2.0,
    epsilon: float = 0.0,
) -> Estimate:
    r"""Inverse variance of the relative noise on all weights that costs a tenth of accuracy.

    .. math:: 1/\sigma'^2, \qquad E_{z \sim N(0, I)}
        [\operatorname{err}(\theta + \sigma' |\theta| \odot z)] - \operatorname{err}(\theta) = 0.1

    sigma' is a standard deviation, relative to each weight; weights that are exactly zero stay
    so. The published noise has the variance :math:`\sigma'^2 w_i^2 + \epsilon^2`: ``epsilon``
    adds that term, which breaks the invariance to rescaling. The error is that of the random
    draws. BatchNorm is not folded first.

    Args:
        analysis: What is measured.
        drop: ``"accuracy"``, the share of labels that are right; or ``"loss"``, which any
            criterion has, to rise by ``target`` in its own units.
        target: What the noise must cost in the mean.
        num_pairs: Pairs of opposite draws, the same for every sigma. For a network of few
            parameters and examples the standard error of 16 pairs is some 20% small.
        largest: Upper end of the bracket; the lower is a millionth of it. If no sigma costs so
            much, the value is that of the largest, an upper bound, and has not converged.
        epsilon: Standard deviation of the noise of a weight that is zero; published 0.001.
    """
    level = sigma_of(
        analysis,
        magnitude=True,
        drop=drop,
        target=target,
        num_pairs=num_pairs,
        largest=largest,
        epsilon=epsilon,
    )
    return of_sigma(
        analysis,
        level,
        lambda sigma: 1 / sigma**2,
        drop=drop,
        target=target,
        magnitude=True,
        error_unreached=1 / largest**2,
    )
