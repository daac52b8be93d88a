"""Kendall's tau of one measure, and of many in a wide table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.stats

from sharpkit.study.correlation.ranks import Sample, codes
from sharpkit.study.correlation.resampling import (
    FEWEST,
    RESAMPLES,
    draw_counts,
    draw_orders,
    interval,
    permutation_p,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Correlation", "correlate", "kendall", "null_deviation"]


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its interval.

    Attributes:
        tau: Kendall's tau-b; NaN if a variable is constant or there are fewer than 2 models.
        low: Lower end of the 95% bootstrap interval over models; NaN if there is none.
        high: Upper end.
        p_value: Of the hypothesis of independence.
        n: Models.
    """

    tau: float
    low: float
    high: float
    p_value: float
    n: int


def null_deviation(n: int) -> float:
    r"""Return the standard deviation of tau over n models if the two variables are independent.

    .. math:: \sqrt{\frac{2(2n + 5)}{9n(n - 1)}}

    Without ties, and with models that are independent of each other.

    Args:
        n: Models, at least 2.

    Example:
        >>> round(null_deviation(50), 3)
        0.098

    Source: Kendall 1938, doi:10.1093/biomet/30.1-2.81.
    """
    return math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))


def kendall(
    x: Sequence[float],
    y: Sequence[float],
    *,
    seed: int = 0,
    groups: Sequence[str] | None = None,
    clusters: Sequence[str] | None = None,
) -> Correlation:
    """Return Kendall's tau-b of two variables over models, with a bootstrap interval.

    Pairs with a missing value are left out. With ``groups``, tau is the mean of the taus
    within groups, weighted by their numbers of pairs, and models are resampled within
    groups: what is left of a correlation when the groups' means are taken out.

    Args:
        x: One value a model.
        y: Likewise.
        seed: Of the bootstrap.
        groups: The group of each model.
        clusters: What models are alike by, such as the setting of which they are the seeds.
            Those of one cluster are resampled and permuted together: as independent models
            they would make the interval too narrow. A cluster lies in one group.

    The interval is :func:`sharpkit.study.correlation.resampling.interval`'s; there is none with
    fewer than 5 models or clusters. p is scipy's without groups and clusters, and otherwise
    that of 1000 permutations within groups.

    Example:
        >>> kendall([1, 2, 3, 4], [1, 3, 2, 4]).tau.round(4)
        np.float64(0.6667)
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    labels = codes(groups, len(a))
    alike = np.arange(len(a)) if clusters is None else codes(clusters, len(a))
    if clusters is not None:
        Sample(np.zeros((len(a), 0)), labels, alike)  # raises if a cluster has two groups
    fine = np.isfinite(a) & np.isfinite(b)
    labels = labels[fine]
    alike = np.unique(alike[fine], return_inverse=True)[1].reshape(-1)
    columns = np.stack([a[fine], b[fine]], axis=1)
    sample = Sample(columns, labels, alike)
    n = len(columns)
    tau = np.float64(sample.matrix(sample.once)[0, 0, 1] if n else np.nan)
    if n < FEWEST or not np.isfinite(tau):
        return Correlation(tau, np.nan, np.nan, np.nan, n)
    low, high = interval(
        float(tau),
        sample.matrix(draw_counts(sample, seed))[:, 0, 1],
        units=sample.num_clusters,
        clustered=sample.num_clusters < n,
    )
    if groups is None and clusters is None:
        p_value = float(scipy.stats.kendalltau(columns[:, 0], columns[:, 1]).pvalue)
    else:
        orders = draw_orders(alike, labels, seed, RESAMPLES)
        p_value = float(permutation_p(columns[:, :1], columns[:, 1], labels, orders)[0])
    return Correlation(tau, low, high, p_value, n)


def correlate(
    frame: pd.DataFrame,
    measures: Sequence[str],
    *,
    gap: str,
    group: str,
    cluster: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Return a table: tau of each measure with the gap, pooled and within groups.

    A pooled correlation may come from the groups alone (larger architectures are both
    sharper and have the larger gap). ``disagree`` is true where the pooled and the within
    values have opposite signs, or where the pooled interval excludes 0 and the other does
    not.

    Args:
        frame: One row a model; a column a measure, and those named by ``gap`` and ``group``.
        measures: Columns to correlate.
        gap: Column of the generalization gap.
        group: Column of the group, such as the architecture.
        cluster: Column of what models are alike by, as for :func:`kendall`.
        seed: Of the bootstrap.
    """
    import pandas as pd

    groups = [str(g) for g in frame[group]]
    clusters = None if cluster is None else [str(c) for c in frame[cluster]]
    rows = []
    for name in measures:
        x, y = frame[name].tolist(), frame[gap].tolist()
        pooled = kendall(x, y, seed=seed, clusters=clusters)
        inner = kendall(x, y, seed=seed, groups=groups, clusters=clusters)
        excludes = [c.low > 0 or c.high < 0 for c in (pooled, inner)]
        rows.append(
            {
                "measure": name,
                "n": pooled.n,
                "tau": pooled.tau,
                "low": pooled.low,
                "high": pooled.high,
                "p": pooled.p_value,
                "tau_within": inner.tau,
                "low_within": inner.low,
                "high_within": inner.high,
                "p_within": inner.p_value,
                "disagree": bool(pooled.tau * inner.tau < 0 or (excludes[0] and not excludes[1])),
            }
        )
    return pd.DataFrame(rows)
