"""The largest ball in which a function does not rise by more than a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit.estimators.ascent import Norm, maximize_in_ball, steepest
from sharpkit.estimators.protocol import check_positive

__all__ = ["WorstRadius", "worst_radius"]

SMALLEST = 1e-9  # of the largest radius
HALVING = 2.0


@dataclass(frozen=True)
class WorstRadius:
    """Where the worst case was found to exceed the target.

    Attributes:
        upper: The smallest radius at which a point beyond the target was found: the exact
            radius is at most this. The largest radius tried if none was found.
        lower: The largest radius in which the ascent found none; no guarantee.
        reached: Whether such a point was found.
        ascents: Ascents made.
    """

    upper: float
    lower: float
    reached: bool
    ascents: int


class _Found(Exception):  # noqa: N818  (a message inside the module, never seen)
    def __init__(self, point: Tensor):
        self.point = point


def worst_radius(
    function: Callable[[Tensor], tuple[float, Tensor, float]],
    drop: Callable[[Tensor], float],
    *,
    target: float,
    start_value: float,
    start_gradient: Tensor,
    norm: Norm,
    largest: float,
    steps: int,
    tolerance: float,
    generator: torch.Generator,
) -> WorstRadius:
    """Return the largest radius whose ball holds no point with a drop beyond the target.

    Ascents in balls of bisected radius look for a point beyond the target; the ray from
    the origin to it shows how much nearer one lies. As an ascent can miss, what it returns is
    an upper bound, attained by a point, and a lower one without guarantee.

    Args:
        function: Maps ``z [P]`` to the value to climb, its gradient, and the drop there.
        drop: Maps ``z`` to the drop alone; not finite counts as beyond.
        target: Drop that must not be exceeded.
        start_value: The value at 0.
        start_gradient: Its gradient at 0.
        norm: Of the ball.
        largest: Largest radius to look in.
        steps: Of each ascent.
        tolerance: Relative distance of the two bounds at the end.
        generator: Of the directions at points without a gradient.

    Raises:
        SettingsError: If a setting is not positive.

    Example:
        >>> def f(z):
        ...     return float(z.sum()), torch.ones_like(z), float(z.sum())
        >>> found = worst_radius(f, lambda z: float(z.sum()), target=1.0, start_value=0.0,
        ...     start_gradient=torch.ones(4), norm="linf", largest=10.0, steps=3,
        ...     tolerance=0.01, generator=torch.Generator())
        >>> round(found.upper, 1), 0.25 <= found.upper <= 0.2525
        (0.3, True)
    """
    check_positive("target", target)
    check_positive("largest", largest)
    check_positive("tolerance", tolerance)
    check_positive("steps", steps, minimum=1)
    smallest, ascents = SMALLEST * largest, 0

    def beyond(value: float) -> bool:
        return not value <= target

    def search(radius: float) -> Tensor | None:
        nonlocal ascents
        ascents += 1

        def climb(z: Tensor) -> tuple[float, Tensor]:
            value, gradient, dropped = function(z)
            if beyond(dropped):
                raise _Found(z)
            return value, gradient

        try:
            maximize_in_ball(
                climb,
                start_value=start_value,
                start_gradient=start_gradient,
                rho=radius,
                norm=norm,
                steps=steps,
                generator=generator,
            )
        except _Found as found:
            return found.point
        return None

    def along(point: Tensor, low: float) -> float:
        # The nearest point beyond the target on the ray, as far as bisection from low tells.
        size = float(point.abs().max() if norm == "linf" else point.norm())
        near, far = min(low, size), size
        while far > near * (1 + tolerance / 2):
            middle = math.sqrt(near * far)
            near, far = (near, middle) if beyond(drop(point * (middle / size))) else (middle, far)
        return far

    first = largest * steepest(start_gradient, norm)
    point = first if bool(first.any()) and beyond(drop(first)) else search(largest)
    if point is None:
        return WorstRadius(largest, largest, False, ascents)
    upper, lower = along(point, smallest), 0.0
    while lower == 0.0 and upper > smallest:
        point = search(upper / HALVING)
        if point is None:
            lower = upper / HALVING
        else:
            upper = along(point, smallest)
    while 0 < lower * (1 + tolerance) < upper:
        middle = math.sqrt(lower * upper)
        point = search(middle)
        if point is None:
            lower = middle
        else:
            upper = along(point, lower)
    return WorstRadius(upper, lower, True, ascents)
