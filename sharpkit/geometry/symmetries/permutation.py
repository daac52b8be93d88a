"""Hidden units are renumbered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharpkit.geometry.symmetries.kinds import Element, Observation, Part, kind
from sharpkit.geometry.symmetries.units import FIXED, Touch
from sharpkit.objective.states import State

__all__ = ["UnitGroup", "find", "groups_of"]


@dataclass(frozen=True)
class UnitGroup:
    """Units that lie in the same places, and may be renumbered among each other.

    Attributes:
        touches: The places: tensors and axes.
        positions: For each of them where the units are along the axis, ``[units, count]``.
    """

    touches: tuple[Touch, ...]
    positions: tuple[np.ndarray, ...]

    @property
    def units(self) -> int:
        """How many."""
        return len(self.positions[0])

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the parameters and buffers that move with them."""
        return tuple(dict.fromkeys(t.name for t in self.touches))

    def act(self, state: State, order: np.ndarray) -> dict[str, Tensor]:
        """Return the state in which unit i is what unit ``order[i]`` was."""
        moved = dict(state)
        for touch, at in zip(self.touches, self.positions, strict=True):
            index = np.arange(len(touch.ids))
            index[at.ravel()] = at[order].ravel()
            tensor = moved[touch.name]
            where = torch.as_tensor(index, device=tensor.device)
            moved[touch.name] = tensor.index_select(touch.axis, where)
        return moved

    def rows(self, state: State, place: int) -> Tensor:
        """Return the entries of each unit at one of the places, ``[units, entries]``."""
        touch, at = self.touches[place], self.positions[place]
        tensor = state[touch.name]
        found = tensor.index_select(touch.axis, torch.as_tensor(at.ravel(), device=tensor.device))
        return found.movedim(touch.axis, 0).reshape(self.units, -1)


@kind("permutation")
def find(seen: Observation) -> list[Part]:
    """Return groups of units that lie in the same places of the same tensors."""
    return [_part(group) for group in groups_of(seen)]


def groups_of(seen: Observation) -> list[UnitGroup]:
    """Return the groups, one for each part of :func:`find`."""
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
        _group(members, [touches[number] for number, _ in where])
        for where, members in groups.items()
        if len(members) > 1
    ]


def _group(members: list[int], touches: Sequence[Touch]) -> UnitGroup:
    # Positions of each unit along each axis, in order.
    positions = (np.stack([np.flatnonzero(t.ids == u) for u in members]) for t in touches)
    return UnitGroup(tuple(touches), tuple(positions))


def _part(group: UnitGroup) -> Part:
    def draw(generator: torch.Generator) -> Element:
        order = torch.randperm(group.units, generator=generator, device="cpu").numpy()
        if (order == np.arange(group.units)).all():
            order = np.roll(order, 1)
        return lambda state: group.act(state, order)

    return Part(group.units, group.tensors, draw)
