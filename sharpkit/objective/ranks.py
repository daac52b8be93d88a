"""What the ranks that measure together must have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharpkit.errors import ObjectiveError
from sharpkit.objective.evaluator import Evaluator
from sharpkit.team import Team

__all__ = ["agreed"]

Prepared = tuple[Evaluator, dict[str, Tensor]]


def agreed(team: Team, prepare: Callable[[], Prepared], *settings: Any) -> Prepared:
    """Return what was prepared, if all ranks have the same model and settings.

    Args:
        team: The ranks.
        prepare: Makes the evaluator and the parameters to measure at.
        settings: What else must be the same.

    Raises:
        ObjectiveError: If a parameter, a buffer or a setting differs from that of rank 0.
    """
    made: list[Prepared] = []

    def look() -> dict[str, str]:
        made.append(prepare())
        return {} if team.alone else _marks(*made[0], *settings)

    found = team.gather(look)
    for rank, marks in enumerate(found):
        odd = [n for n in {**found[0], **marks} if marks.get(n) != found[0].get(n)]
        if odd:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            raise ObjectiveError(
                "Expected the same model and settings on all ranks. Rank"
                f" {rank} differs from rank 0 in {', '.join(odd[:3])}{more}. Load the same"
                " checkpoint on all ranks and give the same arguments."
            )
    return made[0]


def _marks(evaluator: Evaluator, start: dict[str, Tensor], *settings: Any) -> dict[str, str]:
    tensors = {**evaluator.fixed, **evaluator.buffers, **start}
    marks = {n: _digest(t) for n, t in tensors.items()}
    marks["the selected parameters"] = str(list(start))
    marks["the settings"] = str(settings)
    marks["torch's version"] = torch.__version__
    marks["the number of threads"] = str(torch.get_num_threads())
    return marks


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    if flat.numel():
        content.update(flat.view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
