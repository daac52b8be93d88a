"""How sharpness and generalization go together over a set of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.stats

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Correlation", "correlate", "kendall"]

FEWEST = 5  # models: fewer give no interval
RESAMPLES = 1000
LEVEL = 0.95


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


def kendall(
    x: Sequence[float], y: Sequence[float], *, seed: int = 0, groups: Sequence[str] | None = None
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

    Misleads when models are few: the interval is the percentile bootstrap, which is too
    narrow below about 10 models.

    Example:
        >>> kendall([1, 2, 3, 4], [1, 3, 2, 4]).tau.round(4)
        np.float64(0.6667)
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    labels = np.zeros(len(a), dtype=int)
    if groups is not None:
        labels = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    fine = np.isfinite(a) & np.isfinite(b)
    a, b, labels = a[fine], b[fine], labels[fine]
    tau = _within(a, b, labels)
    n = len(a)
    if n < FEWEST or not np.isfinite(tau):
        return Correlation(tau, np.nan, np.nan, np.nan, n)
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == g) for g in np.unique(labels)]
    draws = []
    for _ in range(RESAMPLES):
        index = np.concatenate([rng.choice(m, len(m)) for m in members])
        draws.append(_within(a[index], b[index], labels[index]))
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if groups is None:
        p_value = float(scipy.stats.kendalltau(a, b).pvalue)
    else:  # permute within groups
        shuffled = []
        for _ in range(RESAMPLES):
            order = np.arange(n)
            for m in members:
                order[m] = rng.permutation(m)
            shuffled.append(abs(_within(a, b[order], labels)))
        p_value = float((1 + np.sum(np.array(shuffled) >= abs(tau) - 1e-12)) / (1 + RESAMPLES))
    return Correlation(tau, float(low), float(high), p_value, n)


def _tau_b(a: np.ndarray, b: np.ndarray) -> float:
    # All pairs at once: for the few models of a study far faster than sorting, which counts
    # when thousands of resamples are drawn.
    x, y = np.sign(a[:, None] - a), np.sign(b[:, None] - b)
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def _within(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> np.float64:
    total, weight = 0.0, 0
    for g in np.unique(labels):
        mine = labels == g
        n = int(mine.sum())
        if n < 2 or np.ptp(a[mine]) == 0 or np.ptp(b[mine]) == 0:
            continue
        pairs = n * (n - 1) // 2
        total += pairs * _tau_b(a[mine], b[mine])
        weight += pairs
    return np.float64(total / weight if weight else np.nan)


def correlate(
    frame: pd.DataFrame, measures: Sequence[str], *, gap: str, group: str, seed: int = 0
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
        seed: Of the bootstrap.
    """
    import pandas as pd

    rows = []
    for name in measures:
        pooled = kendall(frame[name].tolist(), frame[gap].tolist(), seed=seed)
        groups = [str(g) for g in frame[group]]
        inner = kendall(frame[name].tolist(), frame[gap].tolist(), seed=seed, groups=groups)
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
