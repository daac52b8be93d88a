"""The loss of batches as a function of named parameters: model, data and their checks."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sharpkit.errors import ObjectiveError, SharpkitWarning
from sharpkit.objective import batches as trees
from sharpkit.objective.isolation import evaluation, is_out_of_memory
from sharpkit.objective.losses import BatchLoss, CriterionLoss
from sharpkit.objective.products import Named

__all__ = ["Evaluator"]

T = TypeVar("T")

CACHE_SHARE = 4  # batches are kept in memory if they take at most a quarter of the budget
CHECK_SEED = 7  # another random state than that of the passes


class _Bound(nn.Module):
    # Puts the user's module and batch loss under one forward(), so that functional_call
    # exchanges the parameters for any method that the batch loss calls.
    def __init__(self, model: nn.Module, batch_loss: BatchLoss):
        super().__init__()
        self.model = model
        self._batch_loss = batch_loss

    def forward(self, batch: Any, outputs_only: bool) -> Any:
        if outputs_only:
            assert isinstance(self._batch_loss, CriterionLoss)
            inputs, targets = self._batch_loss.unpack(batch)
            return self._batch_loss.outputs(self.model, inputs), targets
        return self._batch_loss(self.model, batch)


class Evaluator:
    """Evaluate loss sums of batches at any parameters, leaving the model untouched.

    Args:
        model: The user's module, unwrapped. It is read, never written.
        batch_loss: Maps ``(model, batch)`` to ``(loss_sum, num_terms)``.
        data: A re-iterable of batches.
        names: The parameters that vary; all others keep their values.
        dtype: Floating dtype to evaluate in; ``None`` keeps the model's.
        budget: Memory in bytes, of which a share may hold the batches.
        check: Whether to verify determinism, additivity and the data's repeatability.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_loss: BatchLoss,
        data: Iterable[Any],
        names: list[str],
        *,
        dtype: torch.dtype | None,
        budget: int,
        check: bool,
    ):
        self.model, self.batch_loss, self.dtype = model, batch_loss, dtype
        self._bound = _Bound(model, batch_loss)
        parameters = dict(model.named_parameters())
        self.device = parameters[names[0]].device
        fixed = {n: p.detach() for n, p in parameters.items() if n not in set(names)}
        self._pristine = {n: b.detach() for n, b in model.named_buffers()}
        self._fixed = {n: self.cast(t) for n, t in fixed.items()}
        self._snapshot_buffers()
        self._data = data
        self.cached = False
        self.micro_batch: int | None = None
        self.additive = False
        self.num_batches = self.num_examples = 0
        self.num_terms = 0.0
        self.fingerprint = ""
        self._first_pass({n: self.cast(parameters[n].detach()) for n in names}, budget, check)

    # -- evaluation ------------------------------------------------------------------

    def loss(self, theta: Named, batch: Any) -> tuple[Tensor, float]:
        """Return the loss sum and the number of terms of one batch."""
        result = self._call(theta, batch, outputs_only=False)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ObjectiveError(
                "Expected `batch_loss(model, batch)` to return (loss_sum, num_terms)."
                f" Got {type(result).__name__}. Return the sum of the loss terms and"
                " their number."
            )
        total, count = result
        if not isinstance(total, Tensor) or total.numel() != 1:
            shape = tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
            raise ObjectiveError(
                f"Expected the loss of a batch to be one number. Got {shape}. Use a"
                " criterion with reduction='mean', or sum the terms."
            )
        count = float(count)
        if not (count >= 0 and math.isfinite(count)):
            raise ObjectiveError(f"Expected a number of loss terms of at least 0. Got {count}.")
        return total.reshape(()), count

    def share(self, theta: Named, batch: Any) -> Tensor:
        """Return what a batch contributes to L: batches simply add up."""
        return self.loss(theta, batch)[0] / self.num_terms

    def outputs(self, theta: Named, batch: Any) -> tuple[Tensor, Any]:
        """Return the network's outputs and the targets; needs a criterion."""
        outputs, targets = self._call(theta, batch, outputs_only=True)
        return outputs, targets

    def _call(self, theta: Named, batch: Any, outputs_only: bool) -> Any:
        state = {**self._fixed, **self._buffers, **theta}
        named = {f"model.{name}": tensor for name, tensor in state.items()}
        result = functional_call(self._bound, named, (batch, outputs_only))
        for name, buffer in self._buffers.items():
            if buffer._version != self._versions[name]:
                self._snapshot_buffers()  # the user's own buffers were never written
                raise ObjectiveError(
                    f"Expected a forward pass that changes nothing. It wrote the buffer"
                    f" {name!r}. Call model.eval(), or switch off its statistics."
                )
        return result

    def each(
        self,
        function: Callable[[Any], T],
        consume: Callable[[T], bool | None],
        *,
        grad: bool,
        skip: int = 0,
    ) -> None:
        """Call ``consume(function(batch))`` for the pieces of the data, in order.

        A piece that runs out of memory is cut in two, and all later ones are made as small.

        Args:
            function: Called inside :func:`evaluation`.
            consume: Takes each result; returning True ends the pass.
            grad: Whether autograd records.
            skip: Number of leading pieces to leave out.
        """
        with evaluation(self.model, grad=grad):
            count = 0
            for batch in self._data:
                todo = self._pieces(batch)
                while todo:
                    piece = todo.pop(0)
                    count += 1
                    if count <= skip:
                        continue
                    result = self._attempt(function, piece)
                    if result is None:
                        todo = [p for q in [piece, *todo] for p in self._pieces(q)]
                        count -= 1
                    elif consume(result[0]):
                        return

    def _pieces(self, batch: Any) -> list[Any]:
        batch = batch if self.cached else trees.move(batch, self.device, self.dtype)
        return trees.split(batch, self.micro_batch) if self.micro_batch else [batch]

    def _attempt(self, function: Callable[[Any], T], piece: Any) -> tuple[T] | None:
        try:
            return (function(piece),)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            size = trees.batch_size(piece)
            if not self.additive or size is None or size < 2:
                raise ObjectiveError(
                    f"Memory ran out on a batch of {size} examples that cannot be cut"
                    f" further ({str(error).splitlines()[0]}). Use smaller batches, fewer"
                    " parameters (params=...), or a device with more memory."
                ) from error
        # The handler is left, so the failed graph is free before the next try.
        self.micro_batch = (size + 1) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"Memory ran out on a batch of {size} examples: going on with micro-batches of"
            f" {self.micro_batch}. The result is the same, only slower.",
            SharpkitWarning,
            stacklevel=2,
        )
        return None

    # -- construction ----------------------------------------------------------------

    def restrict(self, fixed: Named) -> Evaluator:
        """Return the same evaluator with further parameters held fixed."""
        other = copy.copy(self)
        other._fixed = {**self._fixed, **fixed}
        return other

    def cast(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the dtype to evaluate in."""
        return tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor

    def _snapshot_buffers(self) -> None:
        self._buffers = {n: self.cast(b).clone() for n, b in self._pristine.items()}
        self._versions = {n: b._version for n, b in self._buffers.items()}

    def _first_pass(self, theta: Named, budget: int, check: bool) -> None:
        kept: list[Any] | None = []
        size_bytes = 0
        marks = 0
        with evaluation(self.model, grad=False):
            for index, raw in enumerate(self._data):
                batch = trees.move(raw, self.device, self.dtype)
                marks = (marks + trees.fingerprint(raw)) % 2**128
                size_bytes += trees.batch_bytes(batch)
                if kept is not None and size_bytes <= budget // CACHE_SHARE:
                    kept.append(batch)
                else:
                    kept = None
                self.num_batches += 1
                self.num_examples += trees.batch_size(batch) or 0
                if index == 0 and check:
                    self._check_first(theta, batch)
        if self.num_batches == 0:
            raise ObjectiveError(
                "Expected data with at least one batch. Got none. Is the loader empty"
                " (drop_last on a small data set), or the path wrong? Look at len(list(data))."
            )
        self.fingerprint = f"{marks:032x}"
        if check:
            self._check_same_data(marks)
        if kept is not None:
            self._data, self.cached = kept, True
        self.initial_value = self._count_terms(theta)

    def _count_terms(self, theta: Named) -> float:
        total, count, seen = 0.0, 0.0, 0

        def add(result: tuple[Tensor, float]) -> None:
            nonlocal total, count, seen
            value = float(result[0].double())
            if not math.isfinite(value):
                raise ObjectiveError(
                    f"Expected a finite loss. It is {value} on batch {seen}. Look for NaN in"
                    " the data, a diverged model, or a loss that takes log(0)."
                )
            total, count, seen = total + value, count + result[1], seen + 1

        self.each(lambda batch: self._first(theta, batch), add, grad=False)
        if count == 0:
            raise ObjectiveError(
                "Expected at least one loss term. All targets are masked (ignore_index)."
            )
        self.num_terms = count
        return total / count

    def _first(self, theta: Named, batch: Any) -> tuple[Tensor, float]:
        try:
            return self.loss(theta, batch)
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
                f" {' '.join(str(error).split())[:300]} Check that the data fit the model"
                " and the loss."
            ) from error

    def _check_first(self, theta: Named, batch: Any) -> None:
        # Deterministic? A second evaluation from another random state must be the same.
        while True:
            try:
                losses = []
                for seed in (CHECK_SEED, CHECK_SEED + 1):
                    with evaluation(self.model, grad=False, seed=seed):
                        loss, terms = self._first(theta, batch)
                    losses.append(float(loss.double()))
                break
            except Exception as error:
                size = trees.batch_size(batch) or 0
                if not is_out_of_memory(error) or size < 2:
                    raise
            batch = trees.split(batch, (size + 1) // 2)[0]  # a part of it tells as much
        first, second = losses
        slack = 100 * torch.finfo(self.coarsest_dtype(theta)).eps * max(abs(first), 1e-30)
        if abs(first - second) > slack:
            raise ObjectiveError(
                "Expected the same loss from the same batch twice. Got"
                f" {first:.6g} and {second:.6g}: dropout, noise or sampling is active."
                " Call model.eval() and make the loss deterministic."
            )
        self._check_additive(theta, batch, first, terms)

    def _check_additive(self, theta: Named, batch: Any, whole: float, terms: float) -> None:
        # The loss of a batch must be a sum over its examples: halves must add up.
        size = trees.batch_size(batch) or 0
        if size < 2 or not math.isfinite(whole):  # the latter is refused with its own words
            self.additive = True
            return
        is_criterion = isinstance(self.batch_loss, CriterionLoss)
        try:
            with evaluation(self.model, grad=False):
                halves = [self.loss(theta, piece) for piece in trees.split(batch, (size + 1) // 2)]
        except Exception as error:
            if is_criterion and isinstance(error, ObjectiveError):
                raise
            return  # a batch that cannot be cut: it is used as it stands
        total = sum(float(loss.double()) for loss, _ in halves)
        count = sum(n for _, n in halves)
        eps = torch.finfo(self.coarsest_dtype(theta)).eps
        slack = max(1e4 * eps, 1e-9)
        same = abs(total - whole) <= slack * (abs(whole) + sum(abs(float(x)) for x, _ in halves))
        self.additive = same and abs(count - terms) <= 1e-6 * max(terms, 1.0)
        if is_criterion and not self.additive:
            raise ObjectiveError(
                "Expected a loss that is the mean over its terms, so that the halves of a"
                f" batch add up to the whole. Got {whole:.6g} for the batch and {total:.6g}"
                " for its halves. Use reduction='mean'; give num_terms= if the loss divides"
                " by something other than the number of targets; make sure that no layer"
                " mixes examples (BatchNorm without running statistics); or use"
                " Objective.from_batch_loss, whose batches are taken as they are."
            )

    def _check_same_data(self, marks: int) -> None:
        again = 0
        with evaluation(self.model, grad=False, seed=CHECK_SEED):
            for raw in self._data:
                again = (again + trees.fingerprint(raw)) % 2**128
        if again != marks:
            raise ObjectiveError(
                "Expected the same examples in every pass over the data. Two passes"
                " differ: random augmentation, sampling, or drop_last with shuffling. Use"
                " deterministic transforms and shuffle=False."
            )

    @staticmethod
    def coarsest_dtype(theta: Named) -> torch.dtype:
        """Return the dtype that decides how well two evaluations can agree."""
        return max((t.dtype for t in theta.values()), key=lambda d: torch.finfo(d).eps)
