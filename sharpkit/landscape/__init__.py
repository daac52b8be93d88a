"""Losses along lines, planes and curves through the parameters."""

from sharpkit.landscape.caption import caption
from sharpkit.landscape.directions import filter_normalized
from sharpkit.landscape.export import save_slice
from sharpkit.landscape.geodesics import geodesic_slice
from sharpkit.landscape.result import Marker, Slice, Status, load_slice
from sharpkit.landscape.section import Axis, Direction, Section, StraightSection
from sharpkit.landscape.slices import quadratic_model, slice_1d

__all__ = [
    "Axis",
    "Direction",
    "Marker",
    "Section",
    "Slice",
    "Status",
    "StraightSection",
    "caption",
    "filter_normalized",
    "geodesic_slice",
    "load_slice",
    "quadratic_model",
    "save_slice",
    "slice_1d",
]
