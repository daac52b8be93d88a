"""What the kinds share that multiply units by factors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sharpkit.geometry.symmetries.kinds import Element, Part
from sharpkit.geometry.symmetries.units import FIXED, Touch
from sharpkit.objective.states import State

__all__ = ["parts_of", "scaled", "statistics"]


def statistics(touches: Sequence[Touch]) -> set[int]:
    """Return the units that running statistics are of."""
    return {int(i) for t in touches if t.role in ("mean", "variance") for i in t.ids}


def parts_of(touches: Sequence[Touch], units: set[int]) -> list[Part]:
    """Return the parts that some of the units make up, by where they lie."""
    places: dict[int, list[tuple[str, int, str]]] = {}
    for touch in touches:
        for unit in set(touch.ids.tolist()) & units:
            places.setdefault(unit, []).append((touch.name, touch.axis, touch.role))
    groups: dict[tuple[tuple[str, int, str], ...], list[int]] = {}
    for unit, where in places.items():
        groups.setdefault(tuple(where), []).append(unit)
    return [
        _part(sorted(members), tuple(dict.fromkeys(name for name, _, _ in where)), touches)
        for where, members in groups.items()
    ]


def _part(members: list[int], names: tuple[str, ...], touches: Sequence[Touch]) -> Part:
    own = [t for t in touches if t.name in names]

    def draw(generator: torch.Generator) -> Element:
        u = torch.rand(len(members), generator=generator, dtype=torch.float64, device="cpu")
        factors = np.exp(2 * u.numpy() - 1)  # between 1/e and e

        return lambda state: scaled(state, own, members, factors)

    return Part(len(members), names, draw, tuple(members))


def scaled(
    state: State, touches: Sequence[Touch], members: Sequence[int], factors: np.ndarray
) -> dict[str, Tensor]:
    """Return the state with units multiplied by factors.

    Args:
        state: Parameters and buffers.
        touches: Where the units lie, by their roles.
        members: The units, ascending.
        factors: A positive number for each.
    """
    moved = dict(state)
    for touch in touches:
        moved[touch.name] = _scaled(moved[touch.name], touch, members, factors)
    return moved


def _scaled(tensor: Tensor, touch: Touch, members: Sequence[int], factors: np.ndarray) -> Tensor:
    at = np.searchsorted(members, touch.ids).clip(max=len(members) - 1)
    hit = (np.asarray(members)[at] == touch.ids) & (touch.ids != FIXED)
    values = np.where(hit, factors[at], 1.0)
    around = [1] * tensor.ndim
    around[touch.axis] = len(values)
    c = torch.as_tensor(values, device=tensor.device).reshape(around)
    if touch.role == "read":
        return tensor / c
    if touch.role == "variance":
        return torch.where(c == 1, tensor, c.square() * (tensor + touch.eps) - touch.eps)
    return tensor * c
