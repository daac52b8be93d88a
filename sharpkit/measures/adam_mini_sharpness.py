"""The sharpness that Adam-mini minimizes implicitly."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

import torch

from sharpkit.analysis import Analysis
from sharpkit.errors import SettingsError
from sharpkit.measures._blocks import BlockMethod, rows_of, shared_step_sharpness
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "adam_mini_sharpness",
    symbol="sum_B sqrt(|B| tr H_BB), rows",
    reference="Li, Wen, Lyu 2025, arXiv:2511.02773; Zhang et al. 2024, arXiv:2406.16793",
    cost="24 Lanczos steps and 32 HVPs (shared), P if exact; GGN: a gradient an output",
    invariant_to={"permutation", "key_bias_shift"},
    degree=0.5,
    nonnegative=True,
)
def adam_mini_sharpness(
    analysis: Analysis,
    *,
    num_probes: int = 32,
    method: BlockMethod = "auto",
    partition: Literal["rows", "tensors"] = "rows",
    heads: int | None = None,
    head_weights: str = "*[qk]_proj.weight",
) -> Estimate:
    r"""Root of size times trace summed over blocks, which Adam-mini minimizes implicitly.

    .. math:: \sum_B \sqrt{|B| \operatorname{tr} H_{BB}}

    where one second moment serves each block: one row (output neuron, token) of each weight,
    and all of each vector. Adam-mini takes the rows of a query's or key's weight head by head;
    give the number of heads for that. Single entries as blocks would be Adam's
    ``adam_sharpness``, and all parameters in one block :math:`\sqrt{P \operatorname{tr} H}`.

    Defined where no block's trace is negative; negative ones count as 0 and their share is
    stated. The traces come from one set of probes; the bias of their roots is bounded as in
    ``adam_sharpness``, and is far smaller, as many entries make one trace. Rows are indices of
    the first axis: for weights stored as (in, out) they are inputs.

    Args:
        analysis: What is measured.
        num_probes: Budget of Hessian-vector products, beside the Lanczos run's.
        method: ``"auto"`` (exact with at most ``num_probes`` parameters), ``"exact"``,
            ``"hutchinson"`` or ``"ggn"`` (of the Gauss-Newton matrix, exact at any P).
        partition: ``"rows"``, or ``"tensors"``: one block a parameter, as in Adam-mini's
            first version for all but embeddings, queries and keys.
        heads: Blocks of each weight that ``head_weights`` matches; None: as the others.
        head_weights: Glob of the queries' and keys' weights.
    """
    labels: list[int] = []
    matched = False
    for name, rows in rows_of(analysis):
        start, blocks = (labels[-1] + 1 if labels else 0), rows
        if heads is not None and fnmatchcase(name, head_weights):
            matched = True
            if heads < 1 or rows % heads:
                raise SettingsError(
                    f"Expected `heads` to divide the rows of {name!r}, {rows}. Got {heads}."
                )
            blocks = heads
        elif partition == "tensors":
            blocks = 1
        labels += [start + row * blocks // rows for row in range(rows)]
    if heads is not None and not matched:
        raise SettingsError(
            f"Expected `head_weights` to match a weight, as `heads` is given. Got"
            f" {head_weights!r}, which matches none."
        )
    return shared_step_sharpness(
        analysis,
        "adam_mini_sharpness",
        torch.tensor(labels, device="cpu"),
        None,
        method=method,
        num_probes=num_probes,
    )
