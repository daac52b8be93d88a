"""Points to find again in a plane: the centre, checkpoints, a trajectory."""

from __future__ import annotations

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Affine2D, Bbox

from sharpkit.landscape import Marker, Slice
from sharpkit.plots.figure import HALO, as_text, width_of

__all__ = ["draw_places", "is_trajectory", "label_places", "split_places"]

JOINED = ("trajectory",)  # kinds of directions whose markers are one path
CENTRE = ("theta", "centre", "center")
INK = "#D55E00"
LONG = 24
SIZE = 6.5


def split_places(one: Slice) -> tuple[list[Marker], list[Marker]]:
    """Return the markers that are the centre, and the others."""
    centre = [m for m in one.markers if m.label.lower() in CENTRE]
    return centre, [m for m in one.markers if m not in centre]


def is_trajectory(one: Slice, asked: bool | None) -> bool:
    """Tell whether the markers are one path in their order."""
    if asked is not None:
        return asked
    return bool(one.details.get("trajectory", any(a.kind in JOINED for a in one.axes)))


def draw_places(axes: Axes, one: Slice, trajectory: bool | None) -> list[Artist]:
    """Draw the markers, and return what a legend shows of them; off the plane is hollow."""
    centre, others = split_places(one)
    handles: list[Artist] = []
    points = np.array([m.coordinates for m in others], dtype=float).reshape(-1, 2)
    joined = is_trajectory(one, trajectory) and len(points) >= 2
    if joined:
        (line,) = axes.plot(
            *points.T, color=INK, linewidth=1.2, zorder=5, label="trajectory",
            path_effects=HALO,
        )  # fmt: skip
        beyond = int((~_inside(one, points)).sum())
        label = "trajectory"
        if beyond:
            label += f" ({beyond} of {len(points)} points beyond the grid)"
        handles.append(Line2D([], [], color=INK, linewidth=1.2, label=label))
        line.set_label(label)
        _arrow(axes, points)
    off = np.array([m.distance > 0 for m in others], dtype=bool)
    for where, face, label in ((~off, INK, "on the plane"), (off, "white", "off the plane")):
        if where.any():
            (dots,) = axes.plot(
                *points[where].T, linestyle="none", marker="o", markersize=4.5, color=INK,
                markerfacecolor=face, markeredgewidth=0.9, zorder=6, label=label,
            )  # fmt: skip
            if off.any():
                handles.append(dots)
    for marker in centre:
        (star,) = axes.plot(
            *([c] for c in marker.coordinates), linestyle="none", marker="*", markersize=10,
            color="white", markeredgecolor="black", markeredgewidth=0.8, zorder=7,
            label=as_text(marker.label),
        )  # fmt: skip
        handles.insert(0, star)
    return handles


def label_places(axes: Axes, one: Slice, trajectory: bool | None) -> None:
    """Write the markers' names, once all else is drawn.

    Names that would lie on one another are left out, those of the last and the first point of a
    trajectory last.
    """
    others = split_places(one)[1]
    if not others:
        return
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # makes the layout
    points = axes.transData.transform([m.coordinates for m in others]) / figure.dpi  # inches
    edge = axes.get_window_extent().transformed(Affine2D().scale(1 / figure.dpi))
    taken: list[Bbox] = []
    last = len(others) - 1
    order = list(range(len(others)))
    if is_trajectory(one, trajectory):
        order.sort(key=lambda k: (k != last, k != 0, k))
    for k in order:
        label = others[k].label
        text = as_text(label if len(label) <= LONG else label[:LONG] + "...")
        x, y = points[k]
        wide = width_of(text, SIZE)
        late, up = x + wide + 0.1 > edge.x1, y + 0.16 < edge.y1
        left = x - 0.07 - wide if late else x + 0.07
        low = y + 0.03 if up else y - 0.14
        box = Bbox.from_bounds(left - 0.03, low, wide + 0.06, 0.11)
        if not edge.contains(x, y) or left < edge.x0 or box.count_overlaps(taken):
            continue
        taken.append(box)
        axes.annotate(
            text, (others[k].coordinates[0], others[k].coordinates[1]),
            xytext=(-5 if late else 5, 2 if up else -10), textcoords="offset points", fontsize=SIZE,
            ha="right" if late else "left", va="bottom", zorder=8, path_effects=HALO,
        ).set_in_layout(False)  # fmt: skip


def _inside(one: Slice, points: np.ndarray) -> np.ndarray:
    low = np.array([g.min() for g in one.grid])
    high = np.array([g.max() for g in one.grid])
    return np.asarray(((points >= low) & (points <= high)).all(axis=1))


def _arrow(axes: Axes, points: np.ndarray) -> None:
    # On the last stretch that has a length.
    steps = np.hypot(*np.diff(points, axis=0).T)
    if not steps.any():
        return
    k = int(np.flatnonzero(steps)[-1])
    start, end = points[k], points[k + 1]
    axes.annotate(
        "", xy=tuple(start + 0.75 * (end - start)), xytext=tuple(start), zorder=5.5,
        annotation_clip=True,
        arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "mutation_scale": 11,
                    "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip
