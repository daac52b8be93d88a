"""Sharpness along training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sharpkit.errors import SettingsError
from sharpkit.plots.figure import COLOURS, as_text, legend_above, tidy

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["plot_tracking"]

SHARPNESS = ("lambda_max", "trace")
LABELS = {
    "lambda_max": r"$\lambda_{\max}$ of the Hessian",
    "trace": "trace of the Hessian",
    "loss": "loss",
}
EDGE = "two_over_eta"


def plot_tracking(
    frame: pd.DataFrame,
    *,
    panels: Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    log: bool = False,
    title: str = "",
) -> tuple[Axes, ...]:
    r"""Draw the largest eigenvalue, the trace and the loss by step, one above the other.

    In the panel of :math:`\lambda_{\max}` the threshold of stability of gradient descent,
    :math:`2 / \eta`, is dashed; it steps with the learning rate. Rows with neither
    :math:`\lambda_{\max}` nor trace were no measurements and are left out of those panels; a
    single missing number among others is a gap. Shades are plus and minus the error as the table
    has it: one standard error of a trace, a bound of an eigenvalue.

    Args:
        frame: Columns ``step`` and some of ``lambda_max``, ``trace``, ``loss``; perhaps
            ``lambda_max_error``, ``trace_error`` and ``two_over_eta``.
        panels: Which of the three; None: those in the table.
        ax: As many axes as there are panels.
        log: Whether values are on logarithmic scales.
        title: Of the figure.

    Returns:
        The axes of each panel.

    Raises:
        SettingsError: If there is no column ``step``, nothing to draw, or another number of axes
            than of panels.
    """
    if "step" not in frame or not len(frame):
        raise SettingsError(
            f"Expected a table with a column 'step' and some rows. Got {len(frame)} rows of"
            f" {', '.join(map(str, frame.columns)) or 'nothing'}."
        )
    frame = frame.sort_values("step", kind="stable")
    held = [n for n in LABELS if n in frame and frame[n].notna().any()]
    names = held if panels is None else list(panels)
    if not names or any(n not in held for n in names):
        raise SettingsError(
            f"Expected panels that the table has numbers for ({', '.join(held) or 'none'})."
            f" Got {', '.join(names) or 'none'}."
        )
    drawn = _axes(ax, len(names))
    for axes, name in zip(drawn, names, strict=True):
        lines = [_series(axes, frame, name, COLOURS[list(LABELS).index(name)])]
        if name == "lambda_max" and EDGE in frame and frame[EDGE].notna().any():
            edge = frame[np.isfinite(frame[EDGE].to_numpy(dtype=float))]
            lines += axes.plot(
                edge["step"], edge[EDGE], linestyle="--", color="0.25", linewidth=1.1,
                drawstyle="steps-post", label=r"$2/\eta$, where gradient descent loses stability",
            )  # fmt: skip
        if log:
            axes.set_yscale("log")
        axes.set_ylabel(LABELS[name], fontsize=9)
        axes.tick_params(labelsize=8)
        first = as_text(title) if axes is drawn[0] else ""
        legend_above(axes, lines if len(lines) > 1 else [], first)
    drawn[-1].set_xlabel("step", fontsize=9)
    return drawn


def _axes(ax: Axes | Sequence[Axes] | None, count: int) -> tuple[Axes, ...]:
    if ax is None:
        figure = Figure(figsize=(4.6, 0.7 + 1.7 * count), layout="constrained")
        made = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
        for axes in made:
            tidy(axes)
        return tuple(made)
    given = (ax,) if isinstance(ax, Axes) else tuple(ax)
    if len(given) != count:
        raise SettingsError(
            f"Expected {count} axes, one a panel. Got {len(given)}. Choose with `panels`."
        )
    return given


def _series(axes: Axes, frame: pd.DataFrame, name: str, colour: str) -> Line2D:
    if name in SHARPNESS:
        measured = [n for n in SHARPNESS if n in frame]
        frame = frame[frame[measured].notna().any(axis=1)]
    else:
        frame = frame[frame[name].notna()]
    step = frame["step"].to_numpy(dtype=float)
    value = frame[name].to_numpy(dtype=float)
    value = np.where(np.isfinite(value), value, np.nan)
    marker = "o" if len(step) <= 60 and name in SHARPNESS else ""
    known = np.isfinite(value)
    lone = known & ~np.r_[False, known[:-1]] & ~np.r_[known[1:], False]
    (line,) = axes.plot(
        step, value, color=colour, linewidth=1.4, marker=marker, markersize=3, label=LABELS[name]
    )
    if lone.any() and not marker:  # a point between two gaps has no line
        axes.plot(step[lone], value[lone], color=colour, linestyle="none", marker="o", markersize=3)
    error = f"{name}_error"
    if error in frame:
        half = np.abs(frame[error].to_numpy(dtype=float))
        half = np.where(np.isfinite(half), half, np.nan)
        axes.fill_between(step, value - half, value + half, color=colour, alpha=0.22, linewidth=0)
    return line
