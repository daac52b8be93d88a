"""Where a perturbation goes: whole parameters, or the rows that a sparse gradient names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Displacement", "Slot", "slots_of"]


@dataclass(frozen=True)
class Slot:
    """One parameter with a gradient; ``rows`` are the indices of a sparse one, else None."""

    parameter: Tensor
    rows: tuple[Tensor, ...] | None
    gradient: Tensor

    @property
    def point(self) -> Tensor:
        """The entries that the gradient belongs to, in its shape: a view, or a copy of rows."""
        weights = self.parameter.detach()
        return weights if self.rows is None else weights[self.rows]


def slots_of(parameters: Iterable[Tensor]) -> list[Slot]:
    """Return a slot for every parameter that has a gradient."""
    slots = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows = tuple(gradient.indices())
            slots.append(Slot(parameter, rows, gradient.values()))
        else:
            slots.append(Slot(parameter, None, gradient.detach()))
    return slots


class Displacement:
    """Parameters moved by a perturbation, with what is needed to put them back bit for bit.

    The old values are copied, not recomputed: ``(w + d) - d`` is not ``w`` in floating point.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        """Keep the values of ``slots``; `move` changes them, so that `undo` is there before."""
        self._kinds = [slot.rows is None for slot in slots]
        self._whole = [slot.parameter.detach() for slot in slots if slot.rows is None]
        self._saved = [weights.clone() for weights in self._whole]
        self._rows = [(s.parameter.detach(), s.rows, s.point) for s in slots if s.rows is not None]

    def move(self, delta: Sequence[Tensor]) -> None:
        """Move the parameters by ``delta``, one for every slot."""
        whole = [d for d, is_whole in zip(delta, self._kinds, strict=True) if is_whole]
        rows = [d for d, is_whole in zip(delta, self._kinds, strict=True) if not is_whole]
        if whole:
            torch._foreach_add_(self._whole, whole)
        for (weights, where, saved), d in zip(self._rows, rows, strict=True):
            weights[where] = saved + d

    def undo(self) -> None:
        """Put the old values back."""
        if self._whole:
            torch._foreach_copy_(self._whole, self._saved)
        for weights, rows, saved in self._rows:
            weights[rows] = saved
