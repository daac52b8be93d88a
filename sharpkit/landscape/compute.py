"""Slices: the loss and metrics on a line or a grid, each point one forward pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sharpkit.errors import SettingsError
from sharpkit.landscape.points import CHUNK, Index, Parts, Row, SliceProgress, fingerprint
from sharpkit.landscape.ranges import parse_range
from sharpkit.landscape.refine import Filled, fill_grid
from sharpkit.landscape.result import Marker, Slice, Status
from sharpkit.landscape.section import Section, StraightSection
from sharpkit.landscape.workers import Job, Pool, marks
from sharpkit.objective import Objective
from sharpkit.objective.states import state_hash
from sharpkit.objective.statistics import has_running_statistics
from sharpkit.objective.tallies import Metric, Tallies, Tally
from sharpkit.results import Cost, to_plain

__all__ = ["compute_slice"]

BEYOND = 2.0  # heights of the cut


def compute_slice(
    section: Section,
    objective: Objective | Mapping[str, Objective] | None,
    x: str | Iterable[float],
    y: str | Iterable[float] | None = None,
    *,
    metrics: Sequence[str] | Mapping[str, Metric | None] = (),
    loss_max: float | None = None,
    refine: float | None = None,
    batch_norm: str = "keep",
    quadratic: bool = False,
    num_groups: int = 8,
    parts: str | Path | None = None,
    workers: int = 1,
    factory: Callable[[], Mapping[str, Objective]] | None = None,
    markers: Sequence[Marker] | None = None,
    details: Mapping[str, Any] | None = None,
    progress: Callable[[SliceProgress], None] | None = None,
) -> Slice:
    r"""Evaluate the loss and metrics on a line or a grid through the parameters.

    .. math:: L(\theta_0 + \sum_i x_i s_i d_i)

    or, for a curved section, L at its points. One forward pass a point and data set gives the
    loss, the metrics and, from sums over groups of the examples, their standard errors: of each
    value, and of its difference from coordinates 0, where the same groups are compared. The
    model, its buffers and the random state are never written.

    What is not finite stays a gap (NaN), as does what lies above ``loss_max`` and what is beyond
    the end of the section. With ``refine`` the grid is filled coarse to fine: where the surface
    is smooth, points are interpolated and marked so, and held-out points say how well
    (``details["max_check_error"]``).

    Args:
        section: A line, a plane or a curve: see :mod:`sharpkit.landscape`.
        objective: What to evaluate, one or several by the name of their data: the first one's
            loss decides what is cut and refined. None: ask ``factory``.
        x: Coordinates along the first axis, or a range such as ``"-1:1:51"``.
        y: Along the second, for a section of two axes.
        metrics: ``"accuracy"``, or functions ``(outputs, targets)`` by name, which return one
            value an example, or the mean of the batch (then without an error).
        loss_max: Points above it are cut, early where the loss cannot be negative.
        refine: Largest miss of an interpolated value, as a share of the value; None: measure
            every point. Of metrics, and of a loss that is not positive everywhere, misses of
            0.5% of the range of the values are allowed too.
        batch_norm: ``"keep"`` the running statistics, or ``"reestimate"`` them at every point
            on the first data set's batches (a second pass).
        quadratic: Whether to compute the quadratic model at the section's origin too: a
            gradient and a Hessian-vector product an axis; straight sections only.
        num_groups: Groups of the examples; 1: no errors.
        parts: A folder in which points are kept as they are found: after an interrupt the same
            call goes on. It is left in place; :func:`remove_parts` deletes them.
        workers: Processes; several need ``factory``.
        factory: A function of a module that returns the objectives by name, to be called in
            each process.
        markers: Points to show; default the origin of a line or plane.
        details: Kept with the slice: title, checkpoint, command.
        progress: Called with the forecast first, then as points come.

    Returns:
        The slice, with names ``"loss"``, ``"accuracy"``, or ``"train/loss"`` and so on where
        there are several data sets.

    Raises:
        SettingsError: If a setting makes no sense, ``parts`` holds another slice or cannot be
            written, or ``factory`` returns other objectives in other processes.
        MeasureError: If the section's directions are zero or parallel.
        ObjectiveError: If a forward pass fails.

    Cost: a forward pass a point and data set; two with ``batch_norm="reestimate"``.

    Example:
        >>> from sharpkit.landscape import Direction, StraightSection
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> objective = Objective(model, torch.nn.MSELoss(), (torch.ones(1, 1), torch.ones(1, 1)))
        >>> d = Direction(torch.ones(1), "tensor", "multiples of d")
        >>> section = StraightSection(objective.theta, [d])
        >>> compute_slice(section, objective, [-1.0, 0.0, 2.0]).loss.tolist()
        [1.0, 0.0, 4.0]
    """
    grid = tuple(parse_range(r) for r in ((x,) if y is None else (x, y)))
    if len(grid) != len(section.axes):
        raise SettingsError(
            f"Expected coordinates along each of the {len(section.axes)} axes of the section. Got"
            f" {len(grid)}."
        )
    if loss_max is not None and not math.isfinite(loss_max):
        raise SettingsError(f"Expected a finite `loss_max`. Got {loss_max}.")
    if refine is not None and not 0 < refine < 1:
        raise SettingsError(f"Expected `refine` between 0 and 1. Got {refine}.")
    if workers < 1 or (workers > 1 and factory is None):
        raise SettingsError(
            f"Expected one worker, or a `factory` that makes the objectives in each. Got {workers}."
        )
    if objective is None and factory is None:
        raise SettingsError("Expected an objective, or a `factory` that makes it. Got neither.")
    if isinstance(metrics, str):
        metrics = (metrics,)
    named = factory() if objective is None and factory is not None else objective
    assert named is not None
    objectives = dict(named) if isinstance(named, Mapping) else {"": named}
    if not objectives:
        raise SettingsError("Expected at least one data set. Got none.")
    chosen = dict(metrics) if isinstance(metrics, Mapping) else dict.fromkeys(metrics)
    if unknown := [n for n, m in chosen.items() if m is None and n != "accuracy"]:
        raise SettingsError(
            f"Expected 'accuracy', or functions by name. Got {unknown[0]!r} without a function."
        )
    work = _Work(
        job=Job(
            factory=factory if factory is not None else (lambda: objectives),
            section=section,
            grid=grid,
            metrics=chosen,
            num_groups=num_groups,
            batch_norm=batch_norm,
            loss_max=loss_max,
            summed_to=_summed_to(loss_max, refine),
        ),
        objectives=objectives,
        workers=workers,
        progress=progress or (lambda _: None),
        refine=refine,
    )
    return work.run(
        Path(parts) if parts is not None else None, quadratic, markers, dict(details or {})
    )


def _summed_to(loss_max: float | None, refine: float | None) -> float | None:
    # Interpolation reaches over the edge of what is cut.
    if loss_max is None or refine is None:
        return None
    return loss_max + BEYOND * abs(loss_max)


@dataclass
class _Work:
    job: Job
    objectives: dict[str, Objective]
    workers: int
    progress: Callable[[SliceProgress], None]
    refine: float | None

    def run(
        self,
        folder: Path | None,
        quadratic: bool,
        markers: Sequence[Marker] | None,
        details: dict[str, Any],
    ) -> Slice:
        started = time.perf_counter()
        job, first = self.job, next(iter(self.objectives.values()))
        before = {n: o.cost for n, o in self.objectives.items()}
        self.evaluation = replace(job, factory=lambda: self.objectives).evaluation()
        self.team = first.team
        shape = tuple(len(g) for g in job.grid)
        origin = (0.0,) * len(shape)
        base = replace(self.evaluation, loss_max=None)
        counting = base.row(origin)  # also counts what sums are divided by
        timed = time.perf_counter()
        base.row(origin)
        self.seconds = time.perf_counter() - timed
        self.start = counting.tallies or None
        if self.start is None:  # no finite loss at the origin: count at theta
            self.counts = [t(o.theta).counts for t, o in self._tallies()]
        else:
            self.counts = [t.counts for t in self.start]
        sizes = [(len(t.names), t.num_groups) for t, _ in self._tallies()]
        held = folder if self.team.rank == 0 else None
        self.parts = Parts(held, self._plan(), sizes, self._origin(counting))
        self.found = self.parts.load(self.counts)
        if not self.team.alone:
            self.found = self.team.gather(lambda: self.found)[0]
        self.total = int(np.prod(shape))
        self._report()
        pool = None
        if self.workers > 1:
            pool = Pool(replace(job, expected=marks(self.objectives)), self.workers)
        try:
            self.source = pool.rows if pool is not None else self._here
            filled = self._fill(shape)
        finally:
            self.parts.flush()
            if pool is not None:
                pool.close()
        model = self._quadratic(first) if quadratic else None
        spent = [o.cost - before[n] for n, o in self.objectives.items()]
        cost = Cost(
            hvps=sum(c.hvps for c in spent),
            gradients=sum(c.gradients for c in spent),
            forwards=sum(c.forwards for c in spent) + self.elsewhere,
            seconds=time.perf_counter() - started,
        )
        return self._result(shape, filled, model, markers, details, cost)

    elsewhere = 0  # forward passes of other processes

    def _tallies(self) -> list[tuple[Tallies, Objective]]:
        return list(zip(self.evaluation.sets.values(), self.objectives.values(), strict=True))

    def _plan(self) -> dict[str, Any]:
        # All that the values depend on.
        section, job = self.job.section, self.job
        n = len(job.grid)
        at = [(0.0,) * n, *(tuple(float(i == j) for j in range(n)) for i in range(n))]
        at += [(0.37,) * n]
        points = [section.point(p) for p in at]
        return {
            "version": version("sharpkit"),
            "section": fingerprint(*(p.cpu() for p in points if p is not None)),
            "grid": fingerprint(*job.grid),
            "state": [state_hash(o) for o in self.objectives.values()],
            "data": {n: o.data_fingerprint for n, o in self.objectives.items()},
            "metrics": [f"{n}:{getattr(m, '__qualname__', m)}" for n, m in job.metrics.items()],
            "groups": job.num_groups,
            "batch_norm": job.batch_norm,
            "loss_max": [job.loss_max, job.summed_to],
        }

    def _origin(self, row: Row) -> list[tuple[float, float]]:
        # Values, and how near they come again on other kernels: a label may turn.
        if not row.tallies:
            return [(math.nan, 0.0)]
        values = torch.cat([t.means for t in row.tallies]).tolist()
        coarse = 2e-2 if any(o.model_dtype.itemsize < 4 for o in self.objectives.values()) else 0.0
        names = self._names()
        return [
            (v, max(coarse, 1e-3 if n.rsplit("/", 1)[-1] == "loss" else 1e-2))
            for v, n in zip(values, names, strict=True)
        ]

    def _report(self) -> None:
        done = len(self.found)
        self.progress(SliceProgress(done, self.total, self.seconds, self.workers))

    # -- points ------------------------------------------------------------------------------

    def _here(self, indices: Sequence[Index]) -> Iterable[tuple[Index, Row]]:
        if not self.team.shares_probes:
            return self.evaluation.rows(indices)
        return self._shared_out(indices)

    def _shared_out(self, indices: Sequence[Index]) -> Iterator[tuple[Index, Row]]:
        # All ranks have all data: points are dealt out, some at a time, which are then kept.
        team = self.team
        for start in range(0, len(indices), CHUNK * team.size):
            some = indices[start : start + CHUNK * team.size]
            mine = some[team.rank :: team.size]
            dealt = team.gather(lambda own=mine: list(self.evaluation.rows(own)))  # type: ignore[misc]
            for rank, rows in enumerate(dealt):
                if rank != team.rank:
                    self.elsewhere += sum(self._forwards(row) for _, row in rows)
                yield from rows

    def _forwards(self, row: Row) -> int:
        if row.status is Status.OUTSIDE:
            return 0
        return (len(self.objectives) if row.tallies else 1) + self._twice

    def measure(self, indices: Sequence[Index]) -> None:
        """See that these points are found."""
        todo = [i for i in indices if i not in self.found]
        began, before = time.perf_counter(), len(self.found)
        for index, row in self.source(todo):
            self.found[index] = row
            self.parts.add(index, row)
            if self.workers > 1:
                self.elsewhere += self._forwards(row)
            new = len(self.found) - before
            self.seconds = (time.perf_counter() - began) / new * self.workers
            self._report()

    @property
    def _twice(self) -> bool:
        return any(t.reestimates for t in self.evaluation.sets.values())

    def _fill(self, shape: tuple[int, ...]) -> Filled | None:
        if self.refine is None:
            self.measure(list(np.ndindex(*shape)))
            return None

        def values(indices: Sequence[Index]) -> dict[Index, np.ndarray]:
            self.measure(indices)
            return {
                i: np.concatenate([self._values(row, cut=False), self._sums(row)])
                for i, row in ((i, self.found[i]) for i in indices)
            }

        centre = tuple(int(np.abs(g).argmin()) for g in self.job.grid)
        return fill_grid(
            self.job.grid,
            centre,
            values,
            lambda i: self.found[i].status is Status.CUT and not self.found[i].tallies,
            [n.rsplit("/", 1)[-1] == "loss" for n in self._names()],
            tolerance=self.refine,
            carried=self._carried,
        )

    @property
    def _carried(self) -> int:
        return sum(len(t.names) * t.num_groups for t, _ in self._tallies())

    def _sums(self, row: Row) -> np.ndarray:
        # What errors are made of: it is interpolated along with the values.
        if not row.tallies:
            return np.full(self._carried, np.nan)
        sums = torch.cat([t.sums.flatten() for t in row.tallies]).numpy()
        return np.where(np.isfinite(sums), sums, np.nan)

    def _interpolated(self, sums: np.ndarray) -> tuple[Tally, ...]:
        found, at = [], 0
        for (tallies, _), counts in zip(self._tallies(), self.counts, strict=True):
            shape = len(tallies.names), tallies.num_groups
            own = torch.from_numpy(sums[at : at + shape[0] * shape[1]].copy()).view(shape)
            found.append(Tally(own, counts))
            at += shape[0] * shape[1]
        return tuple(found)

    def _errors(self, tallies: Sequence[Tally]) -> tuple[Any, Any]:
        # Of the values, and of their differences from the origin.
        errors = torch.cat([t.errors() for t in tallies])
        if self.start is None:
            return errors, torch.full_like(errors, torch.nan)
        pairs = zip(tallies, self.start, strict=True)
        return errors, torch.cat([t.errors(s) for t, s in pairs])

    def _names(self) -> list[str]:
        return [
            f"{name}/{value}" if name else value
            for name, tallies in self.evaluation.sets.items()
            for value in tallies.names
        ]

    def _values(self, row: Row, *, cut: bool = True) -> np.ndarray:
        if not row.tallies or (cut and row.status is Status.CUT):
            return np.full(len(self._names()), np.nan)
        values = torch.cat([t.means for t in row.tallies]).numpy()
        return np.where(np.isfinite(values), values, np.nan)

    # -- what comes of it --------------------------------------------------------------------

    def _quadratic(self, objective: Objective) -> tuple[np.ndarray, dict[str, Any]]:
        units = self.job.section.units()
        if units is None:
            raise SettingsError(
                "Expected a straight section for the quadratic model. This one is curved. Leave"
                " out `quadratic`."
            )
        origin = self.job.section.point((0.0,) * len(units))
        assert origin is not None
        there = objective.at(origin)
        value, gradient = there.value_and_gradient()
        U = torch.stack(list(units), dim=1).to(gradient)
        slope = (U.T.double() @ gradient.double()).cpu().numpy()
        HU = torch.stack([there.hvp(u.to(gradient)) for u in units], dim=1)
        bend = (U.T.double() @ HU.double()).cpu().numpy()
        bend = (bend + bend.T) / 2
        mesh = np.stack(np.meshgrid(*self.job.grid, indexing="ij"), axis=-1)
        model = float(value) + mesh @ slope + np.einsum("...i,ij,...j->...", mesh, bend, mesh) / 2
        return model, {"slope": slope.tolist(), "curvature": bend.tolist()}

    def _result(
        self,
        shape: tuple[int, ...],
        filled: Filled | None,
        model: tuple[np.ndarray, dict[str, Any]] | None,
        markers: Sequence[Marker] | None,
        details: dict[str, Any],
        cost: Cost,
    ) -> Slice:
        names = self._names()
        values = np.full((len(names), *shape), np.nan)
        errors, rises = values.copy(), values.copy()
        status = np.full(shape, Status.MISSING, dtype=np.int8)
        for index, row in self.found.items():
            status[index] = row.status
            at: tuple[Any, ...] = (slice(None), *index)
            values[at] = self._values(row)
            if row.status is Status.MEASURED:
                errors[at], rises[at] = self._errors(row.tallies)
        if filled is not None:
            unknown = status == Status.MISSING  # others may be found from a run before
            predicted = filled.predicted & unknown
            status[filled.skipped & unknown] = Status.SKIPPED
            status[predicted] = Status.INTERPOLATED
            values[:, predicted] = filled.values[predicted][:, : len(names)].T
            for index in map(tuple, np.argwhere(predicted)):
                at = (slice(None), *index)
                made_up = self._interpolated(filled.values[index][len(names) :])
                errors[at], rises[at] = self._errors(made_up)
            if self.job.loss_max is not None:  # what is predicted above was not measured
                above = predicted & (values[0] > self.job.loss_max)
                status[above], values[:, above] = Status.SKIPPED, np.nan
        for array in (errors, rises):
            array[np.isnan(values)] = np.nan
        section, sets = self.job.section, list(self.evaluation.sets.values())
        if markers is None:
            centred = isinstance(section, StraightSection)
            markers = [Marker("theta", (0.0,) * len(shape))] if centred else []
        about = self._details(filled, model) | details
        kept = [n for n, e in zip(names, errors, strict=True) if not np.isnan(e).all()]
        where = {n: i for i, n in enumerate(names)}
        notes = list(section.notes)
        if self.start is None:
            notes.append("The loss at the origin is not finite: rises from it are unknown.")
        if self.job.batch_norm == "reestimate" and not any(t.reestimates for t in sets):
            notes.append("There is no BatchNorm with running statistics: nothing is re-estimated.")
        if model is not None and any(t.reestimates for t in sets):
            notes.append(
                "The quadratic model keeps BatchNorm's running statistics as they are at theta."
            )
        return Slice(
            axes=section.axes,
            grid=self.job.grid,
            values={n: values[where[n]] for n in names},
            errors={n: errors[where[n]] for n in kept},
            rise_errors={n: rises[where[n]] for n in kept if not np.isnan(rises[where[n]]).all()},
            status=status,
            quadratic=None if model is None else model[0],
            markers=tuple(markers),
            details=to_plain(about),
            notes=tuple(notes),
            cost=cost,
        )

    def _details(
        self, filled: Filled | None, model: tuple[np.ndarray, dict[str, Any]] | None
    ) -> dict[str, Any]:
        first = next(iter(self.objectives.values()))
        sets = list(self.evaluation.sets.values())
        kept = "re-estimated" if any(t.reestimates for t in sets) else "kept"
        found: dict[str, Any] = {
            "num_examples": {n or "data": o.num_examples for n, o in self.objectives.items()},
            "data_fingerprint": {
                n or "data": o.data_fingerprint for n, o in self.objectives.items()
            },
            "batch_norm": kept if has_running_statistics(first.model) else None,
            "loss_max": self.job.loss_max,
            "tolerance": self.refine,
            "num_groups": self.job.num_groups,
            "num_parameters": first.space.dim,
            "dtype": str(first.model_dtype).removeprefix("torch."),
            "sharpkit": version("sharpkit"),
            "torch": torch.__version__,
        }
        cosine = getattr(self.job.section, "cosine", None)
        if cosine is not None:
            found["cosine"] = cosine
        if filled is not None:
            found["max_check_error"] = dict(
                zip(self._names(), filled.worst_miss.tolist(), strict=True)
            )
            found["num_checked"] = filled.num_checked
        return found | (model[1] if model is not None else {})
