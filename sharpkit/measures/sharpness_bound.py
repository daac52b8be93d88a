"""The sharpness bound: PAC-Bayes with noise that stays in the worst-case box."""

from sharpkit.analysis import Analysis
from sharpkit.measures._drop import Drop, Reference, alpha_of, bound_of, of_alpha, sigma_of_alpha
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "sharpness_bound",
    symbol="|theta - theta_0|^2 log(2P)/(2 alpha^2) + log(m/sigma) + 10",
    reference="Jiang et al. 2020, arXiv:1912.02178; constants derived here",
    cost="that of sharpness_flatness, shared",
    invariant_to={"permutation"},
    degree=0,
    nonnegative=False,
    needs={"initial", "labels"},
    dear=True,
)
def sharpness_bound(
    analysis: Analysis,
    *,
    reference: Reference = "init",
    drop: Drop = "accuracy",
    target: float = 0.1,
    steps: int = 20,
    largest: float = 2.0,
    num_examples: int | None = None,
) -> Estimate:
    r"""Complexity term of the PAC-Bayes bound with noise that stays in the worst-case box.

    .. math:: \frac{\|\theta-\theta_0\|^2}{4\sigma^2} + \log\frac{m}{\sigma} + 10, \qquad
        \sigma = \frac{\alpha}{\sqrt{2\log 2\omega}}

    with alpha as for ``sharpness_flatness`` and :math:`\omega` parameters. At this sigma noise
    leaves the box with probability 1/2 at most, as :math:`\omega e^{-\alpha^2/2\sigma^2} = 1/2`:
    the first term is :math:`\|\theta-\theta_0\|^2 \log(2\omega) / 2\alpha^2`. Retellings of the
    published formula differ in the constant before the logarithm (and have
    :math:`\log(2\omega/\delta)`); this one is derived. A lower bound, as alpha is bounded from
    above.

    Args:
        analysis: What is measured.
        reference: ``"init"``: theta_0 is the parameters before training; ``"origin"``: zero.
        drop: As for ``sharpness_flatness``; so are the next three.
        target: The drop that is still allowed.
        steps: Gradients of each ascent.
        largest: Largest alpha to try.
        num_examples: m, the number of training examples; None: of the data given.
    """
    bound, dim = bound_of(analysis, reference, num_examples), analysis.objective.space.dim
    radius = alpha_of(
        analysis, magnitude=False, drop=drop, target=target, steps=steps, largest=largest
    )
    return of_alpha(
        analysis,
        radius,
        lambda alpha: bound(sigma_of_alpha(alpha, dim)),
        drop=drop,
        target=target,
        magnitude=False,
    )
