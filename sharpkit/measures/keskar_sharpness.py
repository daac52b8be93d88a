"""Keskar's epsilon-sharpness: the largest relative rise over a box around theta."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.errors import MeasureError, SettingsError
from sharpkit.estimators.protocol import check_positive
from sharpkit.geometry import ElementwiseMetric
from sharpkit.measures._ball import Chart, ascend
from sharpkit.measures._groups import UNKNOWN, centred
from sharpkit.measures.registry import register
from sharpkit.objective.groups import group_error
from sharpkit.results import Estimate

MEMORY_SHARE = 4  # of the free memory, a quarter


@register(
    "keskar_sharpness",
    symbol="100 (max_{z in C_eps} L(theta+Az) - L(theta)) / (1 + L(theta))",
    reference="Keskar et al. 2017, arXiv:1609.04836",
    cost="(restarts + 1) steps + 1 gradients (21), 2 forwards",
    invariant_to={"permutation", "key_bias_shift"},
    degree=None,
    nonnegative=True,
)
def keskar_sharpness(
    analysis: Analysis,
    *,
    epsilon: float = 1e-3,
    subspace: int | None = None,
    steps: int = 20,
    restarts: int = 0,
) -> Estimate:
    r"""Largest rise of the loss over a box, in percent of one plus the loss.

    .. math:: 100\,\frac{\max_{z \in C_\epsilon} L(\theta+Az) - L(\theta)}{1+L(\theta)},
        \qquad C_\epsilon = \{z : |z_i| \le \epsilon(|(A^+\theta)_i|+1)\}

    A is the identity, or ``[P, p]`` with random normal columns (the paper only calls them
    random) of unit length to within their scatter, entries from :math:`N(0, 1/P)`. The
    paper takes ten steps of L-BFGS-B, we the projected ascent of the other worst cases; both
    give lower bounds. The 1 makes the box absolute for small weights, so that rescaling
    layers changes it, and the loss in the denominator mixes in how well the network fits.

    Args:
        analysis: What is measured.
        epsilon: Half the width of the box (the paper: 1e-3 and 5e-4).
        subspace: p, fewer than P (the paper: 100); None: all parameters.
        steps: Gradients of an ascent.
        restarts: Ascents from random points of the box besides the one from theta.
    """
    check_positive("epsilon", epsilon)
    here = 1 + analysis.value
    if here <= 0:
        raise MeasureError(
            "Expected a loss above -1, as the rise is measured by one plus the loss. Got"
            f" {analysis.value:g}. Use sam_sharpness with norm='linf'."
        )
    estimate, delta = ascend(
        analysis,
        _chart(analysis, subspace),
        rho=epsilon,
        norm="linf",
        steps=steps,
        purpose="keskar_sharpness",
        restarts=restarts,
    )
    value = 100 * estimate.value / here
    error, draws = UNKNOWN
    if analysis.num_groups:
        groups = analysis.num_groups
        weights, low = analysis.objective.grouped_value(groups)
        _, high = analysis.objective.at(analysis.theta + delta).grouped_value(groups)
        # The ratio to first order in both losses.
        parts = 100 / here * (high - (1 + estimate.value / here) * low)
        error, draws = centred(group_error(parts, weights), value)
    return replace(
        estimate,
        value=value,
        probe_error=100 * (estimate.probe_error or 0.0) / here,
        data_error=error,
        data_draws=draws,
    )


def _chart(analysis: Analysis, subspace: int | None) -> Chart:
    theta, P = analysis.theta, analysis.objective.space.dim
    if subspace is None:
        return Chart.of(ElementwiseMetric(theta.abs() + 1))
    if not 1 <= subspace < P:
        raise SettingsError(
            f"Expected `subspace` between 1 and {P - 1}, one less than the parameters, or"
            f" None for all of them. Got {subspace!r}."
        )
    room = analysis.objective.free_memory // MEMORY_SHARE
    needed = subspace * P * theta.element_size()
    if needed > room:
        raise MeasureError(
            f"Expected memory for {subspace} directions: {needed / 1e9:.3g} GB, at most a"
            f" quarter of what is free. That is {room / 1e9:.3g} GB. Take a smaller `subspace`."
        )
    generator = analysis.generator("keskar_sharpness subspace")
    A = torch.randn(
        (subspace, P), generator=generator, dtype=theta.dtype, device=theta.device
    ) / math.sqrt(P)
    gram = (A @ A.T).double()
    coordinates = torch.linalg.solve(gram, (A @ theta).double()).to(theta.dtype)
    width = coordinates.abs() + 1

    def push(z: Tensor) -> Tensor:
        return torch.mv(A.T, width * z)

    def pull(gradient: Tensor, _: Tensor | None) -> Tensor:
        slope: Tensor = torch.mv(A, gradient) * width
        return slope

    return Chart(push, pull)
