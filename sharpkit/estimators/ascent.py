"""The largest value of a function in a ball around the origin, by projected ascent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.estimators.protocol import check_positive

__all__ = ["Ascent", "Norm", "dual_norm", "maximize_in_ball", "project", "steepest"]

Norm: TypeAlias = Literal["l2", "linf"]

MOMENTUM = 0.75
ENOUGH_INCREASES = 0.75
GAP_TOLERANCE = 0.02  # of the value: the room that a converged ascent may leave


def check_norm(norm: str) -> None:
    """Raise SettingsError unless the norm is known."""
    if norm not in ("l2", "linf"):
        raise SettingsError(f"Expected `norm` to be 'l2' or 'linf'. Got {norm!r}.")


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the unit vector of the norm that rises fastest; zero for a zero gradient.

    Example:
        >>> steepest(torch.tensor([3.0, -4.0]), "linf").tolist()
        [1.0, -1.0]
    """
    if norm == "linf":
        return gradient.sign()
    length = gradient.norm()
    return gradient / length if float(length) > 0 else torch.zeros_like(gradient)


def dual_norm(gradient: Tensor, norm: Norm) -> float:
    """Return the largest slope over unit vectors: ``|g|_2`` for l2, ``|g|_1`` for linf."""
    return float(gradient.norm() if norm == "l2" else gradient.abs().sum())


def project(point: Tensor, rho: float, norm: Norm) -> Tensor:
    """Return the nearest point of the ball of radius rho."""
    if norm == "linf":
        return point.clamp(-rho, rho)
    length = float(point.norm())
    return point * (rho / length) if length > rho else point


@dataclass(frozen=True)
class Ascent:
    """The highest point that an ascent met.

    Attributes:
        value: The function there.
        point: Where it was, inside the ball.
        gap: First-order room left: ``max over the ball of g.(z - point)``. Zero at a
            stationary point; no guarantee that no higher peak exists.
        converged: Whether the gap is at most 2% of the rise.
        evaluations: Values-with-gradients computed.
        non_finite: Steps at which the function was not finite; they were taken back.
    """

    value: float
    point: Tensor
    gap: float
    converged: bool
    evaluations: int
    non_finite: int


def _checkpoints(steps: int) -> set[int]:
    # Croce and Hein 2020: p_0 = 0, p_1 = 0.22, then ever shorter intervals, at least 0.06.
    last, now, marks = 0.0, 0.22, set()
    while now <= 1:
        marks.add(math.ceil(now * steps))
        last, now = now, now + max(now - last - 0.03, 0.06)
    return marks


def maximize_in_ball(
    function: Callable[[Tensor], tuple[float, Tensor]],
    *,
    start_value: float,
    start_gradient: Tensor,
    rho: float,
    norm: Norm,
    steps: int,
    generator: torch.Generator,
) -> Ascent:
    r"""Search the maximum of a function over ``|z| <= rho`` by Auto-PGD.

    Projected steepest ascent with momentum; the step starts at the ball's diameter and is
    halved, going on from the best point, when too few steps rise (Croce and Hein 2020,
    arXiv:2003.01690). At a point without a gradient it starts in a random direction.

    Args:
        function: Maps ``z [P]`` to its value and gradient.
        start_value: The function at 0.
        start_gradient: Its gradient at 0.
        rho: Radius of the ball.
        norm: ``"l2"`` or ``"linf"``.
        steps: Values-with-gradients to spend, at least 1.
        generator: Source of the random direction, if one is needed.

    Raises:
        SettingsError: If rho or steps is not positive, or the norm is unknown.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, 1.0]))
        >>> z0 = torch.zeros(2)
        >>> best = maximize_in_ball(
        ...     lambda z: (float(z @ A @ z + z.sum()), 2 * A @ z + 1), start_value=0.0,
        ...     start_gradient=torch.ones(2), rho=1.0, norm="linf", steps=3,
        ...     generator=torch.Generator())
        >>> best.value, best.gap
        (6.0, 0.0)
    """
    check_norm(norm)
    check_positive("rho", rho)
    check_positive("steps", steps, minimum=1)
    direction = steepest(start_gradient, norm)
    if not bool(direction.any()):
        noise = torch.randn(
            start_gradient.shape,
            generator=generator,
            dtype=start_gradient.dtype,
            device=start_gradient.device,
        )
        direction = steepest(noise, norm)
    origin = torch.zeros_like(start_gradient)
    best = (start_value, origin, start_gradient)
    previous, point, slope = origin, origin, start_gradient
    value = start_value
    eta = 2 * rho
    marks = _checkpoints(steps)
    increases = since = non_finite = 0
    halved, best_at_mark = False, start_value
    for step in range(1, steps + 1):
        heading = steepest(slope, norm) if step > 1 and bool(slope.any()) else direction
        target = project(point + eta * heading, rho, norm)
        moved = target
        if step > 1:
            moved = project(
                point + MOMENTUM * (target - point) + (1 - MOMENTUM) * (point - previous),
                rho,
                norm,
            )
        new_value, new_slope = function(moved)
        since += 1
        if not (math.isfinite(new_value) and bool(torch.isfinite(new_slope).all())):
            non_finite += 1
            eta /= 2  # take it back: go on from the best finite point with half the step
            value, point, slope = best
            previous = point
            continue
        increases += new_value > value
        previous, point, slope, value = point, moved, new_slope, new_value
        if value > best[0]:
            best = (value, point, slope)
        if step in marks:
            few = increases < ENOUGH_INCREASES * since
            stuck = not halved and best[0] <= best_at_mark
            halved = few or stuck
            if halved:
                eta /= 2
                value, point, slope = best
                previous = point
            increases = since = 0
            best_at_mark = best[0]
    value, point, slope = best
    gap = max(rho * dual_norm(slope, norm) - float(torch.dot(slope, point)), 0.0)
    rise = value - start_value
    return Ascent(
        value=value,
        point=point,
        gap=gap,
        converged=rise > 0 and gap <= GAP_TOLERANCE * rise,
        evaluations=steps,
        non_finite=non_finite,
    )
