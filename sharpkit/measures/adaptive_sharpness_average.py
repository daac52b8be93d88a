"""Average-case adaptive sharpness: random perturbations relative to each weight."""

import math
from dataclasses import replace

from sharpkit.analysis import Analysis
from sharpkit.estimators import average_rise
from sharpkit.estimators.ascent import Norm
from sharpkit.measures.registry import register
from sharpkit.results import Estimate

DEFAULT_RHO = {"l2": 0.1, "linf": 0.2}  # within the grids of arXiv:2302.07011


@register(
    "adaptive_sharpness_average",
    symbol="E_d L(theta+d) - L(theta), d ~ N(0, rho^2 w^2)",
    reference="Andriushchenko et al. 2023, arXiv:2302.07011",
    cost="2 num_pairs forwards (200) and 2 gradients",
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
    norm: Norm = "l2",
    num_pairs: int = 100,
) -> Estimate:
    r"""Mean rise of the loss under random perturbations relative to the weights.

    .. math:: E_{\delta \sim N(0, \rho^2 \operatorname{diag}(w^2))}
        [L(\theta+\delta)] - L(\theta) \approx \tfrac{\rho^2}{2}\sum_i w_i^2 H_{ii}

    For ``norm="linf"`` the perturbation is uniform on :math:`[-\rho|w|, \rho|w|]`. Draws
    come in pairs of opposite sign, so the gradient cancels; rho is the standard deviation
    of one relative entry and is not divided by the square root of P.

    Args:
        analysis: What is measured.
        rho: Relative scale; default 0.1 for l2 and 0.2 for linf.
        norm: ``"l2"`` or ``"linf"``.
        num_pairs: Pairs of perturbed losses. The rises are skewed: with 20 pairs the standard
            error comes out some 20% small, with 100 it is right.
    """
    scale = analysis.theta.abs()
    estimate = average_rise(
        lambda z: analysis.loss_at(scale * z),
        start_value=analysis.value,
        like=scale,
        rho=DEFAULT_RHO[norm] if rho is None else rho,
        norm=norm,
        num_pairs=num_pairs,
        generator=analysis.generator("adaptive_sharpness_average"),
    )
    # The loss at theta is in every rise, so its rounding does not average out.
    rounding = analysis.rounding(analysis.value, analysis.value + estimate.value)
    return replace(estimate, probe_error=math.hypot(estimate.probe_error or 0.0, rounding))
