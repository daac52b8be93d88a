"""The rise of the loss under Gaussian smoothing: the low-pass filter measure."""

from dataclasses import replace

import torch

from sharpkit.analysis import Analysis
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures._average import mean_rise
from sharpkit.measures.registry import register
from sharpkit.results import Estimate, Part


@register(
    "gaussian_smoothed_sharpness",
    symbol="E_d L(theta+d) - L(theta), d ~ N(0, sigma^2 I)",
    reference="Bisla, Wang, Choromanska 2022, arXiv:2201.08025",
    cost="2 num_pairs forwards (200), 21 more for the data error, 2 gradients",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=1,
    nonnegative=False,
)
def gaussian_smoothed_sharpness(
    analysis: Analysis, *, sigma: float = 0.01, num_pairs: int = 100
) -> Estimate:
    r"""Rise of the loss when it is smoothed by a Gaussian kernel, a low-pass filter.

    .. math:: (L * N(0,\sigma^2 I))(\theta) - L(\theta)
        = E_{\delta \sim N(0, \sigma^2 I)} L(\theta+\delta) - L(\theta)
        \approx \tfrac{\sigma^2}{2}\operatorname{tr} H

    The paper's measure is the smoothed loss itself, the first of the parts; it ranks
    networks of the same loss alike. Not invariant to rescaling the layers of a ReLU network.
    Draws come in pairs of opposite sign, so the gradient cancels.

    Args:
        analysis: What is measured.
        sigma: Standard deviation of each entry of the perturbation.
        num_pairs: Pairs of perturbed losses. With few the standard error comes out small where
            few directions are curved (by some 20% with 10), as the rises are skewed.
    """
    check_positive("sigma", sigma)
    rise = mean_rise(
        analysis,
        torch.ones_like(analysis.theta),
        rho=sigma,
        norm="l2",
        num_pairs=num_pairs,
        purpose="gaussian_smoothed_sharpness",
    )
    smoothed = Part("smoothed loss", analysis.value + rise.value, rise.probe_error)
    return replace(rise, parts=(smoothed,))
