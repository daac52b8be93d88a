"""One wrapper around any torch optimizer: perturb, look again, restore, step.

A method of the family is a subclass that says where to look (`SharpnessAware._perturbation`)
and, if it wants both gradients, what to descend along (`SharpnessAware._descent`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpkit.errors import SettingsError
from sharpkit.optim._checkpoint import Resumable
from sharpkit.optim._checks import (
    at_least_zero,
    check_base,
    check_not_accumulated,
    finite,
    mark_as_used,
)
from sharpkit.optim._guards import RandomState
from sharpkit.optim._passes import Passes
from sharpkit.optim._scaling import (
    check_still_scaled,
    clip,
    forget_scaler,
    found_overflow,
    is_unscaled,
)
from sharpkit.optim._slots import Slot
from sharpkit.optim._tensors import Ray
from sharpkit.optim._wrapper import of_itself

__all__ = ["SharpnessAware"]


class SharpnessAware(Passes, Resumable):
    r"""Base of the optimizers that take the gradient at a perturbed point.

    .. math:: w \leftarrow \operatorname{Base}\bigl(w,\ \nabla L(w + \delta)\bigr),
        \qquad \delta = \delta(w, \nabla L(w))

    The derivative of :math:`\delta` is dropped. The wrapper shares ``param_groups`` and
    ``state`` with the base optimizer, so learning rate schedulers, checkpoints of the base
    optimizer and tools that read them work unchanged.

    Three ways to step:

    * ``loss = opt.step(closure)`` runs both passes and returns the first loss. The closure
      computes the loss, calls ``backward`` and returns the loss; gradients are cleared before
      each pass. A closure that loops over several micro-batches gives their accumulated
      gradient, perturbs once, and replays them: the step of the large batch.
    * By hand: ``loss.backward()``, ``if opt.first_step():`` forward and backward again, then
      ``opt.step()``, which restores the weights and steps.
    * With a ``torch.amp.GradScaler``: ``opt.step(closure, scaler=scaler)`` with
      ``scaler.scale(loss).backward()`` in the closure, or by hand
      ``opt.first_step(scaler=scaler)`` and ``scaler.step(opt)``; then ``scaler.update()``. If
      either pass is not finite the whole step is skipped and the scale shrinks.

    The weights are restored by copy, bit for bit, also after an exception in the closure.
    Weight decay of the base optimizer acts in its step, at the restored weights, and is not
    part of the perturbation; to have it there, add it to the loss instead.

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius of the perturbation, in the metric of the method. The attribute may be
            changed between steps.
        model: The network. Give it if it has buffers that training changes (running
            statistics of norm layers): the second pass then leaves them alone. The first step
            refuses such a network without it (a compiled one may not be noticed). Needed too
            for ``synchronize=False``.
        perturb: The parameters to perturb; None means all. The others are trained as well, but
            neither moved nor counted in the norm.
        same_randomness: Give the second pass the random numbers of the first, so that dropout
            masks agree (in ``step(closure)`` only).
        synchronize: Under DistributedDataParallel, perturb by the gradient averaged over the
            ranks; False perturbs each rank by its own, and saves one communication.
        max_grad_norm: Clip the norm of the gradient that the base optimizer gets to this; None
            does not clip. The perturbation is made from the unclipped gradient.

    Raises:
        SettingsError: For settings that make no sense, sharded or complex parameters.
    """

    # Lets GradScaler call `step` also after an overflow, so that the weights are restored.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float,
        model: nn.Module | None = None,
        perturb: Iterable[Tensor] | None = None,
        same_randomness: bool = True,
        synchronize: bool = True,
        max_grad_norm: float | None = None,
    ) -> None:
        check_base(base_optimizer)
        if isinstance(base_optimizer, SharpnessAware):
            raise SettingsError(
                "Expected a plain torch optimizer as `base_optimizer`. Got "
                f"{type(base_optimizer).__name__}, which wraps one already; wrap its `base`."
            )
        super().__init__(
            base_optimizer,
            model=model,
            perturb=perturb,
            same_randomness=same_randomness,
            synchronize=synchronize,
        )
        self.rho = at_least_zero("rho", rho)
        self.max_grad_norm = max_grad_norm
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise SettingsError(
                f"Expected `max_grad_norm` above zero or None. Got {max_grad_norm!r}."
            )
        self.steps = 0
        """Steps begun; a step that GradScaler skips counts too."""
        self.memory: dict[str, dict[Tensor, Tensor]] = {}
        """Tensors that the method keeps from step to step, by name and parameter."""
        self._staged: dict[str, dict[Tensor, Tensor]] = {}
        self._generator: torch.Generator | None = None
        self._first: dict[Tensor, Tensor] = {}
        self._skipped = False
        self._looked_twice = False
        self._scaler: Any = None

    # -- what a method says --------------------------------------------------------------

    def _perturbation(self, slots: Sequence[Slot]) -> Sequence[Tensor] | Ray:
        """Return the perturbation of every slot, shaped like its gradient.

        What must be kept for the next steps goes to ``self._staged``; it replaces the same
        names of ``self.memory`` once the step is made.
        """
        raise NotImplementedError

    def _descent(
        self, point: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return what the base optimizer gets, if ``uses_first_gradient``.

        ``point`` are the (restored) parameters that had a gradient in either pass; a gradient
        that was missing in one pass is zero.
        """
        raise NotImplementedError

    def _one_pass_done(self) -> None:
        """Change ``.grad`` in a step without a second pass."""

    def _wants_second_pass(self) -> bool:
        """Return whether this step perturbs and looks again."""
        return True

    def _look_around(
        self, closure: Callable[..., Any], scaler: Any, random: RandomState | None
    ) -> None:
        """Make passes between the first and the perturbation; leave ``.grad`` as it was."""

    def _after_step(self) -> None:
        """Do what follows the base optimizer's step; it is not called if that is skipped."""

    # -- stepping ------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, scaler: Any = None) -> Any:
        """Make one step; with a closure both passes, without one the end of `first_step`.

        Args:
            closure: Computes the loss, calls ``backward`` and returns the loss.
            scaler: The GradScaler that the closure scales its loss with, if it does.

        Returns:
            What the closure returned in the first pass; None without a closure.

        Raises:
            SettingsError: Without a closure when no `first_step` came before, or no second
                pass after it; when gradients were accumulated before a step with a closure.
        """
        if closure is not None:
            return self._guarded(self._run, closure, scaler)
        if self._displacement is not None and not self._gradients():
            self.restore()
            raise SettingsError(
                "Expected forward and backward between `first_step()` and `step()`. Got no"
                " gradient; the step is given up and the weights are restored."
            )
        self._finish(scaler)
        return None

    def _guarded(self, run: Callable[..., Any], closure: Callable[..., Any], scaler: Any) -> Any:
        """Run a whole step; an exception gives it up and leaves no gradients behind."""
        self._check_closure_call()
        drawn = None if self._generator is None else self._generator.get_state()
        try:
            return run(closure, scaler if scaler is not None and scaler.is_enabled() else None)
        except BaseException:
            self.restore()
            if self._generator is not None and drawn is not None:
                self._generator.set_state(drawn)
            for parameter in self.parameters():
                parameter.grad = None
            raise

    def _run(self, closure: Callable[..., Any], scaler: Any) -> Any:
        """Run all passes of one step."""
        random = self._randomness()
        with self._local_gradients():
            loss = self._pass(closure)
        self._look_around(closure, scaler, random)
        if self.first_step(scaler=scaler):
            self._again(random, closure)
        self._finish(scaler)
        return loss

    @of_itself
    def first_step(self, *, scaler: Any = None) -> bool:
        """Perturb the parameters by the gradients that ``backward`` has left.

        The gradients are cleared. Dropout masks of a second pass by hand are new ones.

        Args:
            scaler: The GradScaler that scaled the loss, if one did.

        Returns:
            Whether a second pass is wanted. If False, leave the gradients as they are and call
            `step`: the method looks once this time, or the scaled gradient was not finite.

        Raises:
            SettingsError: If the step before was not finished.
        """
        if self._begun:
            raise SettingsError(
                "Expected `step()` after `first_step()`. Got another `first_step()`; the"
                " weights are still perturbed. Call `restore()` to give the step up."
            )
        try:
            return self._begin(scaler)
        except BaseException:
            self.restore()
            raise

    def _begin(self, scaler: Any) -> bool:
        with torch.no_grad():
            self._begun = True
            self.steps += 1
            if not self._wants_second_pass():
                return False  # `_finish` unscales
            if scaler is not None and scaler.is_enabled():
                self._scaler = scaler
                if not self._unscale_first(scaler):
                    self._skipped = True
                    return False
            if self.uses_first_gradient:
                self._first = self._own_gradients()
            self._perturb()
            return True

    @of_itself
    def restore(self) -> None:
        """Put weights and buffers back as they were before `first_step`, and give it up.

        Without a perturbation it does nothing.
        """
        self._undo()
        if self._watch is not None:
            self._watch, self._watched = None, False  # it has seen no whole step
        self._begun = self._skipped = self._looked_twice = False
        self._pass_number = 0
        self._scaler = None
        self._first = {}
        self._staged = {}

    def _perturb(self) -> None:
        """Move the parameters by what the gradients ask for, and clear the gradients."""
        slots = self._slots()
        self._guard()
        self._looked_twice = True
        if slots:
            self._move(slots, self._perturbation(slots))
        for parameter in self.parameters():
            parameter.grad = None

    def _finish(self, scaler: Any) -> None:
        """Restore, then hand the gradient to the base optimizer."""
        if not self._begun:
            raise SettingsError(
                "Expected `step(closure)`, or `first_step()` before `step()`. Got `step()` alone;"
                f" {type(self).__name__} needs gradients at two points."
            )
        try:
            self._undo()
            self._check_watch()
            if scaler is not None and scaler.is_enabled():
                scaler.unscale_(self.base)
                sound = not self._skipped and finite(self._gradients())
            else:
                self._check_scaler_known()
                sound = not self._skipped and not found_overflow(self, self._gradients())
            if sound:
                self._two_passes_done() if self._looked_twice else self._one_pass_done()
                if self.max_grad_norm is not None:
                    clip(self.parameters(), self.max_grad_norm)
            if scaler is not None and scaler.is_enabled():
                scaler.step(self.base)  # skips by itself after an overflow
            elif sound:
                self.base.step()
            if sound:
                self.memory.update(self._staged)
                self._after_step()
        except BaseException:
            forget_scaler(self)
            raise
        finally:
            self.restore()
        for gradient in self._gradients():
            mark_as_used(gradient)

    def _two_passes_done(self) -> None:
        if not self.uses_first_gradient:
            return
        first, self._first = self._first, {}
        both = [p for p in self.parameters() if p.grad is not None or p in first]
        if both:
            old = [first[p] if p in first else torch.zeros_like(p) for p in both]
            new = [torch.zeros_like(p) if p.grad is None else p.grad for p in both]
            for parameter, gradient in zip(both, self._descent(both, old, new), strict=True):
                parameter.grad = gradient

    # -- checks --------------------------------------------------------------------------

    def _check_scaler_known(self) -> None:
        if not hasattr(self, "found_inf"):
            if self._looked_twice and self._scaler and not is_unscaled(self._scaler, self):
                raise SettingsError(
                    "Expected scaler.step(opt) after first_step(scaler=scaler). Got opt.step(),"
                    " which would step along scaled gradients."
                )
        elif self._scaler is not None:
            check_still_scaled(self._scaler, self.base)
        elif self._looked_twice:
            raise SettingsError(
                "Expected opt.first_step(scaler=scaler) with scaler.step(opt). Got `first_step()`"
                " without it, which took the scaled gradients for the gradients."
            )

    def _check_closure_call(self) -> None:
        if self._begun:
            raise SettingsError(
                "Expected `step()` after `first_step()`. Got `step(closure)`, which makes both"
                " passes itself; call `restore()` to give the step up."
            )
        if hasattr(self, "found_inf"):
            forget_scaler(self)
            raise SettingsError(
                "Expected opt.step(closure, scaler=scaler). Got scaler.step(opt, closure), which"
                " cannot see the gradients of the closure."
            )
        check_not_accumulated(self._gradients())

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.saved_settings)
        return f"{type(self).__name__}({settings}, base={self.base!r})"
