"""Lists of tensors read as one long vector: norm, inner product, linear combinations.

Sums are taken in float32 at least, in float64 for float64 tensors, and stay on the device:
nothing here waits for it. Tensors on several devices meet on the first one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ray", "add", "dot", "norm", "on_host", "ray", "scale", "scale_", "unit"]


def _sum_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.promote_types(torch.float32, _widest(tensors))


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all entries as a scalar tensor; ``tensors`` is not empty."""
    dtype, device = _sum_dtype(tensors), tensors[0].device
    parts = torch._foreach_norm(list(tensors), 2, dtype=dtype)
    total: Tensor = torch.linalg.vector_norm(torch.stack([part.to(device) for part in parts]))
    return total


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product as a scalar tensor; the lists have the same shapes."""
    dtype, device = _sum_dtype([*left, *right]), left[0].device
    parts = [(a.to(dtype) * b.to(dtype)).sum().to(device) for a, b in zip(left, right, strict=True)]
    return torch.stack(parts).sum()


def scale(tensors: Sequence[Tensor], factor: Tensor | float) -> list[Tensor]:
    """Return ``factor * tensors`` in new tensors of the same dtypes and devices."""
    if not isinstance(factor, Tensor):
        return list(torch._foreach_mul(list(tensors), factor))
    if all(tensor.device == factor.device for tensor in tensors):
        return _as(tensors, torch._foreach_mul(list(tensors), factor))
    return _as(tensors, [tensor * factor.to(tensor.device) for tensor in tensors])


def scale_(tensors: list[Tensor], factor: Tensor | float) -> list[Tensor]:
    """Multiply the tensors in place, and return them."""
    if isinstance(factor, Tensor) and any(t.device != factor.device for t in tensors):
        for tensor in tensors:
            tensor.mul_(factor.to(tensor.device))
    else:
        torch._foreach_mul_(tensors, factor)
    return tensors


def add(
    left: Sequence[Tensor], right: Sequence[Tensor], factor: Tensor | float = 1.0
) -> list[Tensor]:
    """Return ``left + factor * right`` in new tensors."""
    if not isinstance(factor, Tensor):
        return list(torch._foreach_add(list(left), list(right), alpha=factor))
    if on_host(*left, *right, factor):
        return list(torch._foreach_addcmul(list(left), list(right), [factor] * len(left)))
    return list(torch._foreach_add(scale(right, factor), list(left)))


def on_host(*tensors: Tensor) -> bool:
    """Return whether all are on the CPU, where one pass over the memory costs more than a call.

    On an accelerator it is the other way round: two operations on all tensors together take
    two launches, a fused one that ``torch._foreach`` takes apart one for every tensor.
    """
    return all(tensor.device.type == "cpu" for tensor in tensors)


@dataclass(frozen=True)
class Ray:
    """Tensors over one divisor, a scalar tensor: a perturbation that is not written out."""

    tensors: Sequence[Tensor]
    divisor: Tensor

    def write(self) -> list[Tensor]:
        """Return the quotients in new tensors."""
        if all(tensor.device == self.divisor.device for tensor in self.tensors):
            return _as(self.tensors, torch._foreach_div(list(self.tensors), self.divisor))
        divided = [tensor / self.divisor.to(tensor.device) for tensor in self.tensors]
        return _as(self.tensors, divided)


def ray(tensors: Sequence[Tensor], length: Tensor | None = None, size: float = 1.0) -> Ray:
    """Return ``size`` times the tensors over ``length`` (their norm); zeros where that is zero.

    A length that is not finite gives NaN in every entry, so that it cannot pass unseen.
    """
    length = norm(tensors) if length is None else length
    divisor = torch.where(length == 0, torch.inf, length)
    divisor = torch.where(torch.isfinite(length), divisor, torch.nan)
    return Ray(tensors, divisor / size)  # without a size it is infinite


def unit(
    tensors: Sequence[Tensor], length: Tensor | None = None, size: float = 1.0
) -> list[Tensor]:
    """Return what `ray` says, written out."""
    return ray(tensors, length, size).write()


def _as(tensors: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
    """Return results in the dtypes of tensors: a scalar by a wider scalar is wider."""
    return [result.to(tensor.dtype) for tensor, result in zip(tensors, results, strict=True)]
