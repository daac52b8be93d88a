"""Slices along a line: losses of several data sets or checkpoints, with their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sharpkit.errors import SettingsError
from sharpkit.landscape import Slice, Status
from sharpkit.landscape.caption import caption as told
from sharpkit.landscape.caption import name_of
from sharpkit.plots.figure import (
    COLOURS,
    HALO,
    add_caption,
    as_text,
    cell_of,
    legend_above,
    new_axes,
    tidy,
    wrapped,
)
from sharpkit.plots.scale import shown_name
from sharpkit.results import Estimate

__all__ = ["plot_line"]

Band = Literal["rise", "value"]
STYLES = ("-", (0, (5, 1)), (0, (3, 1, 1, 1)), ":")
WORDS = {"rise": "of the rise from the centre", "value": "of the value"}


def plot_line(
    slices: Slice | Sequence[Slice],
    names: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    band: bool | Band = True,
    level: float = 0.95,
    quadratic: bool = True,
    log: bool = False,
    title: str | None = None,
    caption: bool = False,
) -> Axes:
    """Draw values along a line; what is not known stays a gap.

    Values of one quantity (``"train/loss"``, ``"test/loss"``) share the left axis, those of a
    second one (``"accuracy"``) have the right axis. Interpolated points are hollow, measured
    ones beside them filled. Points above ``loss_max`` and those that are not finite are marked
    at the upper edge. The quadratic model is dashed and leaves the axes where it leaves the
    range of the values.

    The band is the value plus and minus the quantile times the standard error: Student's t with
    ``details["num_groups"] - 1`` degrees of freedom, the normal one if the number is not known.
    By default the error is that of the *rise from the centre*: the same examples are used at
    every point, so the shape is known better than the height. The band then is zero at the
    centre, and says nothing of how well the value itself is known: for that take ``"value"``.

    Args:
        slices: One, or several to compare on one scale.
        names: Which values; None: of one slice all, of several the loss of each.
        ax: Draw here.
        band: ``"rise"``, ``"value"``, None of them (False), or what there is (True).
        level: Probability of the band.
        quadratic: Whether to draw the quadratic model where a slice has one.
        log: Whether the left axis is logarithmic.
        title: None: the slice's title or checkpoint, if there is one.
        caption: Whether to write below what was measured, and how.

    Returns:
        The left axes.

    Raises:
        SettingsError: If a slice is no line or lacks a value or the errors asked for, or the
            values are of more than two quantities.
    """
    held = [slices] if isinstance(slices, Slice) else list(slices)
    left = ax or new_axes()
    kind = band_of(held, band)
    sides, handles = draw_line(left, held, names, kind, level, quadratic, log)
    labels = list(dict.fromkeys(as_text(s.axes[0].label) for s in held))
    beside = 0.8 + 0.5 * (len(sides) > 1)
    left.set_xlabel(wrapped("; ".join(labels), cell_of(left).width - beside, 9), fontsize=9)
    given = title if title is not None else (name_of(held[0]) if len(held) == 1 else "")
    legend_above(left, handles if len(handles) > 1 else [], as_text(given), grow=ax is None)
    if caption:
        figure = left.get_figure(root=True)
        assert isinstance(figure, Figure)
        bands = f" Bands: {100 * level:g}% intervals {WORDS[kind]}." if kind else ""
        add_caption(figure, told(held) + bands, grow=ax is None)
    return left


def draw_line(
    left: Axes,
    held: Sequence[Slice],
    names: Sequence[str] | None,
    kind: Band | None,
    level: float,
    quadratic: bool,
    log: bool,
) -> tuple[dict[str, Axes], list[Artist]]:
    """Draw all but titles; return the axes of each quantity, and what a legend shows."""
    if not held or any(s.dim != 1 for s in held):
        raise SettingsError("Expected slices along a line. Use plot_contour for a plane.")
    chosen = [_names(s, names, len(held) > 1) for s in held]
    quantities = list(dict.fromkeys(n.rsplit("/", 1)[-1] for of in chosen for n in of))
    if len(quantities) > 2:
        raise SettingsError(
            f"Expected values of one or two quantities. Got {', '.join(quantities)}. Choose"
            " with `names`."
        )
    sides = {q: left if q == quantities[0] else _right(left) for q in quantities}
    handles: list[Artist] = []
    sets = list(dict.fromkeys(n.rpartition("/")[0] for of in chosen for n in of))
    for k, (s, of) in enumerate(zip(held, chosen, strict=True)):
        for name in of:
            data, _, quantity = name.rpartition("/")
            axes = sides[quantity]
            which = k if len(held) > 1 else sets.index(data)
            dash = STYLES[(sets.index(data) if len(held) > 1 else 0) % len(STYLES)]
            if axes is not left:
                dash = "-."
            label = shown_name(name) if len(held) == 1 else as_text(name_of(s) or f"slice {k + 1}")
            if len(held) > 1 and len(of) > 1:
                label += f", {shown_name(name)}"
            label += " (right)" if axes is not left else ""
            colour = COLOURS[which % len(COLOURS)]
            handles.append(_curve(axes, s, name, colour, dash, label, kind, level))
        modelled = next(n for n in s.names if s[n] is s.loss)
        if quadratic and s.quadratic is not None and modelled in of:
            colour = COLOURS[k % len(COLOURS)] if len(held) > 1 else "0.25"
            style: dict[str, Any] = {"linestyle": "--", "linewidth": 1.0}
            label = "quadratic model" + (f" of {shown_name(modelled)}" if len(sets) > 1 else "")
            # Not add_line: the range stays that of the values.
            model = Line2D(s.grid[0], s.quadratic, color=colour, label=label, **style)
            sides[modelled.rpartition("/")[2]].add_artist(model)
            if label not in [h.get_label() for h in handles]:
                handles.append(Line2D([], [], color="0.25", label=label, **style))
    for q, axes in sides.items():
        axes.set_ylabel(as_text(q), fontsize=9)
        axes.tick_params(labelsize=8)
    if log:
        left.set_yscale("log")
    handles += _edge(left, held)
    if any((s.status == Status.INTERPOLATED).any() for s in held):
        handles.append(
            Line2D([], [], linestyle="none", marker="o", markersize=3.5, color="0.3",
                   markerfacecolor="white", markeredgewidth=0.7, label="interpolated")
        )  # fmt: skip
    if kind and any(h.get_gid() == "band" for h in left.collections):
        handles.append(Patch(color="0.5", alpha=0.3, linewidth=0,
                             label=f"{100 * level:g}% band of the {kind}"))  # fmt: skip
    _places(sides[quantities[-1]], held)
    left.margins(x=0.02)
    return sides, handles


def _names(s: Slice, names: Sequence[str] | None, several: bool) -> list[str]:
    if names is None:
        return [next(n for n in s.names if s[n] is s.loss)] if several else list(s.names)
    if isinstance(names, str):
        names = [names]
    for name in names:
        _ = s[name]
    return list(names)


def band_of(held: Sequence[Slice], band: bool | Band) -> Band | None:
    if band is False:
        return None
    if band is True:
        return "rise" if any(s.rise_errors for s in held) else "value"
    if band not in WORDS:
        raise SettingsError(f"Expected `band` to be True, False, 'rise' or 'value'. Got {band!r}.")
    if not any(s.rise_errors if band == "rise" else s.errors for s in held):
        raise SettingsError(
            f"Expected a slice with the errors {WORDS[band]}. There are none. Use band=True for"
            " what there is."
        )
    return band


def dof_of(s: Slice, name: str) -> float | None:
    """Return the degrees of freedom of the standard errors of a value; None: not known."""
    groups = s.details.get("num_groups")
    if isinstance(groups, Mapping):
        data = name.rpartition("/")[0]
        groups = groups.get(data, next(iter(groups.values())) if len(groups) == 1 else None)
    return None if groups is None or groups < 2 else float(groups) - 1


def _curve(
    axes: Axes, s: Slice, name: str, colour: str, style: object, label: str,
    kind: Band | None, level: float,
) -> Line2D:  # fmt: skip
    x, y = s.grid[0], np.asarray(s[name], dtype=float)
    (line,) = axes.plot(x, y, color=colour, linestyle=style, linewidth=1.5, label=label)
    errors = {"rise": s.rise_errors, "value": s.errors}[kind] if kind else {}
    if name in errors:
        one = Estimate(0.0, 1.0, "stderr", dof=dof_of(s, name))
        half = one.interval(level)[1] * errors[name]
        drawn = axes.fill_between(x, y - half, y + half, color=colour, alpha=0.22, linewidth=0)
        drawn.set_gid("band")
    known = np.isfinite(y)
    beside = np.r_[False, known[:-1]] | np.r_[known[1:], False]
    size = 3.0 if len(x) <= 60 else 1.8
    between = s.status == Status.INTERPOLATED
    # A point between two gaps has no line to show it.
    filled = known & ~between & (between.any() | ~beside)
    for where, face in ((filled, colour), (known & between, "white")):
        if where.any():
            axes.plot(
                x[where], y[where], linestyle="none", marker="o", markersize=size, color=colour,
                markerfacecolor=face, markeredgewidth=0.7,
            )  # fmt: skip
    return line


def _edge(axes: Axes, held: Sequence[Slice]) -> list[Artist]:
    # Where no value can be drawn, and why, at the upper edge.
    found: list[Artist] = []
    limits = list(dict.fromkeys(s.details.get("loss_max") for s in held))
    above = f"above loss_max = {limits[0]:g}" if len(limits) == 1 and limits[0] else "cut"
    for kind, marker, label in (
        (Status.CUT, "^", above),
        (Status.NOT_FINITE, "x", "not finite"),
    ):
        x = np.concatenate([s.grid[0][s.status == kind] for s in held])
        if len(x):
            found += axes.plot(
                x, np.full(len(x), 0.985), transform=axes.get_xaxis_transform(), marker=marker,
                linestyle="none", markersize=4, color="0.45", label=label, clip_on=False,
                zorder=4,
            )  # fmt: skip
    return found


def _places(axes: Axes, held: Sequence[Slice]) -> None:
    low, high = min(s.grid[0].min() for s in held), max(s.grid[0].max() for s in held)
    for label, x in dict.fromkeys((m.label, m.coordinates[0]) for s in held for m in s.markers):
        if not low <= x <= high:
            continue
        axes.axvline(x, color="0.4", linewidth=0.7, linestyle=":", zorder=1)
        late = x > low + 0.8 * (high - low)
        axes.annotate(
            as_text(label), (x, 0.93), xycoords=("data", "axes fraction"),
            xytext=(-3 if late else 3, 0), textcoords="offset points", fontsize=7,
            color="0.3", va="top", ha="right" if late else "left", path_effects=HALO,
        )  # fmt: skip


def _right(left: Axes) -> Axes:
    axes = left.twinx()
    tidy(axes)
    axes.grid(False)
    axes.spines["right"].set_visible(True)
    return axes
