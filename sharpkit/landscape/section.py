"""What a slice is taken of: a line, a plane or a curve in the space of the parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sharpkit.errors import MeasureError, SettingsError, ShapeError

__all__ = ["Axis", "Direction", "Section", "StraightSection"]


@dataclass(frozen=True)
class Axis:
    """One axis of a slice, without the vector: all that a caption needs.

    Attributes:
        kind: ``"filter"``, ``"eigen"``, ``"gradient"``, ...
        label: What a reader sees at the axis, units included.
        step: Length in theta of one unit, ``||theta(1) - theta(0)||``.
        seed: Of a random direction.
        details: What else matters: eigenvalue, residual, norm, names left out (JSON-able).
    """

    kind: str
    label: str
    step: float
    seed: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Direction:
    """A direction to look along: position x is ``theta + x * step * vector``.

    Attributes:
        vector: ``[P]``, as it was found: never rescaled.
        kind: As for :class:`Axis`.
        label: Likewise.
        step: How far along the vector x = 1 is.
        seed: Of a random draw.
        details: As for :class:`Axis`.
        notes: Sentences for a person.

    Example:
        >>> d = Direction(torch.tensor([3.0, 4.0]), "tensor", "multiples of d", step=2.0)
        >>> d.axis.step
        10.0
    """

    vector: Tensor = field(repr=False)
    kind: str
    label: str
    step: float = 1.0
    seed: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def unit(self) -> Tensor:
        """What x = 1 adds to theta, ``[P]``."""
        return self.step * self.vector

    @property
    def axis(self) -> Axis:
        """The same without the vector."""
        length = abs(self.step) * float(self.vector.double().norm())
        return Axis(self.kind, self.label, length, self.seed, dict(self.details))


class Section(Protocol):
    """A map from one or two coordinates to parameters.

    Attributes:
        axes: One or two.
        notes: Sentences for a person.
    """

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What each coordinate is."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for a person."""

    def point(self, coordinates: Sequence[float]) -> Tensor | None:
        """Return theta ``[P]`` there; None where the section has no such point."""

    def units(self) -> tuple[Tensor, ...] | None:
        """Return what each coordinate adds to theta; None if the section is not straight."""


class StraightSection:
    r"""A line or a plane: :math:`\theta_0 + \sum_i x_i s_i d_i`.

    Args:
        origin: :math:`\theta_0`, ``[P]``.
        directions: One or two.

    Raises:
        SettingsError: If there are none, or more than two.
        ShapeError: If a direction does not have the shape of the origin.
        MeasureError: If a direction is zero or not finite, or two are parallel.

    Example:
        >>> d = Direction(torch.tensor([0.0, 1.0]), "tensor", "multiples of d")
        >>> StraightSection(torch.zeros(2), [d]).point([0.5])
        tensor([0.0000, 0.5000])
    """

    def __init__(self, origin: Tensor, directions: Sequence[Direction]):
        self.origin = origin.detach()
        self.directions = tuple(directions)
        self._row: tuple[float, Tensor] | None = None
        if not 1 <= len(self.directions) <= 2:
            raise SettingsError(f"Expected one or two directions. Got {len(self.directions)}.")
        for direction in self.directions:
            _check(direction, self.origin)
        if len(self.directions) == 2:
            first, second = (d.vector.double() for d in self.directions)
            cosine = float(first @ second / (first.norm() * second.norm()))
            if not 1 - abs(cosine) > 1e-6:
                raise MeasureError(
                    "Expected two directions that span a plane. These are parallel (cosine"
                    f" {cosine:.8f}). Take another seed, or orthogonalised ones."
                )
            self.cosine: float | None = cosine
        else:
            self.cosine = None

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What each coordinate is."""
        return tuple(d.axis for d in self.directions)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the directions say."""
        return tuple(dict.fromkeys(n for d in self.directions for n in d.notes))

    def units(self) -> tuple[Tensor, ...]:
        """Return what each coordinate adds to theta."""
        return tuple(d.unit for d in self.directions)

    def point(self, coordinates: Sequence[float]) -> Tensor:
        """Return theta ``[P]`` at these coordinates."""
        x, *rest = (float(c) * d.step for c, d in zip(coordinates, self.directions, strict=True))
        if self._row is None or self._row[0] != x:  # the same for all points of a row
            self._row = (x, torch.add(self.origin, self.directions[0].vector, alpha=x))
        if not rest:
            return self._row[1].clone()
        return torch.add(self._row[1], self.directions[1].vector, alpha=rest[0])

    def coordinates(self, theta: Tensor) -> tuple[tuple[float, ...], float]:
        """Return the nearest point's coordinates (least squares), and the distance to it.

        Args:
            theta: Parameters ``[P]``, such as a checkpoint's.
        """
        basis = torch.stack([u.double() for u in self.units()], dim=1)
        offset = theta.detach().double() - self.origin.double()
        solution = torch.linalg.lstsq(basis, offset[:, None]).solution[:, 0]
        distance = float((offset - basis @ solution).norm())
        return tuple(solution.tolist()), distance


def _check(direction: Direction, origin: Tensor) -> None:
    if direction.vector.shape != origin.shape:
        raise ShapeError(
            f"Expected a direction of shape {tuple(origin.shape)}, the parameters'. Got"
            f" {tuple(direction.vector.shape)}."
        )
    length = abs(direction.step) * float(direction.vector.double().norm())
    if not (length > 0 and math.isfinite(length)):
        raise MeasureError(
            f"Expected a direction of positive, finite length. The {direction.kind} direction"
            f" has {length:g}."
        )
