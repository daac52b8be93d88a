"""What of a network may be renumbered, multiplied or turned without changing its function."""

from __future__ import annotations

from collections.abc import Sequence

from sharpkit.geometry.canonical import Gauge
from sharpkit.geometry.layouts import Factorization, FactorPair
from sharpkit.geometry.symmetries import (
    Symmetry,
    batch_norm_scale,
    node_scale,
    permutation,
    verified,
)
from sharpkit.geometry.symmetries.kinds import Observation, Part
from sharpkit.geometry.symmetries.units import Touch
from sharpkit.landscape.paths.matching import HeadOrder, UnitOrder
from sharpkit.landscape.paths.scales import meets_itself
from sharpkit.objective import Objective
from sharpkit.objective.states import State

__all__ = ["full_pairs", "head_orders", "scalable_parts", "unit_orders"]


def full_pairs(a: State, pairs: Sequence[FactorPair], notes: list[str]) -> tuple[FactorPair, ...]:
    """Return the pairs that the first network has at full rank: only they have a gauge."""
    kept = tuple(p for p in pairs if not Gauge(a, Factorization((p,))).deficient)
    left = [p for p in pairs if p not in kept]
    if left:
        notes.append(
            f"Left out {left[0].kind} of {left[0].module!r}"
            f"{f' and {len(left) - 1} more' if len(left) > 1 else ''}: its product is of less"
            " than full rank in the first network."
        )
    return kept


def scalable_parts(
    objective: Objective,
    seen: Observation,
    touches: Sequence[Touch],
    state: State,
    fixed: set[str],
    names: Sequence[str],
    notes: list[str],
) -> list[Part]:
    """Return the parts of units that positive factors may multiply, verified."""
    kept: list[Part] = []
    for name, module in (("node_scale", node_scale), ("batch_norm_scale", batch_norm_scale)):
        guess = tuple(module.find(seen))
        found = verified(objective, Symmetry(name, guess), state) if guess else None
        for part in found.parts if found else ():
            if fixed & set(part.tensors):
                notes.append(f"Left out units of {part.tensors[0]}: some parameters are fixed.")
            elif meets_itself(part, touches, names):
                notes.append(f"Left out units of {part.tensors[0]}: they write what they read.")
            else:
                kept.append(part)
    return kept


def unit_orders(
    objective: Objective,
    seen: Observation,
    state: State,
    fixed: set[str],
    names: Sequence[str],
    notes: list[str],
) -> list[UnitOrder]:
    """Return the groups of units that may be renumbered, verified."""
    groups = permutation.groups_of(seen)
    parts = permutation.find(seen)
    found = verified(objective, Symmetry("permutation", tuple(parts)), state) if parts else None
    held = {id(part) for part in found.parts} if found else set()
    kept = []
    for part, group in zip(parts, groups, strict=True):
        if id(part) not in held:
            continue
        if fixed & set(group.tensors):
            notes.append(f"Left out units of {group.tensors[0]}: some parameters are fixed.")
            continue
        kept.append(UnitOrder(group, names))
    return kept


def head_orders(
    objective: Objective,
    pairs: Sequence[FactorPair],
    state: State,
    turn: bool,
    notes: list[str],
) -> list[HeadOrder]:
    """Return the attention layers whose heads may change places, verified."""
    layers: dict[str, list[FactorPair]] = {}
    for pair in pairs:
        if pair.kind in ("qk", "vo"):
            layers.setdefault(pair.module, []).append(pair)
    guesses = []
    for module, held in layers.items():
        counts = {block.size[0] for pair in held for block in pair.blocks}
        if {pair.kind for pair in held} != {"qk", "vo"} or len(counts) != 1:
            notes.append(
                f"The heads of {module!r} keep their order: not all of their factors are free."
            )
        elif counts != {1}:
            guesses.append(HeadOrder(tuple(held), turn))
    if not guesses:
        return []
    parts = [guess.part() for guess in guesses]
    found = verified(objective, Symmetry("heads", tuple(parts)), state)
    held_parts = {id(part) for part in found.parts} if found else set()
    return [g for g, part in zip(guesses, parts, strict=True) if id(part) in held_parts]
