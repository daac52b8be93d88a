"""The gradient noise scale."""

import math

import numpy as np
import torch
from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.errors import MeasureError
from sharpkit.estimators.noise_scale import NoiseScale, noise_scale
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures.registry import register
from sharpkit.results import Cost, Estimate

BLOCKS = 20  # of groups, left out in turn
MOST_GROUPS = 1024  # gradients that are computed unless group_size says otherwise
FEWEST = 4  # of them that can say how much they differ
SHARE = 4  # of the free memory, a quarter
ROUNDING = 100  # of eps


@register(
    "gradient_noise_scale",
    symbol="tr Sigma / |G|^2",
    reference="McCandlish et al. 2018, arXiv:1812.06162",
    cost="1 gradient, in single examples or small groups",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=0,
    nonnegative=True,
    needs={"examples"},
)
def gradient_noise_scale(analysis: Analysis, *, group_size: int | None = None) -> Estimate:
    r"""Batch size at which the noise of a gradient is as large as the gradient.

    .. math:: B = \operatorname{tr}\Sigma / |G|^2, \qquad
        \widehat{\operatorname{tr}\Sigma} = \frac{1}{K-1} \sum_k b_k |h_k - \bar g|^2, \qquad
        \widehat{|G|^2} = |\bar g|^2 - \widehat{\operatorname{tr}\Sigma} / N

    for the mean gradients h of K groups of b examples; both are unbiased for the population
    that the data are a sample of, and with groups of one, whatever the order of the data. The
    data error is the jackknife's; ``details["interval"]`` is Fieller's 95% interval of the ratio,
    which is lopsided, and without end where the gradient is not told from zero. Where the
    estimate of :math:`|G|^2` is not positive the ratio is undefined (a network trained to the
    end): then the value is the lower end of that interval, and has not converged.

    Args:
        analysis: What is measured.
        group_size: Examples of a group; None: 1 up to 1024 examples, otherwise as many as give
            about 1024 groups. Larger ones take fewer passes, but must be of shuffled data.
    """
    objective = analysis.objective
    if group_size is None:
        group_size = -(-objective.num_examples // MOST_GROUPS)
    check_positive("group_size", group_size, minimum=1)
    expected = -(-objective.num_examples // group_size)
    space = objective.space
    room = objective.free_memory // (SHARE * 8 * space.dim)
    blocks = min(BLOCKS, expected, room)
    if blocks < FEWEST:
        raise MeasureError(
            "Expected four groups of examples at least, to see how they differ, and memory for"
            f" four vectors of P. Got {expected} groups of {objective.num_examples} examples, and"
            f" room for {room} vectors in a quarter of the memory. Give more data, a smaller"
            " `group_size`, or fewer parameters."
        )
    sums = torch.zeros(blocks, space.dim, dtype=torch.float64, device=space.device)
    counts, groups, squares = (np.zeros(blocks) for _ in range(3))
    place = 0

    def add(h: Tensor, examples: int) -> None:
        nonlocal place
        k, place = place % blocks, place + 1
        h = h.double()
        sums[k] += examples * h
        counts[k] += examples
        groups[k] += 1
        squares[k] += examples * float(h.square().sum())

    objective.each_group_gradient(group_size, add)
    scale = noise_scale((sums @ sums.T).cpu().numpy(), counts, groups, squares)
    return _estimate(analysis, scale, group_size)


def _estimate(analysis: Analysis, scale: NoiseScale, group_size: int) -> Estimate:
    low, high = scale.interval
    notes = []
    if not math.isfinite(high):
        notes.append(
            "The gradient is not told from zero by these data, so the noise scale has no upper"
            " end. Give more examples, or measure earlier in training."
        )
    if not scale.defined:
        notes.append(
            "The unbiased estimate of the squared gradient is not positive, and the ratio"
            " undefined: the value is the lower end of its 95% interval."
        )
    eps = torch.finfo(analysis.objective.model_dtype).eps
    value = scale.value if scale.defined else low
    room = ROUNDING * eps * value * max(scale.amplified, 1.0)
    return Estimate(
        value=value,
        probe_error=room if scale.defined else math.inf,
        error_kind="rounding" if scale.defined else "lower_bound",
        data_error=scale.error if scale.defined and analysis.num_groups else None,
        data_draws=scale.draws if scale.defined and analysis.num_groups else (),
        converged=math.isfinite(high) and scale.defined,
        cost=Cost(gradients=1),
        details={
            "interval": [low, high],
            "trace_of_covariance": scale.trace,
            "squared_gradient": scale.square,
            "group_size": group_size,
        },
        notes=tuple(notes),
    )
