"""Fisher SAM: SAM in a ball of the (diagonal, empirical) Fisher metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from sharpkit.optim import _tensors as tensors
from sharpkit.optim._checks import at_least_zero
from sharpkit.optim._slots import Slot
from sharpkit.optim.base import SharpnessAware

__all__ = ["FisherSAM"]


class FisherSAM(SharpnessAware):
    r"""Sharpness-aware minimization in the Fisher metric.

    .. math:: \delta = \rho\, \hat F^{-1} g / \sqrt{g^\top \hat F^{-1} g}, \qquad
        \hat F^{-1} = \operatorname{diag}\bigl(1 / (1 + \eta\, g_i^2)\bigr)

    with g the gradient of the mini-batch mean, which must be of a negative log likelihood.
    This is the practical form: the square of the mean gradient, not the mean of squared
    gradients per example. ``eta=0`` is SAM.

    Invariance: permutations of the parameters and flips of their signs. The exact Fisher
    metric would give invariance to reparametrization; this diagonal does not, and it depends
    on the scale of the loss.

    Cost: 2 gradients a step, one copy of the perturbed weights.

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius; 0.05 as for SAM, our choice.
        eta: Weight of the Fisher information; 1, our choice: the paper tunes it.
        **options: As `SharpnessAware`.

    Raises:
        SettingsError: For settings that make no sense.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = FisherSAM(torch.optim.SGD([w], lr=0.0), rho=1.0, eta=1.0)
        >>> (w @ torch.tensor([1.0, 0.0])).backward()
        >>> opt.first_step()  # sqrt(1 / 2): half of the metric is the gradient's square
        True
        >>> w.detach()
        tensor([0.7071, 0.0000])

    Source: Kim et al., ICML 2022, arXiv 2206.04920, in the form that arXiv 2502.08448 gives
    (equations 4 and 5).
    """

    takes_sparse = True
    saved_settings = ("rho", "eta")

    def __init__(
        self, base_optimizer: Optimizer, *, rho: float = 0.05, eta: float = 1.0, **options: Any
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **options)
        self.eta = at_least_zero("eta", eta)

    def _perturbation(self, slots: Sequence[Slot]) -> tensors.Ray:
        gradient = [slot.gradient for slot in slots]
        information = [g.square().mul_(self.eta).add_(1.0) for g in gradient]
        natural = [torch.div(g, f, out=f) for g, f in zip(gradient, information, strict=True)]
        length = tensors.dot(gradient, natural).sqrt()
        return tensors.ray(natural, length, self.rho)
