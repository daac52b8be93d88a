"""Products with the generalised Gauss-Newton matrix: through the outputs and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharpkit.errors import ObjectiveError
from sharpkit.objective import products
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.isolation import is_out_of_memory
from sharpkit.objective.losses import CriterionLoss
from sharpkit.objective.probing import PROBE_EXAMPLES, agrees, first_piece
from sharpkit.objective.products import Named

__all__ = ["gauss_newton", "verify_outputs"]

_ADVICE = "Expected a network whose backward pass can be differentiated, as the GGN needs it."


def gauss_newton(evaluator: Evaluator, theta: Named, V: Tensor) -> Tensor:
    """Return ``G V [P, K]`` over all data; the criterion must act on one output tensor.

    Raises:
        ObjectiveError: If the network's outputs are no tensor, or it cannot be
            differentiated forward.
    """
    criterion = evaluator.batch_loss
    assert isinstance(criterion, CriterionLoss)
    like = list(theta.values())

    def one(batch: Any) -> Tensor:
        outputs, targets = _outputs(evaluator, theta, batch)
        if not outputs.requires_grad:  # the batch says nothing about these parameters
            return torch.zeros_like(V)
        free = outputs.detach().requires_grad_()
        loss = criterion.terms(free, targets)[0] / evaluator.num_terms
        if not loss.requires_grad:  # every target is masked
            return torch.zeros_like(V)
        (slope,) = torch.autograd.grad(loss, free, create_graph=True)
        if not slope.requires_grad:
            return torch.zeros_like(V)
        forward = _Forward(outputs, like)
        result = []
        for vector in products.columns(V, theta):
            (curved,) = torch.autograd.grad(
                slope,
                free,
                grad_outputs=forward(vector),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            back = torch.autograd.grad(
                outputs, like, grad_outputs=curved, retain_graph=True, allow_unused=True
            )
            result.append(products.flat(back, like, V.dtype))
        return torch.stack(result, dim=1)

    total = torch.zeros_like(V)

    def add(part: Tensor) -> None:
        total.add_(part)

    evaluator.each(one, add, grad=True, theta=theta)
    return total


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


def _outputs(evaluator: Evaluator, theta: Named, batch: Any) -> tuple[Tensor, Any]:
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
            return _outputs(double, at, piece)[0].detach().reshape(-1)

        outputs, _ = _outputs(double, leaves, piece)
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
    outputs, _ = _outputs(evaluator, theta, piece)
    if outputs.requires_grad:
        like = list(theta.values())
        _Forward(outputs, like)([torch.ones_like(t) for t in like])
    return True
