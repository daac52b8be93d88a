"""Losses along lines, planes and curves through the parameters."""

from sharpkit.landscape.caption import caption
from sharpkit.landscape.compute import compute_slice
from sharpkit.landscape.curvature_directions import (
    eigen_directions,
    gradient_direction,
    worst_direction,
)
from sharpkit.landscape.export import save_slice
from sharpkit.landscape.geodesics import GeodesicSection, geodesic_slice
from sharpkit.landscape.paths import (
    BezierPath,
    PolychainPath,
    SegmentPath,
    align,
    barrier,
    connect,
    plane_through,
)
from sharpkit.landscape.point_directions import (
    Trajectory,
    between,
    orthogonalized,
    tensor_direction,
    trajectory_plane,
)
from sharpkit.landscape.points import SliceProgress, remove_parts
from sharpkit.landscape.random_directions import filter_normalized, random_direction
from sharpkit.landscape.ranges import parse_range
from sharpkit.landscape.result import Marker, Slice, Status, load_slice
from sharpkit.landscape.section import Axis, Direction, Section, StraightSection
from sharpkit.landscape.slices import quadratic_model, slice_1d

__all__ = [
    "Axis",
    "BezierPath",
    "Direction",
    "GeodesicSection",
    "Marker",
    "PolychainPath",
    "Section",
    "SegmentPath",
    "Slice",
    "SliceProgress",
    "Status",
    "StraightSection",
    "Trajectory",
    "align",
    "barrier",
    "between",
    "caption",
    "compute_slice",
    "connect",
    "eigen_directions",
    "filter_normalized",
    "geodesic_slice",
    "gradient_direction",
    "load_slice",
    "orthogonalized",
    "parse_range",
    "plane_through",
    "quadratic_model",
    "random_direction",
    "remove_parts",
    "save_slice",
    "slice_1d",
    "tensor_direction",
    "trajectory_plane",
    "worst_direction",
]
