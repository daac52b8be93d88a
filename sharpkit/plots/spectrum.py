"""The density of the Hessian's eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from sharpkit.plots.figure import COLOURS, new_axes
from sharpkit.results import Spectrum

__all__ = ["density_on", "plot_cumulative", "plot_spectrum"]

WIDTH_SHARE = 0.01  # standard deviation of a smoothed node, as a share of the range
POINTS = 2000
SMALLEST_SHARE = 1e-6  # of the largest magnitude: rounding is not far below


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


def plot_spectrum(
    spectrum: Spectrum,
    *,
    ax: Axes | None = None,
    title: str = "",
    x_scale: Literal["linear", "log"] = "linear",
    ends: tuple[float, float] | None = None,
) -> Axes:
    """Draw the density on a logarithmic scale; eigenvalues below zero are shaded.

    Both ends are marked: the eigenvalues if they are given, otherwise the outermost Ritz values,
    which lie inside of them and are called so. Peaks are as wide as the smoothing
    (1% of the range), not as the eigenvalues: a lone outlier shows as a small bump.

    Args:
        spectrum: What to draw.
        ax: Axes to draw on; None makes a figure.
        title: Of the axes.
        x_scale: ``"log"`` shows magnitudes on both sides of zero over many decades; the
            density then is per unit of the axis, so that peaks keep their area.
        ends: The smallest and the largest eigenvalue, as a Lanczos run found them.
    """
    axes = ax or new_axes()
    values = np.concatenate([np.array(nodes) for nodes in spectrum.nodes])
    low, high = float(values.min()), float(values.max())
    if ends is not None:
        low, high = min(low, ends[0]), max(high, ends[1])
    scale = SMALLEST_SHARE * (max(abs(low), abs(high)) or 1.0)

    def onto(x: np.ndarray) -> np.ndarray:
        # Position on the axis: the value itself, or signed decades above the smallest.
        result: np.ndarray = (
            x if x_scale == "linear" else np.arcsinh(x / (2 * scale)) / math.log(10)
        )
        return result

    left, right = (float(onto(np.array(x))) for x in (low, high))
    spread = (right - left) or max(abs(right), 1.0)
    width = WIDTH_SHARE * spread
    grid = np.linspace(left - 5 * width, right + 5 * width, POINTS)
    placed = replace(spectrum, nodes=tuple(tuple(onto(np.array(n))) for n in spectrum.nodes))
    density = density_on(grid, placed, width)
    floor = 0.1 / (spectrum.dim * width)  # a tenth of one eigenvalue, spread over a peak
    axes.semilogy(grid, np.maximum(density, floor), color=COLOURS[0], linewidth=1.2)
    axes.fill_between(grid, floor, np.maximum(density, floor), color=COLOURS[0], alpha=0.15)
    axes.set_ylim(bottom=floor)
    axes.margins(x=0)
    if low < 0:
        axes.axvspan(grid[0], 0, color="0.85", zorder=0, linewidth=0)
    marked = ends or (low, high)
    names = (r"$\lambda_{\min}$", r"$\lambda_{\max}$")
    if ends is None:
        names = ("smallest Ritz value", "largest Ritz value")
    for value, name, side in zip(marked, names, ("left", "right"), strict=True):
        at = float(onto(np.array(value)))
        axes.axvline(at, color=COLOURS[1], linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{name} = {value:.3g}",
            (at, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4 if side == "left" else -4, 0),
            textcoords="offset points",
            ha=side,
            va="top",
            fontsize=8,
            color=COLOURS[1],
        )
    if x_scale == "log":
        _decades(axes, low, high, scale, onto)
    axes.set_xlabel("eigenvalue of the Hessian")
    axes.set_ylabel("density" if x_scale == "linear" else "density per decade")
    axes.set_title(title, fontsize=9)
    return axes


def plot_cumulative(
    spectrum: Spectrum, *, ax: Axes | None = None, title: str = "", level: float = 0.95
) -> Axes:
    """Draw the share of eigenvalues above each magnitude, with the band that holds it.

    Both axes are logarithmic; positive eigenvalues are a solid line, magnitudes of negative
    ones a dashed one. Unlike a smoothed density nothing here depends on a width.

    Args:
        spectrum: What to draw.
        ax: Axes to draw on; None makes a figure.
        title: Of the axes.
        level: Probability of the band.
    """
    axes = ax or new_axes()
    values = np.concatenate([np.array(nodes) for nodes in spectrum.nodes])
    largest = float(abs(values).max()) or 1.0
    grid = np.geomspace(SMALLEST_SHARE * largest, 1.05 * largest, 400)
    for sign, style, name in ((1, "-", "positive"), (-1, "--", "negative, magnitude")):
        if not (sign * values > grid[0]).any():
            continue
        share, low, high = (np.array(x) for x in spectrum.cumulative(list(sign * grid), level))
        if sign > 0:
            share, low, high = 1 - share, 1 - high, 1 - low
        least = 0.5 / spectrum.dim
        axes.loglog(grid, np.maximum(share, least), style, color=COLOURS[0], label=name)
        axes.fill_between(
            grid, np.maximum(low, least), np.maximum(high, least), color=COLOURS[0], alpha=0.12,
            step="mid", linewidth=0,
        )  # fmt: skip
        axes.set_ylim(least, 1.5)
    axes.set_xlabel("magnitude of the eigenvalue")
    axes.set_ylabel("share of eigenvalues beyond")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(title, fontsize=9)
    return axes


def _decades(
    axes: Axes, low: float, high: float, scale: float, onto: Callable[[np.ndarray], np.ndarray]
) -> None:
    ticks, labels = [0.0], ["0"]
    top = math.floor(math.log10(max(abs(low), abs(high)) or 1.0))
    for exponent in range(math.ceil(math.log10(scale)) + 1, top + 1, 2):
        for sign in (1, -1):
            value = sign * 10.0**exponent
            if low <= value <= high:
                ticks.append(float(onto(np.array(value))))
                labels.append(f"${'-' if sign < 0 else ''}10^{{{exponent}}}$")
    axes.set_xticks(ticks, labels)
