"""The margin of the classification."""

import math

import numpy as np
import scipy.stats
import torch

from sharpkit.analysis import Analysis
from sharpkit.errors import SettingsError
from sharpkit.measures.registry import register
from sharpkit.results import Cost, Estimate

ROUNDING = 100  # a logit is a chain of sums: some eps of its size are lost
SAFETY = 6.0  # one random change of the last digits may be smaller than the rounding itself


@register(
    "margin",
    symbol="z_y - max_{j != y} z_j at 10%",
    reference="Jiang et al. 2020, arXiv:1912.02178; Bartlett et al. 2017, arXiv:1706.08498",
    cost="2 forwards",
    invariant_to={
        "permutation",
        "orthogonal",
        "layer_scale",
        "node_scale",
        "pair_scale",
        "batch_norm_scale",
        "logit_scale",
        "attention_gl",
        "key_bias_shift",
    },
    degree=0,
    nonnegative=False,
    needs={"labels"},
)
def margin(analysis: Analysis, *, percentile: float = 10.0) -> Estimate:
    r"""Tenth percentile of the logit margin: how clearly nearly all examples are right.

    .. math:: Q_{10\%}\Big(z_{n y_n} - \max_{j \ne y_n} z_{nj}\Big)

    Larger is better, so it enters generalization measures as :math:`1/\gamma^2`; negative where
    more than a tenth are wrong. For a binary logit it is z or -z. The percentile interpolates
    between order statistics. The data error is that of a sample quantile (Maritz and Jarrett
    1978, doi:10.1080/01621459.1978.10480027), widened where labels of one example are alike.
    It sees the scale of the logits, which training goes on to grow.

    Args:
        analysis: What is measured.
        percentile: Between 0 and 100.
    """
    if not 0 <= percentile <= 100:
        raise SettingsError(f"Expected `percentile` from 0 to 100. Got {percentile!r}.")
    margins, examples = analysis.objective.margins()
    x = margins.numpy()
    value = float(np.quantile(x, percentile / 100))
    eps = torch.finfo(analysis.objective.model_dtype).eps
    near = float(np.median(np.abs(x)))
    # Logits far larger than their differences lose more: seen by moving the last digits.
    moved, _ = analysis.objective.at(analysis.theta + analysis.last_digits).margins()
    lost = SAFETY * abs(float(np.quantile(moved.numpy(), percentile / 100)) - value)
    data = None
    if analysis.num_groups:
        data = _data_error(x, examples.numpy(), percentile / 100, value)
    return Estimate(
        value=value,
        probe_error=max(ROUNDING * eps * max(near, abs(value)), lost),
        error_kind="rounding",
        data_error=data,
        cost=Cost(forwards=2),
        details={"num_labels": len(x), "error_rate": float(1 - np.mean(x > 0))},
    )


def _data_error(x: np.ndarray, examples: np.ndarray, p: float, value: float) -> float | None:
    # The standard deviation of the bootstrap of an order statistic, without drawing.
    n = len(x)
    if n < 10 or not 0 < p < 1 or not np.isfinite(x).all():
        return None
    a, b = p * (n + 1), (1 - p) * (n + 1)
    weights = np.diff(scipy.stats.beta.cdf(np.arange(n + 1) / n, a, b))
    ordered = np.sort(x)
    mean = float(weights @ ordered)
    error = math.sqrt(max(float(weights @ (ordered - mean) ** 2), 0.0))
    # Labels of one example go together: by how much is the share below the value less sure?
    off = (x <= value) - np.mean(x <= value)
    sums = np.bincount(examples, weights=off)
    alone = float((off**2).sum())
    return error * math.sqrt(max(float((sums**2).sum()) / alone, 1.0)) if alone > 0 else error
