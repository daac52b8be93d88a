"""Paths between minima: straight and curved, their barriers, and what brings ends together."""

from sharpkit.landscape.paths.alignment import Alignment, Moved, align
from sharpkit.landscape.paths.barrier import Barrier, Profile, barrier
from sharpkit.landscape.paths.curves import BezierPath, Path, PolychainPath, SegmentPath
from sharpkit.landscape.paths.planes import plane_through
from sharpkit.landscape.paths.training import Connection, connect

__all__ = [
    "Alignment",
    "Barrier",
    "BezierPath",
    "Connection",
    "Moved",
    "Path",
    "PolychainPath",
    "Profile",
    "SegmentPath",
    "align",
    "barrier",
    "connect",
    "plane_through",
]
