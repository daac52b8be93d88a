"""Kendall's tau for studies so large that its intervals would take too long."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats

from sharpkit.study.correlation.ranks import texts
from sharpkit.study.correlation.study_frame import select_models

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["measured_taus", "seconds_needed"]

SECONDS_A_PAIR = 1e-5  # of models and measure: 2.3 s for 500 models, one thread


def seconds_needed(scored: pd.DataFrame) -> float:
    """Return about how many seconds the intervals of all measures would take."""
    models = scored.groupby("label")["checkpoint"].nunique().to_numpy(dtype=float)
    return float((models**2).sum()) * SECONDS_A_PAIR


def measured_taus(long: pd.DataFrame, gap: str, group: str | None) -> tuple[pd.DataFrame, str]:
    r"""Return tau of each measure as measured, and the sentence that says of which models.

    Within groups it is the mean of the groups' tau weighted by their pairs of models; groups
    in which a variable is constant are left out, as in
    :func:`sharpkit.study.correlation.correlate_study`. ``disagree`` follows that function's
    rule, with twice the largest standard deviation that tau of n independent models can have,

    .. math:: \sqrt{2 (1 - \tau^2) / n}

    in place of intervals (Kendall and Gibbons, Rank Correlation Methods, 1990, section 4.8).

    Args:
        long: Of :func:`sharpkit.study.tables.scores_table`.
        gap: Metadata entry.
        group: Metadata entry.
    """
    import pandas as pd

    models = select_models(long, gap)
    groups = None if group is None else np.array(texts(models.column(group)))
    rows = []
    for label in models.values.columns:
        x = models.values[label].to_numpy(dtype=float)
        fine = np.isfinite(x)
        loose = ~models.converged[label].to_numpy(dtype=bool) & fine
        x, y = x[fine], models.gap[fine]
        row: dict[str, Any] = {
            "measure": label,
            "n": len(x),
            "unconverged": int(loose.sum()),
            "tau": _tau(x, y),
            "low": math.nan,
            "high": math.nan,
        }
        if groups is not None:
            row |= {
                "tau_within": _within(x, y, groups[fine]),
                "low_within": math.nan,
                "high_within": math.nan,
            }
            row["disagree"] = _disagree(row["tau"], row["tau_within"], len(x))
        rows.append(row)
    return pd.DataFrame(rows), models.sentence


def _disagree(pooled: float, within: float, n: int) -> bool:
    def clear(tau: float) -> bool:
        return abs(tau) > 2 * math.sqrt(2 * max(1 - tau**2, 0.0) / n) if n else False

    opposite = pooled * within < 0 and (clear(pooled) or clear(within))
    return opposite or (clear(pooled) and not clear(within))


def _tau(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(scipy.stats.kendalltau(x, y).statistic)


def _within(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> float:
    total = weight = 0.0
    for name in np.unique(groups):
        mine = groups == name
        value, pairs = _tau(x[mine], y[mine]), mine.sum() * (mine.sum() - 1) / 2
        if math.isfinite(value):
            total, weight = total + pairs * value, weight + pairs
    return total / weight if weight else math.nan
