"""Gradients that a GradScaler has scaled, and what it leaves on an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit.errors import SettingsError
from sharpkit.optim import _tensors as tensors
from sharpkit.optim._checks import finite

__all__ = [
    "check_still_scaled",
    "clip",
    "forget_scaler",
    "found_overflow",
    "is_unscaled",
    "unscale_first",
]


def is_unscaled(scaler: Any, *optimizers: Any) -> bool:
    """Return whether ``scaler.unscale_`` was called on one of the optimizers in this step."""
    states = getattr(scaler, "_per_optimizer_states", {})
    stages = [states[id(o)]["stage"] for o in optimizers if id(o) in states]
    return any(getattr(stage, "name", None) == "UNSCALED" for stage in stages)


def check_still_scaled(scaler: Any, *optimizers: Any) -> None:
    """Refuse gradients that ``scaler.unscale_`` has divided already and a step divides again.

    After the first pass it would moreover leave those of the second scaled.

    Raises:
        SettingsError: If it has.
    """
    if is_unscaled(scaler, *optimizers):
        raise SettingsError(
            "Expected gradients that are still scaled. Got them after `scaler.unscale_` in the"
            " first pass, or of `base`; clip by `max_grad_norm`, or after the second pass and"
            " scaler.unscale_(opt)."
        )


def unscale_first(gradients: Sequence[Tensor], scaler: Any, group: Any) -> bool:
    """Divide the first gradients by the scale if all are finite; return whether they are.

    Gradients that are not finite stay, so that the scaler sees them at the end of the step.

    Args:
        gradients: Those of the first pass, changed in place.
        scaler: The GradScaler.
        group: The ranks whose gradients differ and who skip together; None if they do not.
    """
    sound = finite(gradients)
    if group is not None and gradients:
        flag = torch.tensor(float(sound), device=gradients[0].device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group)
        sound = bool(flag.item())
        if not sound:
            for gradient in gradients:
                gradient.fill_(torch.nan)  # every rank's scaler must see the overflow
    if sound:
        for gradient in gradients:
            gradient.mul_(1.0 / scaler.get_scale())
    return sound


def found_overflow(optimizer: Any, gradients: Sequence[Tensor]) -> bool:
    """Do as ``scaler.step(optimizer)`` asks: unscale, and say whether to skip the step."""
    found = getattr(optimizer, "found_inf", None)
    if found is None:
        return False
    factor = getattr(optimizer, "grad_scale", None)
    if factor is not None:
        for gradient in gradients:
            gradient.div_(factor.to(gradient.device))
    return bool(found)


def forget_scaler(optimizer: Any) -> None:
    """Drop what ``scaler.step`` has set and, after an exception, does not take back."""
    optimizer.__dict__.pop("found_inf", None)
    optimizer.__dict__.pop("grad_scale", None)


def clip(parameters: Sequence[Tensor], limit: float) -> None:
    """Clip the norm of all gradients, as torch does, also where some have rows only."""
    if not any(p.grad is not None and p.grad.is_sparse for p in parameters):
        nn.utils.clip_grad_norm_(parameters, limit)
        return
    parts = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            parts.append(parameter.grad.values())
        elif parameter.grad is not None:
            parts.append(parameter.grad)
    factor = (limit / (tensors.norm(parts) + 1e-6)).clamp(max=1.0)
    for part in parts:
        part.mul_(factor.to(part.device))
