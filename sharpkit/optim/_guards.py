"""What the second pass must not leave behind: buffers of the model and random states."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["BufferGuard", "RandomState", "StatisticsWatch", "kept_buffers"]


class BufferGuard:
    """The buffers of a model as they are now.

    All buffers are kept, not those of known layers only: the running statistics of every norm
    layer, their counters (which matter when ``momentum=None``), the vectors of spectral norm,
    the ranges of quantization observers.
    """

    def __init__(self, model: nn.Module | None) -> None:
        modules = [] if model is None else model.modules()
        self._kept = [
            (module, name, buffer, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None and not _repeats(buffer)
        ]

    @torch.no_grad()
    def undo(self) -> None:
        """Put the buffers back, the same tensors with the same values."""
        for module, name, buffer, value in self._kept:
            buffer.detach().copy_(value)
            module._buffers[name] = buffer


def _repeats(buffer: Tensor) -> bool:
    """Return whether entries share memory (``expand``), which nothing can write in place."""
    if buffer.layout != torch.strided:
        return False
    return any(n > 1 and step == 0 for n, step in zip(buffer.shape, buffer.stride(), strict=True))


@contextmanager
def kept_buffers(model: nn.Module | None) -> Iterator[None]:
    """Leave the buffers of ``model`` as they were, also after an exception."""
    guard = BufferGuard(model)
    try:
        yield
    finally:
        guard.undo()


class RandomState:
    """The state of torch's global generators: the CPU's, and those of the parameters' devices."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        devices = {p.device for p in parameters if p.device.type in ("cuda", "xpu")}
        self._others = [
            (getattr(torch, device.type), device, getattr(torch, device.type).get_rng_state(device))
            for device in sorted(devices, key=str)
        ]
        mps = any(p.device.type == "mps" for p in parameters)
        self._mps = torch.mps.get_rng_state() if mps else None

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self._cpu)
        for backend, device, state in self._others:
            backend.set_rng_state(state, device)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)


class StatisticsWatch:
    """Notices layers with running statistics that run in training mode while it is on.

    It ends when `stop` is called, or when nobody holds it any more.
    """

    def __init__(self) -> None:
        self.seen: str | None = None
        me = weakref.ref(self)

        def look(module: nn.Module, _: object) -> None:
            watch = me()
            if watch and module.training and module._buffers.get("running_mean") is not None:
                watch.seen = type(module).__name__

        handle = nn.modules.module.register_module_forward_pre_hook(look)
        self.stop = weakref.finalize(self, handle.remove)
        """Stop watching."""
