"""The loss around a point: directions and slices."""

from sharpkit.landscape.directions import filter_normalized
from sharpkit.landscape.slices import quadratic_model, slice_1d

__all__ = ["filter_normalized", "quadratic_model", "slice_1d"]
