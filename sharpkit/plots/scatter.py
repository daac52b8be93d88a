"""Sharpness against the generalization gap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sharpkit.plots.figure import COLOURS, MARKERS, new_axes

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["plot_against_gap"]


def plot_against_gap(
    frame: pd.DataFrame,
    measure: str,
    *,
    gap: str,
    group: str,
    error: str | None = None,
    ax: Axes | None = None,
    title: str = "",
    legend: bool = True,
) -> Axes:
    """Draw one point a model, a colour and a marker a group, with error bars.

    Args:
        frame: One row a model.
        measure: Column of the x axis; logarithmic where all values are positive.
        gap: Column of the y axis.
        group: Column that chooses colour and marker.
        error: Column of the measure's error.
        ax: Draw here.
        title: For example the tau.
        legend: Whether to name the groups.
    """
    axes = ax or new_axes()
    for i, (name, rows) in enumerate(frame.groupby(group, sort=True)):
        axes.errorbar(
            rows[measure],
            rows[gap],
            xerr=None if error is None else np.nan_to_num(rows[error].astype(float)),
            linestyle="none",
            marker=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            markersize=4.5,
            elinewidth=0.8,
            label=str(name),
        )
    values = frame[measure].dropna()
    if len(values) and (values > 0).all() and values.max() > 5 * values.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(measure.replace("_", " "))
    axes.set_ylabel("generalization gap (test - train loss)" if gap == "gap" else gap)
    axes.set_title(title, fontsize=9)
    if legend:
        axes.legend(fontsize=8, frameon=False)
    return axes
