"""WSAM: the sharpness as a regularization term with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit.optim import _tensors as tensors
from sharpkit.optim._checks import fraction
from sharpkit.optim.sam import SAM

__all__ = ["WSAM"]


class WSAM(SAM):
    r"""Weighted sharpness-aware minimization.

    .. math:: L(w) + \frac{\gamma}{1 - \gamma} \bigl(L(w + \delta) - L(w)\bigr), \qquad
        \delta = \rho\, g / \lVert g \rVert, \quad g_p = \nabla L(w + \delta)

    Decoupled, the base optimizer steps along g, and then the sharpness is descended with the
    group's learning rate :math:`\eta`:
    :math:`w \leftarrow w - \eta \frac{\gamma}{1-\gamma} (g_p - g)`. Coupled, the base optimizer
    gets :math:`g + \frac{\gamma}{1-\gamma} (g_p - g)`. They differ for any base optimizer but
    plain SGD. :math:`\gamma = 1/2` coupled is SAM, :math:`\gamma = 0` no SAM at all.

    Invariance: as SAM. Clipping by ``max_grad_norm`` does not touch the decoupled part.

    Cost: 2 gradients a step, one copy of the weights and one gradient more.

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius; 0.05, from a public implementation.
        gamma: The weight, from 0 to less than 1; 0.9, from a public implementation.
        decouple: Whether the sharpness stays outside the base optimizer.
        **options: As `SAM`.

    Raises:
        SettingsError: For settings that make no sense.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = WSAM(torch.optim.SGD([w], lr=0.1), rho=0.5, gamma=0.75)
        >>> def closure():
        ...     (0.5 * (w**2).sum()).backward()
        >>> opt.step(closure)
        >>> w.detach()  # w - 0.1 (w + 3 * 0.5 w / 5)
        tensor([2.6100, 3.4800])

    Source: Yue et al., KDD 2023, arXiv 2305.15817.
    """

    takes_sparse = False
    uses_first_gradient = True
    saved_settings = ("rho", "norm", "gamma", "decouple")

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float = 0.05,
        gamma: float = 0.9,
        decouple: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **options)
        self.gamma = fraction("gamma", gamma, one=False)
        self.decouple = decouple
        self._sharpness: dict[Tensor, Tensor] = {}

    def _descent(
        self, point: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        weight = self.gamma / (1 - self.gamma)
        sharpness = tensors.add(second, first, -1.0)
        tensors.scale_(sharpness, weight)
        if self.decouple:
            self._sharpness = dict(zip(point, sharpness, strict=True))
            return first
        torch._foreach_add_(sharpness, list(first))
        return sharpness

    def restore(self) -> None:  # noqa: D102
        super().restore()
        self._sharpness = {}

    @torch.no_grad()
    def _after_step(self) -> None:
        sharpness, self._sharpness = self._sharpness, {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in sharpness:
                    parameter.sub_(sharpness[parameter] * group["lr"])
