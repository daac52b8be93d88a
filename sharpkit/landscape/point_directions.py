"""Directions from points: between checkpoints, along a trajectory, tensors of the user's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharpkit.errors import MeasureError, SettingsError
from sharpkit.landscape.result import Marker
from sharpkit.landscape.section import Direction, StraightSection
from sharpkit.parameters import ParameterSpace

__all__ = [
    "Trajectory",
    "between",
    "orthogonalized",
    "tensor_direction",
    "trajectory_plane",
]


def between(
    theta_a: Tensor, theta_b: Tensor, *, label: str = "share of the way from A to B"
) -> Direction:
    """Return the direction from one point to another: x = 0 is A, x = 1 is B.

    Args:
        theta_a: The parameters of A, ``[P]``.
        theta_b: Of B.
        label: What a reader sees at the axis.

    Raises:
        MeasureError: If they are equal, or have other shapes.

    Example:
        >>> between(torch.zeros(2), torch.tensor([3.0, 4.0])).axis.step
        5.0
    """
    if theta_a.shape != theta_b.shape:
        raise MeasureError(
            f"Expected two points with the same parameters. Got shapes {tuple(theta_a.shape)} and"
            f" {tuple(theta_b.shape)}. Select the same parameters of the same architecture."
        )
    vector = theta_b.detach() - theta_a.detach().to(theta_b)
    distance = float(vector.double().norm())
    if not (distance > 0 and math.isfinite(distance)):
        raise MeasureError(f"Expected two different points. Their distance is {distance:g}.")
    return Direction(vector, "between", label, details={"distance": distance})


def tensor_direction(
    vector: Tensor | Mapping[str, Tensor],
    space: ParameterSpace,
    *,
    label: str = "multiples of the direction",
    step: float = 1.0,
) -> Direction:
    """Return a direction of the user's own, as it is.

    Args:
        vector: ``[P]``, or tensors by parameter name.
        space: The parameters.
        label: What a reader sees at the axis: say the unit.
        step: How far along the vector x = 1 is.

    Raises:
        ShapeError: If it does not have the shape of the parameters.

    Example:
        >>> space = ParameterSpace.of({"w": torch.zeros(2)})
        >>> tensor_direction({"w": torch.ones(2)}, space).vector
        tensor([1., 1.])
    """
    flat = vector if isinstance(vector, Tensor) else space.flatten(vector)
    space.check_vector(flat)
    return Direction(flat.detach().to(space.device, space.dtype), "tensor", label, step=step)


def orthogonalized(first: Direction, second: Direction) -> Direction:
    r"""Return the second direction without its part along the first, as long as it was.

    .. math:: d_2' = c\,(d_2 - \hat d_1 \hat d_1^\top d_2), \qquad \|d_2'\| = \|d_2\|

    After it a direction is no longer normalised by filter exactly: the details say by which
    angle it was turned.

    Args:
        first: The one that stays.
        second: The one that is turned.

    Raises:
        MeasureError: If they are parallel.
    """
    d1, d2 = first.vector.double(), second.vector.double()
    unit = d1 / d1.norm()
    rest = d2 - unit * (unit @ d2)
    rest -= unit * (unit @ rest)
    length = d2.norm()
    if not float(rest.norm()) > 1e-6 * float(length):
        raise MeasureError(
            "Expected two directions that are not parallel, to orthogonalise. Take another seed."
        )
    turned = math.degrees(math.asin(min(1.0, abs(float(unit @ d2 / length)))))
    vector = (rest * (length / rest.norm())).to(second.vector)
    details = {**second.details, "turned_degrees": turned}
    return Direction(
        vector, second.kind, second.label, second.step, second.seed, details, second.notes
    )


@dataclass(frozen=True)
class Trajectory:
    """The plane that holds most of a sequence of checkpoints.

    Attributes:
        section: The plane, through the checkpoint ``centre``.
        markers: The checkpoints: coordinates, and how far from the plane each lies.
        explained_variance: Share of the variance of the checkpoints along each axis.
        random_walk: The same for a random walk of as many steps in many dimensions.
        distances: From the plane, of each checkpoint.
        notes: Sentences for a person.
    """

    section: StraightSection
    markers: tuple[Marker, ...]
    explained_variance: tuple[float, ...]
    random_walk: tuple[float, ...]
    distances: tuple[float, ...]
    notes: tuple[str, ...]

    def grid(self, count: int = 51, margin: float = 0.2) -> tuple[np.ndarray, ...]:
        """Return coordinates along each axis that hold all checkpoints.

        The shorter axis has at least half the range of the longer one, so that the plane, whose
        axes are distances, is no thin strip.

        Args:
            count: Points along an axis.
            margin: Beyond the outermost ones, as a share of their range.
        """
        at = np.array([m.coordinates for m in self.markers])
        low, high = at.min(axis=0), at.max(axis=0)
        span = high - low
        least = 0.5 * (1 + 2 * margin) * span.max()
        room = np.maximum(margin * span, (least - span) / 2)
        return tuple(
            np.linspace(a - r, b + r, count) for a, b, r in zip(low, high, room, strict=True)
        )


def trajectory_plane(
    thetas: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    *,
    centre: int = -1,
    axes: int = 2,
) -> Trajectory:
    r"""Return the plane of the first principal components of a sequence of checkpoints.

    .. math:: W = (\theta_i - \bar\theta)_i = U S V^\top, \qquad
        \text{explained}_k = s_k^2 / \sum_j s_j^2

    The rows are centred, as in scikit-learn's PCA and Li et al. (2018), and the plane goes
    through the checkpoint ``centre``; its axes are orthonormal, in units of theta.

    Args:
        thetas: The checkpoints ``[P]`` in order.
        labels: What to call them; default their numbers.
        centre: The one at coordinates 0.
        axes: 1 or 2.

    Raises:
        SettingsError: If there are fewer than ``axes + 1`` checkpoints, or not one label each.
        MeasureError: If they do not span as many dimensions, or are not finite.

    When it misleads: the path of a random walk in many dimensions has a first component with
    6/pi^2 = 61% of the variance too, and draws cosines (Antognini and Sohl-Dickstein 2018,
    arXiv:1806.08805): compare with ``random_walk``. A checkpoint far from the plane has a loss of
    its own that the surface does not show: see ``distances``.

    Cost: ``n^2 P`` multiplications for n checkpoints.

    Example:
        >>> t = torch.tensor([[3.0, 0.0, 0.1], [1.0, 1.0, -0.1], [0.0, 0.0, 0.0]])
        >>> found = trajectory_plane(list(t))
        >>> [round(v, 3) for v in found.explained_variance]
        [0.879, 0.121]
    """
    count = len(thetas)
    if axes not in (1, 2):
        raise SettingsError(f"Expected 1 or 2 axes. Got {axes!r}.")
    if count < axes + 1:
        raise SettingsError(
            f"Expected at least {axes + 1} checkpoints, to draw a trajectory along {axes} axes."
            f" Got {count}."
        )
    if labels is not None and len(labels) != count:
        raise SettingsError(f"Expected a label for each of {count} checkpoints. Got {len(labels)}.")
    names = list(labels) if labels is not None else [str(i) for i in range(count)]
    if len({tuple(t.shape) for t in thetas}) > 1:
        raise MeasureError("Expected checkpoints with the same parameters. Their sizes differ.")
    rows = torch.stack([t.detach().double() for t in thetas])
    if not bool(rows.isfinite().all()):
        raise MeasureError(
            "Expected finite checkpoints. Some hold NaN or infinity. Leave them out."
        )
    origin = thetas[centre].detach()
    rows = rows - rows[centre]  # distances of a trajectory, before the mean is taken off
    centred = rows - rows.mean(dim=0)
    squares, U = torch.linalg.eigh(centred @ centred.T)
    squares, U = squares.flip(0).clamp(min=0), U.flip(1)
    if not float(squares[axes - 1]) > 1e-12 * max(float(squares[0]), 1e-300):
        raise MeasureError(
            f"Expected checkpoints that span {axes} dimensions. They lie on"
            f" {'a point' if not float(squares[0]) > 0 else 'a line'}. Use fewer axes."
        )
    explained = tuple((squares[:axes] / squares.sum()).tolist())
    directions = []
    for k in range(axes):
        vector = centred.T @ (U[:, k] / squares[k].sqrt())
        if float(vector @ rows[0 if centre != 0 else -1]) < 0:
            vector = -vector  # the start is at positive coordinates
        directions.append(
            Direction(
                vector.to(origin),
                kind="trajectory",
                label=f"distance along component {k + 1} ({explained[k]:.0%})",
                details={"explained_variance": explained[k], "checkpoints": count},
            )
        )
    section = StraightSection(origin, directions)
    markers = []
    for name, theta in zip(names, thetas, strict=True):
        at, distance = section.coordinates(theta)
        markers.append(Marker(name, at, distance))
    walk = _random_walk(count, axes)
    share = ", ".join(f"{e:.0%}" for e in explained)
    notes = (
        f"The plane holds {sum(explained):.0%} of the variance of {count} checkpoints ({share});"
        f" of a random walk as long it would hold {sum(walk):.0%}.",
        f"The checkpoints lie up to {max(m.distance for m in markers):.3g} from the plane"
        f" (||theta|| at the centre is {float(origin.norm()):.3g}).",
    )
    return Trajectory(
        section, tuple(markers), explained, walk, tuple(m.distance for m in markers), notes
    )


def _random_walk(count: int, axes: int) -> tuple[float, ...]:
    # Many dimensions: the rows' inner products are min(i, j), whose centred matrix has these
    # shares of its trace.
    index = np.arange(1, count + 1, dtype=float)
    K = np.minimum.outer(index, index)
    J = np.eye(count) - 1.0 / count
    values = np.linalg.eigvalsh(J @ K @ J)[::-1]
    return tuple((values[:axes] / values.sum()).tolist())
