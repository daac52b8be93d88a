"""The parts of many scores: numbers of layers as a map, single eigenvalues as dots."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from sharpkit.plots.figure import COLOURS, as_text, new_axes

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["plot_eigenvalues", "plot_parts"]

WIDE = 10.0  # largest over smallest, from which colours are logarithmic
LONG = 32  # characters of a name


def plot_parts(frame: pd.DataFrame, *, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw a row a checkpoint and a column a layer; colours are the values.

    Colours are logarithmic where all values are positive and spread by more than a factor 10,
    and around zero where they have both signs. ``!`` marks what did not converge.

    Args:
        frame: Columns ``checkpoint``, ``part``, ``value``, ``converged``.
        ax: Draw here.
        title: For example the measure.
    """
    rows = list(dict.fromkeys(frame["checkpoint"]))
    names = list(dict.fromkeys(frame["part"]))
    table = np.full((len(rows), len(names)), np.nan)
    place = {name: i for i, name in enumerate(rows)}, {name: i for i, name in enumerate(names)}
    axes = ax or new_axes(2.8 + 0.24 * max(len(names), 6), 1.6 + 0.2 * max(len(rows), 3))
    for checkpoint, part, value, converged in zip(
        *(frame[c] for c in ("checkpoint", "part", "value", "converged")), strict=True
    ):
        row, column = place[0][checkpoint], place[1][part]
        table[row, column] = value
        if not converged:
            axes.text(column, row, "!", ha="center", va="center", color="red", weight="bold")
    finite = table[np.isfinite(table)]
    norm, colours = _colours(finite)
    image = axes.pcolormesh(
        np.arange(len(names) + 1) - 0.5,
        np.arange(len(rows) + 1) - 0.5,
        np.ma.masked_invalid(table),
        cmap=colours,
        norm=norm,
    )
    axes.grid(False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(names)), [short(n) for n in names], rotation=60, ha="right")
    axes.set_yticks(range(len(rows)), [short(PurePosixPath(n).stem) for n in rows])
    axes.tick_params(labelsize=7, length=0)
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.colorbar(image, ax=axes, pad=0.02).ax.tick_params(labelsize=7)
    axes.set_title(as_text(title), fontsize=9)
    return axes


def _colours(values: np.ndarray) -> tuple[Normalize, str]:
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    if low < 0 < high:
        far = max(-low, high)
        return TwoSlopeNorm(0.0, -far, far), "PuOr_r"
    if low > 0 and high > WIDE * low:
        return LogNorm(low, high), "cividis"
    return Normalize(low, high), "cividis"


def plot_eigenvalues(frame: pd.DataFrame, *, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw single eigenvalues with their bounds, a row a checkpoint; hollow: not converged.

    Args:
        frame: Columns ``checkpoint``, ``value``, ``probe_error``, ``converged``.
        ax: Draw here.
        title: For example which eigenvalues.
    """
    names = list(dict.fromkeys(frame["checkpoint"]))
    axes = ax or new_axes(6.4, 1.0 + 0.2 * max(len(names), 4))
    axes.axvline(0, color="0.5", linewidth=0.8, zorder=1)
    row = frame["checkpoint"].map({name: i for i, name in enumerate(names)}).to_numpy()
    value = frame["value"].to_numpy(dtype=float)
    error = np.nan_to_num(frame["probe_error"].to_numpy(dtype=float), posinf=0.0)
    done = frame["converged"].to_numpy(dtype=bool)
    for chosen, face in ((done, COLOURS[0]), (~done, "white")):
        if chosen.any():
            axes.errorbar(
                value[chosen], row[chosen], xerr=error[chosen], linestyle="none", marker="o",
                markersize=3.5, color=COLOURS[0], markerfacecolor=face, elinewidth=0.8,
            )  # fmt: skip
    axes.set_yticks(range(len(names)), [short(PurePosixPath(n).stem) for n in names], fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("eigenvalue")
    axes.set_title(as_text(title), fontsize=9)
    return axes


def short(text: str, most: int = LONG) -> str:
    """Return the end of a long name, as it is shown."""
    return as_text(text if len(text) <= most else "..." + text[3 - most :])
