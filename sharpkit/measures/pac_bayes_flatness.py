"""PAC-Bayes flatness: how much noise of one size the network bears."""

from sharpkit.analysis import Analysis
from sharpkit.measures._drop import Drop, of_sigma, sigma_of
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "pac_bayes_flatness",
    symbol="1/sigma^2",
    reference="Jiang et al. 2020, arXiv:1912.02178, eq. 53; Dziugaite et al. 2020,"
    " arXiv:2010.11924",
    cost="about 11 num_pairs + 30 forwards (380)",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=0,
    nonnegative=True,
    needs={"labels"},
    dear=True,
)
def pac_bayes_flatness(
    analysis: Analysis,
    *,
    drop: Drop = "accuracy",
    target: float = 0.1,
    num_pairs: int = 32,
    largest: float = 2.0,
) -> Estimate:
    r"""Inverse variance of the Gaussian noise on all weights that costs a tenth of accuracy.

    .. math:: 1/\sigma^2, \qquad E_{z \sim N(0, I)}
        [\operatorname{err}(\theta + \sigma z)] - \operatorname{err}(\theta) = 0.1

    sigma is a standard deviation. (A widespread implementation hands :math:`\sigma^2` to a
    function that takes the standard deviation; its sigma is the square root of this one.) The
    error is that of the random draws. Misleads between networks of
    other scale: rescaling the layers of a ReLU network changes it at will. BatchNorm is not
    folded first.

    Args:
        analysis: What is measured.
        drop: ``"accuracy"``, the share of labels that are right; or ``"loss"``, which any
            criterion has, to rise by ``target`` in its own units.
        target: What the noise must cost in the mean.
        num_pairs: Pairs of opposite draws, the same for every sigma. For a network of few
            parameters and examples the standard error of 16 pairs is some 20% small.
        largest: Upper end of the bracket; the lower is a millionth of it. If no sigma costs so
            much, the value is that of the largest, an upper bound, and has not converged.
    """
    level = sigma_of(
        analysis, magnitude=False, drop=drop, target=target, num_pairs=num_pairs, largest=largest
    )
    return of_sigma(
        analysis,
        level,
        lambda sigma: 1 / sigma**2,
        drop=drop,
        target=target,
        magnitude=False,
        error_unreached=1 / largest**2,
    )
