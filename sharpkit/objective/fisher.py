"""Fisher matrices: outer products of example gradients, of given or of drawn targets."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpkit.errors import ObjectiveError, SettingsError
from sharpkit.objective import batches as trees
from sharpkit.objective import products
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.gauss_newton import (
    Middle,
    OutputProducts,
    Piece,
    linearised,
    tensor_outputs,
    through,
)
from sharpkit.objective.isolation import is_out_of_memory
from sharpkit.objective.losses import CriterionLoss
from sharpkit.objective.output_hessians import closed_form
from sharpkit.objective.probing import PROBE_EXAMPLES, first_piece
from sharpkit.objective.products import Named
from sharpkit.team import interleaved

__all__ = [
    "choose",
    "each_gradient",
    "each_gradient_in_order",
    "each_group_gradient",
    "empirical",
    "example_slopes",
    "monte_carlo",
]

SAME = 1e-8  # relative, in float64, that two ways to one product may differ


class _NotByRows(Exception):  # noqa: N818  (a message inside the package, never seen)
    """The outputs of a batch do not have one row for each example."""


def each_gradient(
    evaluator: Evaluator, theta: Named, dtype: torch.dtype, consume: Callable[[Tensor], None]
) -> None:
    """Call ``consume`` with the gradient ``[P]`` of each example, by one backward pass each.

    Raises:
        ObjectiveError: If the loss is not a sum over examples.
    """
    _refuse_mixed(evaluator)

    def one(batch: Any) -> list[Tensor]:
        return [_gradient(evaluator, theta, piece, dtype) for piece in evaluator.split(batch, 1)]

    def add(rows: list[Tensor]) -> None:
        for row in rows:
            consume(row)

    evaluator.each(one, add, grad=True, theta=theta)


def each_gradient_in_order(
    evaluator: Evaluator, theta: Named, dtype: torch.dtype, consume: Callable[[Tensor], None]
) -> None:
    """Call ``consume`` with the gradient of each example of all ranks' data, in their order.

    Raises:
        ObjectiveError: If the loss is not a sum over examples.
    """
    each_group_gradient(evaluator, theta, dtype, 1, lambda row, _: consume(row), dealt=False)


def each_group_gradient(
    evaluator: Evaluator,
    theta: Named,
    dtype: torch.dtype,
    size: int,
    consume: Callable[[Tensor, int], None],
    *,
    dealt: bool = True,
) -> None:
    """Call ``consume`` with the mean gradient ``[P]`` of groups of examples, and their number.

    A group is a random choice of a batch's examples, ``size`` of them or fewer. All ranks
    are given the groups of all data, a batch of each rank at a time.

    Raises:
        ObjectiveError: If the loss is not a sum over examples.
    """
    _refuse_mixed(evaluator)

    def one(batch: Any) -> list[tuple[Tensor, int]]:
        count = -(-(trees.batch_size(batch) or 1) // size)
        rows = []
        pieces = trees.dealt(batch, count, evaluator.shared)
        for piece in pieces if dealt else evaluator.split(batch, size):
            examples = trees.batch_size(piece) or 1
            rows.append((_gradient(evaluator, theta, piece, dtype) / examples, examples))
        return rows

    def add(rows: list[tuple[Tensor, int]]) -> None:
        for row, examples in rows:
            consume(row, examples)

    if not evaluator.team.shares_data:
        evaluator.each(one, add, grad=True, theta=theta)
        return
    batches, device = evaluator.batches(), next(iter(theta.values())).device

    def next_rows() -> list[tuple[Tensor, int]]:
        found: list[tuple[Tensor, int]] = []
        batch = next(batches, None)
        if batch is not None:
            evaluator.on_few([batch]).each(one, found.extend, grad=True, theta=theta)
        return [(row.cpu(), examples) for row, examples in found]

    for _ in range(max(map(len, evaluator.sizes))):
        for rows in evaluator.team.gather(next_rows):
            add([(row.to(device), examples) for row, examples in rows])


def _gradient(evaluator: Evaluator, theta: Named, example: Any, dtype: torch.dtype) -> Tensor:
    loss = evaluator.share(theta, example) * evaluator.num_examples
    return products.flat_gradient(loss, theta, dtype)[0]


def _refuse_mixed(evaluator: Evaluator) -> None:
    if not evaluator.additive:
        raise ObjectiveError(
            "Expected a loss that is a sum over examples. This one depends on how the"
            " examples are batched, so it has no per-example gradients."
        )


# -- the empirical one, through the outputs ----------------------------------------------


def choose(evaluator: Evaluator, theta: Named, through_outputs: OutputProducts) -> None:
    """Find out whether example gradients are rows of the outputs, if that was not done.

    Raises:
        ObjectiveError: If the loss is not a sum over examples.
    """
    _refuse_mixed(evaluator)
    if through_outputs.by_rows is None:
        through_outputs.by_rows = evaluator.team.first(lambda: _goes_by_rows(evaluator, theta))


def empirical(
    evaluator: Evaluator, theta: Named, through_outputs: OutputProducts, V: Tensor
) -> Tensor:
    """Return what this rank's data contribute to ``F V [P, K]``.

    Where outputs have no row for each example, by a backward pass for each, and ``by_rows``
    of what the products go through is False then.
    """
    if through_outputs.by_rows:
        try:
            return through_outputs(V, _given_targets(evaluator))
        except _NotByRows:
            through_outputs.by_rows = False
    total = torch.zeros_like(V)

    def add(g: Tensor) -> None:
        total.add_(torch.outer(g, g @ V), alpha=1 / evaluator.num_examples)

    each_gradient(evaluator, theta, V.dtype, add)
    return total


def example_slopes(
    evaluator: Evaluator, theta: Named, through_outputs: OutputProducts, v: Tensor
) -> tuple[Tensor, bool]:
    """Return ``v . g_n`` of each example and its size, ``[2, N]``, and whether they took turns.

    The size is the sum of the magnitudes whose sum the slope is: it sets what is rounded.
    One product ``J v`` a batch where outputs have a row for each example; otherwise one
    backward pass an example.

    Raises:
        ObjectiveError: If the loss is not a sum over examples.
    """
    choose(evaluator, theta, through_outputs)

    def own() -> tuple[Tensor, bool]:
        if through_outputs.by_rows:
            try:
                return _slopes_by_rows(evaluator, theta, v), False
            except _NotByRows:
                through_outputs.by_rows = False
        slopes = [torch.zeros(2, 0, dtype=torch.float64, device="cpu")]

        def add(g: Tensor) -> None:
            dots = g.double() * v.double()
            slopes.append(torch.stack([dots.sum(), dots.abs().sum()])[:, None].cpu())

        each_gradient(evaluator, theta, v.dtype, add)
        return torch.cat(slopes, dim=1), True

    parts = evaluator.team.gather(own)
    looped = any(turns for _, turns in parts)
    if not evaluator.team.shares_data:
        return parts[0][0], looped
    # A product J v says as many numbers of a batch as it has examples.
    cut = [
        torch.split(rows, [size or 0 for size in sizes], dim=1)
        for (rows, _), sizes in zip(parts, evaluator.sizes, strict=True)
    ]
    return torch.cat(interleaved(cut), dim=1), looped


def _slopes_by_rows(evaluator: Evaluator, theta: Named, v: Tensor) -> Tensor:
    (vector,) = products.columns(v[:, None], theta)
    found = [torch.zeros(2, 0, dtype=torch.float64, device="cpu")]

    def one(batch: Any) -> Tensor:
        piece = linearised(evaluator, theta, batch)
        if not _by_rows(piece):
            raise _NotByRows
        r = _example_slope(evaluator, piece)
        if piece.push is None or r is None:
            return torch.zeros(2, len(piece.outputs), dtype=torch.float64, device="cpu")
        dots = r.double() * piece.push(vector).double()
        dots = dots.reshape(len(dots), -1)
        return torch.stack([dots.sum(dim=1), dots.abs().sum(dim=1)]).cpu()

    def add(row: Tensor) -> None:
        found.append(row)

    evaluator.each(one, add, grad=True, theta=theta)
    return torch.cat(found, dim=1)


def _example_slope(evaluator: Evaluator, piece: Piece) -> Tensor | None:
    # The slopes of N times the examples' shares of L in their outputs; None if all is masked.
    criterion = evaluator.batch_loss
    assert isinstance(criterion, CriterionLoss)
    free = piece.outputs.detach().requires_grad_()
    loss = criterion.terms(free, piece.targets)[0]
    loss = loss * (evaluator.num_examples / evaluator.num_terms)
    return torch.autograd.grad(loss, free)[0] if loss.requires_grad else None


def _given_targets(evaluator: Evaluator) -> Middle:
    # M of the empirical Fisher: r_n r_n^T / N for the slopes r of example losses.
    def middle(piece: Piece) -> Callable[[Tensor], Tensor] | None:
        if not _by_rows(piece):
            raise _NotByRows
        slope = _example_slope(evaluator, piece)
        if slope is None:  # every target is masked
            return None
        return lambda u: _outer([slope], u) / evaluator.num_examples

    return middle


def _goes_by_rows(evaluator: Evaluator, theta: Named) -> bool:
    # Whether that is the Fisher matrix of example gradients: tried on a few examples in
    # float64, as a network may mix those of a batch.
    if not (isinstance(evaluator.batch_loss, CriterionLoss) and evaluator.additive):
        return False
    double = evaluator.in_double()
    leaves = {n: t.detach().double().requires_grad_() for n, t in theta.items()}
    P, N = sum(t.numel() for t in leaves.values()), evaluator.num_examples
    generator = torch.Generator(device="cpu").manual_seed(3)
    V = torch.randn((P, 1), generator=generator, device="cpu", dtype=torch.float64)
    V = V.to(evaluator.device)

    def one(batch: Any) -> bool | None:
        if (trees.batch_size(batch) or 1) < 2:
            return None  # nothing can be mixed
        batched = through(linearised(double, leaves, batch), leaves, V, _given_targets(double))
        single = torch.zeros_like(V)
        for example in double.split(batch, 1):
            g = _gradient(double, leaves, example, torch.float64)
            single += torch.outer(g, g @ V) / N
        scale = max(float(single.norm()), float(batched.norm()))
        return float((batched - single).norm()) <= SAME * scale

    try:
        return first_piece(double, leaves, one, most=PROBE_EXAMPLES) is not False
    except _NotByRows:
        return False
    except Exception as error:
        # Double precision or a second derivative is not for every model: the loop is.
        if is_out_of_memory(error) or isinstance(error, (RuntimeError, ObjectiveError, TypeError)):
            return False
        raise


def _by_rows(piece: Piece) -> bool:
    return piece.outputs.ndim > 0 and piece.outputs.shape[0] == trees.batch_size(piece.batch)


def _outer(slopes: list[Tensor], u: Tensor) -> Tensor:
    # The sum of r_n <r_n, u_n> over slopes r, for each row n.
    total = torch.zeros_like(u, dtype=torch.promote_types(u.dtype, torch.float32))
    for r in slopes:
        dots = (r * u).to(total.dtype).reshape(u.shape[0], -1).sum(dim=1)
        total += r * dots.reshape(-1, *[1] * (u.ndim - 1))
    return total


# -- with drawn targets ------------------------------------------------------------------


def monte_carlo(
    evaluator: Evaluator,
    theta: Named,
    through_outputs: OutputProducts,
    num_samples: int,
    seed: int,
) -> Middle:
    """Return M of the Monte Carlo Fisher: outer products of slopes at drawn targets.

    Args:
        evaluator: The loss of batches.
        theta: The parameters.
        through_outputs: What the products go through.
        num_samples: Draws for each target.
        seed: Of the draws. Each belongs to its place in the data, whatever the batches.

    Raises:
        SettingsError: If the number or the seed is no such number.
        ObjectiveError: When called: if the criterion has no distribution to draw from, the
            outputs do not have one row for each example, or the data change their order.
    """
    for what, value, least in (("num_samples", num_samples, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise SettingsError(
                f"Expected `{what}` to be an integer of at least {least}. Got {value!r}."
            )
    criterion = evaluator.batch_loss
    assert isinstance(criterion, CriterionLoss)
    place_of = _places(evaluator, theta, through_outputs)

    def middle(piece: Piece) -> Callable[[Tensor], Tensor]:
        free = piece.outputs.detach()
        known = closed_form(criterion, free, piece.targets, evaluator.num_terms)
        if known is None:
            raise ObjectiveError(
                "Expected a criterion with a predictive distribution to draw targets from:"
                " CrossEntropyLoss, MSELoss or BCEWithLogitsLoss, of targets that fit the"
                f" outputs. Got {_name(criterion.criterion)}. Use the GGN."
            )
        rows = _by_rows(piece)
        if not rows and evaluator.additive:
            raise ObjectiveError(
                "Expected outputs with one row for each example. Got outputs of shape"
                f" {tuple(free.shape)} for {trees.batch_size(piece.batch)} examples. Use the"
                " GGN, or wrap the model to return one row each."
            )
        if not evaluator.cached:
            place = (evaluator.micro_batch, piece.start)
            mark = trees.fingerprint(piece.batch)
            if through_outputs.marks.setdefault(place, mark) != mark:
                raise ObjectiveError(
                    "Expected data in the same order in every pass, as each draw belongs to"
                    " its place in the data. Got another order. Use shuffle=False."
                )
        share = known.numbers_a_draw
        slopes = []
        for sample in range(num_samples):
            uniform = _uniform(seed, sample, place_of(piece.start) // share, free.numel() // share)
            r = known.slope(torch.from_numpy(uniform).to(free.device))
            slopes.append((r / num_samples**0.5).reshape(free.shape))
        if rows:
            return lambda u: _outer(slopes, u)
        return lambda u: _outer([r[None] for r in slopes], u[None])[0]  # one example alone

    return middle


def _places(
    evaluator: Evaluator, theta: Named, through_outputs: OutputProducts
) -> Callable[[int], int]:
    # From a place among this rank's outputs to that among all ranks', found once by a pass.
    team = evaluator.team
    if not team.shares_data:
        return lambda start: start
    if through_outputs.places is None:

        def one(batch: Any) -> int:
            return tensor_outputs(evaluator, theta, batch)[0].numel()

        counts = evaluator.collect(one, grad=False)
        own, everywhere, before, here = [0], [0], 0, 0
        for (rank, _), pieces in zip(evaluator.order, counts, strict=True):
            if rank == team.rank:
                own.append(here)
                everywhere.append(before)
                here += sum(pieces)
            before += sum(pieces)
        through_outputs.places = (own[1:] or [0], everywhere[1:] or [0])
    mine, all_ranks = through_outputs.places

    def place_of(start: int) -> int:
        batch = bisect.bisect_right(mine, start) - 1
        return start - mine[batch] + all_ranks[batch]

    return place_of


def _uniform(seed: int, sample: int, start: int, count: int) -> np.ndarray[Any, np.dtype[Any]]:
    # A piece of one long stream, found by its place: a block of Philox has four numbers.
    stream = np.random.Philox(key=np.array([seed, sample], dtype=np.uint64))
    stream.advance(start // 4)
    skip = start % 4
    return np.random.Generator(stream).random(skip + count)[skip:]


def _name(criterion: object) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)
