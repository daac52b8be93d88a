r"""Metrics on the parameters: what "distance" means when the worst perturbation is sought.

Each metric M is used through its square roots, so that the ball
:math:`\{\delta : \delta^\top M \delta \le \rho^2\}` becomes the round ball of
:math:`\zeta = M^{1/2}\delta`. The square roots here are symmetric.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from sharpkit.errors import SettingsError

__all__ = ["ElementwiseMetric", "EuclideanMetric", "Metric", "MongeMetric"]


class Metric(Protocol):
    """A positive definite matrix by its square roots; all maps take and give ``[P]``."""

    def whiten(self, delta: Tensor) -> Tensor:
        """Return ``M^{1/2} delta``."""
        ...

    def unwhiten(self, zeta: Tensor) -> Tensor:
        """Return ``M^{-1/2} zeta``, for perturbations and for gradients alike."""
        ...


class EuclideanMetric:
    """``M = I``."""

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

    def whiten(self, delta: Tensor) -> Tensor:
        """Return ``delta / c``; zero where c is zero."""
        return torch.where(self.scale > 0, delta / self.scale, torch.zeros_like(delta))

    def unwhiten(self, zeta: Tensor) -> Tensor:
        """Return ``c * zeta``."""
        return zeta * self.scale


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
