"""What a torch optimizer knows of the parameters: learning rates and second moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit.errors import OperatorError
from sharpkit.objective.isolation import unwrap
from sharpkit.parameters import ParameterSpace

__all__ = ["OptimizerState"]

ITSELF = "Pass the optimizer itself"


@dataclass(frozen=True)
class OptimizerState:
    """The groups and the state of an optimizer, by the names of the parameters.

    Attributes:
        adam: Whether it is ``Adam`` or ``AdamW``.
        kind: Its class, or "state_dict".
        groups: The options of each parameter group.
        options: The options of each parameter's group, by the parameter's name.
        state: The state of each parameter, by its name.
        unnamed: Why names are not known; empty if they are.
    """

    adam: bool
    kind: str
    groups: tuple[Mapping[str, Any], ...]
    options: Mapping[str, Mapping[str, Any]]
    state: Mapping[str, Mapping[str, Any]]
    unnamed: str = ""

    @classmethod
    def of(cls, optimizer: object, model: nn.Module) -> OptimizerState:
        """Read an optimizer, or what its ``state_dict()`` returned.

        A state dict numbers the parameters. Their names are taken from it where the optimizer
        was made of ``named_parameters()``; otherwise its only group must hold the parameters
        of the model, or those that require gradients, in their order.

        Args:
            optimizer: A ``torch.optim.Optimizer`` or its state dict; a state already read is
                returned.
            model: The module that it trains.

        Raises:
            OperatorError: If it is neither.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> state = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
            >>> OptimizerState.of(state, model).setting("lr")
            0.1
        """
        if isinstance(optimizer, OptimizerState):
            return optimizer
        model = unwrap(model)
        if isinstance(optimizer, torch.optim.Optimizer):
            return cls._of_optimizer(optimizer, model)
        if isinstance(optimizer, Mapping) and {"state", "param_groups"} <= set(optimizer):
            return cls._of_state_dict(optimizer, model)
        raise OperatorError(
            "Expected a torch optimizer or its state_dict(). Got"
            f" {type(optimizer).__name__}. {ITSELF}, or optimizer.state_dict()."
        )

    @classmethod
    def _of_optimizer(cls, optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerState:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        named = dict(model.named_parameters(remove_duplicate=False))
        known = {n: p for n, p in named.items() if id(p) in groups}
        return cls(
            adam=isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)),
            kind=type(optimizer).__name__,
            groups=tuple(optimizer.param_groups),
            options={n: groups[id(p)] for n, p in known.items()},
            state={n: optimizer.state[p] for n, p in known.items() if p in optimizer.state},
        )

    @classmethod
    def _of_state_dict(cls, found: Mapping[str, Any], model: nn.Module) -> OptimizerState:
        groups = tuple(found["param_groups"])
        names, unnamed = _names(groups, model)
        options, state = {}, {}
        for group in groups:
            for number in group["params"] if names else ():
                options[names[number]] = group
                if number in found["state"]:
                    state[names[number]] = found["state"][number]
        shapes = {n: p.shape for n, p in model.named_parameters(remove_duplicate=False)}
        for name, entries in state.items():
            for what, tensor in entries.items():
                moment = isinstance(tensor, Tensor) and tensor.ndim > 0
                if moment and tensor.shape != shapes.get(name):
                    expected = tuple(shapes.get(name, ()))
                    raise OperatorError(
                        f"Expected the optimizer's state of this model: {what} of {name!r} of"
                        f" shape {expected}. Got {tuple(tensor.shape)}. {ITSELF}, or the"
                        " state of this model's."
                    )
        return cls(
            adam=all({"betas", "eps", "amsgrad"} <= set(g) for g in groups),
            kind="state_dict",
            groups=groups,
            options=options,
            state=state,
            unnamed=unnamed,
        )

    def setting(self, name: str) -> Any:
        """Return an option that all groups share, such as ``"lr"``.

        Raises:
            OperatorError: If a group has none, or groups differ.
        """
        if any(name not in group for group in self.groups):
            raise OperatorError(
                f"Expected an optimizer with the option {name!r}. This one ({self.kind}) has"
                f" {', '.join(k for k in self.groups[0] if k != 'params')}."
            )
        values = [group[name] for group in self.groups]
        if any(value != values[0] for value in values):
            shown = ", ".join(map(str, values))
            raise OperatorError(
                f"Expected one {name!r} for all parameters. The optimizer's groups have {shown}."
                " Restrict the objective to the parameters of one group, and pass its value."
            )
        value = values[0]
        return float(value) if isinstance(value, Tensor) else value

    def adam_diagonal(self, space: ParameterSpace) -> Tensor:
        r"""Return the diagonal ``[P]`` by which Adam's next step divides its momentum.

        See :func:`sharpkit.operators.adam_diagonal`.
        """
        if not self.adam:
            raise OperatorError(
                f"Expected a torch.optim.Adam or AdamW. Got {self.kind}. For others pass the"
                " diagonal of their preconditioner to preconditioned(A, diagonal)."
            )
        if self.unnamed:
            raise OperatorError(self.unnamed)
        unknown = [n for n in space.names if n not in self.options]
        if unknown:
            raise OperatorError(
                f"Expected the optimizer of this model. It does not train {_some(unknown)}. Pass"
                " the module whose parameters it was given, or leave those out with params=..."
            )
        idle = [n for n in space.names if "exp_avg_sq" not in self.state.get(n, {})]
        if idle:
            raise OperatorError(
                f"Expected second moments of every parameter. The optimizer has none of"
                f" {_some(idle)}: it made no step, or they had no gradient. Load its state, or"
                " leave them out with params=..."
            )
        parts = {}
        for name in space.names:
            group, state = self.options[name], self.state[name]
            beta1, beta2 = (float(b) for b in group["betas"])
            t = float(state["step"])
            v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].detach().double()
            parts[name] = (1 - beta1**t) * ((v / (1 - beta2**t)).sqrt() + float(group["eps"]))
        return space.flatten(parts)


def _names(groups: tuple[Mapping[str, Any], ...], model: nn.Module) -> tuple[dict[Any, str], str]:
    # The name of each numbered parameter, or why it is not known.
    if all("param_names" in group for group in groups):
        pairs = [zip(g["params"], g["param_names"], strict=True) for g in groups]
        return {number: name for pair in pairs for number, name in pair}, ""
    if len(groups) != 1:
        return {}, (
            f"Expected one parameter group, or names. The optimizer's state has {len(groups)}"
            " groups, and so the order of its parameters is not known. Pass the optimizer"
            " itself, or make it of model.named_parameters()."
        )
    numbers = groups[0]["params"]
    every = list(model.named_parameters())
    for named in (every, [(n, p) for n, p in every if p.requires_grad]):
        if len(named) == len(numbers):
            return dict(zip(numbers, (n for n, _ in named), strict=True)), ""
    return {}, (
        f"Expected the optimizer's state of this model, which has {len(every)} parameters. It"
        f" has {len(numbers)}. Pass the optimizer itself, or make it of"
        " model.named_parameters()."
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
