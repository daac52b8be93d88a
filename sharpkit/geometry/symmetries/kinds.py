"""Kinds of symmetry: how each is found, random elements of it, and their verification."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from sharpkit.errors import SharpkitWarning
from sharpkit.geometry.layouts import FactorPair, find_pairs
from sharpkit.geometry.symmetries.rules import follow
from sharpkit.geometry.symmetries.units import Mode, Units
from sharpkit.geometry.tape import Tape
from sharpkit.objective import Objective
from sharpkit.objective.states import (
    State,
    deviation,
    state_of,
    trace,
    with_all_parameters,
)

__all__ = [
    "KINDS",
    "Element",
    "Observation",
    "Symmetry",
    "find_symmetries",
    "kind",
    "rounding_of",
    "verified",
]

SAME = 1e-9  # of the largest output, in float64
SAME_EPS = 1e4  # rounding units, in the model's own dtype

Element = Callable[[State], dict[str, Tensor]]
"""A group element: a state in float64 to another one of the same function."""


@dataclass(frozen=True)
class Part:
    """Units that lie in the same places, such as those of one layer.

    Attributes:
        units: How many; of a group that acts on factors, how many matrices or numbers.
        tensors: Names of the parameters and buffers that move with them.
        draw: Makes a random element that acts on them.
        members: Of units that factors multiply: their numbers in the observation.
    """

    units: int
    tensors: tuple[str, ...]
    draw: Callable[[torch.Generator], Element]
    members: tuple[int, ...] = ()


@dataclass(frozen=True)
class Symmetry:
    """A symmetry of one network.

    Attributes:
        name: Of its kind, a key of ``KINDS``.
        parts: What it acts on.
        deviation: How far the outputs moved in the verification, relative; None before it.
        dtype: The dtype of the verification.
    """

    name: str
    parts: tuple[Part, ...]
    deviation: float | None = None
    dtype: torch.dtype = torch.float64

    @property
    def units(self) -> int:
        """How many hidden units it acts on; matrices or numbers where it has no units."""
        return sum(part.units for part in self.parts)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the parameters and buffers that it moves."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.tensors))

    def element(self, generator: torch.Generator) -> Element:
        """Return a random element that acts on all parts at once."""
        return _all([part.draw(generator) for part in self.parts])


def _all(elements: list[Element]) -> Element:
    def act(state: State) -> dict[str, Tensor]:
        moved = dict(state)
        for element in elements:
            moved = element(moved)
        return moved

    return act


@dataclass
class Observation:
    """What one forward pass has shown; kinds ask it for units, or for pairs of factors.

    Attributes:
        objective: The model, loss and data.
        tape: The operations of the pass.
        state: The tensors that stood for parameters and buffers in it.
        outputs: What must not change.
    """

    objective: Objective
    tape: Tape
    state: State
    outputs: list[Tensor]
    _units: dict[Mode, Units] = field(default_factory=dict)

    @classmethod
    def of(cls, objective: Objective, state: State) -> Observation:
        """Watch the model run once at a state, on two examples."""
        return cls(objective, *trace(objective, state, Tape))

    def units(self, mode: Mode) -> Units:
        """Return the units under factors or renumbering."""
        if mode not in self._units:
            self._units[mode] = follow(self.tape, self.state, self.outputs, mode)
        return self._units[mode]

    @cached_property
    def pairs(self) -> tuple[FactorPair, ...]:
        """The pairs of factors that layouts find, whichever parameters are in theta."""
        return find_pairs(with_all_parameters(self.objective)).pairs


Finder = Callable[[Observation], list[Part]]

KINDS: dict[str, Finder] = {}
"""The kinds by name; those that claims speak of have the names of their symmetries."""


def kind(name: str) -> Callable[[Finder], Finder]:
    """Register what finds the parts of a kind of symmetry."""

    def note(finder: Finder) -> Finder:
        KINDS[name] = finder
        return finder

    return note


def find_symmetries(objective: Objective, kinds: tuple[str, ...] | None = None) -> list[Symmetry]:
    """Return the symmetries of an objective's network that were verified.

    Args:
        objective: The model, loss and data.
        kinds: Names among ``KINDS``; default all.
    """
    state = state_of(objective)
    seen = Observation.of(objective, state)
    chosen = [name for name in KINDS if kinds is None or name in kinds]
    found = [Symmetry(name, tuple(KINDS[name](seen))) for name in chosen]
    return [s for guess in found if guess.parts and (s := verified(objective, guess, state))]


def verified(
    objective: Objective, symmetry: Symmetry, state: State | None = None, *, seed: int = 0
) -> Symmetry | None:
    """Return a symmetry with the parts that leave all outputs unchanged; None without any.

    A random element is applied and the outputs on all the data are compared, in float64 where
    the model can be run so. If they moved, each part is tried alone and dropped with a warning
    if it is not exact.

    Args:
        objective: The model, loss and data.
        symmetry: A guess.
        state: Where; default the objective's.
        seed: Of the element.
    """
    state = state_of(objective) if state is None else state

    def moves(parts: tuple[Part, ...]) -> tuple[bool, float, torch.dtype]:
        element = replace(symmetry, parts=parts).element(_generator(seed))
        gap, dtype = deviation(objective, state, element(state))
        return not gap <= rounding_of(dtype), gap, dtype

    parts = symmetry.parts
    wrong, gap, dtype = moves(parts)
    if wrong:
        parts = tuple(part for part in parts if not moves((part,))[0])
        dropped = [part for part in symmetry.parts if part not in parts]
        if parts:
            wrong, gap, dtype = moves(parts)
        names = ", ".join(name for part in dropped for name in part.tensors[:1]) or "them together"
        warnings.warn(
            f"{symmetry.name} of {names} changes the outputs and is left out: the network does"
            " something there that one pass over two examples does not show.",
            SharpkitWarning,
            stacklevel=2,
        )
    if wrong or not parts:
        return None
    return replace(symmetry, parts=parts, deviation=gap, dtype=dtype)


def rounding_of(dtype: torch.dtype) -> float:
    """Return how far outputs may move, relative, when they are compared in a dtype."""
    return SAME if dtype == torch.float64 else SAME_EPS * torch.finfo(dtype).eps


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)
