"""Diagonal blocks of a curvature matrix, one for each group of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.objective import Objective
from sharpkit.operators.base import SymmetricOperator
from sharpkit.parameters import Grouping, groups

__all__ = ["blocks"]

_PRODUCTS: dict[str, Callable[[Objective], Callable[[Tensor], Tensor]]] = {
    "hessian": lambda objective: objective.hvp,
    "ggn": lambda objective: objective.ggnvp,
    "empirical_fisher": lambda objective: objective.fisher_vp,
}


def blocks(
    objective: Objective,
    by: Grouping = "layer",
    *,
    matrix: Literal["hessian", "ggn", "empirical_fisher"] = "hessian",
) -> dict[str, SymmetricOperator]:
    """Return the diagonal blocks of a curvature matrix, by the names of their groups.

    Each is that of ``objective.restrict``, made at its first product: the cost of a block
    is that of the layers that its derivatives pass.

    Args:
        objective: The objective.
        by: ``"layer"`` (all parameters of one module), ``"parameter"`` (one tensor), a glob
            or several, of which each makes one block; these may overlap.
        matrix: ``"hessian"``, ``"ggn"`` or ``"empirical_fisher"``.

    Raises:
        ObjectiveError: If a glob matches nothing.
        SettingsError: If there is no such matrix.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> objective = Objective(model, torch.nn.MSELoss(), (torch.eye(2), torch.ones(2, 1)))
        >>> {name: block.dim for name, block in blocks(objective).items()}
        {'0': 9, '1': 4}
    """
    if matrix not in _PRODUCTS:
        raise SettingsError(
            f"Expected `matrix` to be one of {', '.join(_PRODUCTS)}. Got {matrix!r}."
        )
    sizes = dict(zip(objective.space.names, objective.space.sizes, strict=True))
    return {
        group: _block(objective, names, sum(sizes[n] for n in names), matrix)
        for group, names in groups(objective.space, by).items()
    }


def _block(objective: Objective, names: list[str], dim: int, matrix: str) -> SymmetricOperator:
    made: list[Callable[[Tensor], Tensor]] = []
    chosen = set(names)

    def matmat(V: Tensor) -> Tensor:
        if not made:
            made.append(_PRODUCTS[matrix](objective.restrict(lambda name: name in chosen)))
        return made[0](V)

    space = objective.space
    return SymmetricOperator(
        matmat, dim, dtype=space.dtype, device=space.device, team=objective.team
    )
