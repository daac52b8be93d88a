"""Hidden units are renumbered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sharpkit.geometry.symmetries.kinds import Element, Observation, Part, kind
from sharpkit.geometry.symmetries.units import FIXED, Touch
from sharpkit.objective.states import State

__all__ = ["find"]


@kind("permutation")
def find(seen: Observation) -> list[Part]:
    """Return groups of units that lie in the same places of the same tensors."""
    touches = seen.units("permute").touches()
    places: dict[int, list[tuple[int, int]]] = {}
    for number, touch in enumerate(touches):
        for unit, count in zip(*np.unique(touch.ids, return_counts=True), strict=True):
            if unit != FIXED:
                places.setdefault(int(unit), []).append((number, int(count)))
    groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for unit, where in places.items():
        groups.setdefault(tuple(where), []).append(unit)
    return [
        _part(members, [touches[number] for number, _ in where])
        for where, members in groups.items()
        if len(members) > 1
    ]


def _part(members: list[int], touches: Sequence[Touch]) -> Part:
    # Positions of each unit along each axis, in order.
    positions = [np.stack([np.flatnonzero(t.ids == u) for u in members]) for t in touches]

    def draw(generator: torch.Generator) -> Element:
        order = torch.randperm(len(members), generator=generator, device="cpu").numpy()
        if (order == np.arange(len(members))).all():
            order = np.roll(order, 1)

        def act(state: State) -> dict[str, Tensor]:
            moved = dict(state)
            for touch, at in zip(touches, positions, strict=True):
                index = np.arange(len(touch.ids))
                index[at.ravel()] = at[order].ravel()
                tensor = moved[touch.name]
                where = torch.as_tensor(index, device=tensor.device)
                moved[touch.name] = tensor.index_select(touch.axis, where)
            return moved

        return act

    return Part(len(members), tuple(dict.fromkeys(t.name for t in touches)), draw)
