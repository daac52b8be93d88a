r"""Two factors of a product, or a tangent vector of them, and the group that acts on both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sharpkit.errors import MeasureError, ShapeError

__all__ = ["Pair", "check_point", "check_vector"]


class Pair(NamedTuple):
    r"""Factors :math:`(G, H)` of :math:`X = GH^\top`, a tangent vector, or a gradient.

    A named tuple, so that ``torch.func`` and ``torch.autograd.grad`` take it as it is.

    Args:
        G: ``[..., n, h]``; the leading axes are heads, layers, samples.
        H: ``[..., m, h]``, the same leading axes.

    Example:
        >>> pair = Pair(torch.ones(3, 1), torch.ones(2, 1))
        >>> moved = pair.act(torch.tensor([[4.0]]))
        >>> moved.G[0].item(), moved.H[0].item(), moved.product()[0, 0].item()
        (0.25, 4.0, 1.0)
    """

    G: Tensor
    H: Tensor

    def product(self) -> Tensor:
        r"""Return :math:`GH^\top`, ``[..., n, m]``; cost ``n m h`` a head."""
        return self.G @ self.H.mT

    def act(self, element: Tensor, inverse: Tensor | None = None) -> Pair:
        r"""Return :math:`(GA^{-1}, HA^\top)`: a point or a tangent vector, moved by A.

        Args:
            element: A, ``[..., h, h]``.
            inverse: Its inverse, if known.
        """
        if inverse is None:
            return Pair(torch.linalg.solve(element, self.G, left=False), self.H @ element.mT)
        return Pair(self.G @ inverse, self.H @ element.mT)

    def act_dual(self, element: Tensor, inverse: Tensor | None = None) -> Pair:
        r"""Return :math:`(E_GA^\top, E_HA^{-1})`: a Euclidean gradient, moved by A.

        A gradient and a tangent vector that are moved together keep their product.
        """
        if inverse is None:
            return Pair(self.G @ element.mT, torch.linalg.solve(element, self.H, left=False))
        return Pair(self.G @ element.mT, self.H @ inverse)

    def plus(self, other: Pair, factor: float | Tensor = 1.0) -> Pair:
        """Return ``self + factor * other``; a tensor ``[...]`` has one factor a head."""
        scaled = other.times(factor)
        return Pair(self.G + scaled.G, self.H + scaled.H)

    def times(self, factor: float | Tensor) -> Pair:
        """Return ``factor * self``; a tensor ``[...]`` has one factor a head."""
        if isinstance(factor, Tensor):
            factor = factor[..., None, None]
        return Pair(factor * self.G, factor * self.H)

    def dot(self, other: Pair) -> Tensor:
        """Return the plain Euclidean inner product ``[...]``, which GL(h) does not keep."""
        return (self.G * other.G).sum((-2, -1)) + (self.H * other.H).sum((-2, -1))

    def detach(self) -> Pair:
        """Return the same values without a graph."""
        return Pair(self.G.detach(), self.H.detach())


def check_point(pair: Pair) -> None:
    """Raise unless the pair can be a point: tall finite factors of one kind.

    Raises:
        ShapeError: If the shapes do not match, or a factor is wider than tall.
        MeasureError: If the dtypes or devices differ or do not fit, or a number is not finite.
    """
    G, H = pair
    if G.ndim < 2 or H.ndim < 2 or G.shape[:-2] != H.shape[:-2] or G.shape[-1] != H.shape[-1]:
        raise ShapeError(
            f"Expected factors of shapes [..., n, h] and [..., m, h]. Got {list(G.shape)} and "
            f"{list(H.shape)}. Give both the same leading axes and the same last axis."
        )
    if min(G.shape[-2], H.shape[-2]) < G.shape[-1] or G.shape[-1] == 0:
        raise ShapeError(
            f"Expected factors at least as tall as wide, and not empty. Got {list(G.shape)} and "
            f"{list(H.shape)}. Without full column rank no element of GL(h) is free."
        )
    if G.dtype != H.dtype or G.dtype not in (torch.float32, torch.float64):
        raise MeasureError(
            f"Expected both factors in float32 or both in float64. Got {G.dtype} and {H.dtype}. "
            "Convert them."
        )
    if G.device != H.device:
        raise MeasureError(
            f"Expected both factors on one device. Got {G.device} and {H.device}. Move one."
        )
    if not bool(torch.isfinite(G).all() & torch.isfinite(H).all()):
        raise MeasureError(
            "Expected finite factors. Got an infinite entry or NaN. Check the parameters."
        )


def check_vector(pair: Pair, vector: Pair) -> None:
    """Raise unless a tangent vector or gradient has the shapes of its point.

    More leading axes, such as one for samples, are allowed in front of the point's.

    Raises:
        ShapeError: If they do not match.
    """
    for at, v in zip(pair, vector, strict=True):
        if v.ndim < at.ndim or v.shape[v.ndim - at.ndim :] != at.shape:
            raise ShapeError(
                f"Expected a vector of shapes [..., *{list(pair.G.shape)}] and "
                f"[..., *{list(pair.H.shape)}]. Got {list(vector.G.shape)} and "
                f"{list(vector.H.shape)}. Give it the shapes of the point."
            )
    if vector.G.shape[:-2] != vector.H.shape[:-2]:
        raise ShapeError(
            f"Expected the same leading axes in both parts of a vector. Got "
            f"{list(vector.G.shape)} and {list(vector.H.shape)}. Repeat one of them."
        )
