"""Slices of a plane: levels of the loss, where it is not known, and points to find again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sharpkit.errors import SettingsError
from sharpkit.landscape import Slice, Status
from sharpkit.landscape.caption import caption as told
from sharpkit.landscape.caption import name_of
from sharpkit.plots.figure import (
    HALO,
    add_caption,
    as_text,
    cell_of,
    legend_above,
    new_axes,
    wrapped,
)
from sharpkit.plots.places import draw_places, label_places
from sharpkit.plots.scale import MAP, Scale, scale_of, shown_name

__all__ = ["plot_contour"]

# The most telling first: a cell takes the reason of its worst corner.
REGIONS: dict[Status, dict[str, Any]] = {
    Status.NOT_FINITE: {"facecolor": "white", "edgecolor": "0.35", "hatch": "xxxx"},
    Status.CUT: {"facecolor": "0.72", "edgecolor": "0.72"},
    Status.SKIPPED: {"facecolor": "0.76", "edgecolor": "0.76"},
    Status.OUTSIDE: {"facecolor": "white", "edgecolor": "0.8", "hatch": "////"},
    Status.MISSING: {"facecolor": "white", "edgecolor": "0.8", "hatch": "...."},
}
WORDS = {
    Status.NOT_FINITE: "not finite",
    Status.CUT: "cut",
    Status.SKIPPED: "not measured: above it by its neighbours",
    Status.OUTSIDE: "outside the section",
    Status.MISSING: "not measured yet",
}


def plot_contour(
    slice_: Slice,
    name: str | None = None,
    *,
    ax: Axes | None = None,
    levels: int | Sequence[float] | None = None,
    log: bool = True,
    filled: bool = True,
    scale: Scale | None = None,
    colorbar: bool = True,
    trajectory: bool | None = None,
    title: str | None = None,
    caption: bool = False,
) -> Axes:
    """Draw a value over a plane as contours; what is not known stays a gap.

    A grid cell is coloured only where its corners are known (a cell with three known corners
    is coloured up to its diagonal). Cells with a corner above ``loss_max`` are grey, those with
    one that is not finite hatched, and the legend says so. Markers that lie off the plane are
    hollow.

    Args:
        slice_: Of a plane.
        name: The value; None: the loss.
        ax: Draw here.
        levels: How many, or which.
        log: Whether levels are spaced logarithmically. They are not if a value is negative;
            values of less than a millionth of the largest take the lowest colour.
        filled: Areas, or lines with their numbers.
        scale: A scale that several figures share; then `levels` and `log` are its own.
        colorbar: Whether to draw a colour bar.
        trajectory: Whether the markers, but for the centre, are joined in their order; None:
            as ``details["trajectory"]`` says, or if the directions come from a trajectory.
        title: None: the slice's title or checkpoint, if there is one.
        caption: Whether to write below what was measured, and how.

    Raises:
        SettingsError: If the slice is no plane, has no such value or no finite one, or levels do
            not ascend.
    """
    check_plane(slice_, "plot_line")
    scale = scale or scale_of([slice_], name, levels, log)
    axes = ax or new_axes(4.6, 3.9)
    handles = draw_contour(axes, slice_, name, scale, filled, trajectory)
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    if colorbar:
        add_colorbar(figure, axes, scale, shown_name(name or first_loss(slice_)), beside=True)
    given = title if title is not None else name_of(slice_)
    above = legend_above(axes, handles, as_text(given), grow=ax is None)
    cell = cell_of(axes)
    room = [cell.width - 0.6 - 0.7 * colorbar, cell.height - 0.55 - above]
    label_axes(axes, slice_, [0.9 * min(room)] * 2 if alike(slice_) else room)
    if caption:
        add_caption(figure, told(slice_), grow=ax is None)
    label_places(axes, slice_, trajectory)
    return axes


def draw_contour(
    axes: Axes, slice_: Slice, name: str | None, scale: Scale, filled: bool, trajectory: bool | None
) -> list[Artist]:
    """Draw all but texts, and return what a legend shows."""
    axes.grid(False)
    x, y = slice_.grid
    values = np.asarray(slice_.loss if name is None else slice_[name], dtype=float).T
    handles = _regions(axes, slice_, np.isfinite(values.T))
    drawn = np.maximum(values, scale.levels[0] / 2) if scale.log else values
    masked = np.ma.masked_invalid(drawn)
    options: dict[str, Any] = {
        "levels": scale.levels,
        "norm": scale.norm,
        "extend": scale.extend,
        "cmap": MAP,
    }
    if filled:
        shown = axes.contourf(x, y, masked, **options)
        shown.set_edgecolor("face")  # else viewers of PDF show seams between levels
        shown.set_linewidth(0.2)
        axes.contour(x, y, masked, levels=scale.levels, colors="white", linewidths=0.3, alpha=0.6)
    else:
        shown = axes.contour(x, y, masked, linewidths=1.0, **options)
    handles += draw_places(axes, slice_, trajectory)
    axes.set_xlim(x.min(), x.max())
    axes.set_ylim(y.min(), y.max())
    if alike(slice_):
        axes.set_aspect("equal")
    if not filled:
        _numbers(axes, shown)
    return handles


def check_plane(one: Slice, instead: str) -> None:
    """Raise unless a slice is a plane of at least two by two points."""
    if one.dim != 2 or min(one.status.shape) < 2:
        raise SettingsError(
            f"Expected a slice of a plane, two points each way or more. Got one of shape"
            f" {one.status.shape}. Use {instead} for a line."
        )


def first_loss(one: Slice) -> str:
    """Return the name of the loss."""
    return next(n for n in one.names if one[n] is one.loss)


def add_colorbar(
    figure: Figure, axes: Axes | Sequence[Axes], scale: Scale, label: str, *, beside: bool = False
) -> None:
    """Draw the scale with its round values; beside one axes as high as those are."""
    source = ScalarMappable(norm=scale.norm, cmap=MAP)
    options: dict[str, Any] = {"ax": axes, "pad": 0.02}
    if beside:
        assert isinstance(axes, Axes)
        options = {"cax": axes.inset_axes((1.03, 0, 0.05, 1))}
    bar = figure.colorbar(source, extend=scale.extend, **options)
    bar.set_ticks(list(scale.ticks), labels=scale.labels)
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=9)


def label_axes(axes: Axes, one: Slice, room: Sequence[float]) -> None:
    """Write what the axes are, within their lengths; two of the same label are told apart."""
    texts = [as_text(a.label) for a in one.axes]
    if texts[0] == texts[1]:
        texts = [f"direction {k}: {text}" for k, text in enumerate(texts, 1)]
    size = 9 if min(room) > 2 else 8
    axes.set_xlabel(wrapped(texts[0], max(room[0], 0.8), size), fontsize=size)
    axes.set_ylabel(wrapped(texts[1], max(room[1], 0.8), size), fontsize=size)
    axes.tick_params(labelsize=size - 1)
    for axis, length in ((axes.xaxis, room[0]), (axes.yaxis, room[1])):
        axis.set_major_locator(MaxNLocator(5 if length > 2 else 4, steps=[1, 2, 5, 10]))


def region_words(one: Slice) -> dict[Status, str]:
    """Return how the legend calls what is not known."""
    words = dict(WORDS)
    if one.details.get("loss_max") is not None:
        limit = one.details["loss_max"]
        text = f"{limit:g}" if isinstance(limit, (int, float)) else as_text(limit)
        words[Status.CUT] = f"above loss_max = {text}"
    return words


def _regions(axes: Axes, one: Slice, known: np.ndarray) -> list[Artist]:
    # Whole cells, below the contours: those cover what is known.
    x, y = one.grid
    worst = np.full((len(x) - 1, len(y) - 1), -1)
    order = list(REGIONS)
    for rank in range(len(order) - 1, -1, -1):
        at = (one.status == order[rank]) & ~known
        touched = at[:-1, :-1] | at[1:, :-1] | at[1:, 1:] | at[:-1, 1:]
        worst[touched] = rank
    found: list[Artist] = []
    words = region_words(one)
    for rank, kind in enumerate(order):
        cells = [
            [(x[i], y[j]), (x[i + 1], y[j]), (x[i + 1], y[j + 1]), (x[i], y[j + 1])]
            for i, j in np.argwhere(worst == rank)
        ]
        if not cells:
            continue
        style = REGIONS[kind]
        width = 0.0 if "hatch" in style else 0.4
        axes.add_collection(
            PolyCollection(cells, linewidth=width, zorder=0.5, label=words[kind], **style)
        )
        found.append(Patch(linewidth=0.6, label=words[kind], **{**style, "edgecolor": "0.5"}))
    return found


def _numbers(axes: Axes, shown: QuadContourSet) -> None:
    # Every second line, from the outermost; none where the edge would cut it.
    some = np.asarray(shown.levels)[1:-1][::-1][::2][:6]
    texts = axes.clabel(shown, sorted(some), fontsize=7, inline=False, fmt=lambda v: f"{v:.3g}")
    for text in texts or ():
        text.set_path_effects(HALO)
        share = axes.transLimits.transform(text.get_position())
        text.set_visible(bool(((share > 0.06) & (share < 0.94)).all()))


def alike(one: Slice) -> bool:
    """Tell whether a plane has one unit both ways, and is no strip."""
    first, second = one.axes
    units = [re.sub(r"\s*\(.*?\)|\d+|first|second", "", a.label) for a in (first, second)]
    spans = [float(np.ptp(g)) for g in one.grid]
    return first.kind == second.kind and units[0] == units[1] and 0.25 <= spans[0] / spans[1] <= 4
