"""What optimizers that share a step size within blocks of parameters minimize implicitly."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.estimators import block_sums
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures._concave import Concave, Traces, concave_estimate
from sharpkit.results import Cost, Estimate, Part

BlockMethod: TypeAlias = Literal["auto", "exact", "hutchinson", "ggn"]


def rows_of(analysis: Analysis) -> list[tuple[str, int]]:
    """Return the names of the parameters, and how many rows each has (a vector: one)."""
    space = analysis.objective.space
    shapes = zip(space.names, space.shapes, strict=True)
    return [(name, shape[0] if len(shape) > 1 else 1) for name, shape in shapes]


def shared_step_sharpness(
    analysis: Analysis,
    purpose: str,
    labels: Tensor,
    names: list[str] | None,
    *,
    method: BlockMethod,
    num_probes: int,
) -> Estimate:
    r"""Return :math:`\sum_B \sqrt{|B| \operatorname{tr} H_{BB}}`.

    Args:
        analysis: What is measured.
        purpose: The measure's name.
        labels: ``[R]``: the block that each row of each parameter belongs to.
        names: The blocks' names, if they are few enough to be parts.
        method: As for the measures.
        num_probes: Budget of products.
    """
    check_positive("num_probes", num_probes, minimum=2)
    traces, sizes = _traces(analysis, labels, method, num_probes)
    device = analysis.objective.space.device  # where random numbers are drawn
    traces, weights = traces.to(device), sizes.sqrt().to(device)
    function = Concave(
        lambda t: float((weights * t.sqrt()).sum()),
        lambda t: 0.5 * weights / t.sqrt(),
        bend=lambda t: 0.25 * weights / t**1.5,
    )
    estimate = concave_estimate(analysis, purpose, traces, function, what="blocks' traces")
    parts: tuple[Part, ...] = ()
    if names is not None:
        values = (weights * traces.values.clamp(min=0).sqrt()).tolist()
        margin = traces.rounding if traces.exact else 2 * traces.errors
        tops = (weights * (traces.values.clamp(min=0) + margin).sqrt()).tolist()
        lows = (weights * (traces.values - margin).clamp(min=0).sqrt()).tolist()
        parts = tuple(
            Part(name, value, max(top - value, value - low))
            for name, value, top, low in zip(names, values, tops, lows, strict=True)
        )
    return Estimate(
        value=estimate.value,
        probe_error=estimate.probe_error,
        error_kind=estimate.error_kind,
        converged=estimate.converged,
        cost=estimate.cost,
        parts=parts,
        details={**estimate.details, "num_blocks": len(sizes)},
        notes=estimate.notes,
    )


def _traces(
    analysis: Analysis, labels: Tensor, method: BlockMethod, num_probes: int
) -> tuple[Traces, Tensor]:
    space = analysis.objective.space
    cuts = list(zip(space.sizes, (rows for _, rows in rows_of(analysis)), strict=True))
    count = int(labels.max()) + 1

    def gather(x: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device="cpu").index_add_(0, labels, x)

    def rounding(sums: Tensor, largest: float, sizes: Tensor) -> Tensor:
        # That of a sum of entries, each wrong by its own share or that of the largest.
        return analysis.product_error * (sums + largest * sizes.sqrt())

    if method in ("exact", "ggn") or (method == "auto" and space.dim <= num_probes):
        diagonal = analysis.diagonal(
            method="ggn" if method == "ggn" else "exact", num_probes=num_probes
        )
        h = diagonal.values.double()
        values, sizes = gather(block_sums(h, cuts)), gather(block_sums(torch.ones_like(h), cuts))
        zeros = torch.zeros_like(values)
        cost = Cost(hvps=space.dim)
        if method == "ggn":
            cost = Cost(gradients=diagonal.num_gradients)
        wrong = rounding(gather(block_sums(h.abs(), cuts)), float(h.abs().max()), sizes)
        kind = "ggn" if method == "ggn" else "exact"
        return Traces(values, zeros, zeros, wrong, kind, 0, cost), sizes
    found = analysis.row_traces(num_probes=num_probes).merged(labels)
    largest = float(found.values.abs().max())
    wrong = rounding(found.values.abs(), largest, torch.ones_like(found.sizes))
    variances = found.largest_variances + wrong.square()
    traces = Traces(
        found.values,
        (found.errors.square() + wrong.square()).sqrt(),
        variances,
        wrong,
        "hutchinson",
        num_probes,
        Cost(hvps=num_probes),
    )
    return traces, found.sizes
