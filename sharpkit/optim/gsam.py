"""GSAM: descend on the perturbed loss, and lower the surrogate gap beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit.errors import SettingsError
from sharpkit.optim import _tensors as tensors
from sharpkit.optim._checks import at_least_zero
from sharpkit.optim._slots import Slot
from sharpkit.optim.base import SharpnessAware

__all__ = ["GSAM"]


class GSAM(SharpnessAware):
    r"""Surrogate gap guided sharpness-aware minimization.

    .. math:: w \leftarrow \operatorname{Base}(w,\ g_p - \alpha\, g_\perp), \qquad
        g_p = \nabla L(w + \rho_t\, g / \lVert g \rVert), \qquad
        g_\perp = g - \frac{g^\top g_p}{\lVert g_p \rVert^2}\, g_p

    The part of g across the perturbed gradient is subtracted: to first order it leaves the
    perturbed loss alone and lowers the gap between the two losses. The radius may follow the
    learning rate of the first group,
    :math:`\rho_t = \rho_{\min} + (\rho - \rho_{\min})
    (\eta_t - \eta_{\min}) / (\eta_{\max} - \eta_{\min})`; learning rates outside, as in a
    warm-up, have the radius of the nearer end.

    Invariance: orthogonal maps of the parameters, a positive factor on the loss.

    Cost: 2 gradients a step, one copy of the weights and one gradient more.

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius, the largest if it is scheduled; 0.05 as for SAM, our choice.
        alpha: Weight of the part across; 0.4 in the authors' example.
        rho_min: The radius at ``lr_min``; None keeps the radius at ``rho``.
        lr_max: The largest learning rate of the schedule; needed with ``rho_min``.
        lr_min: The smallest.
        **options: As `SharpnessAware`.

    Raises:
        SettingsError: For settings that make no sense.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> base = torch.optim.SGD([w], lr=0.1)
        >>> opt = GSAM(base, rho=0.2, rho_min=0.1, lr_max=0.1)
        >>> base.param_groups[0]["lr"] = 0.05
        >>> round(opt.radius(), 3)
        0.15

    Source: Zhuang et al., ICLR 2022, arXiv 2203.08065.
    """

    uses_first_gradient = True
    saved_settings = ("rho", "alpha", "rho_min", "lr_max", "lr_min")

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float = 0.05,
        alpha: float = 0.4,
        rho_min: float | None = None,
        lr_max: float | None = None,
        lr_min: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **options)
        self.alpha = at_least_zero("alpha", alpha)
        self.rho_min = None if rho_min is None else at_least_zero("rho_min", rho_min)
        self.lr_max = lr_max
        self.lr_min = at_least_zero("lr_min", lr_min)
        if rho_min is not None and (lr_max is None or not lr_max > lr_min):
            raise SettingsError(
                f"Expected `lr_max` above `lr_min` with `rho_min`. Got {lr_max!r} and {lr_min!r}."
            )

    def radius(self) -> float:
        """Return the radius at the present learning rate."""
        if self.rho_min is None or self.lr_max is None:
            return self.rho
        rate = float(self.param_groups[0]["lr"])
        share = min(max((rate - self.lr_min) / (self.lr_max - self.lr_min), 0.0), 1.0)
        return self.rho_min + (self.rho - self.rho_min) * share

    def _perturbation(self, slots: Sequence[Slot]) -> tensors.Ray:
        return tensors.ray([slot.gradient for slot in slots], size=self.radius())

    def _descent(
        self, point: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        del point
        along = tensors.unit(second)
        inner = tensors.dot(first, along)
        step = tensors.scale_(along, self.alpha * inner)  # minus alpha (first - inner along)
        torch._foreach_add_(step, list(first), alpha=-self.alpha)
        torch._foreach_add_(step, list(second))
        return step
