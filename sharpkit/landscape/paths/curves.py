"""Paths from one minimum to another: a segment, a Bezier curve, a chain of segments."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from sharpkit.errors import MeasureError, SettingsError, ShapeError
from sharpkit.landscape.section import Axis

__all__ = ["BezierPath", "Path", "PolychainPath", "SegmentPath"]


class Path(ABC):
    r"""A curve between two ends that is linear in its control points.

    .. math:: \phi(t) = \sum_i w_i(t)\,c_i,\qquad t \in [0, 1],\quad \sum_i w_i(t) = 1

    with :math:`\phi(0) = c_0` and :math:`\phi(1) = c_{n-1}`, the ends. The points between are
    the bends. The gradient of a loss along the curve by a bend is :math:`w_i(t)\,g(\phi(t))`.

    A path is a :class:`~sharpkit.landscape.section.Section` with one axis, t.

    Args:
        points: Control points, each ``[P]``, of one dtype and device; at least two.

    Raises:
        ShapeError: If the points do not have one shape ``[P]``.
        SettingsError: If there are fewer than two.
        MeasureError: If one is not finite, or their dtypes or devices differ.
    """

    kind = "path"

    def __init__(self, points: Sequence[Tensor]):
        self.points = tuple(p.detach().clone() for p in points)
        if len(self.points) < 2:
            raise SettingsError(
                f"Expected at least two control points, the ends. Got {len(self.points)}."
            )
        first = self.points[0]
        for point in self.points:
            if point.ndim != 1 or point.shape != first.shape:
                raise ShapeError(
                    f"Expected control points of one shape [P]. Got {tuple(first.shape)} and"
                    f" {tuple(point.shape)}."
                )
            if point.dtype != first.dtype or point.device != first.device:
                raise MeasureError(
                    "Expected control points of one dtype on one device. Got"
                    f" {first.dtype} on {first.device} and {point.dtype} on {point.device}."
                    " Convert one."
                )
            if not bool(torch.isfinite(point).all()):
                raise MeasureError(
                    "Expected finite parameters. Got an infinite entry or NaN. Check the ends."
                )

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The first and the last point, ``[P]`` each."""
        return self.points[0], self.points[-1]

    @property
    def bends(self) -> tuple[Tensor, ...]:
        """The control points between the ends."""
        return self.points[1:-1]

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """One: t, whose unit is the distance of the ends."""
        distance = float((self.points[-1].double() - self.points[0].double()).norm())
        details = {"bends": len(self.bends), "length": self.length()}
        return (Axis(self.kind, "position t from A to B", distance, details=details),)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for a person."""
        return ()

    @abstractmethod
    def weights(self, t: float) -> tuple[float, ...]:
        """Return the share :math:`w_i(t)` of each control point."""

    def point(self, coordinates: Sequence[float]) -> Tensor | None:
        r"""Return :math:`\phi(t)`, ``[P]``; None for t outside [0, 1], where no path is."""
        (t,) = coordinates
        if not 0 <= t <= 1:
            return None
        theta = torch.zeros_like(self.points[0])
        for weight, point in zip(self.weights(float(t)), self.points, strict=True):
            if weight != 0:  # so that the ends are exact
                theta += weight * point
        return theta

    def units(self) -> tuple[Tensor, ...] | None:
        """Return what t adds to theta if the path is straight, otherwise None."""
        return None

    def length(self, pieces: int = 64) -> float:
        """Return the length of the curve, by so many chords (too short rather than too long)."""
        marks = {i / pieces for i in range(pieces + 1)} | set(self._corners())
        total, before = 0.0, self.points[0].double()
        for t in sorted(marks)[1:]:
            here = self.point([t])
            assert here is not None
            total += float((here.double() - before).norm())
            before = here.double()
        return total

    def _corners(self) -> Sequence[float]:
        return ()


class SegmentPath(Path):
    r"""The straight line :math:`(1 - t)\,\theta_A + t\,\theta_B`.

    Args:
        theta_a: One end, ``[P]``.
        theta_b: The other.

    Raises:
        ShapeError: If the ends do not have one shape ``[P]``.
        MeasureError: If an end is not finite, or dtypes or devices differ.

    Example:
        >>> path = SegmentPath(torch.zeros(2), torch.tensor([3.0, 4.0]))
        >>> path.point([0.5]).tolist(), path.axes[0].step
        ([1.5, 2.0], 5.0)
    """

    kind = "segment"

    def __init__(self, theta_a: Tensor, theta_b: Tensor):
        super().__init__((theta_a, theta_b))

    def weights(self, t: float) -> tuple[float, ...]:
        """Return ``(1 - t, t)``."""
        return 1 - t, t

    def units(self) -> tuple[Tensor, ...]:
        """Return the difference of the ends."""
        return (self.points[1] - self.points[0],)

    def length(self, pieces: int = 64) -> float:
        """Return the distance of the ends."""
        del pieces
        return float((self.points[1].double() - self.points[0].double()).norm())


class BezierPath(Path):
    r"""A Bezier curve of degree n with n + 1 control points.

    .. math:: \phi(t) = \sum_{i=0}^{n} \binom{n}{i}\,(1 - t)^{n-i}\,t^i\,c_i

    With one bend it is the curve of Garipov et al.,
    :math:`(1-t)^2\theta_A + 2t(1-t)\,c + t^2\theta_B`.

    Args:
        theta_a: One end, ``[P]``.
        bends: The control points between, one at least; the curve does not go through them.
        theta_b: The other end.

    Raises:
        SettingsError: If there is no bend.
        ShapeError: If the points do not have one shape ``[P]``.
        MeasureError: If a point is not finite, or dtypes or devices differ.

    Reference: arXiv:1802.10026.

    Example:
        >>> a, c, b = torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([0.0])
        >>> BezierPath(a, [c], b).point([0.5]).tolist()
        [0.5]
    """

    kind = "bezier"

    def __init__(self, theta_a: Tensor, bends: Sequence[Tensor], theta_b: Tensor):
        _check_bends(bends)
        super().__init__((theta_a, *bends, theta_b))

    def weights(self, t: float) -> tuple[float, ...]:
        """Return the Bernstein polynomials at t."""
        n = len(self.points) - 1
        return tuple(math.comb(n, i) * (1 - t) ** (n - i) * t**i for i in range(n + 1))


class PolychainPath(Path):
    r"""Segments from point to point, each taking the same share of t.

    .. math:: \phi(t) = (1 - s)\,c_k + s\,c_{k+1},\qquad k + s = n t,\quad s \in [0, 1]

    with n segments. The curve goes through its bends.

    Args:
        theta_a: One end, ``[P]``.
        bends: The corners between, one at least.
        theta_b: The other end.

    Raises:
        SettingsError: If there is no bend.
        ShapeError: If the points do not have one shape ``[P]``.
        MeasureError: If a point is not finite, or dtypes or devices differ.

    Reference: arXiv:1802.10026.

    Example:
        >>> a, c, b = torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([0.0])
        >>> [PolychainPath(a, [c], b).point([t]).item() for t in (0.25, 0.5, 1.0)]
        [0.5, 1.0, 0.0]
    """

    kind = "polychain"

    def __init__(self, theta_a: Tensor, bends: Sequence[Tensor], theta_b: Tensor):
        _check_bends(bends)
        super().__init__((theta_a, *bends, theta_b))

    def weights(self, t: float) -> tuple[float, ...]:
        """Return the shares of the two corners beside t; zero for the others."""
        n = len(self.points) - 1
        k = min(int(n * t), n - 1)
        shares = [0.0] * (n + 1)
        shares[k], shares[k + 1] = 1 - (n * t - k), n * t - k
        return tuple(shares)

    def _corners(self) -> Sequence[float]:
        n = len(self.points) - 1
        return [i / n for i in range(n + 1)]


def _check_bends(bends: Sequence[Tensor]) -> None:
    if not len(bends):
        raise SettingsError(
            "Expected at least one bend. Got none. Take a SegmentPath for a straight line."
        )
