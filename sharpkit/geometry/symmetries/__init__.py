"""Exact symmetries of a given network, found by watching it run once.

One file a kind; ``find_symmetries`` asks each. What is found is a guess until
:func:`verified` has compared the outputs on all the data in float64.
"""

from sharpkit.geometry.symmetries import (
    batch_norm_scale,
    layer_scale,
    node_scale,
    permutation,
)
from sharpkit.geometry.symmetries.kinds import KINDS, Element, Symmetry, find_symmetries, verified

__all__ = [
    "KINDS",
    "Element",
    "Symmetry",
    "batch_norm_scale",
    "find_symmetries",
    "layer_scale",
    "node_scale",
    "permutation",
    "verified",
]
