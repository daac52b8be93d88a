"""The PAC-Bayes bound with noise of one size."""

import math

from sharpkit.analysis import Analysis
from sharpkit.measures._drop import Drop, Reference, bound_of, of_sigma, sigma_of
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "pac_bayes_bound",
    symbol="|theta - theta_0|^2/(4 sigma^2) + log(m/sigma) + 10",
    reference="Jiang et al. 2020, arXiv:1912.02178, eq. 48 and 49; Dziugaite et al. 2020,"
    " arXiv:2010.11924",
    cost="about 11 num_pairs + 30 forwards (380), shared with pac_bayes_flatness",
    invariant_to={"permutation", "orthogonal"},
    degree=0,
    nonnegative=False,
    needs={"initial", "labels"},
    dear=True,
)
def pac_bayes_bound(
    analysis: Analysis,
    *,
    reference: Reference = "init",
    drop: Drop = "accuracy",
    target: float = 0.1,
    num_pairs: int = 32,
    largest: float = 2.0,
    num_examples: int | None = None,
) -> Estimate:
    r"""Complexity term of the PAC-Bayes bound with the noise that costs a tenth of accuracy.

    .. math:: \frac{\|\theta - \theta_0\|^2}{4\sigma^2} + \log\frac{m}{\sigma} + 10

    with sigma as for ``pac_bayes_flatness``; the first term is half the divergence of
    :math:`N(\theta, \sigma^2 I)` from :math:`N(\theta_0, \sigma^2 I)`. Divided by m, its square
    root bounds the gap up to constants; m is the same for networks of one training set. As a
    number it says more of the distance moved than of the curvature.

    Args:
        analysis: What is measured.
        reference: ``"init"``: theta_0 is the parameters before training; ``"origin"``: zero.
        drop: As for ``pac_bayes_flatness``; so are the next three.
        target: What the noise must cost in the mean.
        num_pairs: Pairs of opposite draws.
        largest: Upper end of the bracket of sigma.
        num_examples: m, the number of training examples; None: of the data given.
    """
    function = bound_of(analysis, reference, num_examples)
    level = sigma_of(
        analysis, magnitude=False, drop=drop, target=target, num_pairs=num_pairs, largest=largest
    )
    return of_sigma(
        analysis,
        level,
        function,
        drop=drop,
        target=target,
        magnitude=False,
        error_unreached=math.inf,
    )
