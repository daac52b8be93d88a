"""Sharpness as training goes on: a measurement every so many steps, from the last one."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sharpkit.errors import SettingsError, SharpkitError, SharpkitWarning
from sharpkit.estimators import hutchinson_trace
from sharpkit.estimators.protocol import check_positive
from sharpkit.objective import Objective
from sharpkit.objective.isolation import recording
from sharpkit.objective.losses import BatchLoss
from sharpkit.objective.states import moved
from sharpkit.operators import hessian
from sharpkit.parameters import Selection
from sharpkit.tracking.threshold import stability_line
from sharpkit.tracking.warm import top_eigenvalues
from sharpkit.tracking.writers import Writer, as_writers

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Tracker"]

COUNTS = {"every": 1, "eigenvalues": 1, "trace_probes": 0, "max_hvps": 1}
SPREAD = 1_000_003  # between the seeds of two trackers, for the seeds of steps


class Tracker:
    r"""Track the largest eigenvalues of the Hessian, and its trace, while a network is trained.

    Every measurement is one of the loss on the same fixed data, in evaluation mode, at the
    network's present parameters and buffers. The network, its gradients, buffers and modes, the
    optimizer and the random states are left as they are: training with a tracker gives the
    same bits as without. What a measurement shares with the next is kept: the way of second
    derivatives, the data's checks, and the eigenvectors, from which the next one starts
    (:func:`sharpkit.tracking.top_eigenvalues`). The trace is of the same random signs at every
    step, so its changes are known better than its error says.

    A step at which the loss or a product is not finite gives a row of NaN with a note; what a
    writer raises is warned of once, and the row is kept.

    Args:
        model: The network in training; its modes do not matter.
        loss: A criterion of mean reduction, as for :class:`sharpkit.Objective`.
        data: The examples to measure on, which can be read many times: a few hundred to a few
            thousand of the training set, always the same, without augmentation.
        every: Steps from one measurement to the next.
        eigenvalues: How many of the largest.
        trace_probes: Products for the trace; 0: no trace, otherwise at least 2.
        optimizer: Read for the line of stability, see
            :func:`sharpkit.tracking.stability_line`; never stepped.
        params: The parameters that span theta: a glob, several, or a function of the name.
        dtype: Measure in this floating dtype, for example ``torch.float64``.
        tolerance: Relative error of the eigenvalues; at most 0.01.
        failure_probability: That an error of a warm start is too small; see
            :func:`sharpkit.tracking.top_eigenvalues`.
        max_hvps: Budget of products for the eigenvalues, of each measurement.
        max_overhead: Measuring may take this share of the time since the first step; the
            interval is lengthened where it would be more. It depends on the clock, and so do
            then the steps that are measured. None: no limit.
        warm: Whether to start from the last eigenvectors.
        seed: Of all random draws.
        writers: Functions of a row, or paths of CSV files: one or several.
        memory_budget: As for :class:`sharpkit.Objective`.
        num_terms: As for :class:`sharpkit.Objective`.

    Raises:
        SettingsError: If a setting is no whole or positive number where it must be.
        ObjectiveError: As for :class:`sharpkit.Objective`: a model without parameters, data
            that can be read only once, a loss that is not finite at the start.

    Cost:
        7 to 16 Hessian-vector products for one eigenvalue (25 and more where the largest crowd
        together) and one for each probe; a product costs 2 to 3 gradients on the tracker's data.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> tracker = Tracker(model, nn.MSELoss(), (x, y), every=2, optimizer=optimizer)
        >>> for step in range(5):
        ...     loss = nn.functional.mse_loss(model(x), y)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     _ = tracker.step(step, loss=loss)
        >>> tracker.frame[["step", "lambda_max", "two_over_eta"]].round(4).values.tolist()
        [[0.0, 1.0, 4.0], [2.0, 1.0, 4.0], [4.0, 1.0, 4.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        every: int = 100,
        eigenvalues: int = 1,
        trace_probes: int = 0,
        optimizer: Any = None,
        params: Selection = "*",
        dtype: torch.dtype | None = None,
        tolerance: float = 1e-2,
        failure_probability: float = 1e-3,
        max_hvps: int = 400,
        max_overhead: float | None = None,
        warm: bool = True,
        seed: int = 0,
        writers: Any = None,
        memory_budget: int | None = None,
        num_terms: Callable[[Any, Any], float] | None = None,
    ):
        counts = {"every": every, "eigenvalues": eigenvalues, "trace_probes": trace_probes}
        for name, value in {**counts, "max_hvps": max_hvps}.items():
            _check_count(name, value)
        if trace_probes == 1:
            raise SettingsError(
                "Expected no `trace_probes`, or 2 at least, to give an error. Got 1."
            )
        check_positive("tolerance", tolerance)
        if not 0 < failure_probability < 1:
            raise SettingsError(
                "Expected `failure_probability` between 0 and 1, both excluded. Got"
                f" {failure_probability!r}."
            )
        if max_overhead is not None and not 0 < max_overhead < 1:
            raise SettingsError(
                f"Expected `max_overhead` between 0 and 1, both excluded. Got {max_overhead!r}."
            )
        self.writers: list[Writer] = as_writers(writers)
        self.optimizer = optimizer
        self.every, self.interval = every, every
        self._k, self._probes = eigenvalues, trace_probes
        self._tolerance, self._chance, self._budget = tolerance, failure_probability, max_hvps
        self._most, self._warm, self._seed = max_overhead, warm, seed
        self._rows: list[dict[str, Any]] = []
        self._vectors: Tensor | None = None
        self._told: set[int] = set()  # writers that failed
        self._at: int | None = None  # the last step that was told of
        self._first = self._last = 0
        self._begun: float | None = None
        self._spent = 0.0
        with _evaluation_mode(model):
            make: Any = functools.partial(Objective, num_terms=num_terms)
            function: Any = loss
            if isinstance(function, _OfBatches):
                make, function = Objective.from_batch_loss, function.batch_loss
            self._objective: Objective = make(
                model, function, data, params, dtype=dtype, memory_budget=memory_budget
            )
        if eigenvalues > self._objective.space.dim:
            raise SettingsError(
                f"Expected `eigenvalues` of at most the number of parameters,"
                f" {self._objective.space.dim}. Got {eigenvalues}."
            )

    @classmethod
    def from_batch_loss(
        cls, model: nn.Module, batch_loss: BatchLoss, data: Any, **options: Any
    ) -> Tracker:
        """Return a tracker of any loss, as :meth:`sharpkit.Objective.from_batch_loss`.

        Args:
            model: As for the class.
            batch_loss: Maps ``(model, batch)`` to ``(loss_sum, num_terms)``.
            data: A re-iterable of batches.
            options: As for the class.
        """
        loss: Any = _OfBatches(batch_loss)
        return cls(model, loss, data, **options)

    # -- in the loop -----------------------------------------------------------------

    def step(
        self, step: int | None = None, *, loss: Any = None, lr: float | None = None
    ) -> dict[str, Any] | None:
        """Count a step of training; measure at the first one and then after every n.

        Args:
            step: Its number; None: one more than the last, beginning with 0.
            loss: The training loss, for the table: a number or a tensor.
            lr: The learning rate; None: the optimizer's.

        Returns:
            The row, if this step was measured.
        """
        now = self._next(step)
        fresh = self._begun is None or now < self._last  # a restart from an earlier step
        self._at = now
        if not fresh and now - self._last < self.interval:
            return None
        return self._measure(now, loss, lr)

    def measure(
        self, step: int | None = None, *, loss: Any = None, lr: float | None = None
    ) -> dict[str, Any]:
        """Measure now, whatever the interval; the next measurement is an interval later.

        Args:
            step: As for :meth:`step`, but None is the last step that was told of.
            loss: As for :meth:`step`.
            lr: As for :meth:`step`.
        """
        if step is None and self._at is not None:
            step = self._at
        self._at = self._next(step)
        return self._measure(self._at, loss, lr)

    def _next(self, step: int | None) -> int:
        if step is None:
            return 0 if self._at is None else self._at + 1
        if isinstance(step, bool) or not isinstance(step, int):
            raise SettingsError(f"Expected `step` to be a whole number. Got {step!r}.")
        return step

    # -- what it says ----------------------------------------------------------------

    @property
    def frame(self) -> pd.DataFrame:
        """The measurements, one a row.

        ``step``; ``lambda_max`` and ``lambda_max_error`` (a bound, see
        :func:`sharpkit.tracking.top_eigenvalues`), ``lambda_2`` and so on if asked for;
        ``trace`` and ``trace_error`` (one standard error); ``two_over_eta``, the line of
        stability; ``loss``, that given or that on the tracker's data, and ``data_loss``, the
        latter; ``hvps`` and ``seconds`` of the measurement; whether it ``converged`` and
        started ``warm``; the ``interval`` to the next; a ``note``. What was not asked for is
        NaN.
        """
        import pandas as pd

        return pd.DataFrame(self._rows, columns=self._columns())

    @property
    def overhead(self) -> float:
        """Seconds spent measuring, as a share of those since the first step; 0 before it."""
        if self._begun is None:
            return 0.0
        return self._spent / max(time.perf_counter() - self._begun, 1e-9)

    @property
    def num_examples(self) -> int:
        """The number of examples that are measured on."""
        return self._objective.num_examples

    def __repr__(self) -> str:
        return (
            f"Tracker(every={self.every}, {self.num_examples} examples,"
            f" {len(self._rows)} measurements)"
        )

    def _columns(self) -> list[str]:
        values = ["lambda_max", *(f"lambda_{i}" for i in range(2, self._k + 1))]
        return [
            "step", *(n for v in values for n in (v, f"{v}_error")), "trace", "trace_error",
            "two_over_eta", "loss", "data_loss", "hvps", "seconds", "converged", "warm",
            "interval", "note",
        ]  # fmt: skip

    # -- a measurement ---------------------------------------------------------------

    def _measure(self, step: int, loss: Any, lr: float | None) -> dict[str, Any]:
        device = self._objective.space.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # so that the training's own work is not ours
        start = time.perf_counter()
        if self._begun is None:
            self._begun, self._first = start, step
        row: dict[str, Any] = dict.fromkeys(self._columns(), math.nan)
        line, note = stability_line(self.optimizer, lr)
        loss = loss.detach() if isinstance(loss, Tensor) else loss
        given = math.nan if loss is None else float(loss)
        row |= {"step": step, "loss": given, "two_over_eta": math.nan if line is None else line}
        row |= {"hvps": 0, "converged": False, "warm": False, "note": note}
        before = self._objective.cost.hvps
        with torch.autocast(device.type, enabled=False), recording(grad=False):
            try:
                self._fill(row)
            except SharpkitError as error:
                row["note"] = " ".join(f"{note} {error}".split())
                self._vectors = None
            finally:
                row["hvps"] = self._objective.cost.hvps - before
                self._release()
        if loss is None:
            row["loss"] = row["data_loss"]
        row["seconds"] = time.perf_counter() - start
        self._spent += row["seconds"]
        self._last = step
        self._lengthen(step, row["seconds"])
        row["interval"] = self.interval
        self._rows.append(row)
        self._write(row)
        return dict(row)

    def _fill(self, row: dict[str, Any]) -> None:
        model = self._objective.model
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._objective = objective = moved(self._objective, state)
        row["data_loss"] = float(objective.value())
        if not math.isfinite(row["data_loss"]):
            row["note"] = f"{row['note']} The loss is not finite.".strip()
            self._vectors = None
            return
        H = hessian(objective)
        generator = torch.Generator(H.device).manual_seed(
            (self._seed * SPREAD + row["step"]) % 2**62
        )
        found = top_eigenvalues(
            H,
            self._vectors,
            k=self._k,
            tol=self._tolerance,
            max_matvecs=self._budget,
            failure_probability=self._chance,
            generator=generator,
        )
        self._vectors = found.vectors if self._warm and found.converged else None
        names = ["lambda_max", *(f"lambda_{i}" for i in range(2, self._k + 1))]
        for name, value, error in zip(names, found.values, found.errors, strict=False):
            row[name], row[f"{name}_error"] = value, error
        row |= {"converged": found.converged, "warm": found.warm}
        if not found.converged:
            row["note"] = (
                f"{row['note']} The eigenvalues did not converge in {found.num_matvecs} products:"
                " their errors are no bounds. Give a larger `max_hvps`."
            ).strip()
        if self._probes:
            signs = torch.Generator(H.device).manual_seed(self._seed)  # the same at every step
            trace = hutchinson_trace(H, num_probes=self._probes, generator=signs)
            row["trace"], row["trace_error"] = trace.value, trace.probe_error

    def _release(self) -> None:
        # Let go of gradient graphs, and keep what was learnt of how to differentiate.
        self._objective = self._objective.at(self._objective.theta, copy_theta=False)

    def _lengthen(self, step: int, seconds: float) -> None:
        steps = step - self._first
        if self._most is None or steps <= 0 or self._begun is None:
            return
        each = (time.perf_counter() - self._begun - self._spent) / steps
        needed = seconds * (1 - self._most) / (self._most * max(each, 1e-9))
        times = min(max(math.ceil(needed / self.every), 1), 10**6)
        self.interval = self.every * times

    def _write(self, row: dict[str, Any]) -> None:
        for i, writer in enumerate(self.writers):
            try:
                writer(dict(row))
            except Exception as error:  # whatever a writer does, training goes on
                if i not in self._told:
                    self._told.add(i)
                    name = getattr(writer, "__name__", type(writer).__name__)
                    warnings.warn(
                        f"The writer {name} failed at step {row['step']}"
                        f" ({type(error).__name__}: {' '.join(str(error).split())}). The rows"
                        " are kept in `frame`; it is called again, and not warned of again.",
                        SharpkitWarning,
                        stacklevel=4,
                    )


class _OfBatches:
    # Marks the loss of a whole batch.
    def __init__(self, batch_loss: BatchLoss):
        self.batch_loss = batch_loss


@contextlib.contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    # For the time of the first look; later the objective's own flags are set around each pass.
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _check_count(name: str, value: Any) -> None:
    least = COUNTS[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingsError(
            f"Expected `{name}` to be a whole number of at least {least}. Got {value!r}."
        )
