"""Slices of several checkpoints side by side, on one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sharpkit.errors import SettingsError
from sharpkit.landscape import Slice
from sharpkit.landscape.caption import caption as told
from sharpkit.landscape.caption import name_of
from sharpkit.plots.contour import add_colorbar, draw_contour, first_loss, label_axes
from sharpkit.plots.figure import TIGHT, add_caption, as_text, columns_of, tidy, wrapped
from sharpkit.plots.line import band_of, draw_line
from sharpkit.plots.places import label_places
from sharpkit.plots.scale import Scale, scale_of, shown_name
from sharpkit.plots.surface import draw_surface, fit, solid_axes

__all__ = ["plot_slices"]

WIDTH = 2.4  # inches of a panel


def plot_slices(
    slices: Sequence[Slice],
    name: str | None = None,
    *,
    kind: Literal["contour", "surface"] = "contour",
    columns: int | None = None,
    levels: int | Sequence[float] | None = None,
    log: bool | None = None,
    level: float = 0.95,
    trajectory: bool | None = None,
    caption: bool = False,
) -> tuple[Axes, ...]:
    """Draw several slices side by side; all share their axes, levels and colours.

    Args:
        slices: All lines, or all planes.
        name: The value; None: the loss.
        kind: How planes are drawn.
        columns: Panels in a row; None: up to three.
        levels: Of contours: how many, or which.
        log: Whether values are on a logarithmic scale; None: only those of contours.
        level: Probability of the bands of lines, as for :func:`plot_line`.
        trajectory: As for :func:`plot_contour`.
        caption: Whether to write below what was measured, and how: what all share once.

    Returns:
        The axes of each slice, in their order.

    Raises:
        SettingsError: If there are no slices, they are of different dimension, or one lacks the
            value.
    """
    held = list(slices)
    dims = {s.dim for s in held}
    if len(dims) != 1:
        raise SettingsError(
            f"Expected slices that are all lines or all planes. Got {len(held)} slices of"
            f" dimensions {sorted(dims)}."
        )
    if kind not in ("contour", "surface"):
        raise SettingsError(f"Expected `kind` to be 'contour' or 'surface'. Got {kind!r}.")
    plane, solid = dims == {2}, dims == {2} and kind == "surface"
    across = columns or min(len(held), 3)
    rows = math.ceil(len(held) / across)
    size = (
        (WIDTH + 0.6 * solid) * across + 0.9 * (plane and not solid),
        (2.3 if not solid else 2.8) * rows + 0.2,
    )
    figure = Figure(figsize=size, layout="constrained")
    scale = scale_of(held, name, levels, log if log is not None else not solid) if plane else None
    if solid:
        assert scale is not None
        return _surfaces(figure, held, name, scale, (rows, across), trajectory, caption)
    grid = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False).ravel()
    for spare in grid[len(held) :]:
        spare.remove()
    drawn: list[Axes] = list(grid[: len(held)])
    found: list[Artist] = []
    if scale is not None:
        for axes, s in zip(drawn, held, strict=True):
            found += draw_contour(axes, s, name, scale, True, trajectory)
        _same_limits(drawn, held)
        add_colorbar(figure, drawn, scale, shown_name(name or first_loss(held[0])))
    else:
        found = _lines(drawn, held, name, level, bool(log), across)
    _legend(figure, found)
    for k, (axes, s) in enumerate(zip(drawn, held, strict=True)):
        _texts(axes, s, k, plane, last_row=k + across >= len(held), first=k % across == 0)
    if caption:
        add_caption(figure, told(held), grow=True)
    if plane:
        for axes, s in zip(drawn, held, strict=True):
            label_places(axes, s, trajectory)
    return tuple(drawn)


def _lines(
    drawn: Sequence[Axes],
    held: Sequence[Slice],
    name: str | None,
    level: float,
    log: bool,
    across: int,
) -> list[Artist]:
    band = band_of(held, True)
    found: list[Artist] = []
    right: Axes | None = None
    for axes, s in zip(drawn, held, strict=True):
        tidy(axes)
        sides, handles = draw_line(
            axes, [s], None if name is None else [name], band, level, True, log
        )
        found += handles
        for other in list(sides.values())[1:]:
            if right is not None:
                other.sharey(right)
            right = other
            if axes is not drawn[-1] and (drawn.index(axes) + 1) % across:
                other.set_ylabel("")
                other.tick_params(labelright=False)
    for axes in drawn:
        axes.autoscale_view()
    return found


def _legend(figure: Figure, found: Sequence[Artist]) -> float:
    # What all panels show, once, at the top; returns its height in inches.
    handles = list({str(h.get_label()): h for h in found}.values())
    wide, high = figure.get_size_inches()
    labels, columns, size, height = columns_of(handles, wide)
    if labels:
        figure.set_size_inches(wide, high + height / 72)
        figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, fontsize=size, **TIGHT
        )
    return height / 72


def _same_limits(drawn: Sequence[Axes], held: Sequence[Slice]) -> None:
    ends = [(min(s.grid[i].min() for s in held), max(s.grid[i].max() for s in held))
            for i in (0, 1)]  # fmt: skip
    for axes in drawn:
        axes.set_xlim(*ends[0])
        axes.set_ylim(*ends[1])


def _texts(axes: Axes, s: Slice, k: int, plane: bool, *, last_row: bool, first: bool) -> None:
    _title(axes, s, k)
    if plane:
        label_axes(axes, s, (WIDTH - 0.7, WIDTH - 0.7))
    else:
        axes.set_xlabel(wrapped(as_text(s.axes[0].label), WIDTH - 0.6, 8), fontsize=8)
        axes.tick_params(labelsize=7)
    axes.tick_params(labelbottom=last_row)
    if not last_row:
        axes.set_xlabel("")
    if not first:
        axes.set_ylabel("")


def _title(axes: Axes, s: Slice, k: int) -> None:
    axes.set_title(wrapped(as_text(name_of(s) or f"slice {k + 1}"), WIDTH - 0.5, 8), fontsize=8)


def _surfaces(
    figure: Figure, held: Sequence[Slice], name: str | None, scale: Scale,
    shape: tuple[int, int], trajectory: bool | None, caption: bool,
) -> tuple[Axes, ...]:  # fmt: skip
    drawn = [figure.add_subplot(*shape, k + 1, projection="3d") for k in range(len(held))]
    found: list[Artist] = []
    for axes, s in zip(drawn, held, strict=True):
        found += draw_surface(solid_axes(axes), s, name, scale, trajectory)
    _same_limits(drawn, held)
    high = _legend(figure, found)
    below = add_caption(figure, told(held), grow=True) if caption else 0.0
    for k, (axes, s) in enumerate(zip(drawn, held, strict=True)):
        _title(axes, s, k)
        fit(solid_axes(axes), high + 0.4, below, False)
    return tuple(drawn)
