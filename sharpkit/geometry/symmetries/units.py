"""Hidden units of a network, and which entries of which parameters belong to each.

A unit is a variable that may be multiplied by a factor (or exchanged with another one). Every
tensor of the forward pass has units along at most one of its axes. An operation either hands
them on, ties units of two tensors to each other (a residual sum), reads them with a weight,
or writes new ones. What is not known to keep them fixes them: nothing may happen to a unit
that a softmax, or the loss, has seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["FIXED", "Label", "Mode", "ParameterView", "Role", "Touch", "Units", "spread"]

FIXED = 0

Mode: TypeAlias = Literal["scale", "permute"]
Role: TypeAlias = Literal["write", "read", "mean", "variance", "index"]


@dataclass(frozen=True)
class Label:
    """The units of a tensor along one axis; along the others all entries share them."""

    axis: int
    ids: np.ndarray


@dataclass(frozen=True)
class ParameterView:
    """A parameter seen through views: ``axes[i]`` is the parameter's axis behind axis i.

    Attributes:
        name: Of the parameter.
        axes: None where the view's axis is new or of length 1.
    """

    name: str
    axes: tuple[int | None, ...]


@dataclass(frozen=True)
class Touch:
    """Entries of a parameter or buffer along one axis, and the units they belong to.

    Attributes:
        name: Of the tensor.
        axis: The axis.
        role: ``"write"``: they grow with the unit, ``"read"``: they shrink with it,
            ``"mean"`` and ``"variance"``: running statistics of it, ``"index"``: they are
            numbered by it.
        ids: A unit for each entry.
        eps: What is added to a variance.
    """

    name: str
    axis: int
    role: Role
    ids: np.ndarray
    eps: float = 0.0


class Units:
    """Units, which of them are one, and what they touch."""

    def __init__(self, mode: Mode, state: Mapping[str, Tensor]):
        self.mode: Mode = mode
        self._parent: list[int] = [FIXED]
        self._labels: dict[int, Label] = {}
        self._views: dict[int, ParameterView] = {
            id(t): ParameterView(n, tuple(range(t.ndim))) for n, t in state.items()
        }
        self._touches: dict[str, dict[tuple[int, Role], Touch]] = {}
        self._opaque: set[str] = set()

    @property
    def written(self) -> Role:
        """The role of entries that produce units."""
        return "write" if self.mode == "scale" else "index"

    # -- units -----------------------------------------------------------------------

    def fresh(self, count: int) -> np.ndarray:
        """Return so many new units."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, unit: int) -> int:
        """Return the unit that stands for all that are one with this."""
        path = []
        while self._parent[unit] != unit:
            path.append(unit)
            unit = self._parent[unit]
        for passed in path:
            self._parent[passed] = unit
        return unit

    def roots(self, ids: np.ndarray) -> np.ndarray:
        """Return the root of each unit."""
        return np.array([self.root(int(i)) for i in ids], dtype=int)

    def tie(self, first: Iterable[int], second: Iterable[int]) -> None:
        """Make units one, pair by pair."""
        for a, b in zip(first, second, strict=True):
            x, y = sorted((self.root(int(a)), self.root(int(b))))
            self._parent[y] = x  # the fixed unit is the smallest, and stays a root

    def fix(self, ids: Iterable[int]) -> None:
        """Let nothing happen to these units."""
        for unit in ids:
            self._parent[self.root(int(unit))] = FIXED

    # -- tensors ---------------------------------------------------------------------

    def label(self, tensor: Tensor) -> Label | None:
        """Return the units of a tensor; None if nothing may happen to it."""
        return self._labels.get(id(tensor))

    def set_label(self, tensor: Tensor, label: Label | None) -> None:
        """Say what the units of a tensor are."""
        if label is None:
            self._labels.pop(id(tensor), None)
        else:
            assert tensor.shape[label.axis] == len(label.ids)
            self._labels[id(tensor)] = label

    def view(self, tensor: Tensor) -> ParameterView | None:
        """Return which parameter or buffer a tensor is; None if it is an activation."""
        return self._views.get(id(tensor))

    def set_view(self, tensor: Tensor, view: ParameterView) -> None:
        """Say that a tensor is a view of a parameter."""
        self._views[id(tensor)] = view

    def forget_view(self, tensor: Tensor) -> None:
        """Treat a parameter, seen as this tensor, as an activation."""
        del self._views[id(tensor)]

    def fix_tensor(self, tensor: Tensor) -> None:
        """Let nothing happen to a tensor, be it an activation or a parameter."""
        label, view = self.label(tensor), self.view(tensor)
        if label is not None:
            self.fix(label.ids)
        if view is not None:
            self.use(view.name, [], opaque=True)

    # -- parameters ------------------------------------------------------------------

    def use(self, name: str, touches: Iterable[Touch], *, opaque: bool = False) -> None:
        """Note what one operation does with a parameter.

        A parameter that is used twice must be changed in the same way for both.

        Args:
            name: Of the parameter or buffer.
            touches: Its axes that follow units; along all others nothing may happen.
            opaque: Whether nothing at all may happen to it.
        """
        found = {(t.axis, t.role): t for t in touches}
        known = self._touches.get(name)
        if opaque or name in self._opaque:
            self._opaque.add(name)
            for touch in (*found.values(), *(known or {}).values()):
                self.fix(touch.ids)
            self._touches[name] = {}
            return
        if known is None:
            self._touches[name] = found
            return
        for key in {*known, *found}:
            if key in known and key in found:
                self.tie(known[key].ids, found[key].ids)
            else:
                self.fix((known.get(key) or found[key]).ids)

    def touches(self) -> list[Touch]:
        """Return all touches, units replaced by their roots; those of no free unit left out."""
        every = [t for found in self._touches.values() for t in found.values()]
        rooted = [Touch(t.name, t.axis, t.role, self.roots(t.ids), t.eps) for t in every]
        return [t for t in rooted if (t.ids != FIXED).any()]


def spread(label: Label | None, shape: torch.Size) -> Tensor:
    """Return a unit for every entry of a tensor of this shape."""
    if label is None:
        return torch.zeros(shape, dtype=torch.int64, device="cpu")
    ids = torch.as_tensor(label.ids, device="cpu")
    around = [1] * len(shape)
    around[label.axis] = len(ids)
    return ids.reshape(around).expand(shape).contiguous()
