"""One scale for the values of one or several slices: colours, levels and marks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from sharpkit.errors import SettingsError
from sharpkit.landscape import Slice
from sharpkit.plots.figure import as_text

__all__ = ["Scale", "scale_of", "shown_name"]

LEVELS = 14
DECADES = 6  # below the largest value: what is less takes the lowest colour
MAP = "viridis"


@dataclass(frozen=True)
class Scale:
    """What colours and levels stand for.

    Attributes:
        levels: Ascending; the first and the last are the ends of the scale.
        log: Whether the scale is logarithmic.
        ticks: Round values on it.
        below: Whether some values lie below the first level.
        above: Whether some lie above the last.
    """

    levels: np.ndarray
    log: bool
    ticks: tuple[float, ...]
    below: bool
    above: bool

    @property
    def norm(self) -> Normalize:
        """From values to the range of a colour map."""
        ends = float(self.levels[0]), float(self.levels[-1])
        return LogNorm(*ends) if self.log else Normalize(*ends)

    @property
    def extend(self) -> str:
        """Which ends the values go beyond, in matplotlib's word."""
        return {(False, False): "neither", (True, False): "min", (False, True): "max"}.get(
            (self.below, self.above), "both"
        )

    @property
    def labels(self) -> list[str]:
        """The ticks as text."""
        return [tick_text(t) for t in self.ticks]

    def height(self, values: np.ndarray) -> np.ndarray:
        """Return the values as heights: their decimal logarithm on a logarithmic scale."""
        if not self.log:
            return values
        result: np.ndarray = np.log10(np.maximum(values, self.levels[0]))
        return result


def scale_of(
    slices: Sequence[Slice],
    name: str | None,
    levels: int | Sequence[float] | None = None,
    log: bool = True,
) -> Scale:
    """Return the scale that holds all values of these slices.

    Args:
        slices: One or more.
        name: The value; None: the loss.
        levels: How many, or which.
        log: Logarithmic, unless a value is negative or none is positive.

    Raises:
        SettingsError: If no value is finite, a slice has no such value, or levels do not ascend
            (or are not positive on a logarithmic scale).
    """
    held = np.concatenate([(s.loss if name is None else s[name]).ravel() for s in slices])
    finite = held[np.isfinite(held)].astype(float)
    if not len(finite):
        raise SettingsError(
            "Expected a slice with at least one finite value. All are above loss_max, not"
            " finite or not measured. Take a smaller range, or a larger loss_max."
        )
    low, high = float(finite.min()), float(finite.max())
    log = log and low >= 0 and high > 0
    if levels is None or isinstance(levels, int):
        count = LEVELS if levels is None else levels
        if count < 2:
            raise SettingsError(f"Expected at least two levels. Got {count}.")
        chosen = _levels(finite, count, log)
    else:
        chosen = np.array(levels, dtype=float)
        if len(chosen) < 2 or not (np.diff(chosen) > 0).all() or (log and chosen[0] <= 0):
            what = "ascending, positive" if log else "ascending"
            raise SettingsError(f"Expected two or more {what} levels. Got {list(levels)}.")
    edge = 1e-9 * float(chosen[0] if log else chosen[-1] - chosen[0])
    return Scale(
        chosen,
        log,
        ticks(float(chosen[0]), float(chosen[-1]), log),
        below=low < chosen[0] - edge,
        above=high > chosen[-1] * (1 + 1e-9) if log else high > chosen[-1] + edge,
    )


def _levels(finite: np.ndarray, count: int, log: bool) -> np.ndarray:
    low, high = float(finite.min()), float(finite.max())
    if log:
        least = float(finite[finite > 0].min())
        low = max(least, high * 10.0**-DECADES)
        if high <= low * (1 + 1e-9):
            low, high = low / 1.1, high * 1.1
        return np.geomspace(low, high, count)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        wide = 0.1 * max(abs(low), abs(high)) or 1.0
        low, high = low - wide, high + wide
    return np.linspace(low, high, count)


def ticks(low: float, high: float, log: bool) -> tuple[float, ...]:
    """Return some three to eight round values from low to high."""
    if not log:
        found = MaxNLocator(6).tick_values(low, high)
        return tuple(float(t) for t in found if low <= t <= high)
    slack = 1 + 1e-9
    decades = math.log10(high / low)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if decades > 4:
        step = math.ceil(decades / 7)
        powers = [10.0**k for k in range(first, last + 1) if (k - last) % step == 0]
    else:
        of = (1, 2, 5) if decades <= 3 else (1, 3)
        powers = [m * 10.0**k for k in range(first, last + 1) for m in of]
    inside = tuple(p for p in powers if low / slack <= p <= high * slack)
    return inside if len(inside) >= 3 else ticks(low, high, False)


def tick_text(value: float) -> str:
    """Return a round value as short text."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")
    factor, power = f"{value:.3e}".split("e")
    factor = factor.rstrip("0").rstrip(".")
    times = "" if factor == "1" else f"{factor}\\times"
    return f"${times}10^{{{int(power)}}}$"


def shown_name(name: str | None) -> str:
    """Return ``"test loss"`` for ``"test/loss"``."""
    return as_text("loss" if name is None else " ".join(name.rsplit("/", 1)))
