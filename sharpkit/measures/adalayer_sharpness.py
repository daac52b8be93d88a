"""The sharpness that Adalayer minimizes implicitly."""

from __future__ import annotations

from typing import Literal

import torch

from sharpkit.analysis import Analysis
from sharpkit.measures._blocks import BlockMethod, rows_of, shared_step_sharpness
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "adalayer_sharpness",
    symbol="sum_B sqrt(|B| tr H_BB), layers",
    reference="Li, Wen, Lyu 2025, arXiv:2511.02773; Zhao et al. 2024, arXiv:2407.07972",
    cost="24 Lanczos steps and 32 HVPs (shared), P if exact; GGN: a gradient an output",
    invariant_to={"permutation", "key_bias_shift"},
    degree=0.5,
    nonnegative=True,
)
def adalayer_sharpness(
    analysis: Analysis,
    *,
    num_probes: int = 32,
    method: BlockMethod = "auto",
    by: Literal["parameter", "layer"] = "parameter",
) -> Estimate:
    r"""Root of size times trace summed over layers, which Adalayer minimizes implicitly.

    .. math:: \sum_\ell \sqrt{|\ell| \operatorname{tr} H_{\ell\ell}}

    where one second moment serves each layer; the terms are the parts. Defined where no
    layer's trace is negative; negative ones count as 0 and their share is stated. The traces
    come from the same probes as ``adam_mini_sharpness``'s, and the bias of their roots is
    bounded as in ``adam_sharpness``.

    Args:
        analysis: What is measured.
        num_probes: Budget of Hessian-vector products, beside the Lanczos run's.
        method: ``"auto"`` (exact with at most ``num_probes`` parameters), ``"exact"``,
            ``"hutchinson"`` or ``"ggn"`` (of the Gauss-Newton matrix, exact at any P).
        by: What counts as a layer: each ``"parameter"`` (weight and bias apart), or all
            parameters of one module, ``"layer"``.
    """
    names: list[str] = []
    labels: list[int] = []
    for name, rows in rows_of(analysis):
        layer = name if by == "parameter" else name.rpartition(".")[0]
        if layer not in names:
            names.append(layer)
        labels += [names.index(layer)] * rows
    return shared_step_sharpness(
        analysis,
        "adalayer_sharpness",
        torch.tensor(labels, device="cpu"),
        names,
        method=method,
        num_probes=num_probes,
    )
