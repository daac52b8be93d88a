"""What is verified when an objective is made: that model, loss and data are one function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpkit.errors import ObjectiveError
from sharpkit.objective import batches as trees
from sharpkit.objective.evaluator import Evaluator, memory_error
from sharpkit.objective.isolation import is_out_of_memory
from sharpkit.objective.losses import CriterionLoss
from sharpkit.objective.products import Named

__all__ = ["first_pass"]

HEAD_EXAMPLES = 64  # of the first batches, what all ranks have
CACHE_SHARE = 4  # batches are kept in memory if they take at most a quarter of the budget
CHECK_SEED = 7  # another random state than that of the passes
COARSE = 1e-4  # the eps of a dtype (bfloat16) whose roundings show in every loss


def first_pass(evaluator: Evaluator, theta: Named, *, budget: int, check: bool) -> None:
    """Read all data once (twice with check), verify them, and count the loss terms.

    Args:
        evaluator: To be told what the data are.
        theta: The parameters.
        budget: Memory in bytes, of which a share may hold the batches.
        check: Whether to verify determinism, additivity and the data's repeatability.

    Raises:
        ObjectiveError: If model, loss and data do not make one fixed function.
    """
    team = evaluator.team
    kept: list[list[Any] | None] = []

    def read() -> _Own:
        own, batches = _read(evaluator, theta, budget, check)
        kept.append(batches)
        return own

    found = team.gather(read)
    own = found[team.rank]
    if team.shares_probes and any(part.marks != own.marks for part in found):
        raise ObjectiveError(
            "Expected the same data on all ranks, as they share out the probes. Got different"
            " ones. Give every rank all the data, or take share='data'."
        )
    evaluator.take_in(own.sizes, own.marks)
    if evaluator.num_batches == 0:
        raise ObjectiveError(
            "Expected data with at least one batch. Got none. Is the loader empty"
            " (drop_last on a small data set), or the path wrong? Look at len(list(data))."
        )
    evaluator.shared = {path for part in found for path in part.shared}
    evaluator.always_grad = any(part.always_grad for part in found)
    if check:
        evaluator.additive = all(part.additive for part in found)
        team.gather(lambda: _check_same_data(evaluator, own.marks))
    if kept[0] is not None:
        evaluator._data, evaluator.cached = kept[0], True
    if team.shares_data:
        _share_head(evaluator, theta)
    _count_terms(evaluator, theta)


@dataclass(frozen=True)
class _Own:
    # What a rank read of its own data.
    sizes: list[int | None]
    marks: int
    shared: set[str]
    additive: bool
    always_grad: bool


def _read(
    evaluator: Evaluator, theta: Named, budget: int, check: bool
) -> tuple[_Own, list[Any] | None]:
    # One pass over a rank's data; the batches too, if they fit in memory.
    kept: list[Any] | None = []
    sizes: list[int | None] = []
    size_bytes = marks = 0
    additivity = _Additivity(evaluator, theta)
    shared: set[str] = set()
    with evaluator.context(grad=False):
        for index, raw in enumerate(evaluator._data):
            batch = trees.move(raw, evaluator.device, evaluator.dtype, own=kept is not None)
            marks = (marks + trees.fingerprint(raw)) % 2**128
            shared |= trees.shared_paths(batch)
            size_bytes += trees.batch_bytes(batch)
            if kept is not None and size_bytes <= budget // CACHE_SHARE:
                kept.append(batch)
            else:
                kept = None
            sizes.append(trees.batch_size(batch))
            if index == 0:
                batch = _check_first(evaluator, theta, batch, check)
            if check:
                additivity.look_at(batch)
    return _Own(sizes, marks, shared, additivity.holds, evaluator.always_grad), kept


def _share_head(evaluator: Evaluator, theta: Named) -> None:
    # The first examples of all data on all ranks: what is tried out on a few examples is
    # tried on the same ones everywhere, also on a rank without data.
    def mine() -> list[Any]:
        found: list[Any] = []
        first = {r: own[0] or 0 for r, own in enumerate(evaluator.sizes) if own}
        before = sum(size for r, size in first.items() if r < evaluator.team.rank)

        def one(batch: Any) -> tuple[Any, bool]:
            piece = evaluator.split(batch, HEAD_EXAMPLES)[0] if evaluator.additive else batch
            return piece, _loss(evaluator, theta, piece)[1] > 0

        def take(result: tuple[Any, bool]) -> bool:
            piece, counts = result
            if evaluator.at_batch == 0 or counts:
                found.append(trees.move(piece, torch.device("cpu"), None, own=True))
            return counts

        if before < HEAD_EXAMPLES:
            evaluator.each(one, take, grad=False)
        return found

    evaluator.lead_by([piece for pieces in evaluator.team.gather(mine) for piece in pieces])


def _loss(evaluator: Evaluator, theta: Named, batch: Any) -> tuple[Tensor, float]:
    # The loss; an exception tells the shapes.
    try:
        return evaluator.loss(theta, batch)
    except ObjectiveError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        shapes = [
            f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
            for _, leaf in trees.leaves(batch)
            if isinstance(leaf, Tensor)
        ]
        raise ObjectiveError(
            "The model or the loss failed on a batch with tensors"
            f" {', '.join(shapes) or 'of no kind'}: {type(error).__name__}:"
            f" {' '.join(str(error).split())[:300].rstrip('.')}. Check that the data fit the"
            " model and the loss."
        ) from error


def _needs_gradients(error: BaseException) -> bool:
    # A loss that differentiates by itself, such as that of a differential equation.
    cause = error.__cause__ or error
    return isinstance(cause, RuntimeError) and "does not require grad" in str(cause)


def _check_first(evaluator: Evaluator, theta: Named, batch: Any, check: bool) -> Any:
    # Deterministic? A second evaluation from another random state must be the same.
    # Returns the part of the batch that fits in memory.
    while True:
        try:
            losses = []
            for seed in (CHECK_SEED, CHECK_SEED + 1) if check else (CHECK_SEED,):
                with evaluator.context(grad=False, seed=seed):
                    loss, _ = _loss(evaluator, theta, batch)
                losses.append(float(loss.detach().cpu().double()))
            break
        except Exception as error:
            if _needs_gradients(error) and not evaluator.always_grad:
                evaluator.always_grad = True
                continue
            size = trees.batch_size(batch) or 0
            if not is_out_of_memory(error):
                raise
            if size < 2:
                raise memory_error(size, str(error)) from error
        batch = trees.split(batch, (size + 1) // 2)[0]  # a part of it tells as much
    first, second = losses[0], losses[-1]
    eps = torch.finfo(evaluator.coarsest_dtype(theta)).eps
    slack = (2 if eps > COARSE else 100) * eps * max(abs(first), 1e-30)
    if abs(first - second) > slack:
        raise ObjectiveError(
            "Expected the same loss from the same batch twice. Got"
            f" {first:.6g} and {second:.6g}: dropout, noise or sampling is active."
            " Call model.eval() and make the loss deterministic."
        )
    return batch


class _Additivity:
    # The loss of a batch must be a sum over its examples: halves must add up. Torch's own
    # criteria are checked on one batch; others, whose divisor is unknown, on every batch,
    # as a hidden ignore_index shows only where the halves differ.
    def __init__(self, evaluator: Evaluator, theta: Named):
        self._evaluator, self._theta = evaluator, theta
        loss = evaluator.batch_loss
        self._criterion = isinstance(loss, CriterionLoss)
        self._every = isinstance(loss, CriterionLoss) and not loss.counted_exactly
        self._seen_one = self._seen_many = False
        self.holds = True

    def look_at(self, batch: Any) -> None:
        """Check a batch, if there is something to learn from it."""
        if not self.holds:
            return
        size = trees.batch_size(batch)
        if not size:
            self.holds = False  # nothing to cut
        elif size > 1:
            if self._every or not self._seen_many:
                self._compare(batch, trees.split(batch, (size + 1) // 2), 1)
            self._seen_many = True
        elif self._every or not (self._seen_one or self._seen_many):
            self._seen_one = True
            self._compare(trees.doubled(batch), [batch], 2)

    def _compare(self, whole: Any, parts: list[Any], times: int) -> None:
        try:
            value, terms = self._measure(whole)
            pieces = [self._measure(part) for part in parts]
        except Exception as error:
            if self._criterion and isinstance(error, ObjectiveError):
                raise
            if is_out_of_memory(error):
                return  # only halves are possible, and those are what is computed
            if self._every and times == 1:
                raise ObjectiveError(
                    "Expected batches that can be cut in two, to check what the loss divides"
                    f" by. Half a batch failed ({' '.join(str(error).split())[:160]}). Use a"
                    " criterion of torch.nn, or Objective.from_batch_loss."
                ) from error
            self.holds = self.holds and times == 2  # it is used as it stands
            return
        if not all(math.isfinite(v) for v in (value, *(v for v, _ in pieces))):
            return  # refused with its own words
        total = times * sum(v for v, _ in pieces)
        count = times * sum(n for _, n in pieces)
        same = abs(total - value) <= self._slack(value, pieces, times, terms)
        counted = abs(count - terms) <= 1e-6 * max(terms, 1.0)
        if same and counted:
            return
        self.holds = False
        if self._criterion:
            raise ObjectiveError(
                "Expected a loss that is the mean over its terms, so that the halves of a"
                f" batch add up to the whole. Got {value:.6g} for the batch and {total:.6g}"
                " for its halves. Use reduction='mean'; give num_terms= if the loss divides"
                " by something other than the number of targets; make sure that no layer"
                " mixes examples (BatchNorm without running statistics); or use"
                " Objective.from_batch_loss, whose batches are taken as they are."
            )
        mean = times * sum(v * n for v, n in pieces) / count if count else math.nan
        if counted and abs(mean - value) <= self._slack(value, pieces, times, 0.0):
            raise ObjectiveError(
                "Expected batch_loss to return the sum of the loss terms and their number."
                f" Got what looks like their mean: {value:.6g} for a batch, of which the"
                f" halves have the mean {mean:.6g}. Multiply it by the number of terms."
            )

    def _measure(self, batch: Any) -> tuple[float, float]:
        with self._evaluator.context(grad=False):
            loss, terms = self._evaluator.loss(self._theta, batch)
        return float(loss.detach().cpu().double()), terms

    def _slack(
        self, value: float, pieces: list[tuple[float, float]], times: int, terms: float
    ) -> float:
        # Rounding: relative to the sums, and to 1 for each term (logarithms near zero).
        eps = torch.finfo(self._evaluator.coarsest_dtype(self._theta)).eps
        if eps > COARSE:
            relative = 4 * eps
        else:  # TF32 on a GPU rounds by the size of the batch
            tf32 = self._evaluator.device.type == "cuda" and eps > 1e-10
            relative = max((1e4 if tf32 else 1e3) * eps, 1e-9)
        size = abs(value) + times * sum(abs(v) for v, _ in pieces)
        return relative * size + terms * min(100 * eps, 1e-3)


def _check_same_data(evaluator: Evaluator, marks: int) -> None:
    again = 0
    with evaluator.context(grad=False, seed=CHECK_SEED):
        for raw in evaluator._data:
            again = (again + trees.fingerprint(raw)) % 2**128
    if again != marks:
        raise ObjectiveError(
            "Expected the same examples in every pass over the data. Two passes"
            " differ: random augmentation, sampling, or drop_last with shuffling. Use"
            " deterministic transforms and shuffle=False."
        )


def _count_terms(evaluator: Evaluator, theta: Named) -> None:
    def count() -> float:
        total, seen = 0.0, 0

        def add(result: tuple[Tensor, float]) -> None:
            nonlocal total, seen
            value = float(result[0].detach().cpu().double())
            if not math.isfinite(value):
                raise ObjectiveError(
                    f"Expected a finite loss. It is {value} on batch {seen}. Look for NaN in"
                    " the data, a diverged model, or a loss that takes log(0)."
                )
            total, seen = total + result[1], seen + 1

        evaluator.each(lambda batch: _loss(evaluator, theta, batch), add, grad=False)
        return total

    evaluator.num_terms = evaluator.over_data(count)
    if evaluator.num_terms == 0:
        evaluator.num_terms = 1.0
        raise ObjectiveError(
            "Expected at least one loss term. All targets are masked (ignore_index)."
        )
