"""The density of the Hessian's eigenvalues."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from sharpkit.plots.figure import COLOURS, new_axes
from sharpkit.results import Spectrum

__all__ = ["density_on", "plot_spectrum"]

WIDTH_SHARE = 0.01  # standard deviation of a smoothed node, as a share of the range
POINTS = 2000


def density_on(grid: np.ndarray, spectrum: Spectrum, width: float) -> np.ndarray:
    """Return the density on a grid: nodes smoothed to Gaussians of standard deviation width.

    It integrates to 1 over all eigenvalues.
    """
    total = np.zeros_like(grid)
    for nodes, weights in zip(spectrum.nodes, spectrum.weights, strict=True):
        z = (grid[:, None] - np.array(nodes)) / width
        total += (np.array(weights) * np.exp(-0.5 * z**2)).sum(axis=1)
    result: np.ndarray = total / (len(spectrum.nodes) * width * np.sqrt(2 * np.pi))
    return result


def plot_spectrum(spectrum: Spectrum, *, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw the density on a logarithmic scale; eigenvalues below zero are shaded.

    The largest and the smallest Ritz value are marked. Peaks are as wide as the smoothing
    (1% of the range), not as the eigenvalues: a lone outlier shows as a small bump.
    """
    axes = ax or new_axes()
    values = np.concatenate([np.array(nodes) for nodes in spectrum.nodes])
    low, high = float(values.min()), float(values.max())
    spread = (high - low) or max(abs(high), 1.0)
    width = WIDTH_SHARE * spread
    grid = np.linspace(low - 5 * width, high + 5 * width, POINTS)
    density = density_on(grid, spectrum, width)
    floor = 0.1 / (spectrum.dim * width)  # a tenth of one eigenvalue, spread over a peak
    axes.semilogy(grid, np.maximum(density, floor), color=COLOURS[0], linewidth=1.2)
    axes.fill_between(grid, floor, np.maximum(density, floor), color=COLOURS[0], alpha=0.15)
    axes.set_ylim(bottom=floor)
    axes.margins(x=0)
    if low < 0:
        axes.axvspan(grid[0], 0, color="0.85", zorder=0, linewidth=0)
    for value, name, side in ((low, "min", "left"), (high, "max", "right")):
        axes.axvline(value, color=COLOURS[1], linewidth=0.8, linestyle=":")
        axes.annotate(
            f"$\\lambda_{{\\{name}}}$ = {value:.3g}",
            (value, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4 if side == "left" else -4, 0),
            textcoords="offset points",
            ha=side,
            va="top",
            fontsize=8,
            color=COLOURS[1],
        )
    axes.set_xlabel("eigenvalue of the Hessian")
    axes.set_ylabel("density")
    axes.set_title(title, fontsize=9)
    return axes
