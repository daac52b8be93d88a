"""Where a perturbation goes: whole parameters, or the rows that a sparse gradient names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit.optim._tensors import Ray, on_host

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

    def __init__(self, slots: Sequence[Slot], room: dict[Tensor, Tensor] | None = None) -> None:
        """Keep the values of ``slots``; `move` changes them, so that `undo` is there before.

        Args:
            slots: What is to move.
            room: Memory for the copies, kept from step to step.
        """
        room = {} if room is None else room
        self._kinds = [slot.rows is None for slot in slots]
        whole = [slot.parameter for slot in slots if slot.rows is None]
        self._whole = [parameter.detach() for parameter in whole]
        self._saved = [_room_for(parameter, room) for parameter in whole]
        if whole:
            torch._foreach_copy_(self._saved, self._whole)
        self._rows = [(s.parameter.detach(), s.rows, s.point) for s in slots if s.rows is not None]

    def move(self, delta: Sequence[Tensor] | Ray) -> None:
        """Move the parameters by ``delta``, one for every slot."""
        steps = delta.tensors if isinstance(delta, Ray) else delta
        whole = [d for d, is_whole in zip(steps, self._kinds, strict=True) if is_whole]
        rows = [d for d, is_whole in zip(steps, self._kinds, strict=True) if not is_whole]
        if whole:
            _move(self._whole, whole, delta)
        for (weights, where, saved), d in zip(self._rows, rows, strict=True):
            point = saved.clone()
            _move([point], [d], delta)
            weights[where] = point

    def undo(self) -> None:
        """Put the old values back."""
        if self._whole:
            torch._foreach_copy_(self._whole, self._saved)
        for weights, rows, saved in self._rows:
            weights[rows] = saved


def _room_for(parameter: Tensor, room: dict[Tensor, Tensor]) -> Tensor:
    """Return memory of the shape of a parameter, on the CPU the same in every step.

    There new memory costs more than the copy; accelerators have allocators of their own.
    """
    known = room.get(parameter)
    wanted = parameter.shape, parameter.dtype, parameter.device
    if known is not None and (known.shape, known.dtype, known.device) == wanted:
        return known
    new = torch.empty_like(parameter, requires_grad=False)
    if new.device.type == "cpu":
        room[parameter] = new
    return new


def _move(weights: list[Tensor], steps: list[Tensor], delta: Sequence[Tensor] | Ray) -> None:
    """Add ``steps`` to ``weights``, over the divisor of ``delta`` if it has one."""
    if not isinstance(delta, Ray):
        torch._foreach_add_(weights, steps)
    elif on_host(*weights, delta.divisor):
        torch._foreach_addcdiv_(weights, steps, [delta.divisor] * len(steps))
    else:
        torch._foreach_add_(weights, Ray(steps, delta.divisor).write())
