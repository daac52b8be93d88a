"""A callback for Hugging Face's Trainer; transformers is imported when the class is asked for."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from sharpkit.errors import SharpkitError
from sharpkit.tracking.tracker import Tracker

__all__ = ["SharpnessCallback"]  # noqa: F822  (made by __getattr__)


def __getattr__(name: str) -> Any:
    if name == "SharpnessCallback":
        return _callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _callback() -> type:
    try:
        base: Any = importlib.import_module("transformers").TrainerCallback
    except ImportError as error:
        raise SharpkitError(
            "Expected transformers to be installed, for its callback. It is not. Run pip install"
            " transformers, or call a Tracker in the loop."
        ) from error

    class SharpnessCallback(base):  # type: ignore[misc]
        """Track sharpness in the Trainer: ``Trainer(..., callbacks=[SharpnessCallback(...)])``.

        It is the :class:`sharpkit.tracking.Tracker` of a plain loop, told of every step of the
        optimizer, and made when training begins. The Trainer tells callbacks no loss, so the
        table has that on the tracker's data. Of several processes the first one measures.

        Args:
            loss: As for the tracker: a criterion of the logits and the batch's ``labels``; None
                if ``batch_loss`` is given.
            data: The examples to measure on: mappings of tensors, as a collator returns them.
            batch_loss: Maps ``(model, batch)`` to ``(loss_sum, num_terms)``.
            options: As for the tracker; the optimizer is the Trainer's.

        Attributes:
            tracker: The tracker; None before training.
        """

        def __init__(self, loss: Any, data: Any, *, batch_loss: Any = None, **options: Any):
            self._loss, self._data, self._batch_loss = loss, data, batch_loss
            self._options = options
            self.tracker: Tracker | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Make the tracker, on the device where training runs."""
            del args, control
            if not state.is_world_process_zero:
                return
            options = {"optimizer": given.get("optimizer"), **self._options}
            if self._batch_loss is not None:
                self.tracker = Tracker.from_batch_loss(
                    given["model"], self._batch_loss, self._data, **options
                )
            else:
                self.tracker = Tracker(given["model"], self._loss, self._data, **options)

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Tell the tracker of a step of the optimizer."""
            del args, control
            if self.tracker is None:
                return
            if "optimizer" not in self._options:
                self.tracker.optimizer = given.get("optimizer", self.tracker.optimizer)
            self.tracker.step(state.global_step)

    return SharpnessCallback
