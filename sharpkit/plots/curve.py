"""The loss along a line."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from sharpkit.plots.figure import COLOURS, new_axes
from sharpkit.results import Curve

__all__ = ["plot_slice"]


def plot_slice(
    curve: Curve, *, quadratic: Curve | None = None, ax: Axes | None = None, title: str = ""
) -> Axes:
    """Draw a slice; values that are not finite stay gaps.

    Args:
        curve: The loss along the direction.
        quadratic: The quadratic model along it, drawn dashed within the range of the loss.
        ax: Draw here.
        title: What the direction is.
    """
    axes = ax or new_axes()
    y = np.array(curve.y)
    axes.plot(curve.x, y, color=COLOURS[0], linewidth=1.5, label=curve.y_label)
    if quadratic is not None:
        model = np.array(quadratic.y)
        model = np.where(model <= np.nanmax(y) * 1.05, model, np.nan)
        axes.plot(
            quadratic.x, model, color=COLOURS[1], linestyle="--", linewidth=1.2,
            label="quadratic model",
        )  # fmt: skip
        axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel(curve.x_label)
    axes.set_ylabel(curve.y_label)
    axes.set_title(title, fontsize=9)
    return axes
