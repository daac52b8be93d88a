"""The same number on parts of the data: how much it depends on the sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharpkit.objective import batches as trees
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.products import Named

__all__ = ["GroupForms", "group_error", "grouped_forms", "grouped_losses"]

T = TypeVar("T")

SLICE = 2**16  # entries summed in the vectors' own precision
FEWEST = 4  # groups that can still say how much they differ


@dataclass(frozen=True)
class GroupForms:
    r"""Bilinear forms of a curvature matrix, group by group of the data.

    Attributes:
        weights: Share of the loss terms in each group, ``[G]``; they sum to 1.
        forms: :math:`u_{lk}^\top S_g v_k` with the group's part :math:`S_g` of the
            matrix, ``[L, G, K]``; summed over groups they are the forms of the whole.
    """

    weights: Tensor
    forms: Tensor

    def error(self, coefficients: Tensor) -> tuple[float, tuple[float, ...]] | None:
        """Return the standard error of a combination of forms, and its value on each group.

        Args:
            coefficients: ``[L, K]``; the number is ``sum_lk c_lk sum_g forms_lgk``.

        Returns:
            The error from the data being a sample, and pseudo-values whose mean is the
            number; None with fewer than four groups.
        """
        parts = torch.einsum("lgk,lk->g", self.forms, coefficients.to(self.forms))
        return group_error(parts, self.weights)


def group_error(parts: Tensor, weights: Tensor) -> tuple[float, tuple[float, ...]] | None:
    """Return the standard error of a sum of group contributions, and pseudo-values.

    Args:
        parts: What each group contributes, ``[G]``.
        weights: Share of the loss terms in each group; those of zero are left out.

    Returns:
        The error from the data being a sample, and values whose mean is the sum; None with
        fewer than four groups.
    """
    used = weights > 0
    parts, weights = parts[used], weights[used]
    count = len(parts)
    if count < FEWEST:
        return None
    total = parts.sum()
    off = parts - weights * total  # a group's contribution less its share of the sum
    values = total + count * off
    error = math.sqrt(count / (count - 1) * float(off.square().sum()))
    return error, tuple(values.tolist())


def grouped_forms(
    evaluator: Evaluator,
    theta: Named,
    product: Callable[[Any, Tensor], Tensor],
    V: Tensor,
    lefts: Sequence[Tensor],
    num_groups: int,
) -> GroupForms:
    """Return forms ``u . S_g v`` from one streamed pass over the data.

    Batches are dealt out to the groups at random; fewer batches than groups are cut into
    pieces, whose examples are drawn at random, and the pieces dealt out in turn: data that are
    sorted must not pass for a stratified sample. A loss that does not add up over examples is
    not cut. The draws are the same at every call.

    Args:
        evaluator: The loss of batches.
        theta: The parameters to differentiate at.
        product: Maps a piece and ``V [P, K]`` to its contribution.
        V: Right vectors ``[P, K]``.
        lefts: Left vectors, each ``[P, K]``.
        num_groups: Groups to deal out to.
    """
    cuts = _cuts(evaluator, num_groups)
    weights = torch.zeros(num_groups, dtype=torch.float64, device="cpu")
    shape = (len(lefts), num_groups, V.shape[1])
    forms = torch.zeros(shape, dtype=torch.float64, device="cpu")

    def one(batch: Any) -> list[tuple[float, Tensor]]:
        rows = []
        for piece in trees.dealt(batch, cuts, evaluator.shared):
            with torch.no_grad():
                count = evaluator.loss(theta, piece)[1]
            SV = product(piece, V)
            row = torch.stack([_dots(U, SV) for U in lefts])
            rows.append((count, row.cpu()))
        return rows

    V = V.T.contiguous().T
    lefts = [U.T.contiguous().T for U in lefts]
    found = evaluator.collect(one, grad=True, theta=theta)
    for group, (count, row) in _dealt(found, cuts, num_groups):
        weights[group] += count
        forms[:, group] += row
    return GroupForms(weights / evaluator.num_terms, forms)


def grouped_losses(evaluator: Evaluator, theta: Named, num_groups: int) -> tuple[Tensor, Tensor]:
    """Return each group's share of the loss terms and what it contributes to L, both ``[G]``.

    The groups are those of :func:`grouped_forms`.

    Args:
        evaluator: The loss of batches.
        theta: The parameters.
        num_groups: Groups to deal out to.
    """
    cuts = _cuts(evaluator, num_groups)
    sums = torch.zeros(2, num_groups, dtype=torch.float64, device="cpu")

    def one(batch: Any) -> list[tuple[float, float]]:
        pieces = trees.dealt(batch, cuts, evaluator.shared)
        results = [evaluator.loss(theta, piece) for piece in pieces]
        return [(count, float(loss.detach())) for loss, count in results]

    found = evaluator.collect(one, grad=False)
    for group, (count, loss) in _dealt(found, cuts, num_groups):
        sums[0, group] += count
        sums[1, group] += loss
    weights, losses = (sums / evaluator.num_terms).unbind()
    return weights, losses


def _dealt(found: list[list[list[T]]], cuts: int, num_groups: int) -> Iterator[tuple[int, T]]:
    # The group of each part of each piece of each batch, and what was found of it.
    order = torch.randperm(
        len(found), generator=torch.Generator().manual_seed(trees.DEAL), device="cpu"
    ).tolist()
    for number, batch in enumerate(found):
        for piece in batch:
            for part, x in enumerate(piece):
                place = number * cuts + part if cuts > 1 else order[number]
                yield place % num_groups, x


def _cuts(evaluator: Evaluator, num_groups: int) -> int:
    # Pieces to cut a batch into, so that there is one for each group.
    if evaluator.additive and evaluator.num_batches < num_groups:
        return -(-num_groups // max(evaluator.num_batches, 1))
    return 1


def _dots(U: Tensor, W: Tensor) -> Tensor:
    # Sums of many products in pieces, so that they lose no digits and take no memory.
    return torch.stack([_dot(u, w) for u, w in zip(U.unbind(1), W.unbind(1), strict=True)])


def _dot(u: Tensor, w: Tensor) -> Tensor:
    pieces = zip(torch.split(u, SLICE), torch.split(w, SLICE), strict=True)
    return torch.stack([torch.dot(a, b).double() for a, b in pieces]).sum()
