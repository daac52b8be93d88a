"""Momentum-SAM: perturb along the momentum, which costs no second gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit.errors import SettingsError
from sharpkit.optim import _tensors as tensors
from sharpkit.optim._slots import Slot
from sharpkit.optim.base import SharpnessAware

__all__ = ["MomentumSAM"]

_NAMES = ("momentum_buffer", "exp_avg")


class MomentumSAM(SharpnessAware):
    r"""Sharpness-aware minimization along the momentum.

    .. math:: \delta = -\rho\, v / \lVert v \rVert, \qquad
        w \leftarrow \operatorname{Base}(w,\ \nabla L(w + \delta))

    with v the base optimizer's momentum (SGD's ``momentum_buffer``, Adam's ``exp_avg``) before
    the step. The sign is the authors': the point lies ahead, where the momentum carries the
    weights, as Nesterov's does, but at a fixed distance. The first step, without momentum, is
    the base optimizer's. Unlike the authors' code the weights are perturbed only during the
    pass, so that what is saved and evaluated is w; and an L2 term of the base optimizer's
    ``weight_decay`` is taken at w, where their SGD takes it at the perturbed point.

    The loss that ``step(closure)`` returns is that of the perturbed point, and running
    statistics come from there: there is no other pass. By hand: ``opt.first_step()``, then
    forward and backward, then ``opt.step()``.

    Invariance: orthogonal maps of the parameters (SGD), a constant positive factor on the loss.

    Cost: 1 gradient a step, one copy of the weights during the pass.

    Args:
        base_optimizer: SGD with momentum, Adam, AdamW or another that keeps its momentum under
            these names.
        rho: The radius; 0.3 in the authors' SGD (their AdamW has 1).
        **options: As `SharpnessAware`.

    Raises:
        SettingsError: If the base optimizer keeps no momentum.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = MomentumSAM(torch.optim.SGD([w], lr=0.1, momentum=0.9), rho=0.5)
        >>> def closure():
        ...     loss = 0.5 * (w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> losses = [opt.step(closure).item() for _ in range(2)]
        >>> round(losses[1], 4)  # 0.5 * (4.5 - 0.5)^2
        8.0

    Source: Becker et al., arXiv 2401.12033, and the authors' code. Not `MicroBatchSAM` (mSAM),
    not `MongeSAM` (M-SAM).
    """

    def __init__(self, base_optimizer: Optimizer, *, rho: float = 0.3, **options: Any) -> None:
        super().__init__(base_optimizer, rho=rho, **options)
        groups = self.param_groups
        if any(not group.get("momentum") and "betas" not in group for group in groups):
            raise SettingsError(
                "Expected a base optimizer with momentum: SGD(momentum=0.9), Adam, AdamW. Got"
                f" {type(base_optimizer).__name__} without."
            )

    def _run(self, closure: Callable[..., Any], scaler: Any) -> Any:
        self.first_step()
        loss = self._pass(closure)
        self._finish(scaler)
        return loss

    def _begin(self, scaler: Any) -> bool:
        del scaler  # there is no gradient yet
        self._begun = True
        self.steps += 1
        slots = []
        for parameter in self.perturbed_parameters():
            velocity = self._velocity(parameter)
            if velocity is not None:
                slots.append(Slot(parameter, None, velocity))
        if slots:
            with torch.no_grad():
                velocities = [slot.gradient for slot in slots]
                self._move(slots, tensors.ray(velocities, size=-self.rho))
        for parameter in self.parameters():
            parameter.grad = None
        return True

    def _velocity(self, parameter: Tensor) -> Tensor | None:
        state = self.state.get(parameter, {})
        for name in _NAMES:
            if isinstance(state.get(name), Tensor):
                value: Tensor = state[name]
                return value
        return None
