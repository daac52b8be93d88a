"""Sharpness against the generalization gap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sharpkit.plots.figure import COLOURS, MARKERS, as_text, new_axes

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
    kind: str | None = None,
    converged: str | None = None,
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
        kind: Column of what the errors mean; above a ``"lower_bound"`` the bar has one side.
        converged: Column that says which values converged; the others are hollow.
        ax: Draw here.
        title: For example the tau.
        legend: Whether to name the groups.
    """
    axes = ax or new_axes()
    for i, (name, rows) in enumerate(frame.groupby(group, sort=True)):
        style = {"marker": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)]}
        bars = None if error is None else _bars(rows, error, kind)
        done = np.ones(len(rows), bool) if converged is None else rows[converged].to_numpy(bool)
        for chosen, face in ((done, style["color"]), (~done, "white")):
            if not chosen.any():
                continue
            axes.errorbar(
                rows[measure][chosen],
                rows[gap][chosen],
                xerr=None if bars is None else bars[:, chosen],
                linestyle="none",
                markersize=4.5,
                elinewidth=0.8,
                markerfacecolor=face,
                label=as_text(name) if face != "white" or not done.any() else None,
                **style,  # type: ignore[arg-type]
            )
    values = frame[measure].dropna()
    if len(values) and (values > 0).all() and values.max() > 5 * values.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(as_text(measure.replace("_", " ")))
    axes.set_ylabel("generalization gap (test - train loss)" if gap == "gap" else as_text(gap))
    axes.set_title(title, fontsize=9)
    if legend:
        axes.legend(fontsize=8, frameon=False)
    return axes


def _bars(rows: pd.DataFrame, error: str, kind: str | None) -> np.ndarray:
    # Below and above; nothing where the error is unknown, nothing below a lower bound.
    size = rows[error].to_numpy(dtype=float)
    size = np.where(np.isfinite(size), size, 0.0)
    bounds = np.zeros(len(rows), bool) if kind is None else (rows[kind] == "lower_bound").to_numpy()
    return np.stack([np.where(bounds, 0.0, size), size])
