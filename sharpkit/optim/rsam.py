"""RSAM: the gradient where the Renyi entropy of the squared gradient is smaller."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.optim import Optimizer

from sharpkit.errors import SettingsError
from sharpkit.optim import _tensors as tensors
from sharpkit.optim._slots import Slot
from sharpkit.optim.base import SharpnessAware

__all__ = ["RSAM"]


class RSAM(SharpnessAware):
    r"""Renyi sharpness-aware minimization.

    The Hessian's spectrum is replaced by squared gradients: with
    :math:`p_j = g_j^2 / \lVert g \rVert^2`, what is to be small beside the loss is

    .. math:: R(g) = -\operatorname{sign}(1 - \alpha) \sum_j p_j^\alpha
        = -\operatorname{sign}(1 - \alpha)\,
        \frac{\sum_j |g_j|^{2\alpha}}{\bigl(\sum_j g_j^2\bigr)^\alpha},

    which falls as the Renyi entropy :math:`\frac{1}{1-\alpha} \log \sum_j p_j^\alpha` rises.
    The step is that of SAM with another direction:

    .. math:: \delta = \rho\, u / \lVert u \rVert, \qquad u = \frac{\partial R}{\partial g}
        = -\operatorname{sign}(1 - \alpha)\, \frac{2\alpha}{\lVert g \rVert}
        \bigl(a - (a^\top q)\, q\bigr), \qquad
        q = g / \lVert g \rVert,\ a_j = |q_j|^{2\alpha - 1} \operatorname{sign} q_j.

    The equation of the perturbation is derived here; we had no full text of the paper, only
    that weights move along the gradient of R and the loss is taken there. By the chain rule
    :math:`\nabla_w R = H u`, and :math:`\nabla L(w + t u) = \nabla L + t H u + O(t^2)`: moving by
    t u is descent on :math:`L + t R`, with no second derivative computed, just as
    :math:`u = \partial \lVert g \rVert / \partial g = q` gives SAM. As SAM does, it fixes the
    length of the perturbation, so that the weight of R is
    :math:`t = \rho / \lVert u \rVert`. The direction is orthogonal to g: to first order the loss
    itself does not change. Moving by :math:`H u` instead would descend along
    :math:`H^2 u`, which is the gradient of nothing that is wanted.

    R takes all perturbed parameters as one vector. The squared mean gradient of a batch is a
    poor stand-in for curvature: it is dominated by noise near a minimum.

    Invariance: permutations of the parameters and flips of their signs, a positive factor on
    the loss. Neither rotations nor rescalings.

    Cost: 2 gradients a step, 1 during the warm-up; one copy of the perturbed weights.

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius; 0.05 as for SAM (the paper's values are not known to us).
        alpha: The order, from 0.5 on and not 1. The paper takes 0.5 or 1.5, by the shape of the
            Hessian's spectrum; for 0.5 the direction holds the signs of all entries, however
            small, so that rounding steers it; 1.5 does not do that and is our default.
        warm_up: Steps of the base optimizer alone at first; the paper trains up to 5 epochs so.
        **options: As `SharpnessAware`.

    Raises:
        SettingsError: For settings that make no sense; below 0.5 the direction is not bounded
            where an entry of g is zero.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
        >>> opt = RSAM(torch.optim.SGD([w], lr=0.0), rho=1.0, alpha=1.5)
        >>> (0.5 * w**2).sum().backward()
        >>> opt.first_step()  # g = (2, 1): towards the larger entry, across g
        True
        >>> w.detach() - torch.tensor([2.0, 1.0])
        tensor([ 0.4472, -0.8944])

    Source: Zhang et al., arXiv 2510.07758.
    """

    saved_settings = ("rho", "alpha", "warm_up")

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float = 0.05,
        alpha: float = 1.5,
        warm_up: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **options)
        number = not isinstance(alpha, bool) and isinstance(alpha, int | float)
        if not number or not 0.5 <= alpha < math.inf or alpha == 1:
            raise SettingsError(f"Expected a finite `alpha` from 0.5 on, not 1. Got {alpha!r}.")
        if isinstance(warm_up, bool) or not isinstance(warm_up, int) or warm_up < 0:
            raise SettingsError(f"Expected an integer `warm_up` from 0. Got {warm_up!r}.")
        self.alpha, self.warm_up = float(alpha), warm_up

    def _wants_second_pass(self) -> bool:
        before = self.steps - 1 if self._begun else self.steps
        return before >= self.warm_up

    def _local_gradients(self) -> AbstractContextManager[Any]:
        # The only pass of a step goes to the base optimizer: the ranks must agree on it.
        return super()._local_gradients() if self._wants_second_pass() else nullcontext()

    def _perturbation(self, slots: Sequence[Slot]) -> tensors.Ray:
        q = tensors.unit([slot.gradient for slot in slots])
        if self.alpha == 0.5:
            powers = [torch.sign(part) for part in q]
        else:
            powers = list(torch._foreach_abs(q))
            torch._foreach_pow_(powers, 2 * self.alpha - 1)
            for power, part in zip(powers, q, strict=True):
                power.copysign_(part)
        across = tensors.scale_(q, -tensors.dot(powers, q))
        torch._foreach_add_(across, powers)
        # Entries of equal size leave nothing but rounding, which has no direction.
        length = tensors.norm(across)
        floor = 8 * torch.finfo(q[0].dtype).eps * tensors.norm(powers)
        length = torch.where(length <= floor, torch.inf, length)
        factor = self.rho if self.alpha > 1 else -self.rho
        return tensors.Ray(across, length / factor)
