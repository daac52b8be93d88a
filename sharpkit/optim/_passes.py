"""Passes over a batch: at the weights, at moved ones, and what is put back after each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpkit.errors import SettingsError
from sharpkit.optim._checks import check_group, check_parameters, check_selection
from sharpkit.optim._guards import BufferGuard, RandomState, StatisticsWatch
from sharpkit.optim._scaling import check_still_scaled, unscale_first
from sharpkit.optim._slots import Displacement, Slot, slots_of
from sharpkit.optim._tensors import Ray
from sharpkit.optim._wrapper import Wrapper

__all__ = ["Passes"]


class Passes(Wrapper):
    """A wrapper that can move the weights, run a closure there, and put everything back.

    Args:
        base: The optimizer inside.
        model: The network whose buffers the passes must not leave changed.
        perturb: The parameters that move; None means all.
        same_randomness: Whether a second pass gets the random numbers of the first.
        synchronize: Whether the ranks share the gradient of the first pass.

    Raises:
        SettingsError: For parameters and settings that cannot be.
    """

    #: Whether the method can take gradients with rows only (``nn.Embedding(sparse=True)``).
    takes_sparse: bool = False
    #: Whether the step is made from both gradients.
    uses_first_gradient: ClassVar[bool] = False

    def __init__(
        self,
        base: Optimizer,
        *,
        model: nn.Module | None,
        perturb: Iterable[Tensor] | None,
        same_randomness: bool,
        synchronize: bool,
    ) -> None:
        super().__init__(base)
        self.model = model
        self.same_randomness = same_randomness
        self.synchronize = synchronize
        self._selected = None if perturb is None else list(perturb)
        self._displacement: Displacement | None = None
        self._room: dict[Tensor, Tensor] = {}
        self._pass_number = 0
        self._begun = False
        self._buffers: BufferGuard | None = None
        self._watch: StatisticsWatch | None = None
        self._watched = model is not None
        self._check_parameters()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_room": {}}  # a copy or a pickle makes its own

    # -- parameters ----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._check_parameters()

    def perturbed_parameters(self) -> list[Tensor]:
        """Return the parameters that the method perturbs, in order."""
        if self._selected is None:
            return self.parameters()
        chosen = {id(p) for p in self._selected}
        return [p for p in self.parameters() if id(p) in chosen]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters() if p.grad is not None]

    def _own_gradients(self) -> dict[Tensor, Tensor]:
        """Return the gradients, copied where the next pass would write into the same memory."""
        shared = getattr(self.model, "gradient_as_bucket_view", False)
        return {
            p: p.grad.clone() if shared or _in_a_bucket(p.grad) else p.grad
            for p in self.parameters()
            if p.grad is not None
        }

    def _slots(self) -> list[Slot]:
        slots = slots_of(self.perturbed_parameters())
        if not self.takes_sparse and any(slot.rows is not None for slot in slots):
            raise SettingsError(
                f"Expected dense gradients: {type(self).__name__} keeps or combines whole"
                " gradients. Got a sparse one. Make the embedding with sparse=False, or use SAM."
            )
        return slots

    # -- passes --------------------------------------------------------------------------

    @property
    def first_pass(self) -> bool:
        """Whether the pass at hand is the first of its step: log and count in this one alone.

        By hand, whether `first_step` is still to come.
        """
        return self._pass_number == 1 if self._pass_number else not self._begun

    def _pass(self, closure: Callable[..., Any], *arguments: Any) -> Any:
        for parameter in self.parameters():
            parameter.grad = None
        self._pass_number += 1
        with torch.enable_grad():
            return closure(*arguments)

    def _again(
        self, random: RandomState | None, closure: Callable[..., Any], *arguments: Any
    ) -> Any:
        """Run a pass from an earlier random state if there is one; keep the present one."""
        if random is None:
            return self._pass(closure, *arguments)
        present = RandomState(self.parameters())
        random.restore()
        try:
            return self._pass(closure, *arguments)
        finally:
            present.restore()

    def _randomness(self) -> RandomState | None:
        return RandomState(self.parameters()) if self.same_randomness else None

    def _local_gradients(self) -> AbstractContextManager[Any]:
        """Keep the gradients of a pass on this rank if the perturbation is per rank."""
        if self.synchronize:
            return nullcontext()
        return self.model.no_sync()  # type: ignore[no-any-return, union-attr, operator]

    def _unscale_first(self, scaler: Any) -> bool:
        check_still_scaled(scaler, self, self.base)
        group = None if self.synchronize else getattr(self.model, "process_group", None)
        return unscale_first(self._gradients(), scaler, group)

    # -- moving and putting back -----------------------------------------------------------

    def _guard(self) -> None:
        """Keep the buffers, and watch for layers that would write into unknown ones."""
        self._buffers = BufferGuard(self.model)
        if not self._watched:
            self._watch, self._watched = StatisticsWatch(), True

    def _move(self, slots: Sequence[Slot], delta: Sequence[Tensor] | Ray) -> None:
        self._displacement = Displacement(slots, self._room)
        self._displacement.move(delta)
        torch.clear_autocast_cache()  # autocast around the step keeps casts of the old weights

    def _undo(self) -> None:
        with torch.no_grad():
            if self._displacement is not None:
                self._displacement.undo()
                self._displacement = None
                torch.clear_autocast_cache()
            if self._buffers is not None:
                self._buffers.undo()
                self._buffers = None
            if self._watch is not None:
                self._watch.stop()

    # -- checks --------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        check_parameters(self.parameters())
        if not self.synchronize:
            if not hasattr(self.model, "no_sync"):
                raise SettingsError(
                    "Expected `model=` wrapped in DistributedDataParallel with synchronize=False."
                    f" Got {type(self.model).__name__}."
                )
            if self.uses_first_gradient:
                raise SettingsError(
                    f"Expected synchronize=True for {type(self).__name__}, which steps along both"
                    " gradients. Got False, which leaves the first one different on every rank."
                )
        if self._selected is not None:
            check_selection(self._selected, self.parameters())

    def _check_watch(self) -> None:
        watch = self._watch
        if watch is not None and watch.seen is not None:
            raise SettingsError(
                f"Expected `model=` for a network with running statistics ({watch.seen}). Got"
                " none; the perturbed pass would write into them. Give"
                f" {type(self).__name__}(..., model=model)."
            )
        self._watch = None


def _in_a_bucket(gradient: Tensor) -> bool:
    """Return whether a dense gradient is part of a larger piece of memory."""
    if gradient.is_sparse:
        return False
    return gradient.untyped_storage().nbytes() > gradient.numel() * gradient.element_size()
