"""How much a rise of the loss depends on the sample of the data: by groups, or by shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.objective.groups import group_error
from sharpkit.results import Cost, Estimate

PAIRS = 10  # of perturbations, that an average over many is looked at by

DataError = tuple[float | None, tuple[float, ...]]

UNKNOWN: DataError = (None, ())


def rise_by_groups(analysis: Analysis, deltas: Iterable[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return each group's share of the loss terms and of the mean rise, ``[G]`` each.

    One pass for each perturbation, and one at theta; None if no groups are asked for.
    """
    if not analysis.num_groups:
        return None
    groups = analysis.num_groups
    weights, here = analysis.objective.grouped_value(groups)
    there, count = torch.zeros_like(here), 0
    for delta in deltas:
        there += analysis.objective.at(analysis.theta + delta).grouped_value(groups)[1]
        count += 1
    return weights, there / count - here


def rise_error(analysis: Analysis, deltas: Iterable[Tensor], value: float) -> DataError:
    """Return the standard error of a rise at fixed perturbations, and its pseudo-values."""
    parts = rise_by_groups(analysis, deltas)
    if parts is None:
        return UNKNOWN
    return centred(group_error(parts[1], parts[0]), value)


def centred(error: tuple[float, tuple[float, ...]] | None, value: float) -> DataError:
    """Return the error and pseudo-values moved to have the mean that was measured."""
    if error is None or not all(map(math.isfinite, error[1])):
        return UNKNOWN
    size, values = error
    shift = value - sum(values) / len(values)
    return size, tuple(v + shift for v in values)


def mean_over_shards(
    analysis: Analysis,
    measure: Callable[[Analysis, str], Estimate],
    *,
    shard_size: int | None,
    purpose: str,
    by_terms: bool = True,
) -> Estimate:
    """Return the mean of a number over shards of the data, each measured by itself.

    The shards are disjoint samples, so the spread of their numbers gives the data error.

    Args:
        analysis: What is measured.
        measure: Maps the analysis of a shard, and a purpose of its own for random draws.
        shard_size: Examples of a shard; None: the batches as they are.
        purpose: Of the random draws.
        by_terms: Weigh shards by their loss terms, not all alike.
    """
    weights, estimates = [], []
    for index, shard in enumerate(analysis.objective.shards(shard_size)):
        weights.append(shard.num_terms if by_terms else 1.0)
        part = Analysis(shard, seed=analysis.seed, num_groups=0)
        estimates.append(measure(part, f"{purpose} {index}"))
    share = torch.tensor(weights, dtype=torch.float64, device="cpu")
    share = share / share.sum()
    values = torch.tensor([e.value for e in estimates], dtype=torch.float64, device="cpu")
    value = float(share @ values)
    error, draws = centred(group_error(share * values, share), value)
    gaps = [e.probe_error for e in estimates]
    lengths = [e.details.get("perturbation_norm", 0.0) for e in estimates]
    return Estimate(
        value=value,
        probe_error=sum(float(w) * (g or 0.0) for w, g in zip(share, gaps, strict=True)),
        error_kind=estimates[0].error_kind,
        data_error=error,
        converged=all(e.converged for e in estimates),
        cost=Cost(gradients=max(e.cost.gradients for e in estimates)),
        details={
            "num_shards": len(estimates),
            "shard_size": shard_size,
            "smallest": float(values.min()),
            "largest": float(values.max()),
            "perturbation_norm": max(lengths),
        },
        notes=_counted([e.notes for e in estimates]),
        data_draws=draws,
    )


def _counted(notes: Sequence[Sequence[str]]) -> tuple[str, ...]:
    # The notes of the first shard that has some, and how many have any.
    having = [n for n in notes if n]
    if not having:
        return ()
    if len(having) == len(notes) == 1:
        return tuple(having[0])
    return (f"{len(having)} of {len(notes)} shards have notes; the first of them:", *having[0])
