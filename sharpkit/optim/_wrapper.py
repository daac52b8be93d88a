"""A torch optimizer that is another one with something around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Wrapper", "of_itself"]

P = ParamSpec("P")
R = TypeVar("R")
W = TypeVar("W", bound="Wrapper")


def of_itself(method: Callable[Concatenate[W, P], R]) -> Callable[Concatenate[W, P], R]:
    """Run a method on the optimizer inside an object that has only taken its class.

    Lightning's ``self.optimizers()`` is such an object: what a method sets on it is lost.
    """

    @wraps(method)
    def run(self: W, /, *args: P.args, **kwargs: P.kwargs) -> R:
        while "base" not in self.__dict__:
            self = self.optimizer  # type: ignore[attr-defined]
        return method(self, *args, **kwargs)

    return run


class Wrapper(Optimizer):
    """An optimizer whose groups, state and defaults are those of ``base``, not copies."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        super().__setstate__({})  # hooks of a torch optimizer, without groups of its own

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's parameter groups, the same list."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state, the same dict."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults."""
        return self.base.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        self.base.zero_grad(set_to_none)

    def parameters(self) -> list[Tensor]:
        """Return the parameters of all groups, in order."""
        return [p for group in self.param_groups for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("step", None)  # a scheduler's wrapper of this very instance
        return state
