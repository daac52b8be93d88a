"""The exact diagonal of the Gauss-Newton matrix: squares of vector-Jacobian products."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from sharpkit.errors import ObjectiveError
from sharpkit.objective import batches as trees
from sharpkit.objective import products
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.gauss_newton import OutputProducts, curvature, tensor_outputs
from sharpkit.objective.isolation import is_out_of_memory
from sharpkit.objective.losses import CriterionLoss
from sharpkit.objective.output_hessians import Columns, closed_form
from sharpkit.objective.probing import first_piece
from sharpkit.objective.products import Named

__all__ = ["choose", "of_own_data"]

SAME = 1e-8  # relative, in float64, that two ways to one diagonal may differ
TRIED_EXAMPLES, TRIED_COLUMNS = 3, 8  # what the two ways are compared on
DENSE = 2048  # outputs of an example whose Hessian, if it is not known, is decomposed
COPIES = 4  # tensors of the size of theta for each vector-Jacobian product of a chunk
MOST_BYTES = 2**29  # of a chunk: more is not faster
MADE = 2**22  # entries of columns made together in the loop


def choose(evaluator: Evaluator, theta: Named, outputs: OutputProducts, budget: int) -> None:
    """Find out whether torch.func takes examples together, if that was not done."""
    if outputs.by_vmap is None:
        outputs.by_vmap = evaluator.team.first(lambda: _goes_by_vmap(evaluator, theta, budget))


def of_own_data(
    evaluator: Evaluator, theta: Named, outputs: OutputProducts, budget: int
) -> list[Tensor]:
    """Return the sum ``[P]`` over this rank's data in float64, and its backward passes.

    Args:
        evaluator: The loss of batches, of a criterion.
        theta: The parameters.
        outputs: What knows whether torch.func takes examples together.
        budget: Bytes that kept graphs and chunks may take.

    Raises:
        ObjectiveError: If the Hessian over an example's outputs is not known and too large.
    """
    first = next(iter(theta.values()))
    total = torch.zeros(
        sum(t.numel() for t in theta.values()), dtype=torch.float64, device=first.device
    )
    room = budget - sum(h.held for h in evaluator.holders if h.point is theta)
    backwards = torch.zeros((), dtype=torch.float64, device="cpu")

    def one(batch: Any) -> tuple[Tensor, int]:
        if outputs.by_vmap:
            done = _together(evaluator, theta, batch, room)
            if done is not None:
                return done
        return _looped(evaluator, theta, batch)

    def add(result: tuple[Tensor, int]) -> None:
        total.add_(result[0])
        backwards.add_(result[1])

    evaluator.each(one, add, grad=True, theta=theta)
    return [total, backwards]


def _goes_by_vmap(evaluator: Evaluator, theta: Named, budget: int) -> bool:
    # Whether all examples at once give what each gives alone, in float64 on a few of them:
    # torch.func refuses some operations, and is wrong for others without a word.
    if not evaluator.additive:
        return False
    double = evaluator.in_double()
    leaves = {n: t.detach().double().requires_grad_() for n, t in theta.items()}

    def one(piece: Any) -> bool:
        batched = _together(double, leaves, piece, budget, tried=TRIED_COLUMNS)
        if batched is None:
            return False
        single = _looped(double, leaves, piece, tried=TRIED_COLUMNS)[0]
        return float((batched[0] - single).norm()) <= SAME * float(single.norm())

    try:
        with warnings.catch_warnings():
            # A loop over examples inside torch would only be slower than ours.
            warnings.filterwarnings("error", message=".*batching rule.*")
            return first_piece(double, leaves, one, most=TRIED_EXAMPLES) is not False
    except Exception as error:
        # Not every model can be traced by torch.func, or evaluated in double precision.
        if is_out_of_memory(error) or isinstance(
            error, (RuntimeError, ObjectiveError, TypeError, ValueError, UserWarning)
        ):
            return False
        raise


# -- the Hessian over the outputs --------------------------------------------------------


def _columns(
    evaluator: Evaluator, batch: Any, outputs: Tensor, targets: Any, rows: bool
) -> Columns:
    criterion = evaluator.batch_loss
    assert isinstance(criterion, CriterionLoss)
    known = closed_form(criterion, outputs, targets, evaluator.num_terms)
    if known is not None:
        return known.columns(rows=rows)
    if not rows:
        values, vectors = _decomposed(criterion, outputs, targets, evaluator.num_terms)
        return Columns(values[None], lambda _, k: vectors[k].reshape(1, len(k), *outputs.shape))
    pairs = []
    for n, example in enumerate(evaluator.split(batch, 1)):
        own = CriterionLoss.unpack(example)[1]
        pairs.append(_decomposed(criterion, outputs[n : n + 1], own, evaluator.num_terms))
    values = torch.stack([v for v, _ in pairs])
    stacked = torch.stack([v for _, v in pairs])
    return Columns(values, lambda r, k: stacked[r, k].reshape(-1, len(k), *outputs.shape[1:]))


def _decomposed(
    criterion: CriterionLoss, outputs: Tensor, targets: Any, num_terms: float
) -> tuple[Tensor, Tensor]:
    # Eigenvalues, and eigenvectors as rows, of the Hessian over the outputs of an example.
    size = outputs.numel()
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    if size > DENSE:
        raise ObjectiveError(
            f"Expected a criterion of a known kind, or at most {DENSE} outputs of an example,"
            f" as their Hessian is decomposed. Got {size}. Estimate the diagonal of the GGN"
            " operator by probes instead."
        )
    product = curvature(criterion, outputs, targets, num_terms)
    eye = torch.eye(size, dtype=outputs.dtype, device=outputs.device)
    if product is None:
        return torch.zeros(size, dtype=dtype, device=outputs.device), eye.to(dtype)
    H = torch.stack([product(e.reshape(outputs.shape)).reshape(-1) for e in eye]).to(dtype)
    values, vectors = torch.linalg.eigh((H + H.T) / 2)
    return values, vectors.T


def _active(columns: Columns, tried: int | None) -> Tensor:
    # The numbers of the columns that count: masked positions have none. In a trial a few of
    # all, spread evenly: the same ones whatever the batch.
    weights = columns.weights
    if tried is not None and tried < weights.shape[1]:
        return torch.linspace(0, weights.shape[1] - 1, tried, device=weights.device).long()
    return (weights != 0).any(dim=0).nonzero()[:, 0]


# -- one backward pass each --------------------------------------------------------------


def _looped(
    evaluator: Evaluator, theta: Named, batch: Any, tried: int | None = None
) -> tuple[Tensor, int]:
    # One graph an example, one backward pass a column. A loss that does not add up over
    # examples has whole batches for examples.
    like = list(theta.values())
    total = torch.zeros(sum(t.numel() for t in like), dtype=torch.float64, device=like[0].device)
    passes = 0
    for piece in evaluator.split(batch, 1) if evaluator.additive else [batch]:
        outputs, targets = tensor_outputs(evaluator, theta, piece)
        if not outputs.requires_grad:
            continue
        columns = _columns(evaluator, piece, outputs.detach(), targets, rows=False)
        for index in torch.split(_active(columns, tried), max(MADE // outputs.numel(), 1)):
            made = columns.make(slice(None), index)[0].to(outputs.dtype)
            for weight, column in zip(columns.weights[0, index], made, strict=True):
                back = torch.autograd.grad(
                    outputs, like, grad_outputs=column, retain_graph=True, allow_unused=True
                )
                total.addcmul_(_double(back, like), weight * _double(back, like))
                passes += 1
    return total, passes if evaluator.additive else passes * evaluator.num_examples


def _double(parts: Any, like: list[Tensor]) -> Tensor:
    return products.flat(parts, like, torch.float64)


# -- all examples and columns together ---------------------------------------------------


def _together(
    evaluator: Evaluator, theta: Named, batch: Any, room: float, tried: int | None = None
) -> tuple[Tensor, int] | None:
    # One vmap over examples and one over columns, in chunks; None if the outputs do not
    # have a row for each example, or the batch holds more than tensors.
    paths, size = trees.parted(batch, evaluator.shared), trees.batch_size(batch)
    if not paths or not size:
        return None
    with torch.no_grad():
        outputs, targets = tensor_outputs(evaluator, theta, batch)
    if outputs.ndim == 0 or outputs.shape[0] != size:
        return None
    columns = _columns(evaluator, batch, outputs, targets, rows=True)
    active = _active(columns, tried)
    like = {n: t.detach() for n, t in theta.items()}
    tensors = {path: leaf for path, leaf in trees.leaves(batch) if path in set(paths)}

    def example(parts: tuple[Tensor, ...], made: Tensor) -> dict[str, Tensor]:
        own = {p: t[None] for p, t in zip(paths, parts, strict=True)}

        def network(point: Named) -> Tensor:
            row: Tensor = tensor_outputs(evaluator, point, trees.replaced(batch, own))[0]
            return row[0]

        back = torch.func.vjp(network, like)[1]
        found: dict[str, Tensor] = torch.func.vmap(lambda c: back(c)[0])(made)
        return found

    with products.saved_bytes([*theta.values(), *evaluator.fixed.values()]) as saved:
        tensor_outputs(evaluator, theta, evaluator.split(batch, 1)[0])
    P, first = sum(t.numel() for t in like.values()), next(iter(like.values()))
    pair = COPIES * P * columns.weights.element_size() + 2 * saved.total
    pairs = max(int(min(room, MOST_BYTES)) // pair, 1)
    width = min(len(active), pairs) or 1
    height = max(pairs // width, 1)
    total = torch.zeros(P, dtype=torch.float64, device=first.device)
    for start in range(0, size, height):
        rows = slice(start, start + height)
        parts = tuple(tensors[p][rows] for p in paths)
        for index in torch.split(active, width) if len(active) else ():
            made = columns.make(rows, index).to(outputs.dtype)
            back = torch.func.vmap(example)(parts, made)
            weights = columns.weights[rows, index].reshape(-1, 1)
            total += torch.cat(
                [_weighted(back[n].reshape(len(weights), -1), weights) for n in like]
            )
    return total, len(active) * size


def _weighted(g: Tensor, weights: Tensor) -> Tensor:
    wide = g.to(weights.dtype)
    return (weights * wide.square()).sum(dim=0, dtype=torch.float64)
