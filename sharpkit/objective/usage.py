"""What was spent, and which parameters the loss uses: zero rows are named."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharpkit.errors import ObjectiveError, SharpkitWarning
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.probing import first_piece
from sharpkit.objective.products import Named

__all__ = ["PartlySpent", "Spent", "Usage"]

STEP = 1e-3  # relative: small, so that a choice such as argmax stays what it was
LOSES = (
    "Look for torch.no_grad(), .detach() or .item(), and for activation checkpoints with"
    " use_reentrant=True (use_reentrant=False works)."
)


@dataclass
class Spent:
    """What all objectives made from one have in common: their cost, and what was said."""

    hvps: float = 0
    gradients: float = 0
    forwards: float = 0
    unused: set[str] = field(default_factory=set)  # parameters already warned of


class PartlySpent(Spent):
    """The cost on a part of the data, which counts for the whole by its share.

    Args:
        whole: What is told of every change.
        share: Of the examples.
    """

    def __init__(self, whole: Spent, share: float):
        super().__init__(unused=whole.unused)
        self._whole, self._share = whole, share

    def __setattr__(self, name: str, value: Any) -> None:
        whole = self.__dict__.get("_whole")
        if whole is not None and name in ("hvps", "gradients", "forwards"):
            more = self._share * (value - getattr(self, name))
            setattr(whole, name, getattr(whole, name) + more)
        super().__setattr__(name, value)


class Usage:
    """Told which parameters whole passes used; warns once, or refuses.

    It holds no objective: in a cycle, kept graphs would wait for the garbage collector.

    Args:
        evaluator: The loss of batches.
        theta: The parameters.
        said: Names already warned of, shared by all objectives made from one.
    """

    def __init__(self, evaluator: Evaluator, theta: Named, said: set[str]):
        self._evaluator, self._theta, self._said = evaluator, theta, said
        self._used = [False] * len(theta)
        self._fresh = False

    def note(self, used: Sequence[bool]) -> None:
        """Take in which parameters a pass over this rank's data used."""
        self._used = [a or b for a, b in zip(self._used, used, strict=True)]
        self._fresh = True

    def noted(self) -> Tensor:
        """Return whether anything was noted since the last time, and what, to sum over ranks."""
        fresh, self._fresh = self._fresh, False
        return torch.tensor([fresh, *self._used], dtype=torch.float64, device="cpu")

    def report(self, noted: Tensor) -> None:
        """Warn of parameters that no rank used, by the sum of what was noted.

        Raises:
            ObjectiveError: If the loss depends on one that its gradient does not reach.
        """
        fresh, *counts = noted.tolist()
        if fresh > 0:
            self._report([count > 0 for count in counts])

    def _report(self, used: Sequence[bool]) -> None:
        unused = [n for n, flag in zip(self._theta, used, strict=True) if not flag]
        if not unused or self._said.issuperset(unused):
            return
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" * (len(unused) > 5))
        team = self._evaluator.team
        if team.first(lambda: self._depends_on(set(unused))):
            raise ObjectiveError(
                "Expected a gradient for every parameter that the loss depends on. The loss"
                f" changes with {shown}, but its gradient does not reach there. {LOSES}"
                " Or leave them out with params=..., which holds them fixed."
            )
        self._said.update(unused)
        warnings.warn(
            f"The loss does not depend on {shown}: their gradient and curvature are zero."
            " Leave them out with params=... if this is not meant.",
            SharpkitWarning,
            stacklevel=4,
        )

    def _depends_on(self, names: set[str]) -> bool:
        here = {n: t.detach() for n, t in self._theta.items()}
        there = {
            n: t + STEP * (t.abs() + t.abs().mean() + STEP) if n in names else t
            for n, t in here.items()
        }

        def one(piece: Any) -> bool:
            a, b = (
                float(self._evaluator.loss(theta, piece)[0].detach().cpu().double())
                for theta in (here, there)
            )
            eps = torch.finfo(self._evaluator.coarsest_dtype(here)).eps
            return abs(a - b) > 100 * eps * abs(a)

        return bool(first_piece(self._evaluator, self._theta, one))
