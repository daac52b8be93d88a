"""Running statistics of BatchNorm, which are no parameters and so on no path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import nn

from sharpkit.errors import MeasureError, SettingsError
from sharpkit.objective import Objective

__all__ = ["Statistics", "normalised_by_statistics", "with_statistics"]

Statistics: TypeAlias = Literal["refuse", "keep"] | Callable[[Objective], Objective]
"""What becomes of running statistics between the ends: see :func:`with_statistics`."""


def normalised_by_statistics(model: nn.Module) -> list[str]:
    """Return the names of the modules that normalise by running statistics.

    Example:
        >>> normalised_by_statistics(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
        ['1']
    """
    return [
        name or "the model"
        for name, module in model.named_modules()
        if getattr(module, "running_mean", None) is not None
        and getattr(module, "running_var", None) is not None
    ]


def with_statistics(objective: Objective, statistics: Statistics) -> Objective:
    """Return the objective with the running statistics that belong to its theta.

    Args:
        objective: At a point of a path.
        statistics: ``"refuse"``: raise if the network has some, for those of one end belong to
            no other point; ``"keep"``: take the objective's own everywhere, which is right
            where all BatchNorms are folded; or a function of the objective at a point, which
            returns it with statistics estimated there.

    Raises:
        SettingsError: If the setting is unknown.
        MeasureError: If it says to refuse and the network has running statistics.
    """
    if callable(statistics):
        return statistics(objective)
    if statistics == "keep":
        return objective
    if statistics != "refuse":
        raise SettingsError(
            "Expected `statistics` to be 'refuse', 'keep', or a function that maps an objective"
            f" to one with running statistics estimated anew. Got {statistics!r}."
        )
    found = normalised_by_statistics(objective.model)
    if found:
        raise MeasureError(
            f"Expected a network without running statistics on a path. {found[0]!r}"
            f"{f' and {len(found) - 1} more' if len(found) > 1 else ''} normalise by them, and"
            " those of an end are wrong everywhere else. Give a function that estimates them"
            " anew as statistics=..., or fold BatchNorms into the layers"
            " (canonicalize(..., fold_batch_norm=True)) and say statistics='keep'."
        )
    return objective
