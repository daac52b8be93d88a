"""Rank correlations of many measures with their intervals, one row each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from sharpkit.plots.figure import COLOURS, MARKERS, as_text, new_axes

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["plot_taus"]


def plot_taus(
    table: pd.DataFrame,
    *,
    within: str = "within groups",
    null: float = 0.0,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Draw tau of each measure with its interval, pooled and within groups.

    Args:
        table: What :func:`sharpkit.study.correlation.correlate` returned, or the frame of
            :func:`sharpkit.study.correlation.correlate_study`, in the order of the rows from
            top to bottom. Without columns that end in ``_within`` the pooled values alone.
        within: What the groups are, for the legend.
        null: Standard deviation of tau for a measure that has nothing to do with the gap
            (:func:`sharpkit.study.correlation.null_deviation`); a grey band of two of them.
        ax: Draw here.
        title: For example which models.
    """
    axes = ax or new_axes(6.4, 1.0 + 0.24 * max(len(table), 4))
    axes.axvspan(-2 * null, 2 * null, color="0.93", linewidth=0, zorder=0)
    axes.axvline(0, color="0.5", linewidth=0.8, zorder=1)
    y = np.arange(len(table))
    series = [("", "pooled"), ("_within", within)]
    for i, (suffix, label) in enumerate(s for s in series if f"tau{s[0]}" in table):
        tau, low, high = (
            table[name + suffix].to_numpy(dtype=float) for name in ("tau", "low", "high")
        )
        # Where there are too few models for an interval there is a dot alone.
        # An interval that the correction for noise moved beyond the dot begins at the dot.
        bars = np.nan_to_num(np.maximum([tau - low, high - tau], 0))
        axes.errorbar(
            tau,
            y + (0.17 if i else -0.17),
            xerr=bars,
            linestyle="none",
            marker=MARKERS[i],
            markersize=4,
            color=COLOURS[i],
            markerfacecolor="white" if i else COLOURS[i],
            elinewidth=1.0,
            label=as_text(label),
            zorder=3,
        )
    axes.set_yticks(y, [as_text(n).replace("_", " ") for n in table["measure"]], fontsize=8)
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.set_xlim(-1, 1)
    axes.set_xlabel("Kendall's tau with the gap")
    axes.set_title(title, fontsize=9, pad=22)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.4, 0.995))
    return axes
