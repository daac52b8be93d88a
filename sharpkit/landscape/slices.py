"""The loss along a line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sharpkit.objective import Objective
from sharpkit.results import Curve

__all__ = ["quadratic_model", "slice_1d"]


def slice_1d(
    objective: Objective,
    direction: Tensor,
    x: Sequence[float],
    *,
    details: Mapping[str, Any] | None = None,
) -> Curve:
    """Return ``L(theta + x d)``; values that are not finite become NaN, never a number.

    Args:
        objective: Gives theta and L.
        direction: d, ``[P]``.
        x: Multiples of d.
        details: Kept with the curve: direction kind, seed.

    Raises:
        ShapeError: If the direction does not have shape ``[P]``.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> objective = Objective(model, torch.nn.MSELoss(), (torch.ones(1, 1), torch.ones(1, 1)))
        >>> slice_1d(objective, torch.ones(1), [-1.0, 0.0, 2.0]).y
        (1.0, 0.0, 4.0)
    """
    objective.space.check_vector(direction)
    theta = objective.theta
    values = [float(objective.at(theta + step * direction).value()) for step in x]
    return Curve(
        x=tuple(float(step) for step in x),
        y=tuple(v if math.isfinite(v) else math.nan for v in values),
        x_label="multiples of the direction",
        y_label="loss",
        details={"direction_norm": float(direction.norm()), **(details or {})},
    )


def quadratic_model(objective: Objective, direction: Tensor, x: Sequence[float]) -> Curve:
    """Return ``L + x g.d + x^2 d.Hd / 2`` along a direction: one gradient and one HVP.

    Raises:
        ShapeError: If the direction does not have shape ``[P]``.
    """
    objective.space.check_vector(direction)
    value, gradient = objective.value_and_gradient()
    slope = float(gradient @ direction)
    bend = float(direction @ objective.hvp(direction))
    return Curve(
        x=tuple(float(step) for step in x),
        y=tuple(float(value) + step * slope + step**2 * bend / 2 for step in x),
        x_label="multiples of the direction",
        y_label="loss (quadratic model)",
        details={"slope": slope, "curvature": bend},
    )
