"""Coordinates along an axis of a slice."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sharpkit.errors import SettingsError

__all__ = ["parse_range"]

MOST_POINTS = 10**7


def parse_range(text: str | Iterable[float]) -> np.ndarray:
    """Return coordinates: numbers as they are, or ``start:stop:count`` with both ends.

    Args:
        text: For example ``"-1:1:51"``.

    Raises:
        SettingsError: If it is no such range, or the numbers are not finite and ascending.

    Example:
        >>> parse_range("-1:1:5").tolist()
        [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    if isinstance(text, str):
        parts = text.split(":")
        try:
            start, stop, count = float(parts[0]), float(parts[1]), int(parts[2])
            if len(parts) != 3 or count < 2 or not start < stop or count > MOST_POINTS:
                raise ValueError
            x = np.linspace(start, stop, count)
        except (ValueError, IndexError):
            raise SettingsError(
                "Expected a range start:stop:count with start below stop and at least 2 points,"
                f" such as -1:1:51. Got {text!r}."
            ) from None
        if start == -stop and count % 2:
            x[count // 2] = 0.0
    else:
        x = np.asarray(list(text), dtype=float)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all() or not (np.diff(x) > 0).all():
        raise SettingsError("Expected at least two finite coordinates in ascending order.")
    return x
