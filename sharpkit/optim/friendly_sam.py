"""Friendly SAM: perturb along the noise of the batch, not along the full gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from sharpkit.optim import _tensors as tensors
from sharpkit.optim._checks import at_least_zero, fraction
from sharpkit.optim._slots import Slot
from sharpkit.optim.base import SharpnessAware

__all__ = ["FriendlySAM"]


class FriendlySAM(SharpnessAware):
    r"""Friendly sharpness-aware minimization (F-SAM).

    .. math:: \delta = \rho\, d / \lVert d \rVert, \qquad d = g - \sigma m, \qquad
        m \leftarrow \lambda m + (1 - \lambda) g

    with m the running mean of the gradients before this one; at the first step
    :math:`d = g` and then :math:`m = g`. This is the order of the authors' code. The paper
    takes the mean with g in it, which for :math:`\sigma = 1` only shortens d, and starts from
    zero. The mean is of the gradients themselves, not of what is left of them.

    Invariance: orthogonal maps of the parameters, a positive constant factor on the loss.

    Cost: 2 gradients a step; one copy of the weights and one vector of their size, which is
    kept, also in ``state_dict``.

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius; 0.05 in the authors' code.
        sigma: How much of the mean is taken away; 1.
        decay: :math:`\lambda`; 0.9 in the authors' class, 0.95 in their script.
        **options: As `SharpnessAware`.

    Raises:
        SettingsError: For settings that make no sense.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = FriendlySAM(torch.optim.SGD([w], lr=0.0), rho=1.0)
        >>> x = iter([[1.0, 0.0], [1.0, 0.0], [1.0, 3.0], [1.0, 3.0]])
        >>> seen = []
        >>> def closure():
        ...     seen.append(w.tolist())
        ...     (w @ torch.tensor(next(x))).backward()
        >>> opt.step(closure), opt.step(closure)
        (None, None)
        >>> seen[3]  # the gradient is (1, 3), the mean (1, 0)
        [0.0, 1.0]

    Source: Li et al., CVPR 2024, arXiv 2403.12350.
    """

    saved_settings = ("rho", "sigma", "decay")

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float = 0.05,
        sigma: float = 1.0,
        decay: float = 0.9,
        **options: Any,
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **options)
        self.sigma = at_least_zero("sigma", sigma)
        self.decay = fraction("decay", decay, one=False)

    def _perturbation(self, slots: Sequence[Slot]) -> tensors.Ray:
        mean = self.memory.get("mean", {})
        renewed = dict(mean)
        noise = []
        for slot in slots:
            gradient = slot.gradient
            if slot.parameter in mean:
                old = mean[slot.parameter]
                noise.append(torch.sub(gradient, old, alpha=self.sigma))
                renewed[slot.parameter] = torch.lerp(old, gradient, 1 - self.decay)
            else:
                noise.append(gradient)
                renewed[slot.parameter] = gradient.clone()
        self._staged["mean"] = renewed
        return tensors.ray(noise, size=self.rho)
