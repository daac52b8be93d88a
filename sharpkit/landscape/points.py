"""Points of a slice: evaluated in order, by several processes, and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from sharpkit.errors import SettingsError
from sharpkit.landscape.result import DAMAGE, Status
from sharpkit.landscape.section import Section
from sharpkit.objective.tallies import Tallies, Tally

__all__ = ["Evaluation", "Index", "Parts", "Row", "Sets", "remove_parts"]

Index: TypeAlias = tuple[int, ...]
Sets: TypeAlias = Mapping[str, Tallies]
"""The data sets by name; the first decides what is cut."""

FLUSH = 5.0  # seconds between two writes
TOGETHER = 0.2  # seconds of points evaluated in one set of surroundings
CHUNK = 16  # points sent to another process at once
ORIGIN = "origin"


@dataclass(frozen=True)
class Row:
    """What was found at a point.

    Attributes:
        status: Of the point.
        tallies: Of each data set; empty unless all data were seen.
    """

    status: Status
    tallies: tuple[Tally, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Evaluates points of a section.

    Attributes:
        section: Where.
        grid: Coordinates along each axis.
        sets: What, on which data.
        loss_max: Points above it are cut.
        summed_to: Where they are cut the sum still goes on up to this loss; default it stops.
    """

    section: Section
    grid: tuple[np.ndarray, ...]
    sets: Sets
    loss_max: float | None
    summed_to: float | None = None

    def row(self, coordinates: Sequence[float]) -> Row:
        """Return what is found at these coordinates."""
        theta = self.section.point(coordinates)
        if theta is None:
            return Row(Status.OUTSIDE)
        found: list[Tally] = []
        status, limit = Status.MEASURED, self.loss_max
        if limit is not None and self.summed_to is not None:
            limit = max(limit, self.summed_to)
        buffers = next(iter(self.sets.values())).statistics(theta)  # the first's, for all
        for tallies in self.sets.values():
            tally = tallies(theta, above=None if found else limit, buffers=buffers)
            if not found:
                loss = float(tally.means[0])
                if not tally.complete:
                    return Row(Status.CUT)
                if not math.isfinite(loss):
                    return Row(Status.NOT_FINITE)
                if limit is not None and loss > limit:
                    return Row(Status.CUT)
                if self.loss_max is not None and loss > self.loss_max:
                    status = Status.CUT
            found.append(tally)
        return Row(status, tuple(found))

    def rows(self, indices: Sequence[Index]) -> Iterator[tuple[Index, Row]]:
        """Yield what is found at points of the grid, in order."""
        at = 0
        while at < len(indices):
            chunk: list[tuple[Index, Row]] = []
            began = time.monotonic()
            with contextlib.ExitStack() as stack:
                for tallies in self.sets.values():
                    stack.enter_context(tallies.many())
                while at < len(indices) and (not chunk or time.monotonic() - began < TOGETHER):
                    chunk.append((indices[at], self.row(self.at(indices[at]))))
                    at += 1
            yield from chunk

    def at(self, index: Index) -> tuple[float, ...]:
        """Return the coordinates of a point of the grid."""
        return tuple(float(g[i]) for g, i in zip(self.grid, index, strict=True))


class Parts:
    """Rows on disk: one file for every few seconds of work, written whole, merged when read.

    Several processes may write into one folder; none touches another's files.

    Args:
        folder: Made if it is missing; None: nothing is kept.
        plan: Everything that the values depend on; another plan's folder is refused.
        sizes: Values and groups ``(M, G)`` of each data set.
        origin: Values there and how near they must be: they say what the plan cannot, such as
            another criterion.

    Raises:
        SettingsError: If the folder holds another slice, or cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        plan: Mapping[str, Any],
        sizes: Sequence[tuple[int, int]],
        origin: Sequence[tuple[float, float]] = (),
    ):
        self.folder, self.sizes = folder, list(sizes)
        self._pending: list[tuple[Index, Row]] = []
        self._written = time.monotonic()
        if folder is None:
            return
        plan = {**plan, ORIGIN: [v if math.isfinite(v) else None for v, _ in origin]}
        path = folder / "plan.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                if names := _difference(path, plan, [near for _, near in origin]):
                    raise SettingsError(
                        f"Expected {folder} to hold the points of this slice. It holds those of"
                        f" another one ({names}). Delete it, or give"
                        " another name."
                    )
            else:
                part = folder / f"plan.{uuid.uuid4().hex}.part"
                part.write_text(json.dumps(plan, sort_keys=True))
                os.replace(part, path)
        except OSError as error:
            raise SettingsError(
                f"Expected a folder to write to. {folder}: {error.strerror}."
            ) from error

    def load(self, counts: Sequence[Any]) -> dict[Index, Row]:
        """Return the rows of all files; one that is damaged is left out.

        Args:
            counts: What sums are divided by, of each data set: the same at every point.
        """
        found: dict[Index, Row] = {}
        for path in sorted(self.folder.glob("part-*.npz")) if self.folder else []:
            try:
                with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
                    names = ("indices", "status", "known", "sums")
                    rows = list(zip(*(held[n].tolist() for n in names), strict=True))
                found |= {
                    tuple(index): self._row(Status(code), known, flat, counts)
                    for index, code, known, flat in rows
                }
            except DAMAGE:
                continue
        return found

    def _row(
        self, status: Status, known: bool, flat: Sequence[float], counts: Sequence[Any]
    ) -> Row:
        import torch

        if not known:
            return Row(status)
        tallies, at = [], 0
        for (m, g), count in zip(self.sizes, counts, strict=True):
            tallies.append(
                Tally(torch.tensor(flat[at : at + m * g], dtype=torch.float64).view(m, g), count)
            )
            at += m * g
        return Row(status, tuple(tallies))

    def add(self, index: Index, row: Row) -> None:
        """Keep a row; it is on disk after some seconds, and at the latest after :meth:`flush`."""
        if self.folder is None:
            return
        self._pending.append((index, row))
        if time.monotonic() - self._written > FLUSH:
            self.flush()

    def flush(self) -> None:
        """Write what is not yet written."""
        self._written = time.monotonic()
        if not self._pending or self.folder is None:
            return
        total = sum(m * g for m, g in self.sizes)
        sums = np.full((len(self._pending), total), np.nan)
        for i, (_, row) in enumerate(self._pending):
            if row.tallies:
                sums[i] = np.concatenate([t.sums.numpy().ravel() for t in row.tallies])
        name = uuid.uuid4().hex
        part = self.folder / f"{name}.part.npz"
        try:
            np.savez(
                part,
                indices=np.array([i for i, _ in self._pending], dtype=np.int64),
                status=np.array([r.status for _, r in self._pending], dtype=np.int8),
                known=np.array([bool(r.tallies) for _, r in self._pending]),
                sums=sums,
            )
            os.replace(part, self.folder / f"part-{name}.npz")
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise SettingsError(
                f"Expected to write points to {self.folder}. It failed: {error.strerror}. Make"
                " room, or give another folder."
            ) from error
        self._pending = []


def remove_parts(folder: str | Path) -> None:
    """Delete the points that ``compute_slice(parts=folder)`` kept, and the folder if it is empty.

    Args:
        folder: The folder; other files in it are left alone.
    """
    folder = Path(folder)
    for pattern in ("part-*.npz", "*.part.npz", "plan.*.part", "plan.json"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _difference(path: Path, plan: Mapping[str, Any], near: Sequence[float]) -> str:
    # What is not the same; empty where all is.
    try:
        other = json.loads(path.read_bytes())
        names = [n for n in sorted({*other, *plan} - {ORIGIN}) if other.get(n) != plan.get(n)]
        if not names and not _same(other[ORIGIN], plan[ORIGIN], near):
            names = ["value at the origin: the criterion, a metric or the model's code changed"]
    except (ValueError, TypeError, AttributeError, KeyError):
        return "its plan cannot be read"
    return "another " + ", ".join(names) if names else ""


def _same(old: Sequence[Any], new: Sequence[Any], near: Sequence[float]) -> bool:
    def close(a: float | None, b: float | None, tolerance: float) -> bool:
        if a is None or b is None:
            return a is b
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-6)

    return len(old) == len(new) and all(map(close, old, new, near))


def fingerprint(*arrays: Any) -> str:
    """Return a hash of tensors or arrays, by their bits."""
    digest = hashlib.sha256()
    for array in arrays:
        held = np.asarray(array)
        digest.update(f"{held.dtype}{held.shape}".encode())
        digest.update(np.ascontiguousarray(held).tobytes())
    return digest.hexdigest()[:32]


Note: TypeAlias = Callable[["SliceProgress"], None]


@dataclass(frozen=True)
class SliceProgress:
    """How far a slice is.

    Attributes:
        done: Points that are there.
        total: Points at most (with refinement fewer are measured).
        seconds_a_point: As measured so far; the first report, with nothing done, is the forecast.
        workers: Processes.
    """

    done: int
    total: int
    seconds_a_point: float
    workers: int = 1

    @property
    def remaining(self) -> float:
        """Seconds that are left, at most."""
        return (self.total - self.done) * self.seconds_a_point / self.workers
