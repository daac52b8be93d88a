"""Products J^T M J V through the outputs: the Gauss-Newton matrix and its relatives."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sharpkit.errors import ObjectiveError, SharpkitWarning
from sharpkit.objective import batches as trees
from sharpkit.objective import products
from sharpkit.objective.admission import HvpMode
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.isolation import is_out_of_memory
from sharpkit.objective.losses import CriterionLoss
from sharpkit.objective.output_hessians import closed_form
from sharpkit.objective.probing import (
    PROBE_EXAMPLES,
    RESIDENT_PER_SAVED,
    agrees,
    first_piece,
)
from sharpkit.objective.products import Named

__all__ = [
    "Middle",
    "OutputProducts",
    "Piece",
    "linearised",
    "loss_hessian",
    "through",
    "verify_outputs",
]

_ADVICE = "Expected a network whose backward pass can be differentiated, as the GGN needs it."


@dataclass
class Piece:
    """A few examples, with the network linearised there.

    Attributes:
        outputs: Of the network, with their graph.
        targets: As the criterion takes them.
        batch: The examples.
        push: Maps a vector in parameters to ``J v``; ``None`` if they do not matter.
        start: How many outputs the pieces before have.
        size: Bytes that keeping it takes.
    """

    outputs: Tensor
    targets: Any
    batch: Any
    push: _Forward | None
    start: int = 0
    size: float = 0.0


Middle: TypeAlias = Callable[[Piece], Callable[[Tensor], Tensor] | None]
"""Of a piece, the symmetric map M of its outputs; ``None`` if it is zero."""


class OutputProducts:
    """Products with ``sum J^T M J`` at one point; linearised pieces are kept while they fit.

    Args:
        evaluator: The loss of batches.
        leaves: The parameters to differentiate at; they must not change.
        mode: ``"streamed"`` keeps nothing, ``"kept"`` everything.
        budget: Bytes that kept graphs may take, the Hessian's included.
    """

    def __init__(self, evaluator: Evaluator, leaves: Named, mode: HvpMode, budget: float):
        self._evaluator, self.point = evaluator, leaves
        self._resets = 0
        self._mode, self._given_budget = mode, budget
        self._budget = {"kept": math.inf, "streamed": 0.0}.get(mode, float(budget))
        self.verified = False  # what verify_outputs says, for these parameters and fewer
        self.by_rows: bool | None = None  # whether example gradients are rows of the outputs
        self.by_vmap: bool | None = None  # whether torch.func takes examples together
        self.marks: dict[tuple[int | None, int], int] = {}  # of pieces, to see their order
        self.places: tuple[list[int], list[int]] | None = None  # of batches among outputs
        self._kept: list[Piece] = []
        self.reset()
        evaluator.holders.add(self)

    def at(self, leaves: Named) -> OutputProducts:
        """Return the products at other leaves of the same parameters."""
        other = OutputProducts(self._evaluator, leaves, self._mode, self._given_budget)
        other.verified, other.by_rows, other.marks = self.verified, self.by_rows, self.marks
        other.by_vmap, other.places = self.by_vmap, self.places
        other._budget = self._budget
        return other

    @property
    def held(self) -> float:
        """The bytes that kept pieces take."""
        return sum(piece.size for piece in self._kept)

    def reset(self) -> None:
        """Let go of the kept pieces."""
        self._kept.clear()
        self._resets += 1
        self._seen_all = self._complete = False
        self._built_for = self._evaluator.micro_batch

    def give_up(self) -> bool:
        """Free the kept pieces because memory ran out, and keep fewer from now on."""
        if not self._kept:
            return False
        self._budget = min(self._budget, self.held) / 2
        self.reset()
        return True

    def __call__(self, V: Tensor, middle: Middle) -> Tensor:
        """Return ``sum J^T M J V [P, K]`` over all data."""
        if V.shape[1] == 0:
            return torch.zeros_like(V)
        total = None
        while total is None:  # until what is kept fits
            if self._built_for != self._evaluator.micro_batch:
                self.reset()  # pieces belong to one way of cutting the batches
            total = self._of_kept(V, middle)
        if self._complete:
            return total
        try:
            return total + self._of_others(V, middle)
        except BaseException:
            self.reset()
            raise

    def _of_kept(self, V: Tensor, middle: Middle) -> Tensor | None:
        total = torch.zeros_like(V)
        if not self._kept:
            return total

        def work(_: object) -> None:
            for piece in self._kept:
                total.add_(through(piece, self.point, V, middle))

        try:
            with self._evaluator.context(grad=True):
                self._evaluator.bound(self.point, work)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return total
        self.give_up()
        warnings.warn(
            "Memory ran out with all linearised outputs kept: fewer are kept from now on. The"
            " result is the same, only slower.",
            SharpkitWarning,
            stacklevel=4,
        )
        return None

    def _of_others(self, V: Tensor, middle: Middle) -> Tensor:
        # What is not kept is made anew; in the first pass, leading pieces are kept.
        evaluator, resets = self._evaluator, self._resets
        room = self._budget - evaluator.held_beside(self)
        keeping = not self._seen_all and evaluator.cached and room > 0
        start = sum(piece.outputs.numel() for piece in self._kept)
        total = torch.zeros_like(V)

        def one(batch: Any) -> tuple[Tensor, int, Piece | None]:
            piece = linearised(evaluator, self.point, batch, count=keeping)
            piece.start = start
            part = through(piece, self.point, V, middle)
            return part, piece.outputs.numel(), piece if keeping else None

        def add(result: tuple[Tensor, int, Piece | None]) -> None:
            nonlocal start, room, keeping
            part, numel, piece = result
            total.add_(part)
            start += numel
            as_before = resets == self._resets and self._built_for == evaluator.micro_batch
            keeping = keeping and as_before and piece is not None and piece.size <= room
            if keeping and piece is not None:
                self._kept.append(piece)
                room -= piece.size

        seen = [None] * len(self._kept)
        evaluator.each(one, add, grad=True, theta=self.point, seen=seen)
        if resets == self._resets:
            self._seen_all, self._complete = True, keeping
        return total


def linearised(evaluator: Evaluator, theta: Named, batch: Any, *, count: bool = False) -> Piece:
    """Return the linearised network at a batch.

    Args:
        evaluator: The loss of batches.
        theta: The parameters.
        batch: Examples.
        count: Whether to count the bytes, as the piece may be kept.

    Raises:
        ObjectiveError: If the network's outputs are no tensor.
    """

    def make() -> Piece:
        outputs, targets = tensor_outputs(evaluator, theta, batch)
        push = _Forward(outputs, list(theta.values())) if outputs.requires_grad else None
        return Piece(outputs, targets, batch, push)

    if not count:
        return make()
    inputs = [leaf for _, leaf in trees.leaves(batch) if isinstance(leaf, Tensor)]
    with products.saved_bytes([*theta.values(), *evaluator.fixed.values(), *inputs]) as saved:
        piece = make()
    piece.size = RESIDENT_PER_SAVED * saved.total
    return piece


def through(piece: Piece, theta: Named, V: Tensor, middle: Middle) -> Tensor:
    """Return ``J^T M J V [P, K]`` of a piece."""
    apply = middle(piece) if piece.push is not None else None
    if piece.push is None or apply is None:
        return torch.zeros_like(V)
    like, result = list(theta.values()), []
    for vector in products.columns(V, theta):
        curved = apply(piece.push(vector)).to(piece.outputs.dtype)
        back = torch.autograd.grad(
            piece.outputs, like, grad_outputs=curved, retain_graph=True, allow_unused=True
        )
        result.append(products.flat(back, like, V.dtype))
    return torch.stack(result).T


def loss_hessian(evaluator: Evaluator) -> Middle:
    """Return M of the GGN: the Hessian of L over the outputs."""
    criterion = evaluator.batch_loss
    assert isinstance(criterion, CriterionLoss)

    def middle(piece: Piece) -> Callable[[Tensor], Tensor] | None:
        free = piece.outputs.detach()
        known = closed_form(criterion, free, piece.targets, evaluator.num_terms)
        if known is not None:
            return known.product
        return curvature(criterion, free, piece.targets, evaluator.num_terms)

    return middle


def curvature(
    criterion: CriterionLoss, outputs: Tensor, targets: Any, num_terms: float
) -> Callable[[Tensor], Tensor] | None:
    """Return products with the Hessian over the outputs by autograd; None if it is zero."""
    free = outputs.detach().requires_grad_()
    loss = criterion.terms(free, targets)[0] / num_terms
    if not loss.requires_grad:  # every target is masked
        return None
    (slope,) = torch.autograd.grad(loss, free, create_graph=True)
    if not slope.requires_grad:
        return None

    def product(u: Tensor) -> Tensor:
        (curved,) = torch.autograd.grad(
            slope, free, grad_outputs=u, retain_graph=True, materialize_grads=True
        )
        return curved

    return product


class _Forward:
    # J v by differentiating u -> J^T u, which is linear in u, once more.
    def __init__(self, outputs: Tensor, like: list[Tensor]):
        self._dual = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(
            outputs, like, grad_outputs=self._dual, create_graph=True, allow_unused=True
        )
        self._index = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        self._pulled = [pulled[i] for i in self._index]

    def __call__(self, vector: list[Tensor]) -> Tensor:
        if not self._pulled:
            return torch.zeros_like(self._dual)
        (push,) = torch.autograd.grad(
            self._pulled,
            self._dual,
            grad_outputs=[vector[i] for i in self._index],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return push


def tensor_outputs(evaluator: Evaluator, theta: Named, batch: Any) -> tuple[Tensor, Any]:
    """Return the outputs and the targets of a batch; raises ObjectiveError if no tensor."""
    outputs, targets = evaluator.outputs(theta, batch)
    if not isinstance(outputs, Tensor):
        raise ObjectiveError(
            "Expected a network with one output tensor (or .logits), as the GGN goes through"
            f" it. Got {type(outputs).__name__}. Wrap the model to return what the loss uses."
        )
    return outputs, targets


def verify_outputs(evaluator: Evaluator, theta: Named) -> None:
    """Compare ``J v`` with differences of the outputs in float64, on a few examples.

    Raises:
        ObjectiveError: If they differ, or an operation cannot be differentiated twice.
    """
    try:
        fits = first_piece(evaluator, theta, lambda piece: _runs(evaluator, theta, piece))
    except RuntimeError as error:
        text = " ".join(str(error).split())[:160].rstrip(".")
        raise ObjectiveError(
            f"{_ADVICE} One operation cannot ({text}). Use the Hessian, which falls back."
        ) from error
    double = evaluator.in_double()
    leaves = {n: t.detach().double().requires_grad_() for n, t in theta.items()}
    start = products.flat(list(leaves.values()), list(leaves.values()), torch.float64)
    generator = torch.Generator(device="cpu").manual_seed(2)
    v = torch.randn(start.shape, generator=generator, device="cpu", dtype=torch.float64)
    v = v.to(start.device)

    def one(piece: Any) -> bool | None:
        def flat_outputs(point: Tensor) -> Tensor:
            (column,) = products.columns(point[:, None], leaves)
            at = dict(zip(leaves, column, strict=True))
            return tensor_outputs(double, at, piece)[0].detach().reshape(-1)

        outputs, _ = tensor_outputs(double, leaves, piece)
        if not outputs.requires_grad:
            return None
        (vector,) = products.columns(v[:, None], leaves)
        push = _Forward(outputs, list(leaves.values()))(vector)
        return agrees(push.detach().reshape(-1), flat_outputs, start, v)

    try:
        fits = first_piece(double, leaves, one, most=PROBE_EXAMPLES)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, (RuntimeError, ObjectiveError, TypeError)):
            return  # double precision is not for every model
        raise
    if fits is False:
        raise ObjectiveError(
            f"{_ADVICE} Here it loses derivatives without saying so: its products differ from"
            " differences of the outputs. Use the Hessian, which falls back."
        )


def _runs(evaluator: Evaluator, theta: Named, piece: Any) -> bool:
    outputs, _ = tensor_outputs(evaluator, theta, piece)
    if outputs.requires_grad:
        like = list(theta.values())
        _Forward(outputs, like)([torch.ones_like(t) for t in like])
    return True
