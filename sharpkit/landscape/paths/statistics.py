"""Running statistics of BatchNorm, which are no parameters and so on no path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import nn

from sharpkit.errors import MeasureError, SettingsError
from sharpkit.objective import Objective
from sharpkit.objective.states import state_of, with_state
from sharpkit.objective.statistics import has_running_statistics, reestimated

__all__ = ["Statistics", "like_there", "normalised_by_statistics", "with_statistics"]

Statistics: TypeAlias = Literal["reestimate", "refuse", "keep"] | Callable[[Objective], Objective]
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
        statistics: ``"reestimate"``: estimated anew on the objective's batches
            (:func:`sharpkit.objective.statistics.reestimated`, another pass), for those of one
            end belong to no other point; ``"refuse"``: raise if the network has some;
            ``"keep"``: take the objective's own everywhere, which is right where all BatchNorms
            are folded; or a function of the objective at a point, which returns it with
            statistics estimated there.

    Raises:
        SettingsError: If the setting is unknown.
        MeasureError: If it says to refuse and the network has running statistics.
    """
    if callable(statistics):
        return statistics(objective)
    if statistics == "reestimate":
        return reestimated(objective) if has_running_statistics(objective.model) else objective
    if statistics == "keep":
        return objective
    if statistics != "refuse":
        raise SettingsError(
            "Expected `statistics` to be 'reestimate', 'refuse', 'keep', or a function that maps"
            f" an objective to one with running statistics estimated anew. Got {statistics!r}."
        )
    found = normalised_by_statistics(objective.model)
    if found:
        raise MeasureError(
            f"Expected a network without running statistics on a path. {found[0]!r}"
            f"{f' and {len(found) - 1} more' if len(found) > 1 else ''} normalise by them, and"
            " those of an end are wrong everywhere else. Use statistics='reestimate', or fold"
            " BatchNorms into the layers (canonicalize(..., fold_batch_norm=True)) and say"
            " statistics='keep'."
        )
    return objective


def like_there(objective: Objective, there: Objective) -> Objective:
    """Return an objective of other data at the parameters and with the buffers of one there.

    Running statistics belong to the data trained on, also where other data are measured.

    Args:
        objective: The other data.
        there: Where to measure.
    """
    buffers = {name for name, _ in there.model.named_buffers()}
    moved = objective.at(there.theta)
    if not has_running_statistics(there.model):
        return moved
    state = {n: t for n, t in state_of(there).items() if n in buffers}
    return with_state(moved, {**state_of(moved), **state})
