"""The sharpness bound: PAC-Bayes with relative noise in the worst-case box."""

from sharpkit.analysis import Analysis
from sharpkit.measures._drop import (
    Drop,
    Reference,
    alpha_of,
    magnitude_bound_of,
    of_alpha,
    sigma_of_alpha,
)
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "sharpness_magnitude_bound",
    symbol="sum_i log(...)/4 + log(m/sigma') + 10",
    reference="Jiang et al. 2020, arXiv:1912.02178; constants derived here",
    cost="that of sharpness_magnitude_flatness, shared",
    invariant_to={"permutation"},
    degree=0,
    nonnegative=False,
    needs={"initial", "labels"},
    dear=True,
)
def sharpness_magnitude_bound(
    analysis: Analysis,
    *,
    reference: Reference = "init",
    drop: Drop = "accuracy",
    target: float = 0.1,
    steps: int = 20,
    largest: float = 2.0,
    epsilon: float = 1e-3,
    num_examples: int | None = None,
) -> Estimate:
    r"""Complexity term of the magnitude-aware bound with noise that stays in the worst-case box.

    .. math:: \frac14 \sum_{i=1}^{\omega} \log \frac{\epsilon^2 + (\sigma'^2 + 1)
        \|\theta - \theta_0\|^2 / \omega}{\epsilon^2 + \sigma'^2 (\theta - \theta_0)_i^2}
        + \log\frac{m}{\sigma'} + 10, \qquad \sigma' = \frac{\alpha'}{\sqrt{2\log 2\omega}}

    with alpha' as for ``sharpness_magnitude_flatness``: ``pac_bayes_magnitude_bound`` at the
    relative noise that leaves the box with probability 1/2 at most. Retellings of the published
    formula have :math:`\alpha'^2 + 4\log(2\omega/\delta)` in the numerator; multiplied out, this
    one has :math:`\alpha'^2 + 2\log 2\omega`, and is derived. It need not fall as alpha'
    grows, so its error is that of bisection alone, on the condition that the ascents miss
    nothing.

    Args:
        analysis: What is measured.
        reference: Of the numerator: ``"init"``, the parameters before training, or
            ``"origin"``. Both need the former.
        drop: As for ``sharpness_flatness``; so are the next three.
        target: The drop that is still allowed.
        steps: Gradients of each ascent.
        largest: Largest alpha' to try.
        epsilon: Of the formula, for weights that did not move.
        num_examples: m, the number of training examples; None: of the data given.
    """
    bound = magnitude_bound_of(analysis, reference, num_examples, epsilon)
    dim = analysis.objective.space.dim
    radius = alpha_of(
        analysis, magnitude=True, drop=drop, target=target, steps=steps, largest=largest
    )
    return of_alpha(
        analysis,
        radius,
        lambda alpha: bound(sigma_of_alpha(alpha, dim)),
        drop=drop,
        target=target,
        magnitude=True,
        kind="bound",
    )
