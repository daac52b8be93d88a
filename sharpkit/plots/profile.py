"""A measure layer by layer, with its errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from sharpkit.errors import SettingsError
from sharpkit.plots.figure import COLOURS, MARKERS, as_text, cell_of, legend_above, new_axes
from sharpkit.plots.parts import WIDE, short
from sharpkit.results import ErrorKind, Estimate, Part

__all__ = ["plot_profile"]

Parts = Estimate | Sequence[Part]


def plot_profile(
    estimates: Parts | Mapping[str, Parts],
    *,
    ax: Axes | None = None,
    label: str = "value",
    level: float = 0.95,
    kind: ErrorKind = "stderr",
    log: bool | None = None,
    title: str = "",
) -> Axes:
    """Draw the parts of a measure, a row a layer, in the order in which the measure gave them.

    Bars are what :meth:`sharpkit.Estimate.interval` says of each part: an interval where its
    error is a standard error, all of it where it is a bound, and only upwards where the value is
    a lower bound (as far as the room that the part states). A part without an error has a dot
    alone; what did not converge is hollow. Layers keep the order of the first estimate; those
    that only others have come after. For many checkpoints at once see :func:`plot_parts`.

    Args:
        estimates: An estimate, its parts, or several by name.
        ax: Draw here.
        label: Of the values: the measure, with its unit.
        level: Probability of the intervals.
        kind: What the errors of bare parts mean; an estimate says it itself.
        log: Whether values are logarithmic; None: where all are positive and spread by more than
            a factor 10.
        title: For example the checkpoint.

    Raises:
        SettingsError: If there are no parts.
    """
    held = estimates if isinstance(estimates, Mapping) else {"": estimates}
    series = [
        (name, tuple(e.parts), e.error_kind) if isinstance(e, Estimate) else (name, tuple(e), kind)
        for name, e in held.items()
    ]
    layers = list(dict.fromkeys(p.label for _, parts, _ in series for p in parts))
    if not layers:
        raise SettingsError(
            "Expected an estimate with parts. There are none. Take a measure that gives one number"
            " a layer, such as hessian_trace."
        )
    axes = ax or new_axes(4.6, 1.0 + 0.2 * max(len(layers), 4))
    row = {name: k for k, name in enumerate(layers)}
    handles = []
    for k, (name, parts, meaning) in enumerate(series):
        colour = COLOURS[k % len(COLOURS)]
        shift = 0.6 * ((k + 0.5) / len(series) - 0.5)
        handles.append(
            Line2D([], [], linestyle="none", marker=MARKERS[k % len(MARKERS)], markersize=4,
                   color=colour, label=as_text(name))
        )  # fmt: skip
        known = [p for p in parts if np.isfinite(p.value)]
        for done in (True, False):
            some = [p for p in known if p.converged == done]
            if not some:
                continue
            value = np.array([p.value for p in some])
            axes.errorbar(
                value, [row[p.label] + shift for p in some],
                xerr=np.array([_bar(p, meaning, level) for p in some]).T,
                linestyle="none", marker=MARKERS[k % len(MARKERS)], markersize=4, color=colour,
                markerfacecolor=colour if done else "white", elinewidth=0.9, zorder=3,
            )  # fmt: skip
    values = [p.value for _, parts, _ in series for p in parts if np.isfinite(p.value)]
    positive = bool(values) and min(values) > 0
    if log or (log is None and positive and max(values) > WIDE * min(values)):
        axes.set_xscale("log")
    elif values and min(values) < 0:
        axes.axvline(0, color="0.5", linewidth=0.8, zorder=1)
    room = int(cell_of(axes).width * 7)
    axes.set_yticks(range(len(layers)), [short(n, room) for n in layers], fontsize=7)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(as_text(label), fontsize=9)
    if any(not p.converged for _, parts, _ in series for p in parts):
        handles.append(
            Line2D([], [], linestyle="none", marker="o", markersize=4, color="0.3",
                   markerfacecolor="white", label="not converged")
        )  # fmt: skip
    named = [h for h in handles if h.get_label()]
    legend_above(axes, named, as_text(title), grow=ax is None)
    return axes


def _bar(part: Part, kind: ErrorKind, level: float) -> tuple[float, float]:
    # Lengths to the left and to the right of the dot.
    error = part.probe_error
    if error is None or not np.isfinite(error):
        return 0.0, 0.0
    if kind == "lower_bound":
        return 0.0, error
    one = Estimate(part.value, error, kind, dof=part.dof)
    low, high = one.interval(level)
    return part.value - low, high - part.value
