"""Move one network within what leaves its function alone, until it is near to another one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sharpkit.errors import MeasureError, SettingsError, ShapeError
from sharpkit.geometry.canonical import Gauge
from sharpkit.geometry.layouts import Factorization, FactorPair, find_pairs
from sharpkit.geometry.symmetries.kinds import Observation, Part, rounding_of
from sharpkit.geometry.symmetries.units import Touch
from sharpkit.landscape.paths.freedoms import (
    full_pairs,
    head_orders,
    scalable_parts,
    unit_orders,
)
from sharpkit.landscape.paths.matching import Coordinate, HeadOrder, Rotation, UnitOrder, match
from sharpkit.landscape.paths.scales import Scaling, balancing
from sharpkit.landscape.paths.statistics import normalised_by_statistics
from sharpkit.objective import Objective
from sharpkit.objective.states import State, deviation, state_of, with_state
from sharpkit.results import to_plain

__all__ = ["Alignment", "Freedom", "Moved", "align"]

Freedom: TypeAlias = Literal["permutation", "scale", "gl"]
FREEDOMS: tuple[Freedom, ...] = ("permutation", "scale", "gl")

ROUNDS = 50  # of balancing units and factors in turn
STEADY = 1e-12
CHANGED = 1e-7  # relative: what is less is rounding


@dataclass(frozen=True)
class Moved:
    """One group of an alignment.

    Attributes:
        kind: ``"permutation"``, ``"scale"`` or ``"gl"``.
        label: Where.
        units: How many units, heads or factors of products it has.
        changed: How many changed places, or were multiplied or turned.
    """

    kind: str
    label: str
    units: int
    changed: int


@dataclass(frozen=True)
class Alignment:
    r"""An end that was moved, and how far.

    Attributes:
        objective: The first end's objective with the second end's network, aligned.
        state: Its parameters and buffers, in float64 before rounding.
        moved: What was moved.
        distance_before: :math:`\|\theta_A - \theta_B\|`.
        distance_after: The same with the aligned end.
        balanced_before: The distance of both ends' balanced forms, before they were matched.
        balanced_after: The same, matched: never larger.
        inner_before: The inner product of both ends' balanced forms.
        inner_after: The same, matched: what was maximised.
        ends: What each start of the search ended at; the first began at the given order.
        deviation: How far the outputs of the second end moved on all the data, relative.
        notes: Sentences for a person.
        details: Settings (JSON-able).
    """

    objective: Objective
    state: State = field(repr=False)
    moved: tuple[Moved, ...]
    distance_before: float
    distance_after: float
    balanced_before: float
    balanced_after: float
    inner_before: float
    inner_after: float
    ends: tuple[float, ...]
    deviation: float
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def theta(self) -> Tensor:
        """The aligned parameters, ``[P]``."""
        return self.objective.theta

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the parameters."""
        left_out = ("objective", "state", "moved")
        plain = {n: v for n, v in vars(self).items() if n not in left_out}
        result: dict[str, Any] = to_plain({**plain, "moved": [vars(m) for m in self.moved]})
        return result


def align(
    first: Objective,
    second: Objective | Tensor | State,
    how: Sequence[Freedom] = FREEDOMS,
    *,
    restarts: int = 4,
    seed: int = 0,
) -> Alignment:
    r"""Return the second network as near to the first as its symmetries allow.

    ``"permutation"``: hidden units, channels, the width of a residual stream and attention
    heads are renumbered by weight matching (git re-basin): coordinate ascent of
    :math:`\langle\theta_A, \pi(\theta_B)\rangle`, one linear assignment at a time.
    ``"scale"``: hidden units between which and the outputs the network is positively
    homogeneous are multiplied so that what they get and what they give have the sizes that the
    first network's have. ``"gl"``: the factors of products, such as each attention head's, are
    brought to the first network's gauge and turned by orthogonal Procrustes.

    With scale or gl both networks are brought to the balanced form E, matched there, and the
    second is moved on by the inverse of what balanced the *first*:

    .. math:: \theta_B' = E_A^{-1}\,Q\,\pi\,E_B\,\theta_B

    so that the first stays as it is. As these groups act linearly,
    :math:`E_A((1-t)\theta_A + t\theta_B')` is the segment between the balanced, matched forms,
    and has its loss: nothing is lost by not moving the first, and the barrier does not depend
    on the gauge that either training ended in.

    The groups are those that :mod:`sharpkit.geometry.symmetries` and
    :func:`~sharpkit.geometry.layouts.find_pairs` find and verify on the second network. Its
    outputs are compared in float64 on all the data before anything is returned.

    Args:
        first: The model, loss and data, at the end that stays.
        second: The other end: an objective of the same network, a theta ``[P]``, or a state
            dict. A theta alone is not enough for a network with buffers of its own.
        how: What to use.
        restarts: Random starts of the ascent beside the given order; the best is returned. It
            is only a local maximum all the same.
        seed: Of these.

    Raises:
        SettingsError: If a setting makes no sense.
        ShapeError: If the networks do not have the same tensors.
        MeasureError: If the outputs moved, or a number is not finite.

    It misleads where units are equal or dead, whose place is arbitrary, and where the matched
    inner product is hardly larger: then the networks have no common order, and a barrier that
    stays says nothing about another alignment.

    Cost: a few forward passes over the data in float64, a linear assignment for each group and
    sweep, ``O(n^3)`` for n units, and an SVD of ``[h, h]`` for every two heads of a layer.

    Reference: arXiv:2209.04836 (permutations), arXiv:2505.05409 (the quotient by GL(h)); the
    common gauge and the Procrustes step are ours.

    Example:
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)
        ... )
        >>> data = (torch.eye(3), torch.zeros(3, 2))
        >>> first = Objective(model, torch.nn.MSELoss(), data, dtype=torch.float64)
        >>> state = {n: p.detach().double() for n, p in model.named_parameters()}
        >>> state |= {n: 2 * state[n].flip(0) for n in ("0.weight", "0.bias")}
        >>> state["2.weight"] = state["2.weight"].flip(1) / 2
        >>> found = align(first, state)  # the same network
        >>> found.distance_before > 0.1, found.distance_after < 1e-12
        (True, True)
    """
    _check(how, restarts)
    names = first.space.names
    a, b = state_of(first), _state(first, second)
    other = with_state(first, b)
    notes: list[str] = []
    fixed = {n for n, _ in first.model.named_parameters()} - set(names)
    seen = Observation.of(other, b) if {"permutation", "scale"} & set(how) else None
    pairs = find_pairs(other) if "gl" in how or "permutation" in how else Factorization(())
    notes += pairs.notes if "gl" in how else ()
    factors = full_pairs(a, pairs.pairs, notes) if "gl" in how else ()
    touches: Sequence[Touch] = ()
    parts: list[Part] = []
    if "scale" in how and seen is not None:
        touches = seen.units("scale").touches()
        parts = scalable_parts(other, seen, touches, b, fixed, names, notes)
    home, there = (_Balanced(state, touches, parts, factors, names) for state in (a, b))
    for objective, state, moved in ((first, a, home.state), (other, b, there.state)):
        _same(objective, state, moved)
    if not (home.settled and there.settled):
        notes.append(
            f"Units and factors were not balanced after {ROUNDS} rounds: the result depends a"
            " little on the scales that training ended at."
        )
    orders: list[UnitOrder] = []
    heads: list[HeadOrder] = []
    if "permutation" in how and seen is not None:
        turn = "gl" in how
        orders = unit_orders(other, seen, b, fixed, names, notes)
        heads = head_orders(other, factors if turn else pairs.pairs, b, turn, notes)
    headed = {id(pair) for layer in heads for pair in layer.pairs}
    turned = [Rotation(pair) for pair in factors if id(pair) not in headed]
    coordinates: list[Coordinate] = [*orders, *heads, *turned]
    groups = {"permutation": [*orders, *heads], "scale": parts, "gl": factors}
    notes += [f"Nothing was found for {name!r} to move." for name in how if not groups[name]]
    generator = torch.Generator("cpu").manual_seed(seed)
    found = match(
        home.state,
        there.state,
        coordinates,
        names,
        restarts=restarts if orders or heads else 0,
        generator=generator,
    )
    final = home.undo(found.state)
    gap = _same(other, b, final)
    aligned = with_state(first, final)
    before, after = _distance(a, b, names), _distance(a, final, names)
    if after > before * (1 + 1e-9):
        notes.append(
            f"The distance in theta grew from {before:.4g} to {after:.4g}, as the first network is"
            " not balanced; that of the balanced forms, on which the segment's loss depends, did"
            " not."
        )
    return Alignment(
        objective=aligned,
        state=final,
        moved=(
            *_renumbered(coordinates, found.orders),
            *_multiplied(parts, touches, orders, found.orders, home.scaling, there.scaling),
            *_turned(factors, coordinates, found.orders, b, final),
        ),
        distance_before=before,
        distance_after=after,
        balanced_before=_distance(home.state, there.state, names),
        balanced_after=_distance(home.state, found.state, names),
        inner_before=found.before,
        inner_after=found.after,
        ends=found.ends,
        deviation=gap,
        notes=tuple(notes),
        details={"how": list(how), "restarts": restarts, "seed": seed},
    )


class _Balanced:
    # A state in the form that all its equivalents have, and the way back.
    def __init__(
        self,
        state: State,
        touches: Sequence[Touch],
        parts: Sequence[Part],
        factors: Sequence[FactorPair],
        names: Sequence[str],
    ):
        self._steps: list[Scaling | Gauge] = []
        self.scaling = np.ones(sum(len(part.members) for part in parts))
        self.state = dict(state)
        self.settled = not (parts and factors)
        # Either changes what the other sees where units are in a pair; both lower the norm.
        for turn in range(ROUNDS):
            largest = 0.0
            if parts:
                scaling = balancing(self.state, touches, parts, names)
                self.state = scaling.act(self.state)
                self._steps.append(scaling)
                self.scaling = self.scaling * scaling.factors
                largest = float(np.abs(np.log(scaling.factors)).max(initial=0.0))
            if turn > 0 and largest < STEADY:
                self.settled = True
                break
            if factors:
                gauge = Gauge(self.state, Factorization(tuple(factors)))
                self.state = gauge.state
                self._steps.append(gauge)
            if not (parts and factors):
                break

    def undo(self, state: State) -> dict[str, Tensor]:
        moved = dict(state)
        for step in reversed(self._steps):
            moved = step.undo(moved)
        return moved


def _state(first: Objective, second: Objective | Tensor | State) -> dict[str, Tensor]:
    held = state_of(first)
    if isinstance(second, Objective):
        given: dict[str, Tensor] = state_of(second)
    elif isinstance(second, Tensor):
        first.space.check_vector(second)
        if normalised_by_statistics(first.model):
            raise MeasureError(
                "Expected the running statistics of the second end too. Got its parameters alone."
                " Give an objective or a state dict."
            )
        given = {**held, **first.space.unflatten(second.detach())}
    else:
        given = {**second}
        kept = set(first.model.state_dict()) | {n for n, _ in first.model.named_parameters()}
        missing = [n for n in held if n in kept and n not in given]
        if missing:
            raise ShapeError(
                f"Expected a state with all parameters and buffers. {missing[0]!r} is missing"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}."
            )
    found = {}
    for name, tensor in held.items():
        other = given.get(name, tensor)
        if other.shape != tensor.shape:
            raise ShapeError(
                f"Expected {name!r} of shape {tuple(tensor.shape)} in both networks. Got"
                f" {tuple(other.shape)}."
            )
        other = other.detach().to(tensor.device)
        found[name] = other.double() if other.is_floating_point() else other
        if other.is_floating_point() and not bool(torch.isfinite(other).all()):
            raise MeasureError(
                f"Expected finite parameters. {name!r} has an infinite entry or NaN."
            )
    return found


def _same(objective: Objective, state: State, moved: State) -> float:
    gap, dtype = deviation(objective, state, moved)
    if not gap <= rounding_of(dtype):
        raise MeasureError(
            f"Expected the same outputs after the alignment. They moved by {gap:.2g} of the"
            " largest. Nothing was changed. Leave out one of how=('permutation', 'scale', 'gl')."
        )
    return gap


def _distance(a: State, b: State, names: Sequence[str]) -> float:
    return math.sqrt(math.fsum(float((a[n] - b[n]).square().sum()) for n in names))


def _renumbered(coordinates: Sequence[Coordinate], orders: Mapping[int, np.ndarray]) -> list[Moved]:
    return [
        Moved("permutation", c.label, c.units, int((orders[i] != np.arange(c.units)).sum()))
        for i, c in enumerate(coordinates)
        if i in orders
    ]


def _multiplied(
    parts: Sequence[Part],
    touches: Sequence[Touch],
    units: Sequence[UnitOrder],
    orders: Mapping[int, np.ndarray],
    home: np.ndarray,
    there: np.ndarray,
) -> list[Moved]:
    # A unit's factor is its own in the second network's form, over that of the one in its place.
    members = sorted(unit for part in parts for unit in part.members)
    number = {unit: i for i, unit in enumerate(members)}
    found = []
    for part in parts:
        touch = next(t for t in touches if set(part.members) & set(t.ids.tolist()))
        source = np.arange(len(touch.ids))
        for i, coordinate in enumerate(units):
            group = coordinate.group
            for other, at in zip(group.touches, group.positions, strict=True):
                if (other.name, other.axis) == (touch.name, touch.axis):
                    source[at.ravel()] = at[orders[i]].ravel()
        place = [int(np.flatnonzero(touch.ids == unit)[0]) for unit in part.members]
        came = [number[int(touch.ids[source[p]])] for p in place]
        factors = there[came] / home[[number[unit] for unit in part.members]]
        changed = int((np.abs(np.log(factors)) > CHANGED).sum())
        found.append(Moved("scale", part.tensors[0], len(part.members), changed))
    return found


def _turned(
    factors: Sequence[FactorPair],
    coordinates: Sequence[Coordinate],
    orders: Mapping[int, np.ndarray],
    b: State,
    final: State,
) -> list[Moved]:
    # Heads whose factors are other than renumbering alone makes them.
    renumbered = dict(b)
    for i, order in orders.items():
        renumbered = coordinates[i].shuffled(renumbered, order)
    found = []
    for pair in factors:
        changed = torch.zeros(pair.heads, dtype=torch.bool, device="cpu")
        for before, after in zip(pair.read(renumbered), pair.read(final), strict=True):
            gap, size = (after - before).flatten(1).norm(dim=1), before.flatten(1).norm(dim=1)
            changed |= (gap > CHANGED * size).cpu()
        label = f"{pair.kind} of {pair.module}"
        found.append(Moved("gl", label, pair.heads, int(changed.sum())))
    return found


def _check(how: Sequence[Freedom], restarts: int) -> None:
    if isinstance(how, str) or not how or set(how) - set(FREEDOMS):
        raise SettingsError(f"Expected `how` to be some of {', '.join(FREEDOMS)}. Got {how!r}.")
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 0:
        raise SettingsError(
            f"Expected `restarts` to be a whole number of at least 0. Got {restarts!r}."
        )
