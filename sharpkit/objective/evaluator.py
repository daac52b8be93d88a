"""The loss of batches as a function of named parameters, leaving the model untouched."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sharpkit.errors import ObjectiveError, SharpkitWarning
from sharpkit.objective import batches as trees
from sharpkit.objective.isolation import (
    PASS_SEED,
    evaluation,
    is_out_of_memory,
    recording,
    start_from,
)
from sharpkit.objective.losses import BatchLoss, CriterionLoss
from sharpkit.objective.products import Named
from sharpkit.team import SOLO, Team, interleaved

__all__ = ["Evaluator", "OrderChanged"]

T = TypeVar("T")


class OrderChanged(Exception):  # noqa: N818  (a message inside the package, never seen)
    """The data came in another order than when their first pieces were kept."""


class HoldsMemory(Protocol):
    """Something that can let go of memory when a pass over the data needs it.

    Attributes:
        point: The parameters that it belongs to.
    """

    point: Named

    @property
    def held(self) -> float:
        """Bytes that it holds."""

    def give_up(self) -> bool:
        """Free what is held; return whether anything was."""


class _Bound(nn.Module):
    # Puts the user's module under one forward(), so that functional_call exchanges the
    # parameters for any method that the batch loss calls, and for as long as work lasts.
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        return work(self.model)


class Evaluator:
    """Evaluate loss sums of batches at any parameters, leaving the model untouched.

    What the loss depends on is copied: frozen parameters, buffers, the training flags of
    modules and the criterion's own tensors may change afterwards without being seen.

    Args:
        model: The user's module, unwrapped. It is read, never written.
        batch_loss: Maps ``(model, batch)`` to ``(loss_sum, num_terms)``.
        data: A re-iterable of batches.
        names: The parameters that vary; all others keep their values.
        dtype: Floating dtype to evaluate in; ``None`` keeps the model's.
        team: The ranks that measure together. Passes go over this rank's own data; what the
            numbers below say is of all ranks' data.

    Attributes:
        num_batches: Batches of all ranks; so are the examples and the loss terms.
        sizes: The examples of each batch of each rank.
        at_batch: The number of this rank's batch that a pass is at.
        fused: Whether passes without gradients may use fused attention.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_loss: BatchLoss,
        data: Iterable[Any],
        names: list[str],
        *,
        dtype: torch.dtype | None,
        team: Team = SOLO,
    ):
        self.model, self.dtype, self.team = model, dtype, team
        parameters = dict(model.named_parameters())
        self.device = next(iter(parameters.values())).device  # where the data go
        self.batch_loss: BatchLoss = batch_loss
        if isinstance(batch_loss, CriterionLoss):
            self.batch_loss = batch_loss.to(parameters[names[-1]].device, dtype)
        self._bound = _Bound(model)
        chosen = set(names)
        self.fixed = {
            n: self.cast(p.detach().clone()) for n, p in parameters.items() if n not in chosen
        }
        self._pristine = {n: b.detach().clone() for n, b in model.named_buffers()}
        self._flags = {module: module.training for module in model.modules()}
        self._snapshot_buffers()
        self._data = data
        self._generators = trees.generators(data)
        self.cached = False
        self.shared: set[str] = set()
        self.always_grad = False
        self.micro_batch: int | None = None
        self.additive = False
        self.num_batches = self.num_examples = 0
        self.num_terms = 1.0
        self.fingerprint = ""
        self.sizes: list[list[int | None]] = [[]]
        self.at_batch = 0
        self.fused = False
        self._entered = False  # whether the surroundings of passes are there already
        self._head: list[Any] | None = None  # the first examples of all ranks' data
        self.holders: weakref.WeakSet[HoldsMemory] = weakref.WeakSet()

    # -- one batch -------------------------------------------------------------------

    def loss(self, theta: Named, batch: Any) -> tuple[Tensor, float]:
        """Return the loss sum and the number of terms of one batch."""
        result = self.bound(theta, lambda model: self.batch_loss(model, batch))
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

    def outputs(self, theta: Named, batch: Any) -> tuple[Any, Any]:
        """Return the network's outputs and the targets; needs a criterion."""
        criterion = self.batch_loss
        assert isinstance(criterion, CriterionLoss)
        inputs, targets = criterion.unpack(batch)
        return self.bound(theta, lambda model: criterion.outputs(model, inputs)), targets

    def bound(self, theta: Named, work: Callable[[nn.Module], T]) -> T:
        """Return ``work(model)`` with the model at theta.

        Backward passes belong inside too: activation checkpoints run the model again.
        """
        state = {**self.fixed, **self._buffers, **theta}
        named = {f"model.{name}": tensor for name, tensor in state.items()}
        result: T = functional_call(self._bound, named, (work,))
        for name, buffer in self._buffers.items():
            if buffer._version != self._versions[name]:
                self._snapshot_buffers()  # the user's own buffers were never written
                raise ObjectiveError(
                    f"Expected a forward pass that changes nothing. It wrote the buffer"
                    f" {name!r}. Call model.eval(), or switch off its statistics."
                )
        return result

    # -- all batches -----------------------------------------------------------------

    def context(
        self, *, grad: bool, seed: int = PASS_SEED
    ) -> contextlib.AbstractContextManager[None]:
        """Return the surroundings of every evaluation."""
        if self._entered and not grad:
            start_from(seed, self._generators)
            return contextlib.nullcontext()
        return evaluation(
            self.model,
            grad=grad or self.always_grad,
            seed=seed,
            flags=self._flags,
            generators=self._generators,
            fused=self.fused and not (grad or self.always_grad),
        )

    @contextlib.contextmanager
    def many_passes(self) -> Iterator[None]:
        """Enter the surroundings once for many passes without gradients.

        Each still starts from the same random state; entering takes longer than a pass over a
        small network.
        """
        with self.context(grad=False):
            before, self._entered = self._entered, True
            try:
                yield
            finally:
                self._entered = before

    def each(
        self,
        function: Callable[[Any], T],
        consume: Callable[[T], bool | None],
        *,
        grad: bool,
        theta: Named | None = None,
        seen: Sequence[int | None] = (),
        own: bool = False,
    ) -> None:
        """Call ``consume(function(batch))`` for the pieces of the data, in order.

        A piece that runs out of memory is cut in two, and all later ones are made as small.

        Args:
            function: Called inside :func:`evaluation`.
            consume: Takes each result; returning True ends the pass.
            grad: Whether autograd records.
            theta: The parameters that the model holds while function runs.
            seen: Fingerprints of leading pieces to leave out; ``None``: known to be fixed.
            own: Whether the pieces must not share memory with the user's batches.

        Raises:
            OrderChanged: If a piece left out is not the one that was seen.
        """

        def work(piece: Any) -> T:
            if theta is None:
                return function(piece)
            return self.bound(theta, lambda _: function(piece))

        with self.context(grad=grad):
            iterator = iter(self._data)
            try:
                count = 0
                for self.at_batch, batch in enumerate(iterator):
                    todo = self._pieces(batch, own)
                    while todo:
                        piece = todo.pop(0)
                        if count < len(seen):
                            mark = seen[count]
                            if mark is not None and mark != trees.fingerprint(piece):
                                raise OrderChanged
                            count += 1
                            continue
                        result = self._attempt(work, piece, grad=grad)
                        if result is None:
                            todo = [p for q in [piece, *todo] for p in self._pieces(q)]
                        elif consume(result[0]):
                            return
            finally:
                if callable(close := getattr(iterator, "close", None)):
                    close()  # a generator ends here, where what it changes is put back

    def over_data(self, count: Callable[[], float]) -> float:
        """Return what a rank counts on its own data, summed over the ranks that share it."""
        found = self.team.gather(count)
        return math.fsum(found) if self.team.shares_data else found[0]

    def collect(
        self,
        function: Callable[[Any], T],
        *,
        grad: bool,
        theta: Named | None = None,
    ) -> list[list[T]]:
        """Return what a function says of the pieces of each batch, of all ranks' data in order.

        Their order is that of one process whose batches are the first of each rank, then the
        second of each, and so on. For small things, on the CPU.

        Args:
            function: As for :meth:`each`, and so are the other arguments.
            grad: Whether autograd records.
            theta: The parameters.
        """

        def own() -> list[list[T]]:
            found: list[list[T]] = []

            def add(result: T) -> None:
                while len(found) <= self.at_batch:
                    found.append([])
                found[self.at_batch].append(result)

            self.each(function, add, grad=grad, theta=theta)
            return found

        if not self.team.shares_data:
            return own()
        return interleaved(self.team.gather(own))

    @property
    def order(self) -> list[tuple[int, int]]:
        """Rank and number of each batch, in the order of all data."""
        lists = [[(r, b) for b in range(len(own))] for r, own in enumerate(self.sizes)]
        return interleaved(lists)

    def leading(self) -> Evaluator:
        """Return the same evaluator on the first examples of all data, the same on all ranks."""
        if self._head is None:
            return self
        other = self.on_few(self._head)
        other.cached = False  # they are on the CPU, in the dtype that they came in
        return other

    def on_few(self, pieces: list[Any]) -> Evaluator:
        """Return the same evaluator going over a few pieces, where they belong."""
        other = copy.copy(self)
        other._data, other._generators, other.cached = pieces, [], True
        other.holders = weakref.WeakSet()
        return other

    def lead_by(self, head: list[Any]) -> None:
        """Say what the first examples of all ranks' data are."""
        self._head = head

    def _pieces(self, batch: Any, own: bool = False) -> list[Any]:
        if not self.cached:
            batch = trees.move(batch, self.device, self.dtype, own=own)
        return self.split(batch, self.micro_batch) if self.micro_batch else [batch]

    def split(self, batch: Any, size: int) -> list[Any]:
        """Return pieces of at most ``size`` examples."""
        return trees.split(batch, size, self.shared)

    def _attempt(self, function: Callable[[Any], T], piece: Any, *, grad: bool) -> tuple[T] | None:
        try:
            with recording(grad or self.always_grad):  # a loader may have switched it off
                return (function(piece),)
        except Exception as error:
            if "Checkpointing is not compatible" in str(error) or "use_reentrant" in str(error):
                raise ObjectiveError(
                    "Expected activation checkpoints that torch.autograd.grad can see. Got"
                    " reentrant ones. Use torch.utils.checkpoint with use_reentrant=False."
                ) from error
            if not is_out_of_memory(error):
                raise
            size, reason = trees.batch_size(piece), str(error)
        # The handler is left, so the failed graph is free before the next try.
        freed = [holder.give_up() for holder in list(self.holders)]  # all of them
        if any(freed):
            warnings.warn(
                "Memory ran out while gradient graphs were kept: they are freed, and fewer"
                " will be kept. The result is the same, only slower.",
                SharpkitWarning,
                stacklevel=2,
            )
        elif not self.additive or size is None or size < 2:
            raise memory_error(size, reason)
        else:
            self.micro_batch = (size + 1) // 2
            warnings.warn(
                f"Memory ran out on a batch of {size} examples: going on with micro-batches"
                f" of {self.micro_batch}. The result is the same, only slower.",
                SharpkitWarning,
                stacklevel=2,
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def held_beside(self, holder: HoldsMemory) -> float:
        """Return the bytes that others hold for the same parameters."""
        others = [h for h in self.holders if h is not holder and h.point is holder.point]
        return sum(h.held for h in others)

    # -- variants --------------------------------------------------------------------

    def restrict(self, fixed: Named) -> Evaluator:
        """Return the same evaluator with further parameters held fixed."""
        other = copy.copy(self)
        other.fixed = {**self.fixed, **fixed}
        return other

    def on(self, pieces: list[Any]) -> Evaluator:
        """Return the same evaluator on other data: pieces of batches, where they belong.

        The number of loss terms is still that of the whole.
        """
        other = self.on_few(pieces)
        sizes = [trees.batch_size(piece) for piece in pieces]
        other.take_in(sizes, sum(trees.fingerprint(piece) for piece in pieces))
        return other

    def take_in(self, sizes: list[int | None], marks: int) -> None:
        """Be told of this rank's batches: their examples, and the sum of their fingerprints."""
        found = [(sizes, marks)]
        if self.team.shares_data:
            found = self.team.gather(lambda: (sizes, marks))
        self.sizes = [own for own, _ in found]
        self.num_batches = sum(map(len, self.sizes))
        self.num_examples = sum(size or 0 for own in self.sizes for size in own)
        self.fingerprint = f"{sum(mark for _, mark in found) % 2**128:032x}"

    def batches(self) -> Iterator[Any]:
        """Yield the batches of one pass where they belong; nothing is held between them."""
        with self.context(grad=False):
            iterator = iter(self._data)
        try:
            while True:
                with self.context(grad=False):
                    batch = next(iterator, None)
                    if batch is not None and not self.cached:
                        batch = trees.move(batch, self.device, self.dtype)
                if batch is None:
                    return
                yield batch
        finally:
            if callable(close := getattr(iterator, "close", None)):
                close()

    def in_double(self) -> Evaluator:
        """Return the same evaluator in float64."""
        other = copy.copy(self)
        other.dtype, other.cached = torch.float64, False
        other.fixed = {n: other.cast(t) for n, t in self.fixed.items()}
        if isinstance(self.batch_loss, CriterionLoss):
            other.batch_loss = self.batch_loss.to(self.device, torch.float64)
        other._snapshot_buffers()
        other.holders = weakref.WeakSet()
        return other

    @property
    def buffers(self) -> Named:
        """The buffers that every evaluation sees, in the dtype to evaluate in."""
        return self._buffers

    def set_buffers(self, buffers: Named) -> None:
        """Let every evaluation from now on see other buffers."""
        self._pristine = dict(buffers)
        self._snapshot_buffers()

    def cast(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the dtype to evaluate in."""
        return tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor

    def _snapshot_buffers(self) -> None:
        with recording(grad=False):
            self._buffers = {n: self.cast(b).clone() for n, b in self._pristine.items()}
        self._versions = {n: b._version for n, b in self._buffers.items()}

    @staticmethod
    def coarsest_dtype(theta: Named) -> torch.dtype:
        """Return the dtype that decides how well two evaluations can agree."""
        return max((t.dtype for t in theta.values()), key=lambda d: torch.finfo(d).eps)


def memory_error(size: int | None, reason: str) -> ObjectiveError:
    """Return what to raise when memory runs out and nothing can be made smaller."""
    return ObjectiveError(
        f"Memory ran out on a batch of {size} examples that cannot be cut further"
        f" ({reason.splitlines()[0] if reason else 'out of memory'}). Use smaller batches,"
        " fewer parameters (params=...), or a device with more memory."
    )
