r"""Metrics on the parameters: what "distance" means when the worst perturbation is sought.

Each metric M is used through its square roots, so that the ball
:math:`\{\delta : \delta^\top M \delta \le \rho^2\}` becomes the round ball of
:math:`\zeta = M^{1/2}\delta`. The square roots here are symmetric.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.parameters import ParameterSpace

__all__ = [
    "ElementwiseMetric",
    "EuclideanMetric",
    "Metric",
    "MongeMetric",
    "Scaling",
    "asam_scale",
    "fisher_metric",
    "scale_of",
]

Scaling: TypeAlias = Literal["elementwise", "filter", "layer"]


class Metric(Protocol):
    """A positive definite matrix by its square roots; all maps take and give ``[P]``."""

    @property
    def frozen(self) -> Tensor | None:
        """Entries ``[P]`` that no perturbation moves; None if there are none."""
        ...

    def whiten(self, delta: Tensor) -> Tensor:
        """Return ``M^{1/2} delta``."""
        ...

    def unwhiten(self, zeta: Tensor) -> Tensor:
        """Return ``M^{-1/2} zeta``, for perturbations and for gradients alike."""
        ...


class EuclideanMetric:
    """``M = I``."""

    frozen: Tensor | None = None

    def whiten(self, delta: Tensor) -> Tensor:
        """Return delta."""
        return delta

    def unwhiten(self, zeta: Tensor) -> Tensor:
        """Return zeta."""
        return zeta


class ElementwiseMetric:
    r"""``M = diag(c)^{-2}``: perturbations are measured relative to a scale c.

    With :math:`c = |w|` this is the adaptive metric (Kwon et al. 2021, arXiv:2102.11600).
    Where c is zero the parameter is frozen.

    Args:
        scale: c, ``[P]``, entries of at least 0.
    """

    def __init__(self, scale: Tensor):
        if not bool((scale >= 0).all()):
            raise SettingsError(
                "Expected scales of at least 0. Got a negative one or NaN. Give absolute values."
            )
        self.scale = scale

    @property
    def frozen(self) -> Tensor | None:
        """Where c is zero."""
        zero = self.scale == 0
        return zero if bool(zero.any()) else None

    def whiten(self, delta: Tensor) -> Tensor:
        """Return ``delta / c``; zero where c is zero."""
        return torch.where(self.scale > 0, delta / self.scale, torch.zeros_like(delta))

    def unwhiten(self, zeta: Tensor) -> Tensor:
        """Return ``c * zeta``."""
        return zeta * self.scale


def scale_of(space: ParameterSpace, theta: Tensor, scaling: Scaling) -> Tensor:
    """Return the scale c ``[P]`` that perturbations are measured by.

    Args:
        space: Names and shapes.
        theta: The parameters, ``[P]``.
        scaling: ``"elementwise"``: each entry's size; ``"filter"``: the norm of its slice
            along the first axis, which is the output of linear layers and convolutions
            (of ``nn.ConvTranspose`` it is the input), and of vectors such as biases each
            entry's size; ``"layer"``: the norm of its tensor.

    Raises:
        SettingsError: If the scaling is unknown.

    Example:
        >>> space = ParameterSpace.of({"w": torch.zeros(2, 2), "b": torch.zeros(2)})
        >>> theta = torch.tensor([3.0, 4.0, 0.0, -1.0, 2.0, 0.0])
        >>> scale_of(space, theta, "filter").tolist()
        [5.0, 5.0, 1.0, 1.0, 2.0, 0.0]
    """
    if scaling == "elementwise":
        return theta.abs()
    if scaling not in ("filter", "layer"):
        raise SettingsError(
            f"Expected `scaling` to be 'elementwise', 'filter' or 'layer'. Got {scaling!r}."
        )
    parts = {}
    for name, tensor in space.unflatten(theta).items():
        if scaling == "layer":
            size = tensor.double().norm().expand(tensor.shape)
        elif tensor.ndim < 2:
            size = tensor.abs()
        else:
            rows = tensor.double().flatten(1).norm(dim=1)
            size = rows.reshape(-1, *[1] * (tensor.ndim - 1)).expand(tensor.shape)
        parts[name] = size
    return space.flatten(parts)


def asam_scale(space: ParameterSpace, theta: Tensor, eta: float, *, weights_only: bool) -> Tensor:
    r"""Return the diagonal ``[P]`` of ASAM's :math:`T_w = |w| + \eta`.

    Args:
        space: Names and shapes.
        theta: The parameters, ``[P]``.
        eta: Added to each size, at least 0.
        weights_only: 1 for parameters whose name does not contain ``"weight"``, as in the
            code of Kwon et al. 2021.

    Raises:
        SettingsError: If eta is negative.
    """
    if not 0 <= eta < math.inf:
        raise SettingsError(f"Expected `eta` to be finite and at least 0. Got {eta!r}.")
    scale = space.unflatten(theta.abs() + eta)
    return space.flatten(
        {
            name: torch.ones_like(c) if weights_only and "weight" not in name else c
            for name, c in scale.items()
        }
    )


def fisher_metric(squares: Tensor, *, eta: float | None, damping: float) -> ElementwiseMetric:
    r"""Return a diagonal Fisher metric from squares of gradients.

    Args:
        squares: f, ``[P]``, entries of at least 0.
        eta: ``M = diag(1 + eta f)``, the inverse of the practical Fisher SAM; None: the
            damped ``M = diag(f + damping)``.
        damping: Above 0; used without eta.

    Raises:
        SettingsError: If eta is negative or the damping not positive.
    """
    if eta is None and not 0 < damping < math.inf:
        raise SettingsError(f"Expected `damping` to be positive and finite. Got {damping!r}.")
    if eta is not None and not 0 <= eta < math.inf:
        raise SettingsError(f"Expected `eta` to be finite and at least 0. Got {eta!r}.")
    diagonal = squares + damping if eta is None else 1 + eta * squares
    return ElementwiseMetric(diagonal.rsqrt())


class MongeMetric:
    r"""``M = I + alpha^2 g g^T``, the metric of the graph of the loss.

    .. math:: M^{\pm1/2} = I + \bigl((1+\alpha^2\|g\|^2)^{\pm1/2} - 1\bigr)\,\hat g\hat g^\top

    Jacobsen and Arvanitidis 2025 (arXiv:2502.08448) with :math:`\alpha = 1`; the scale is
    our extension, and 0 gives the Euclidean metric.

    Args:
        gradient: g, ``[P]``.
        alpha: Scale of the loss axis, at least 0.

    Example:
        >>> metric = MongeMetric(torch.tensor([3.0, 0.0]))
        >>> delta = torch.tensor([1.0, 2.0])
        >>> round(float(metric.whiten(delta) @ metric.whiten(delta)), 4)  # 1 + 4 + 9
        14.0
    """

    frozen: Tensor | None = None

    def __init__(self, gradient: Tensor, alpha: float = 1.0):
        if not 0 <= alpha < math.inf:
            raise SettingsError(f"Expected `alpha` to be finite and at least 0. Got {alpha!r}.")
        length = float(gradient.norm())
        self.direction = gradient / length if length > 0 else gradient
        self.stretch = math.sqrt(1 + (alpha * length) ** 2)

    def whiten(self, delta: Tensor) -> Tensor:
        """Return ``M^{1/2} delta``."""
        along = torch.dot(self.direction, delta)
        return delta + (self.stretch - 1) * along * self.direction

    def unwhiten(self, zeta: Tensor) -> Tensor:
        """Return ``M^{-1/2} zeta``."""
        along = torch.dot(self.direction, zeta)
        return zeta + (1 / self.stretch - 1) * along * self.direction
