"""Weights before BatchNorm are multiplied, and its running statistics with them."""

from __future__ import annotations

from sharpkit.geometry.symmetries.kinds import Observation, Part, kind
from sharpkit.geometry.symmetries.scaling import parts_of, statistics
from sharpkit.geometry.symmetries.units import FIXED

__all__ = ["find"]


@kind("batch_norm_scale")
def find(seen: Observation) -> list[Part]:
    """Return the units that a BatchNorm in evaluation mode normalises.

    In training mode the statistics follow the weights by themselves. In evaluation mode the
    mean is multiplied by c, and the variance such that ``variance + eps`` is by ``c^2``.
    """
    touches = seen.units("scale").touches()
    return parts_of(touches, statistics(touches) - {FIXED})
