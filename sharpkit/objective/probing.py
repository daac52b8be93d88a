"""Which way of second derivatives works for a model, tried on a few examples.

A backward pass may refuse to be differentiated, or do so wrongly without a word: its
author cut the graph, or forgot a term. So a way counts as working only if it runs, is
symmetric, and agrees with a difference quotient of the gradient in float64, where a step
can be so small that no kink of a ReLU is met.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharpkit.errors import ObjectiveError
from sharpkit.objective import batches as trees
from sharpkit.objective import products
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.isolation import is_out_of_memory
from sharpkit.objective.products import Named

__all__ = ["Trial", "agrees", "first_piece", "gradient_graph", "try_way"]

T = TypeVar("T")

PROBE_SHARE = 8  # a way to differentiate is tried on an eighth of the first batch
PROBE_EXAMPLES = 8  # and compared with differences on so many examples
RESIDENT_PER_SAVED = 1.5  # a kept graph takes more than the tensors that it saves
TINY = 1e-8  # the step of the comparison, relative to theta
SAME = 1e-3  # two quotients that agree so well met no kink
SATURATED = 1e-4  # a loss below, if a logarithm, has slopes too rounded for so small a step
SHRUNK = (1.0, 0.7, 0.4, 0.1)  # fractions of theta, until the loss is not too near zero
WRONG = 1e-2  # a product that differs by more from them is another matrix's
ASYMMETRIC = "its products are not symmetric"
NOT_DIFFERENTIABLE = "the backward pass of an operation is not differentiable"


@dataclass
class Trial:
    """How a way of second derivatives did.

    Attributes:
        reason: Why it does not work; ``None`` if it does.
        bytes_per_example: What a kept graph takes, by the trial.
    """

    reason: str | None
    bytes_per_example: float = 0.0


def try_way(evaluator: Evaluator, theta: Named, dtype: torch.dtype, way: str) -> Trial:
    """Try ``"kept"`` (double backward) or ``"forward_over_reverse"`` on a few examples."""
    try:
        trial = _try_native(evaluator, theta, dtype, way)
    except ObjectiveError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        return Trial(" ".join(str(error).split())[:160])
    verdict = _compare_in_double(evaluator, theta, way)
    if verdict is False:
        return Trial(trial.reason or "its products differ from differences of the gradient")
    if verdict is True:
        # A gradient that is constant, not cut; or a loss so near 0 that its Hessian is mostly
        # rounding, and so not symmetric to many digits.
        trial.reason = None
    return trial


def gradient_graph(
    evaluator: Evaluator, theta: Named, batch: Any
) -> tuple[products.GradientGraph, float]:
    """Return the gradient of a batch with its graph, and the bytes that keeping it takes."""
    inputs = [leaf for _, leaf in trees.leaves(batch) if isinstance(leaf, Tensor)]
    owned = [*theta.values(), *evaluator.fixed.values(), *inputs]
    with products.saved_bytes(owned) as saved:
        graph = products.gradient_graph(evaluator.share(theta, batch), theta)
    held = 0 if evaluator.cached else trees.batch_bytes(batch)
    return graph, RESIDENT_PER_SAVED * saved.total + held


def first_piece(
    evaluator: Evaluator,
    theta: Named,
    function: Callable[[Any], T],
    *,
    most: int | None = None,
    grad: bool = True,
) -> T | None:
    """Return a function of the first few examples that have loss terms, alike on all ranks.

    Args:
        evaluator: The loss of batches.
        theta: The parameters.
        function: Called once.
        most: At most so many examples; default an eighth of the batch.
        grad: Whether autograd records.
    """
    found: list[T] = []

    def one(batch: Any) -> T | None:
        piece = batch
        if evaluator.additive:
            size = trees.batch_size(batch) or 1
            fewer = max(1, size // PROBE_SHARE)
            for piece in evaluator.split(batch, fewer if most is None else min(size, most)):
                if evaluator.loss(theta, piece)[1] > 0:
                    return function(piece)
            return None
        return function(piece)

    def take(result: T | None) -> bool:
        if result is not None:
            found.append(result)
        return bool(found)

    evaluator.leading().each(one, take, grad=grad, theta=theta)
    return found[0] if found else None


def _product(evaluator: Evaluator, theta: Named, piece: Any, V: Tensor, way: str) -> Tensor:
    if way == "forward_over_reverse":
        return products.forward_over_reverse(lambda t: evaluator.share(t, piece), theta, V)
    graph = products.gradient_graph(evaluator.share(theta, piece), theta)
    return products.double_backward([graph], theta, V, keep=False)


def _try_native(evaluator: Evaluator, theta: Named, dtype: torch.dtype, way: str) -> Trial:
    generator = torch.Generator(device="cpu").manual_seed(0)
    P, device = sum(t.numel() for t in theta.values()), next(iter(theta.values())).device
    V = torch.randn((P, 2), generator=generator, device="cpu").to(device, dtype)

    def one(piece: Any) -> tuple[Tensor, float, bool]:
        if way == "forward_over_reverse":
            return _product(evaluator, theta, piece, V, way), 0.0, True
        count = trees.batch_size(piece) or 1
        graph, size = gradient_graph(evaluator, theta, piece)
        HV = products.double_backward([graph], theta, V, keep=False)
        complete = len(graph.index) == sum(graph.used)  # or a gradient without a graph
        return HV, size / count, complete

    found = first_piece(evaluator, theta, one)
    if found is None:
        return Trial(None)
    HV, per_example, complete = found
    M = (V.T @ HV).double()
    scale = (V.norm(dim=0).max() * HV.norm(dim=0).max()).double()
    slack = min(1e3 * torch.finfo(evaluator.coarsest_dtype(theta)).eps, 0.2)
    if not bool((M[0, 1] - M[1, 0]).abs() <= slack * scale):
        return Trial(ASYMMETRIC, per_example)
    return Trial(None if complete else NOT_DIFFERENTIABLE, per_example)


def _compare_in_double(evaluator: Evaluator, theta: Named, way: str) -> bool | None:
    # Whether the product is that of the gradient's differences; None: cannot be told.
    double = evaluator.in_double()

    def gradient(like: Named, piece: Any, point: Tensor) -> Tensor:
        (column,) = products.columns(point[:, None], like)
        at = {n: t.clone().requires_grad_() for n, t in zip(like, column, strict=True)}
        return double.bound(
            at, lambda _: products.flat_gradient(double.share(at, piece), at, torch.float64)[0]
        )

    def one(piece: Any) -> bool | None:
        # A way is right or wrong at any point: one where the loss has digits will do.
        for shrunk in SHRUNK:
            leaves = {n: (shrunk * t.detach().double()).requires_grad_() for n, t in theta.items()}
            total, count = double.loss(leaves, piece)
            if abs(float(total.detach())) < SATURATED * count:
                continue
            start = products.flat(list(leaves.values()), list(leaves.values()), torch.float64)
            v = _direction(start)

            def product(_: object, at: Named = leaves, v: Tensor = v) -> Tensor:
                return _product(double, at, piece, v[:, None], way)[:, 0]

            def slope(point: Tensor, at: Named = leaves) -> Tensor:
                return gradient(at, piece, point)

            return agrees(double.bound(leaves, product), slope, start, v)
        return None

    leaves = {n: t.detach().double().requires_grad_() for n, t in theta.items()}
    try:
        return first_piece(double, leaves, one, most=PROBE_EXAMPLES)
    except Exception as error:
        # Double precision is not for every model: what was found without it must do.
        if is_out_of_memory(error) or isinstance(error, (RuntimeError, ObjectiveError, TypeError)):
            return None
        raise


def _direction(start: Tensor) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(1)
    return torch.randn(start.shape, generator=generator, device="cpu", dtype=torch.float64).to(
        start.device
    )


def agrees(
    product: Tensor, function: Callable[[Tensor], Tensor], start: Tensor, v: Tensor
) -> bool | None:
    """Return whether a product is the derivative of a function along v; None: unclear.

    Args:
        product: The claimed derivative, float64.
        function: A vector function of the flat parameters.
        start: The parameters.
        v: The direction.
    """
    h = products.central_step(start, v, TINY)
    near, far = (products.quotient(function, start, v, w) for w in (h, 2 * h))
    # Rounding of the function, which the small step makes large.
    floor = 1e3 * torch.finfo(torch.float64).eps * float(function(start).norm()) / h
    if not float((near - far).norm()) <= SAME * float(near.norm()) + floor:
        return None
    size = max(float(near.norm()), float(product.norm()))
    return bool(float((product - near).norm()) <= WRONG * size + floor)
