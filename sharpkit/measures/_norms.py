"""What the norms of parameters share: which of them count, and the sums by layer."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.errors import MeasureError
from sharpkit.results import Estimate, Part

Which: TypeAlias = Literal["all", "weights"]


def norm_of(analysis: Analysis, vector: Tensor, which: Which, squared: bool) -> Estimate:
    """Return the Euclidean norm of a vector ``[P]``, and those of its layers as parts."""
    vector = vector.double()
    if which == "weights":
        space = analysis.objective.space
        chosen = {n for n, s in zip(space.names, space.shapes, strict=True) if len(s) >= 2}
        if not chosen:
            raise MeasureError(
                "Expected parameters of two axes or more for which='weights'. There are none."
                " Use which='all'."
            )
        kept = [
            torch.full((size,), n in chosen, device=vector.device)
            for n, size in zip(space.names, space.sizes, strict=True)
        ]
        vector = vector * torch.cat(kept)

    def size(x: Tensor) -> float:
        square = float(x.square().sum())
        return square if squared else math.sqrt(square)

    eps = torch.finfo(torch.float64).eps
    value = size(vector)
    parts = [(name, size(part)) for name, part in analysis.by_layer(vector).items()]
    return Estimate(
        value=value,
        probe_error=4 * eps * math.sqrt(len(vector)) * value,
        error_kind="rounding",
        parts=tuple(Part(name, x, 4 * eps * math.sqrt(len(vector)) * x) for name, x in parts),
    )
