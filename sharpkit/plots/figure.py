"""What all figures share: size, colours, saving."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["COLOURS", "MARKERS", "as_text", "new_axes", "save_figure"]

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


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
