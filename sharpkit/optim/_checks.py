"""Settings and tensors that the optimizers accept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit.errors import SettingsError

__all__ = [
    "at_least_one",
    "at_least_zero",
    "check_base",
    "check_group",
    "check_list",
    "check_not_accumulated",
    "check_parameters",
    "check_selection",
    "finite",
    "fraction",
    "mark_as_used",
]


def at_least_zero(name: str, value: float) -> float:
    """Return ``value``, a finite number from 0.

    Raises:
        SettingsError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise SettingsError(f"Expected a finite `{name}` of 0 or more. Got {value!r}.")
    return float(value)


def at_least_one(name: str, value: int) -> int:
    """Return ``value``, an integer from 1.

    Raises:
        SettingsError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"Expected an integer `{name}` of 1 or more. Got {value!r}.")
    return value


def fraction(name: str, value: float, *, zero: bool = True, one: bool = True) -> float:
    """Return ``value``, a number between 0 and 1; the ends belong to it if they are allowed.

    Raises:
        SettingsError: If it is anything else.
    """
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
        ends = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise SettingsError(f"Expected `{name}` in {ends}. Got {value!r}.")
    return float(value)


def check_base(base: object) -> None:
    """Refuse what cannot be wrapped.

    Raises:
        SettingsError: If it is no instance of a torch optimizer, or LBFGS, or maximises.
    """
    if not isinstance(base, Optimizer):
        raise SettingsError(
            f"Expected an instance of a torch optimizer as `base_optimizer`. Got {base!r}. Write"
            " SAM(torch.optim.SGD(model.parameters(), lr=0.1))."
        )
    if isinstance(base, torch.optim.LBFGS):
        raise SettingsError(
            "Expected a base optimizer that steps along the gradient it is given. Got LBFGS,"
            " which calls the closure itself."
        )
    for group in base.param_groups:
        check_group(group)


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse parameters that climb: a loss is perturbed uphill.

    Raises:
        SettingsError: With ``maximize``.
    """
    if group.get("maximize"):
        raise SettingsError(
            "Expected a base optimizer that minimises. Got maximize=True, where the worst point"
            " nearby is downhill; minimise the negative instead."
        )


def check_list(name: str, tensors: object) -> None:
    """Refuse one tensor where a list is due: its rows are no parameters.

    Raises:
        SettingsError: If it is one.
    """
    if isinstance(tensors, Tensor):
        raise SettingsError(
            f"Expected a list of parameters as `{name}`. Got one tensor; write [tensor]."
        )


def check_selection(selected: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Refuse to perturb nothing, or what is not trained.

    Raises:
        SettingsError: If ``selected`` is empty or not among ``parameters``.
    """
    known = {id(p) for p in parameters}
    strangers = sum(id(p) not in known for p in selected)
    if not selected or strangers:
        raise SettingsError(
            "Expected in `perturb` one parameter or more, all of them in the base optimizer's"
            f" groups. Got {len(selected)}, of which {strangers} are not."
        )


def mark_as_used(gradient: Tensor) -> None:
    """Remember that a step was made with this gradient, as it is now."""
    gradient._sharpkit_left = gradient._version  # type: ignore[attr-defined]


def check_not_accumulated(gradients: Iterable[Tensor]) -> None:
    """Refuse gradients that no step was made with: a closure's own would replace them.

    Raises:
        SettingsError: If there are any that are not zero.
    """
    for gradient in gradients:
        left = getattr(gradient, "_sharpkit_left", None)
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        if left != gradient._version and bool(values.any()):
            raise SettingsError(
                "Expected no gradients before step(closure), which makes its own. Got some,"
                " which would be lost. To accumulate, call backward on every micro-batch in"
                " the closure; otherwise call zero_grad() first."
            )


def check_parameters(parameters: Iterable[Tensor]) -> None:
    """Refuse parameters whose norm is not defined or not known on this rank.

    Raises:
        SettingsError: For complex or sharded parameters.
    """
    for parameter in parameters:
        if parameter.is_complex():
            raise SettingsError(
                "Expected real parameters. Got complex ones, for which the perturbation is"
                " not defined here; keep real and imaginary parts as two parameters."
            )
        if {kind.__name__ for kind in type(parameter).__mro__} & {"DTensor", "FlatParameter"}:
            raise SettingsError(
                "Expected whole parameters on every rank. Got sharded ones"
                f" ({type(parameter).__name__}), whose norm on one rank is not the norm; use"
                " DistributedDataParallel."
            )


def finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether every entry is finite; waits for the device."""
    values = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    flags = [torch.isfinite(value).all().cpu() for value in values]
    return all(bool(flag) for flag in flags)
