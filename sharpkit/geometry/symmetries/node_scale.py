"""What a hidden unit receives is multiplied, and what it gives on is divided."""

from __future__ import annotations

from sharpkit.geometry.symmetries.kinds import Observation, Part, kind
from sharpkit.geometry.symmetries.scaling import parts_of, statistics
from sharpkit.geometry.symmetries.units import FIXED

__all__ = ["find"]


@kind("node_scale")
def find(seen: Observation) -> list[Part]:
    """Return the units between which and the outputs everything is positively homogeneous.

    Units of linear layers, convolutions, embeddings, and the gains of normalisations, through
    ReLU, LeakyReLU, PReLU, pooling, reshaping and residual sums.
    """
    touches = seen.units("scale").touches()
    free = {int(i) for t in touches for i in t.ids} - {FIXED} - statistics(touches)
    return parts_of(touches, free)
