"""What all figures share: size, colours, saving."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Affine2D, Bbox, blended_transform_factory

__all__ = [
    "COLOURS",
    "HALO",
    "MARKERS",
    "add_caption",
    "as_text",
    "cell_of",
    "columns_of",
    "legend_above",
    "new_axes",
    "save_figure",
    "width_of",
    "wrapped",
]

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HALO: list[patheffects.AbstractPathEffect] = [
    patheffects.withStroke(linewidth=2.0, foreground="white")
]  # around text on lines
TIGHT: dict[str, Any] = {
    "frameon": False, "borderpad": 0.2, "columnspacing": 1.0, "handlelength": 1.6,
    "handletextpad": 0.6, "labelspacing": 0.25,
}  # of legends  # fmt: skip
NARROW = 3.4  # inches of a figure's cell: below, text is smaller


def new_axes(width: float = 4.6, height: float = 3.2) -> Axes:
    """Return the axes of a new figure that belongs to no window."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    tidy(axes)
    return axes


def tidy(axes: Axes) -> None:
    """Take off the frame that carries nothing, and put the grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def save_figure(axes: Axes, path: str | Path, *, dpi: int = 200) -> Path:
    """Write the figure of these axes; the ending of the name chooses PNG, PDF or SVG."""
    path = Path(path)
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.savefig(path, dpi=dpi)
    return path


def as_text(name: object) -> str:
    r"""Return a name as matplotlib shows it letter by letter.

    A dollar sign would start a formula, and what cannot be printed has no glyph.

    Example:
        >>> print(as_text("a$b\n"))
        a\$b?
    """
    return "".join(c if c.isprintable() else "?" for c in str(name)).replace("$", r"\$")


HINTED = 1.05  # letters on whole pixels are wider, at 110 dots an inch by so much


def width_of(text: str, size: float) -> float:
    """Return how wide a line of text is, in inches.

    Args:
        text: As it is shown, without formulas.
        size: Of the font, in points.
    """
    return HINTED * sum(map(_letter, text.replace(r"\$", "$"))) * size / 72


@lru_cache(maxsize=4096)
def _letter(letter: str) -> float:
    # Of a font of one point; pairs of letters stand nearer if anything.
    found = text_to_path.get_text_width_height_descent(letter, FontProperties(size=100), False)
    return float(found[0]) / 100


def wrapped(text: str, width: float, size: float) -> str:
    """Break lines so that none is wider than this many inches; words that are get broken too.

    Example:
        >>> print(wrapped("multiples of the filter norm", 1.2, 9))
        multiples of the
        filter norm
    """
    lines: list[str] = []
    line = ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if width_of(longer, size) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while width_of(word, size) > width and len(word) > 1:
            fits = next(n for n in range(len(word) - 1, 0, -1)
                        if n == 1 or width_of(word[:n], size) <= width)  # fmt: skip
            fits -= word[fits - 1] == "\\" and fits > 1  # an escaped sign stays whole
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return "\n".join([*lines, line])


def cell_of(axes: Axes) -> Bbox:
    """Return the part of the figure that axes and their labels may fill, in inches."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    width, height = figure.get_size_inches()
    spec = axes.get_subplotspec()
    if spec is None:
        return axes.get_position().transformed(Affine2D().scale(width, height))
    spec = spec.get_topmost_subplotspec()
    rows, columns = spec.get_gridspec().get_geometry()
    wide, high = width / columns, height / rows
    return Bbox.from_extents(
        wide * spec.colspan.start, height - high * spec.rowspan.stop,
        wide * spec.colspan.stop, height - high * spec.rowspan.start,
    )  # fmt: skip


def columns_of(handles: Sequence[Artist], width: float) -> tuple[list[str], int, float, float]:
    """Return what a legend needs to fit a width: labels, columns, size and height in points."""
    room = width - 0.1
    size = 8.0 if room > NARROW else 7.0
    key = 2.6 * size / 72  # the symbol and the space beside it
    labels = [wrapped(str(h.get_label()), room - key, size) for h in handles]
    wide = [key + max(width_of(x, size) for x in label.split("\n")) for label in labels]
    columns = len(labels)
    while columns > 1:  # matplotlib fills column by column, the first ones longer
        widths = [max(c) for c in np.array_split(wide, columns)]
        if sum(widths) + 1.2 * (columns - 1) * size / 72 <= room:
            break
        columns -= 1
    if not labels:
        return [], 1, size, 0.0
    high = [label.count("\n") + 1 for label in labels]
    lines = max(int(c.sum()) for c in np.array_split(high, columns))
    return labels, columns, size, 1.4 * size * lines + 4


def legend_above(
    axes: Axes, handles: Sequence[Artist], title: str = "", *, grow: bool = False
) -> float:
    """Put a legend above the axes, where it hides nothing, and the title above it.

    Labels are wrapped to the width of the cell, and there are as many columns as fit.

    Args:
        axes: Whose legend it is.
        handles: With their labels, as they are shown.
        title: Of the axes, as it is shown.
        grow: Whether to make the figure higher by the legend's height.

    Returns:
        The height of both, in inches.
    """
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    cell = cell_of(axes)
    labels, columns, size, height = columns_of(handles, cell.width)
    if labels:
        left = (cell.x0 + 0.05) / figure.get_size_inches()[0]
        # As wide as the cell, not as the axes: the layout would narrow those for it. The room
        # above is that of the title.
        axes.legend(
            handles, labels, fontsize=size, ncols=columns, loc="lower left",
            bbox_to_anchor=(left, 1.0), borderaxespad=0.1, **TIGHT,
            bbox_transform=blended_transform_factory(figure.transFigure, axes.transAxes),
        ).set_in_layout(False)  # fmt: skip
    if grow:
        wide_now, high_now = figure.get_size_inches()
        figure.set_size_inches(wide_now, high_now + height / 72)
    shown = wrapped(title, 0.72 * cell.width, 9) or " "
    axes.set_title(shown, fontsize=9, pad=5 + height)
    return (5 + height + 12 * (shown.count("\n") + 1)) / 72


def add_caption(figure: Figure, text: str, *, grow: bool, size: float = 7.0) -> float:
    """Write a caption below everything, wrapped to the width of the figure.

    Args:
        figure: Of constrained layout, which makes room for it.
        text: Plain.
        grow: Whether to make the figure higher by the caption's height.
        size: Of the font, in points.

    Returns:
        Its height, in inches.
    """
    width, height = figure.get_size_inches()
    shown = wrapped(as_text(text), width - 0.2, size)
    below = (1.25 * size * (shown.count("\n") + 1) + 8) / 72
    if grow:
        figure.set_size_inches(width, height + below)
    figure.supxlabel(shown, x=0.1 / width, ha="left", fontsize=size, color="0.25")
    return below
