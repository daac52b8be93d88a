"""An objective's parameters and buffers by name: other values of them, and what the model does.

``Objective.at`` moves theta alone. Here everything that the function depends on can be
exchanged, running statistics and frozen parameters too.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkit.errors import ObjectiveError
from sharpkit.objective import batches as trees
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.losses import CriterionLoss
from sharpkit.objective.objective import Objective, differentiable
from sharpkit.objective.probing import first_piece
from sharpkit.parameters import ParameterSpace

__all__ = [
    "Reference",
    "State",
    "deviation",
    "moved",
    "state_hash",
    "state_of",
    "trace",
    "with_all_parameters",
    "with_state",
]

PIECE = 4  # examples that a reference is run on at once

R = TypeVar("R")
W = TypeVar("W", bound=contextlib.AbstractContextManager[Any])

State: TypeAlias = Mapping[str, Tensor]
"""Parameters and buffers, by the model's names."""


def state_of(objective: Objective) -> dict[str, Tensor]:
    """Return the parameters (selected and fixed) and buffers, in float64 where floating."""
    held = _held(objective)
    return {n: t.detach().double() if t.is_floating_point() else t for n, t in held.items()}


def _held(objective: Objective) -> dict[str, Tensor]:
    evaluator = objective._evaluator
    return {**evaluator.fixed, **evaluator.buffers, **objective._leaves}


def state_hash(objective: Objective) -> str:
    """Return a SHA-256 of names, dtypes, shapes and contents of parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_held(objective).items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(trees.tensor_bytes(tensor))
    return digest.hexdigest()


def with_state(objective: Objective, state: State) -> Objective:
    """Return the same objective with other parameters and buffers, rounded to its dtype.

    Args:
        objective: The model, loss and data.
        state: All of them, as :func:`state_of` returns them.
    """
    old = objective._evaluator
    evaluator = copy.copy(old)
    evaluator.fixed = {n: state[n].to(t.dtype) for n, t in old.fixed.items()}
    evaluator.set_buffers({n: state[n].to(t.dtype) for n, t in old.buffers.items()})
    evaluator.holders = weakref.WeakSet()
    other = objective.at(objective.space.flatten({n: state[n] for n in objective.space.names}))
    other._evaluator = evaluator
    other._begin()
    return other


def moved(objective: Objective, state: State) -> Objective:
    """Return the objective at another state of the network, as training goes on.

    Unlike :func:`with_state` it keeps the way of second derivatives that was chosen, and so
    costs no pass over the data. The objective that was given is at the new fixed parameters
    and buffers too: use it no more.

    Args:
        objective: The model, loss and data.
        state: All parameters and buffers; they are copied.
    """
    evaluator = objective._evaluator

    def like(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: state[n].detach().to(t.device, t.dtype, copy=True) for n, t in held.items()}

    evaluator.fixed = like(evaluator.fixed)
    evaluator.set_buffers(like(evaluator.buffers))
    space = objective.space
    theta = {n: state[n].detach().to(space.device) for n in space.names}
    return objective.at(space.flatten(theta))


def with_all_parameters(objective: Objective) -> Objective:
    """Return the same objective with all parameters in theta, frozen and left-out ones too.

    What the function does not see of its parameters does not depend on which of them are
    measured. Parameters that are no floating numbers, or on another device, stay fixed.

    Args:
        objective: The model, loss and data.
    """
    old, device = objective._evaluator, objective.space.device
    free = {n: t for n, t in old.fixed.items() if t.is_floating_point() and t.device == device} | {
        n: t.detach() for n, t in objective._leaves.items()
    }
    if len(free) == len(objective._leaves):
        return objective
    other = copy.copy(objective)
    names = (n for n, _ in objective.model.named_parameters())
    other._leaves = differentiable({n: free[n] for n in names if n in free})
    other.space = ParameterSpace.of(other._leaves)
    other._evaluator = copy.copy(old)
    other._evaluator.fixed = {n: t for n, t in old.fixed.items() if n not in free}
    other._evaluator.holders = weakref.WeakSet()
    other._begin()
    return other


def deviation(objective: Objective, first: State, second: State) -> tuple[float, torch.dtype]:
    """Return how far the model's outputs differ between two states, on all the data.

    Args:
        objective: The model, loss and data.
        first: One state.
        second: Another one.

    Returns:
        The largest difference relative to the largest output, and the precision in which the
        model was run: float64 if it can, else its own.
    """

    def compare(way: _Way) -> tuple[float, torch.dtype]:
        def one(piece: Any) -> tuple[list[Tensor], list[Tensor]]:
            return way.outputs(first, piece), way.outputs(second, piece)

        found = way.evaluator.collect(lambda piece: _difference(*one(piece)), grad=False)
        return _relative([pair for batch in found for pair in batch]), way.dtype

    return _first_that_runs(objective, compare)


class Reference:
    """The model's outputs at one state, on a few examples, to compare others with.

    Args:
        objective: The model, loss and data.
        state: The state.
        most: Of the data, so many of the first examples, in pieces of a few where the loss
            adds up over examples, otherwise in whole batches.

    Attributes:
        examples: How many there are.
        dtype: The precision in which the model runs, as for :func:`deviation`.
        finite: Whether all outputs are.
    """

    def __init__(self, objective: Objective, state: State, most: int):
        def run(way: _Way) -> tuple[_Way, list[Any], list[list[Tensor]]]:
            pieces = _first_pieces(way.evaluator, most)
            return way, pieces, self._run(way, pieces, state)

        way, pieces, self._outputs = _first_that_runs(objective, run)
        self._way, self._pieces = way, pieces
        self.examples = sum(trees.batch_size(piece) or 0 for piece in pieces)
        self.dtype = way.dtype
        self.finite = all(bool(torch.isfinite(t).all()) for each in self._outputs for t in each)

    @staticmethod
    def _run(way: _Way, pieces: list[Any], state: State) -> list[list[Tensor]]:
        found: list[list[Tensor]] = []
        few = way.evaluator.on_few(pieces)
        few.each(lambda piece: way.outputs(state, piece), found.append, grad=False)
        return found

    def deviation(self, state: State) -> float:
        """Return the largest difference relative to the largest output."""
        other = self._run(self._way, self._pieces, state)
        if len(other) != len(self._outputs):
            return math.inf
        return _relative([_difference(a, b) for a, b in zip(self._outputs, other, strict=True)])


@dataclass(frozen=True)
class _Way:
    # How to run the model on states in float64.
    evaluator: Evaluator
    dtype: torch.dtype
    around: Callable[[], contextlib.AbstractContextManager[Any]]
    dtypes: Mapping[str, torch.dtype]

    def outputs(self, state: State, piece: Any) -> list[Tensor]:
        named = {n: t.to(self.dtypes[n]) if n in self.dtypes else t for n, t in state.items()}
        with self.around():
            return _outputs(self.evaluator, named, piece)


def _first_that_runs(objective: Objective, work: Callable[[_Way], R]) -> R:
    double, own = objective._evaluator.in_double(), objective._evaluator
    dtypes = {n: t.dtype for n, t in state_in_own_dtype(objective).items()}
    ways = (
        _Way(double, torch.float64, _NoCasts, {}),
        # A model that must cast has the precision of what it casts to.
        _Way(double, torch.float32, contextlib.nullcontext, {}),
    )
    for way in ways:
        try:
            return work(way)
        except ObjectiveError:
            raise
        except Exception:  # a model that casts to a dtype of its own, or insists on it
            continue
    return work(_Way(own, objective.model_dtype, contextlib.nullcontext, dtypes))


class _NoCasts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    # Keeps in float64 what a model casts to a coarser dtype, as many do to normalise.

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled; to say so would import the compiler, for seconds.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in (torch.float32, torch.bfloat16, torch.float16):
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _first_pieces(evaluator: Evaluator, most: int) -> list[Any]:
    pieces: list[Any] = []
    count = 0

    def take(batch: Any) -> bool:
        nonlocal count
        cut = evaluator.split(batch, PIECE) if evaluator.additive else [batch]
        for piece in cut:
            if count >= most:
                break
            pieces.append(piece)
            count += trees.batch_size(piece) or most
        return count >= most

    evaluator.leading().each(lambda batch: batch, take, grad=False, own=True)
    return pieces


def state_in_own_dtype(objective: Objective) -> dict[str, Tensor]:
    """Return the state in the dtype that the objective evaluates in."""
    evaluator = objective._evaluator
    return {**evaluator.fixed, **evaluator.buffers, **objective._leaves}


def _difference(first: list[Tensor], second: list[Tensor]) -> tuple[float, float]:
    # The largest difference of outputs, and the largest output.
    if [t.shape for t in first] != [t.shape for t in second]:
        return math.inf, 0.0
    gap = size = 0.0
    for x, y in zip(first, second, strict=True):
        if x.numel():
            difference = float((x - y).abs().max())
            gap = max(gap, math.inf if math.isnan(difference) else difference)
            size = max(size, float(x.abs().max()))
    return gap, size


def _relative(found: list[tuple[float, float]]) -> float:
    gap = max((gap for gap, _ in found), default=0.0)
    size = max((size for _, size in found), default=0.0)
    return gap / size if size > 0 else gap


def _outputs(evaluator: Evaluator, state: State, piece: Any) -> list[Tensor]:
    # What the model returns; for a batch loss, what each of its calls returns, and the loss.
    named = dict(state)
    if isinstance(evaluator.batch_loss, CriterionLoss):
        return _tensors(evaluator.outputs(named, piece)[0])
    found: list[Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.extend(_tensors(output))

    handle = evaluator.model.register_forward_hook(note)
    try:
        total, _ = evaluator.loss(named, piece)
    finally:
        handle.remove()
    return [*found, total]


def _tensors(tree: Any) -> list[Tensor]:
    # Cached keys and values are no result, but a way to go on from it.
    leaves = [t for path, t in trees.leaves(tree) if not path.startswith(".past_key_values")]
    return [t.detach() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def trace(
    objective: Objective,
    state: State,
    watch: Callable[[], W],
    *,
    most: int = 2,
) -> tuple[W, dict[str, Tensor], list[Tensor]]:
    """Run the model once on a few examples inside a context that watches it.

    Args:
        objective: The model, loss and data.
        state: Where to run it.
        watch: Makes what is entered around the forward pass.
        most: At most so many examples.

    Returns:
        What watched, the tensors that stood for the state while it ran, and what came out:
        the model's outputs, or the loss for a batch loss.
    """

    def run(
        evaluator: Evaluator, named: dict[str, Tensor]
    ) -> tuple[W, dict[str, Tensor], list[Tensor]]:
        watcher = watch()

        def one(piece: Any) -> list[Tensor]:
            with watcher:
                if isinstance(evaluator.batch_loss, CriterionLoss):
                    return _tensors(evaluator.outputs(named, piece)[0])
                return [evaluator.loss(named, piece)[0]]

        outputs = first_piece(evaluator, named, one, most=most, grad=False)
        return watcher, named, outputs or []

    try:
        return run(objective._evaluator.in_double(), dict(state))
    except ObjectiveError:
        raise
    except Exception:  # a model that casts to a dtype of its own, or insists on it
        return run(objective._evaluator, state_in_own_dtype(objective))
