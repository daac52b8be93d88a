"""Whole layers are multiplied, and those that read them are divided."""

from __future__ import annotations

from dataclasses import replace

from sharpkit.geometry.symmetries.kinds import Observation, Part, kind
from sharpkit.geometry.symmetries.scaling import parts_of, statistics
from sharpkit.geometry.symmetries.units import FIXED, Touch

__all__ = ["find"]


@kind("layer_scale")
def find(seen: Observation) -> list[Part]:
    """Return the units of node_scale, those in one tensor with one common factor."""
    touches = seen.units("scale").touches()
    parent: dict[int, int] = {FIXED: FIXED}

    def root(unit: int) -> int:
        while parent.setdefault(unit, unit) != unit:
            unit = parent[unit]
        return unit

    normalised = statistics(touches)
    for touch in touches:
        first = FIXED if normalised & set(touch.ids.tolist()) else root(int(touch.ids[0]))
        for unit in touch.ids:
            a, b = sorted((first, root(int(unit))))
            parent[b] = first = a
    common: list[Touch] = []
    for touch in touches:
        ids = touch.ids.copy()
        ids[:] = root(int(ids[0]))
        common.append(replace(touch, ids=ids))
    return parts_of(common, {int(t.ids[0]) for t in common} - {FIXED})
