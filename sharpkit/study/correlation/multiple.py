"""p-values of many measures, corrected for there being many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import scipy.stats

from sharpkit.errors import SettingsError
from sharpkit.study.correlation.ranks import Floats

__all__ = ["Correction", "adjust"]

Correction: TypeAlias = Literal["holm", "bh", "none"]


def adjust(p_values: Sequence[float] | Floats, correction: Correction = "holm") -> Floats:
    r"""Return p-values that may be compared with one level though there are many.

    Holm, with :math:`p_{(1)} \le \dots \le p_{(m)}`, bounds the probability of any false
    discovery whatever the dependence; Benjamini and Hochberg bound the expected share of
    false ones among the discoveries, if the p-values are independent or positively dependent:

    .. math::

        \tilde p_{(i)} = \max_{j \le i} \min\{1, (m - j + 1)\, p_{(j)}\}, \qquad
        \tilde p_{(i)} = \min_{j \ge i} \min\{1, m\, p_{(j)} / j\}

    Args:
        p_values: [m]; NaN stays NaN and does not count.
        correction: ``"holm"``, ``"bh"`` or ``"none"``.

    Raises:
        SettingsError: If the correction is unknown or a p-value is outside [0, 1].

    Misleads: it counts the measures it is given. Those tried and left out count too.

    Example:
        >>> adjust([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]

    Source: Holm 1979, jstor 4615733; Benjamini and Hochberg 1995,
    doi:10.1111/j.2517-6161.1995.tb02031.x.
    """
    p = np.asarray(p_values, dtype=float)
    if correction not in get_args(Correction):
        raise SettingsError(
            f"Expected `correction` among {', '.join(get_args(Correction))}. Got {correction!r}."
        )
    here = np.isfinite(p)
    if np.any((p[here] < 0) | (p[here] > 1)):
        raise SettingsError("Expected p-values between 0 and 1. Got one outside. Check them.")
    result = np.full(p.shape, np.nan)
    if not here.any() or correction == "none":
        result[here] = p[here]
        return result
    if correction == "bh":
        result[here] = scipy.stats.false_discovery_control(p[here], method="bh")
        return result
    mine = p[here]
    order = np.argsort(mine, kind="stable")
    steps = np.minimum(mine[order] * np.arange(len(mine), 0, -1), 1.0)
    held = np.empty(len(mine))
    held[order] = np.maximum.accumulate(steps)
    result[here] = held
    return result
