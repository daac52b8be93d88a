"""The PAC-Bayes bound with noise relative to each weight."""

import math

from sharpkit.analysis import Analysis
from sharpkit.measures._drop import Drop, Reference, magnitude_bound_of, of_sigma, sigma_of
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "pac_bayes_magnitude_bound",
    symbol="sum_i log(...)/4 + log(m/sigma') + 10",
    reference="Jiang et al. 2020, arXiv:1912.02178, eq. 56 and 57; Dziugaite et al. 2020,"
    " arXiv:2010.11924",
    cost="about 11 num_pairs + 30 forwards (380)",
    invariant_to={"permutation"},
    degree=0,
    nonnegative=False,
    needs={"initial", "labels"},
    dear=True,
)
def pac_bayes_magnitude_bound(
    analysis: Analysis,
    *,
    reference: Reference = "init",
    drop: Drop = "accuracy",
    target: float = 0.1,
    num_pairs: int = 32,
    largest: float = 2.0,
    epsilon: float = 1e-3,
    num_examples: int | None = None,
) -> Estimate:
    r"""Complexity term of the PAC-Bayes bound with relative noise that costs a tenth of accuracy.

    .. math:: \frac14 \sum_{i=1}^{\omega} \log \frac{\epsilon^2 + (\sigma'^2 + 1)
        \|\theta - \theta_0\|^2 / \omega}{\epsilon^2 + \sigma'^2 (\theta - \theta_0)_i^2}
        + \log\frac{m}{\sigma'} + 10

    as published, with the noise of ``pac_bayes_magnitude_flatness`` and its epsilon; for
    ``reference="origin"`` the numerator has :math:`\|\theta\|^2`, and the denominator stays.
    The sum is half the divergence of noise with variances :math:`\epsilon^2 + \sigma'^2
    (\theta-\theta_0)_i^2` from the best isotropic prior around theta_0, while the noise that
    sigma' is found with is relative to theta itself: the number is a score, and no bound of
    that noise. Weights that hardly moved weigh most, through epsilon.

    Args:
        analysis: What is measured.
        reference: Of the numerator: ``"init"``, the parameters before training, or
            ``"origin"``. Both need the former.
        drop: As for ``pac_bayes_flatness``; so are the next three.
        target: What the noise must cost in the mean.
        num_pairs: Pairs of opposite draws.
        largest: Upper end of the bracket of sigma'.
        epsilon: Standard deviation of the noise of a weight that is zero.
        num_examples: m, the number of training examples; None: of the data given.
    """
    function = magnitude_bound_of(analysis, reference, num_examples, epsilon)
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
        function,
        drop=drop,
        target=target,
        magnitude=True,
        error_unreached=math.inf,
    )
