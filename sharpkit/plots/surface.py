"""Slices of a plane as surfaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D, Bbox
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from sharpkit.errors import SettingsError
from sharpkit.landscape import Slice
from sharpkit.landscape.caption import caption as told
from sharpkit.landscape.caption import name_of
from sharpkit.plots.contour import REGIONS, add_colorbar, check_plane, first_loss, region_words
from sharpkit.plots.figure import NARROW, add_caption, as_text, cell_of, legend_above, wrapped
from sharpkit.plots.places import INK, is_trajectory, split_places
from sharpkit.plots.scale import MAP, Scale, scale_of, shown_name

if TYPE_CHECKING:
    from mpl_toolkits.mplot3d import Axes3D

__all__ = ["plot_surface"]

ZOOMS = (0.3, 1.15)


def plot_surface(
    slice_: Slice,
    name: str | None = None,
    *,
    ax: Axes | None = None,
    log: bool = False,
    elevation: float = 32.0,
    azimuth: float = -58.0,
    scale: Scale | None = None,
    colorbar: bool = False,
    trajectory: bool | None = None,
    title: str | None = None,
    caption: bool = False,
) -> Axes:
    """Draw a value over a plane as a surface; what is not known stays a hole.

    A grid cell is drawn if all its four corners are known. The heights of a logarithmic surface
    are decimal logarithms, and its marks say the values.

    Args:
        slice_: Of a plane.
        name: The value; None: the loss.
        ax: Three-dimensional axes to draw on.
        log: Whether heights and colours are logarithmic, unless a value is negative; values of
            less than a millionth of the largest lie on the floor.
        elevation: Of the eye above the plane, in degrees.
        azimuth: Of the eye around the vertical, in degrees.
        scale: A scale that several figures share; then `log` is its own.
        colorbar: Whether to draw a colour bar; the vertical axis has the same marks.
        trajectory: As for :func:`plot_contour`. A point is drawn at the height of the surface
            below it, or not at all where that is not known.
        title: None: the slice's title or checkpoint, if there is one.
        caption: Whether to write below what was measured, and how.

    Raises:
        SettingsError: If the slice is no plane, has no such value or no finite one, or the axes
            are not three-dimensional.
    """
    check_plane(slice_, "plot_line")
    scale = scale or scale_of([slice_], name, None, log)
    axes = solid_axes(ax)
    handles = draw_surface(axes, slice_, name, scale, trajectory)
    axes.view_init(elev=elevation, azim=azimuth)
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    if colorbar:
        add_colorbar(figure, axes, scale, shown_name(name or first_loss(slice_)))
    given = title if title is not None else name_of(slice_)
    above = legend_above(axes, handles, as_text(given), grow=ax is None)
    below = add_caption(figure, told(slice_), grow=ax is None) if caption else 0.0
    fit(axes, above, below, colorbar)
    result: Axes = axes
    return result


def draw_surface(
    axes: Axes3D, slice_: Slice, name: str | None, scale: Scale, trajectory: bool | None
) -> list[Artist]:
    """Draw all but titles, and return what a legend shows."""
    x, y = slice_.grid
    values = np.asarray(slice_.loss if name is None else slice_[name], dtype=float)
    heights = scale.height(values)
    corners = np.stack((*np.meshgrid(x, y, indexing="ij"), heights), axis=-1)
    cells = np.stack(
        [corners[:-1, :-1], corners[1:, :-1], corners[1:, 1:], corners[:-1, 1:]], axis=2
    ).reshape(-1, 4, 3)
    cells = cells[np.isfinite(cells).all(axis=(1, 2))]
    middle = cells[..., 2].mean(axis=1)
    middle = 10**middle if scale.log else middle
    faces = Poly3DCollection(
        list(cells), facecolors=colormaps[MAP](scale.norm(middle)), edgecolors=(0, 0, 0, 0.25),
        linewidths=0.25, zorder=1,
    )  # fmt: skip
    axes.add_collection3d(faces, autolim=False)
    known = heights[np.isfinite(heights)]
    low, high = float(known.min()), float(known.max())
    ends = scale.height(scale.levels[[0, -1]])
    low, high = min(low, float(ends[0])), max(high, float(ends[1]))
    axes.set_xlim(x.min(), x.max())
    axes.set_ylim(y.min(), y.max())
    axes.set_zlim(low, high)
    _marks(axes, slice_, scale, shown_name(name or first_loss(slice_)))
    handles = _reasons(slice_, values)
    handles += _path(axes, slice_, heights, trajectory)
    return handles


def solid_axes(ax: Axes | None) -> Axes3D:
    from mpl_toolkits.mplot3d import Axes3D

    if ax is None:
        figure = Figure(figsize=(4.6, 4.0), layout="constrained")
        ax = figure.add_subplot(projection="3d")
    if not isinstance(ax, Axes3D):
        raise SettingsError(
            'Expected three-dimensional axes. Make them with add_subplot(projection="3d").'
        )
    ax.computed_zorder = False  # markers are seen through the surface
    return ax


def fit(axes: Axes3D, above: float, below: float, colorbar: bool) -> None:
    """Make the box as large as its labels leave it: they stand around it, at any angle."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    cell = cell_of(axes)
    figure.draw_without_rendering()  # makes the layout, which then is kept
    engine = figure.get_layout_engine()
    if engine is not None:
        figure.set_layout_engine("none")
    others = [a for a in (*figure.axes, *axes.collections) if a is not axes and a.get_visible()]
    for artist in others:
        artist.set_visible(False)  # they change nothing, and take time

    def fits(zoom: float) -> bool:
        axes.set_box_aspect((1, 1, 0.75), zoom=zoom)
        figure.draw_without_rendering()
        boxes = [axis.get_tightbbox() for axis in (axes.xaxis, axes.yaxis, axes.zaxis)]
        box = Bbox.union([b for b in boxes if b]).transformed(Affine2D().scale(1 / figure.dpi))
        right = axes.get_window_extent().x1 / figure.dpi if colorbar else cell.x1
        across = cell.x0 < box.x0 and box.x1 < right
        return bool(across and cell.y0 + below < box.y0 and box.y1 < cell.y1 - above)

    low, high = ZOOMS
    for _ in range(5):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    for artist in others:
        artist.set_visible(True)
    if engine is not None:
        figure.set_layout_engine(engine)  # which moves the axes a little
    while not fits(low) and low > ZOOMS[0]:
        low *= 0.95


def _marks(axes: Axes3D, one: Slice, scale: Scale, label: str) -> None:
    step = 1 if cell_of(axes).width > NARROW or len(scale.ticks) < 5 else 2
    heights = scale.height(np.array(scale.ticks[::step]))
    axes.set_zticks(list(heights), labels=scale.labels[::step])
    axes.tick_params(labelsize=7, pad=0)
    texts = [as_text(a.label) for a in one.axes]
    if texts[0] == texts[1]:
        texts = [f"direction {k}: {text}" for k, text in enumerate(texts, 1)]
    size = 8 if cell_of(axes).width > NARROW else 7
    room = 0.34 * cell_of(axes).width
    for write, text in zip((axes.set_xlabel, axes.set_ylabel), texts, strict=True):
        shown = wrapped(text, room, size)
        if shown.count("\n") > 2:
            shown = wrapped(text, 1.4 * room, size)
        write(shown, fontsize=size, labelpad=2 + 0.6 * size * shown.count("\n"))
    axes.set_zlabel(label, fontsize=size, labelpad=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _reasons(one: Slice, values: np.ndarray) -> list[Artist]:
    words = region_words(one)
    unknown = one.status[~np.isfinite(values)]
    found = [words[kind] for kind in REGIONS if (unknown == kind).any()]
    style = {"facecolor": "white", "edgecolor": "0.6", "linewidth": 0.6}
    return [Patch(**style, label=f"holes: {'; '.join(found)}")] if found else []  # type: ignore[arg-type]


def _path(axes: Axes3D, one: Slice, heights: np.ndarray, asked: bool | None) -> list[Artist]:
    centre, others = split_places(one)
    found: list[Artist] = []
    style: dict[str, Any] = {"zorder": 5, "markeredgecolor": "black", "markeredgewidth": 0.6}
    for marker in centre:
        at = (*marker.coordinates, height_at(one, heights, marker.coordinates))
        found += axes.plot(
            *([c] for c in at), linestyle="none", marker="*", markersize=9, color="white",
            label=as_text(marker.label), **style,
        )  # fmt: skip
    if others:
        joined = is_trajectory(one, asked)
        points = [(*m.coordinates, height_at(one, heights, m.coordinates)) for m in others]
        found += axes.plot(
            *np.array(points).T, linestyle="-" if joined else "none", marker="o", markersize=4,
            color=INK, linewidth=1.2, label="trajectory" if joined else "checkpoints", **style,
        )  # fmt: skip
    return found


def height_at(one: Slice, heights: np.ndarray, point: tuple[float, ...]) -> float:
    """Return the bilinear height at a point of the plane; NaN where it is not known."""
    index, share = [], []
    for c, g in zip(point, one.grid, strict=True):
        if not g[0] <= c <= g[-1]:
            return float("nan")
        i = int(np.clip(np.searchsorted(g, c, side="right") - 1, 0, len(g) - 2))
        index.append(i)
        share.append((c - g[i]) / (g[i + 1] - g[i]))
    (i, j), (s, t) = index, share
    total = 0.0
    for k, a in ((0, 1 - s), (1, s)):
        for m, b in ((0, 1 - t), (1, t)):
            if a * b > 0:  # a corner of no weight may be unknown
                total += a * b * float(heights[i + k, j + m])
    return total
