"""A callback for Lightning's Trainer; Lightning is imported when the class is asked for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from sharpkit.errors import SharpkitError
from sharpkit.tracking.tracker import Tracker

__all__ = ["SharpnessCallback"]  # noqa: F822  (made by __getattr__)

LOGGED = ("lambda_max", "lambda_max_error", "trace", "trace_error", "two_over_eta")


def __getattr__(name: str) -> Any:
    if name == "SharpnessCallback":
        return _callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _callback() -> type:
    base: Any = None
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            base = importlib.import_module(package).Callback
            break
        except ImportError:
            continue
    if base is None:
        raise SharpkitError(
            "Expected Lightning to be installed, for its callback. It is not. Run pip install"
            " lightning, or call a Tracker in the training step."
        )

    class SharpnessCallback(base):  # type: ignore[misc]
        """Track sharpness in Lightning: ``Trainer(callbacks=[SharpnessCallback(loss, data)])``.

        It is the :class:`sharpkit.tracking.Tracker` of a plain loop, told of every step of the
        optimizer, and made when training begins, on the device of the module. Its numbers go to
        the trainer's loggers too. Of several processes the first one measures, on its weights.

        Args:
            loss: As for the tracker; None if ``batch_loss`` is given.
            data: The examples to measure on.
            batch_loss: Maps ``(module, batch)`` to ``(loss_sum, num_terms)``.
            network: Of a module to what is measured; None: the module itself, whose
                ``forward`` then takes the inputs.
            log: Whether to log to the trainer's loggers, as ``sharpness/...``.
            options: As for the tracker; the optimizer is the trainer's first one.

        Attributes:
            tracker: The tracker; None before training.
        """

        def __init__(
            self,
            loss: Any,
            data: Any,
            *,
            batch_loss: Any = None,
            network: Callable[[Any], nn.Module] | None = None,
            log: bool = True,
            **options: Any,
        ):
            super().__init__()
            self._loss, self._data, self._batch_loss = loss, data, batch_loss
            self._network, self._log, self._options = network, log, options
            self.tracker: Tracker | None = None
            self._seen = -1

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Make the tracker, on the device where training runs."""
            if not trainer.is_global_zero:
                return
            model = self._network(pl_module) if self._network else pl_module
            options = {"optimizer": (trainer.optimizers or [None])[0], **self._options}
            if self._batch_loss is not None:
                self.tracker = Tracker.from_batch_loss(
                    model, self._batch_loss, self._data, **options
                )
            else:
                self.tracker = Tracker(model, self._loss, self._data, **options)
            self._seen = trainer.global_step

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            """Tell the tracker of a step, if the optimizer made one."""
            del pl_module, batch, batch_idx
            step = trainer.global_step
            if self.tracker is None or step == self._seen:
                return
            self._seen = step
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            row = self.tracker.step(step, loss=loss)
            if row is not None and self._log:
                scalars = {f"sharpness/{n}": row[n] for n in LOGGED if row[n] == row[n]}
                for logger in trainer.loggers:
                    logger.log_metrics(scalars, step=step)

    return SharpnessCallback
