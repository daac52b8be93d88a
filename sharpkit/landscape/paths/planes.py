"""The plane through three checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpkit.errors import MeasureError, SettingsError, ShapeError
from sharpkit.landscape.result import Marker
from sharpkit.landscape.section import Direction, StraightSection

__all__ = ["plane_through"]

FLAT = 1e-6  # of the distance of the third point, its distance from the line of the others


def plane_through(
    theta_a: Tensor,
    theta_b: Tensor,
    theta_c: Tensor,
    labels: Sequence[str] = ("A", "B", "C"),
) -> tuple[StraightSection, tuple[Marker, Marker, Marker]]:
    r"""Return the plane through three points, and where they are in it.

    .. math::
        u = \frac{b - a}{\|b - a\|},\qquad
        v = \frac{(c - a) - u\,u^\top(c - a)}{\|(c - a) - u\,u^\top(c - a)\|}

    with the origin at a. Both coordinates are distances in theta, so that the plane is drawn
    undistorted: a is at (0, 0), b at (\|b - a\|, 0), c at
    (:math:`u^\top(c-a)`, :math:`v^\top(c-a)`). For the plane of a curve of Garipov et al. take
    its ends and its bend, the bend last.

    Args:
        theta_a: A checkpoint's parameters, ``[P]``.
        theta_b: A second one's.
        theta_c: A third one's.
        labels: Their names.

    Returns:
        The plane, and a marker for each point; its ``distance`` is what rounding leaves.

    Raises:
        ShapeError: If the shapes differ.
        SettingsError: If there are not three labels.
        MeasureError: If two points are the same, all three lie on one line (to 1e-6 of their
            distances, or to the rounding of their dtype), or one is not finite.

    It misleads as every plane does: loss is high beside it or low, nothing here says which.
    Parameters of equal networks lie far from each other: align them first
    (:func:`~sharpkit.landscape.paths.align`).

    Reference: arXiv:1802.10026, section 2.

    Example:
        >>> a, b, c = torch.zeros(3), torch.tensor([4.0, 0, 0]), torch.tensor([1.0, 0, 2.0])
        >>> plane, markers = plane_through(a, b, c)
        >>> [m.coordinates for m in markers]
        [(0.0, 0.0), (4.0, 0.0), (1.0, 2.0)]
        >>> plane.point([1.0, 2.0]).tolist()
        [1.0, 0.0, 2.0]
    """
    points = [p.detach() for p in (theta_a, theta_b, theta_c)]
    for point in points:
        if point.ndim != 1 or point.shape != points[0].shape:
            raise ShapeError(
                "Expected three points of one shape [P]. Got"
                f" {', '.join(str(tuple(p.shape)) for p in points)}."
            )
    if len(labels) != 3:
        raise SettingsError(f"Expected three labels. Got {len(labels)}.")
    a, b, c = (p.double() for p in points)
    across, up = b - a, c - a
    width, reach = float(across.norm()), float(up.norm())
    if not (width + reach) < float("inf"):
        raise MeasureError("Expected finite parameters. Got an infinite entry or NaN.")
    sizes = max(float(p.norm()) for p in (a, b, c))
    rounding = 4 * torch.finfo(points[0].dtype).eps * sizes
    same = [(0, 1, width), (0, 2, reach), (1, 2, float((c - b).norm()))]
    for i, j, distance in same:
        if distance <= rounding:
            raise MeasureError(
                f"Expected three different points. {labels[i]} and {labels[j]} are the same"
                " parameters. Take another one."
            )
    u = across / width
    rest = up - (u @ up) * u
    rest = rest - (u @ rest) * u  # once more: the first leaves what rounding takes of `up`
    height = float(rest.norm())
    if height <= max(FLAT * max(width, reach), rounding):
        raise MeasureError(
            f"Expected three points that span a plane. {labels[2]} lies on the line through"
            f" {labels[0]} and {labels[1]}, within {height:.3g} of {reach:.3g}. Take a line"
            " instead (SegmentPath)."
        )
    dtype = points[0].dtype
    names = f"the line from {labels[0]} to {labels[1]}"
    plane = StraightSection(
        points[0],
        [
            Direction(
                across.to(dtype),
                "endpoints",
                f"distance in theta along {names}",
                step=1 / width,
                details={"points": list(labels)},
            ),
            Direction(
                rest.to(dtype),
                "endpoints",
                f"distance in theta from {names}, towards {labels[2]}",
                step=1 / height,
                details={"points": list(labels)},
            ),
        ],
    )
    places = [(0.0, 0.0), (width, 0.0), (float(u @ up), height)]
    markers = []
    for label, place, point in zip(labels, places, points, strict=True):
        gap = plane.point(place).double() - point.double()
        markers.append(Marker(label, place, float(gap.norm())))
    return plane, (markers[0], markers[1], markers[2])
