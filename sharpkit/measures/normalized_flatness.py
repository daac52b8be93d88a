"""Normalized flatness: the curvature under noise that is scaled to suit the weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures._blocks import BlockMethod
from sharpkit.measures._concave import Concave, Traces, concave_estimate, entries
from sharpkit.measures._scales import best_scales
from sharpkit.measures.registry import register
from sharpkit.results import Cost, Estimate, Part

TIGHT = 1e-10  # tolerance of the scales
LOOSE = 1e-5  # under added noise: a bias is wanted, no more
FOUND = 1e-6  # of the value: what may be left to gain


@register(
    "normalized_flatness",
    symbol="min_ab sum_ij (a_i b_j h_ij + w_ij^2/(a_i b_j))/2",
    reference="Tsuzuku, Sato, Sugiyama 2020, arXiv:1901.04653",
    cost="num_probes HVPs (100), P if exact; GGN: a gradient an output",
    invariant_to={
        "permutation",
        "layer_scale",
        "node_scale",
        "pair_scale",
        "batch_norm_scale",
        "logit_scale",
        "key_bias_shift",
    },
    degree=0.5,
    nonnegative=True,
)
def normalized_flatness(
    analysis: Analysis,
    *,
    scales: Literal["rows_columns", "free"] = "rows_columns",
    method: BlockMethod = "auto",
    num_probes: int = 100,
) -> Estimate:
    r"""Least price of noise in the weights, its scales chosen for each row and column.

    .. math:: \sum_{\text{weights } W} \min_{a, b > 0} \tfrac12 \sum_{ij}
        a_i b_j\,h_{ij} + \frac{w_{ij}^2}{a_i b_j}

    with h the Hessian's diagonal. With noise of variance :math:`a_i b_j` the first term is the
    mean rise of the loss, and the second the information that the weights then hold (the
    Kullback-Leibler divergence from noise of the same variance around zero). It is the core of
    the paper's PAC-Bayesian argument, in which scales of rows and columns undo those of units;
    the exact expression printed there was not at hand, and this one is derived from it. A
    weight lambda of the loss in place of 1 only multiplies it by :math:`\lambda^{1/2}`. Convex
    in the logarithms of a and b, which are found in turn, each in closed form. With
    ``"free"`` every weight has its own scale, and the minimum is
    :math:`\sum_{ij} |w_{ij}| \sqrt{h_{ij}}`, which is never more.

    Weights are the tensors of two or more axes (where there is none, all, each entry a row);
    rows and columns of a convolution are its output and input channels, whose h and squares
    are summed over the kernel. Biases have no part. Defined at (near-)minimisers: negative h
    count as 0 and their share is stated. The value is concave in h, so noise in h biases it
    down, and cutting off negative ones up; the error is bounded as in ``adam_sharpness``.

    Args:
        analysis: What is measured.
        scales: ``"rows_columns"`` or ``"free"``.
        method: ``"auto"`` (exact with at most ``num_probes`` parameters), ``"exact"``,
            ``"hutchinson"``, or ``"ggn"``: the Gauss-Newton matrix's diagonal, exact at any P
            and never negative.
        num_probes: Budget of Hessian-vector products for the diagonal.
    """
    check_positive("num_probes", num_probes, minimum=2)
    traces = entries(analysis, method=method, num_probes=num_probes)
    space, found = analysis.objective.space, {}
    theta = space.unflatten(analysis.theta)
    wanted = [n for n, shape in zip(space.names, space.shapes, strict=True) if len(shape) > 1]
    start = 0
    for name, shape, size in zip(space.names, space.shapes, space.sizes, strict=True):
        here = slice(start, start + size)
        start += size
        if wanted and name not in wanted:
            continue
        squares = theta[name].double().square()
        part = _part(traces, here)
        if scales == "free":
            function = _free(squares.flatten().sqrt())
            found[name] = concave_estimate(analysis, f"normalized_flatness {name}", part, function)
            continue
        matrix = (shape[0], shape[1] if len(shape) > 1 else 1)
        part, squares = _channels(part, matrix), _summed(squares, matrix)
        best = best_scales(part.values.clamp(min=0).view(matrix), squares)
        function = _rows_and_columns(squares, best.columns, TIGHT if part.exact else LOOSE)
        estimate = concave_estimate(analysis, f"normalized_flatness {name}", part, function)
        short = best.remaining > FOUND * best.value
        note = (f"The search for the best scales may be {best.remaining:.1g} above the least.",)
        found[name] = replace(
            estimate,
            probe_error=(estimate.probe_error or 0.0) + best.remaining,
            converged=estimate.converged and not short,
            notes=estimate.notes + (note if short else ()),
        )
    return _sum(found, traces)


def _part(traces: Traces, here: slice) -> Traces:
    return Traces(
        traces.values[here],
        traces.errors[here],
        traces.variances[here],
        traces.rounding[here],
        traces.kind,
        traces.num_probes,
        traces.cost,
    )


def _summed(entries: Tensor, matrix: tuple[int, int]) -> Tensor:
    # Over a kernel's positions.
    return entries.reshape(*matrix, -1).sum(dim=2)


def _channels(part: Traces, matrix: tuple[int, int]) -> Traces:
    values, variances, rounding = (
        _summed(x, matrix).flatten() for x in (part.values, part.variances, part.rounding)
    )
    single = values.numel() == part.values.numel()
    errors = part.errors if single else variances.sqrt()  # correlated: at most so much
    return Traces(values, errors, variances, rounding, part.kind, part.num_probes, part.cost)


def _free(sizes: Tensor) -> Concave:
    return Concave(lambda h: float((sizes * h.sqrt()).sum()), lambda h: 0.5 * sizes / h.sqrt())


def _rows_and_columns(squares: Tensor, start: Tensor, tol: float) -> Concave:
    def value(h: Tensor) -> float:
        return best_scales(h.view_as(squares), squares, start=start, tol=tol).value

    def slope(h: Tensor) -> Tensor:
        # The scales stand still to first order: what an entry weighs is its noise's variance.
        best = best_scales(h.view_as(squares), squares, start=start, tol=LOOSE)
        return 0.5 * best.products.flatten()

    return Concave(value, slope, powers=(0.5, 1.0))


def _sum(found: dict[str, Estimate], traces: Traces) -> Estimate:
    estimates = list(found.values())
    value = sum(e.value for e in estimates)
    error = math.fsum(e.probe_error or 0.0 for e in estimates)
    negative = float((traces.values < 0).double().mean())
    notes = tuple(dict.fromkeys(f"{name}: {n}" for name, e in found.items() for n in e.notes))
    return Estimate(
        value=value,
        probe_error=error,
        error_kind="bound",
        converged=all(e.converged for e in estimates) if traces.exact else error <= 0.1 * value,
        cost=Cost(hvps=traces.cost.hvps, gradients=traces.cost.gradients),
        parts=tuple(Part(name, e.value, e.probe_error, e.converged) for name, e in found.items()),
        details={
            "diagonal": traces.kind,
            "num_probes": traces.num_probes,
            "negative_share": negative,
        },
        notes=notes,
    )
