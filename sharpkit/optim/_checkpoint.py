"""A wrapper's part of a state dict: plain values, and tensors by the parameter's number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.optim._wrapper import Wrapper, of_itself

__all__ = ["KEY", "Resumable"]

KEY = "sharpkit"
"""The key that stands beside the base optimizer's ``state`` and ``param_groups``."""


def packed(
    method: str,
    steps: int,
    settings: dict[str, Any],
    memory: Mapping[str, Mapping[Tensor, Tensor]],
    parameters: Sequence[Tensor],
) -> dict[str, Any]:
    """Return what `torch.load` reads with ``weights_only=True``."""
    number = {parameter: i for i, parameter in enumerate(parameters)}
    return {
        "method": method,
        "steps": steps,
        "settings": settings,
        "memory": {
            name: {number[parameter]: value for parameter, value in tensors.items()}
            for name, tensors in memory.items()
        },
    }


def unpacked(
    memory: Mapping[str, Mapping[int, Tensor]], parameters: Sequence[Tensor]
) -> dict[str, dict[Tensor, Tensor]]:
    """Return copies of the tensors on their parameters' devices, by parameter again."""
    return {
        name: {
            parameters[i]: value.to(parameters[i].device, copy=True) for i, value in tensors.items()
        }
        for name, tensors in memory.items()
    }


def check_method(own: Mapping[str, Any] | None, method: str) -> None:
    """Refuse the state of another method.

    Raises:
        SettingsError: If it is.
    """
    if own is not None and own["method"] != method:
        raise SettingsError(
            f"Expected the state of {method}. Got that of {own['method']}; load it into `base` to"
            " keep the base optimizer's state only."
        )


class Resumable(Wrapper):
    """A wrapper whose own state stands in the state dict beside the base optimizer's."""

    #: Settings that ``state_dict`` keeps and ``load_state_dict`` brings back.
    saved_settings: ClassVar[tuple[str, ...]] = ("rho",)

    steps: int
    memory: dict[str, dict[Tensor, Tensor]]
    _generator: torch.Generator | None
    _begun: bool

    @of_itself
    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict with one key more for the wrapper.

        It never holds weights. A base optimizer loads it as its own.

        Raises:
            SettingsError: Between `first_step` and `step`, when the weights are perturbed.
        """
        if self._begun:
            raise SettingsError(
                "Expected `state_dict()` between two steps. Got it after `first_step()`, when the"
                " model has perturbed weights; call `step()` first."
            )
        settings = {name: getattr(self, name) for name in self.saved_settings}
        own = packed(type(self).__name__, self.steps, settings, self.memory, self.parameters())
        own["more"] = self._more_state()
        if self._generator is not None:
            own["generator"] = self._generator.get_state()
        return {**self.base.state_dict(), KEY: own}

    @of_itself
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; settings come back too, as torch does it.

        The state dict of the plain base optimizer is accepted as well and leaves the wrapper as
        it is, as when training goes over to it half way.

        Raises:
            SettingsError: If the state dict is of another method, and between `first_step` and
                `step`.
        """
        if self._begun:
            raise SettingsError(
                "Expected `load_state_dict()` between two steps. Got it after `first_step()`; call"
                " `restore()` before the model's weights are loaded."
            )
        own = state_dict.get(KEY)
        check_method(own, type(self).__name__)
        self.base.load_state_dict({key: v for key, v in state_dict.items() if key != KEY})
        if own is not None:
            self.steps, self.memory = own["steps"], unpacked(own["memory"], self.parameters())
            for name, value in own["settings"].items():
                setattr(self, name, value)
            self._load_more_state(own["more"])
            if self._generator is not None:
                self._generator.set_state(own["generator"].cpu())

    def _more_state(self) -> dict[str, Any]:
        """Return what else the method must keep: plain values and tensors."""
        return {}

    def _load_more_state(self, state: dict[str, Any]) -> None:
        """Take back what `_more_state` returned."""
