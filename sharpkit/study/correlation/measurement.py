"""What the measurement error of the sharpness values does to a correlation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sharpkit.study.correlation.ranks import (
    Floats,
    Sample,
    Statistic,
    from_normal,
    to_normal,
)

__all__ = ["ValueErrors", "disattenuate", "possible_taus", "reliability"]

LEAST = 0.1  # of the reliability: below it noise has swamped the values
TOP = 1 - 1e-12


@dataclass(frozen=True)
class ValueErrors:
    """The errors of one measure's values, one a model, sorted by what they mean.

    Attributes:
        noise: [n] standard errors, independent from model to model; 0 where there is none.
        below: [n] how far the exact value may lie below the value; 0 where it cannot.
        above: [n] how far above.
        unknown: Models whose value has no known error; they are taken as exact.
        lower_bounds: Models whose value is a lower bound.
    """

    noise: Floats
    below: Floats
    above: Floats
    unknown: int = 0
    lower_bounds: int = 0

    @classmethod
    def of(cls, errors: Floats, kinds: list[str | None]) -> ValueErrors:
        """Sort errors by the ``error_kind`` of their estimates.

        A standard error is noise. A bound or rounding may be all on one side. A lower bound
        may be exceeded by its error, the first-order room left at the best point, which is
        no guarantee.
        """
        known = np.isfinite(errors)
        size = np.where(known, np.abs(np.nan_to_num(errors)), 0.0)
        kind = np.array([str(k) for k in kinds])
        sided = (kind == "bound") | (kind == "rounding")
        return cls(
            noise=np.where(kind == "stderr", size, 0.0),
            below=np.where(sided, size, 0.0),
            above=np.where(sided | (kind == "lower_bound"), size, 0.0),
            unknown=int(np.sum(~known)),
            lower_bounds=int(np.sum(kind == "lower_bound")),
        )


def reliability(sample: Sample, counts: Floats) -> Floats:
    r"""Return which share of the first variable's variance is not measurement noise: [B].

    The sample is given its own noise a second time. If its values are exact values plus noise
    of variance q times theirs, the correlation a with the values under fresh noise is
    :math:`(1 + q)^{-1/2}`, so

    .. math:: R = 1 - q = 2 - 1 / a^2.

    For Kendall's and Spearman's a is :math:`\sin(\pi \tau' / 2)`, where :math:`\tau'` is the
    expected tau over the fresh noise, without any simulation:

    .. math::

        \tau' \propto \sum_{i \ne j} \mathrm{sign}(x_i - x_j)
            \left(2 \Phi\!\left(\frac{x_i - x_j}{\sqrt{s_i^2 + s_j^2}}\right) - 1\right).

    Returns:
        1 without noise; 0.1 at least, below which nothing is left to correct.

    Misleads: it is exact for normal values with one standard error, up to a monotone
    transformation that the errors follow; an approximation otherwise. A standard error with
    few degrees of freedom enters by its square, which is unbiased.

    Source: our derivation, after the simulation-extrapolation of Cook and Stefanski 1994,
    doi:10.1080/01621459.1994.10476871.
    """
    a = sample.echo(counts)
    if sample.statistic != "pearson":
        a = to_normal(a, "kendall")
    a = np.clip(a, 1e-6, 1.0)
    return np.where(np.isfinite(a), np.maximum(2 - 1 / a**2, LEAST), np.nan)


def disattenuate(matrix: Floats, rel: Floats, statistic: Statistic) -> Floats:
    r"""Return the correlations [B, v, v] that the first variable has without its noise.

    .. math:: r = \frac{g(\tau)}{\sqrt{R}}, \qquad \tau_\text{exact} = g^{-1}(r)

    g takes a rank correlation to Pearson's of a normal distribution
    (:func:`~sharpkit.study.correlation.ranks.to_normal`), where noise divides by
    :math:`\sqrt R`; r is cut at 1.

    Source: Spearman 1904, doi:10.2307/1412159.
    """
    result = matrix.copy()
    r = to_normal(matrix[:, 0, 1:], statistic) / np.sqrt(rel)[:, None]
    # Where there is no noise the value stays as it is, to the last bit.
    clean = (rel == 1.0)[:, None]
    edge = float(to_normal(np.array(1.0), statistic)) * TOP
    exact = from_normal(np.clip(r, -edge, edge), statistic)
    result[:, 0, 1:] = np.where(clean, matrix[:, 0, 1:], exact)
    result[:, 1:, 0] = result[:, 0, 1:]
    return result


def possible_taus(
    x: Floats, y: Floats, groups: np.ndarray, below: Floats, above: Floats
) -> tuple[float, float]:
    r"""Return two numbers between which tau of the exact values lies, whatever they are.

    The exact value of model i is in :math:`[x_i - b_i, x_i + a_i]`. Pairs whose ranges do not
    meet are in known order. Each other pair counts once fully for and once fully against:

    .. math::

        \frac{\sum_{\text{known}} s^x_{ij} s^y_{ij} \mp \#\text{open}}
             {\sqrt{\#\{s^y \ne 0\}\; \#\text{pairs}}}

    Groups are weighted by their pairs, as for tau.

    Misleads: the ends need not be attained, as the open pairs are not free of each other.
    """
    lows, highs, weight = 0.0, 0.0, 0.0
    for g in np.unique(groups):
        index = np.flatnonzero(groups == g)
        if len(index) < 2 or np.ptp(y[index]) == 0:
            continue
        i, j = np.triu_indices(len(index), 1)
        i, j = index[i], index[j]
        sx, sy = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        upper = np.where(sx > 0, above[j] + below[i], above[i] + below[j])
        moved = upper > 0
        is_open = moved & (np.abs(x[i] - x[j]) <= upper)
        shared = float(np.sum(np.where(is_open, 0.0, sx * sy)))
        free = float(np.sum(is_open & (sy != 0)))
        num_y = float(np.sum(sy != 0))
        # Fewer pairs tied in x make tau-b smaller: the denominator is between these two.
        most = float(np.sum((sx != 0) | is_open))
        least = float(np.sum((sx != 0) & ~is_open)) + free
        if most == 0:
            continue
        pairs = len(i)
        ends = []
        for total in (shared - free, shared + free):
            by = [total / math.sqrt(num_y * k) for k in (most, least) if k > 0]
            ends.append(by)
        lows += pairs * max(min(ends[0]), -1.0)
        highs += pairs * min(max(ends[1]), 1.0)
        weight += pairs
    return (lows / weight, highs / weight) if weight else (math.nan, math.nan)
