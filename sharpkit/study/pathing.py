"""Paths between two checkpoints of a recipe: straight, aligned, along a trained curve."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sharpkit.errors import SettingsError
from sharpkit.landscape import Marker, Section, Slice, Status
from sharpkit.landscape.paths import Barrier, Connection, SegmentPath, align, barrier, connect
from sharpkit.landscape.paths.statistics import Statistics
from sharpkit.objective import Objective
from sharpkit.objective.labels import has_labels
from sharpkit.study.slicing import Source

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FREEDOMS", "PathRequest", "Paths", "write_paths"]

FREEDOMS = ("permutation", "scale", "gl")
STATISTICS: tuple[Literal["reestimate", "refuse", "keep"], ...] = ("reestimate", "refuse", "keep")


@dataclass(frozen=True)
class Paths:
    """What was measured.

    Attributes:
        paths: By name: ``"straight"``, ``"aligned"``, ``"bezier"``.
        barriers: Likewise.
        alignment: What was moved; empty without.
        training: Of the curve; empty without.
        notes: Sentences for a person.
    """

    paths: Mapping[str, Section]
    barriers: Mapping[str, Barrier]
    alignment: Mapping[str, Any]
    training: Mapping[str, Any]
    notes: tuple[str, ...]

    def table(self) -> pd.DataFrame:
        """Return one row a path and value: ends, barrier, its error, where, held out."""
        import pandas as pd

        rows = []
        for name, found in self.barriers.items():
            for value, profile in found.profiles.items():
                rows.append(
                    {
                        "path": name,
                        "value": value,
                        "at A": profile.values[0],
                        "at B": profile.values[-1],
                        "barrier": profile.barrier,
                        "error": profile.error,
                        "held out": profile.held_out,
                        "at t": profile.at,
                    }
                )
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "paths": {n: b.to_dict() for n, b in self.barriers.items()},
            "alignment": dict(self.alignment),
            "training": dict(self.training),
            "notes": list(self.notes),
        }

    def slices(self) -> list[Slice]:
        """Return a slice of each path, to draw."""
        found = []
        for name, one in self.barriers.items():
            path = self.paths[name]
            shape = (len(one.t),)
            errors = {n: np.array(p.errors) for n, p in one.profiles.items() if p.errors}
            rises = {n: np.array(p.rise_errors) for n, p in one.profiles.items() if p.rise_errors}
            values = {n: np.array(p.values) for n, p in one.profiles.items()}
            finite = np.isfinite(values["loss"])
            found.append(
                Slice(
                    axes=path.axes,
                    grid=(np.array(one.t),),
                    values={n: np.where(np.isfinite(v), v, np.nan) for n, v in values.items()},
                    errors=errors,
                    rise_errors=rises,
                    status=np.where(finite, Status.MEASURED, Status.NOT_FINITE)
                    .astype(np.int8)
                    .reshape(shape),
                    markers=(Marker("A", (0.0,)), Marker("B", (1.0,))),
                    details={"title": name, "num_groups": 16, **one.details},
                    notes=one.notes,
                    cost=one.cost,
                )
            )
        return found


@dataclass(frozen=True)
class PathRequest:
    """What to measure.

    Attributes:
        align: Freedoms to bring the ends together by; empty: none.
        connect: Kind of curve to train; None: none.
        bends: Of the curve.
        epochs: Of its training.
        lr: Likewise.
        batch_size: Likewise.
        points: Along each path.
        batch_norm: ``"reestimate"``, ``"refuse"`` or ``"keep"``.
        seed: Of matching and training.
    """

    align: tuple[str, ...] = ()
    connect: str | None = None
    bends: int = 1
    epochs: int = 30
    lr: float = 0.05
    batch_size: int | None = None
    points: int = 25
    batch_norm: str = "reestimate"
    seed: int = 0

    def check(self) -> None:
        """Refuse what makes no sense, before anything is loaded.

        Raises:
            SettingsError: If a name is unknown.
        """
        if unknown := [a for a in self.align if a not in FREEDOMS]:
            raise SettingsError(f"Expected --align of {', '.join(FREEDOMS)}. Got {unknown[0]!r}.")
        if self.connect not in (None, "bezier", "polychain"):
            raise SettingsError(
                f"Expected --connect to be bezier or polychain. Got {self.connect!r}."
            )
        if self.batch_norm not in STATISTICS:
            raise SettingsError(
                f"Expected --batch-norm among {', '.join(STATISTICS)}. Got {self.batch_norm!r}."
            )
        if self.points < 3:
            raise SettingsError(f"Expected at least 3 points along a path. Got {self.points}.")

    def measure(self, first: Source, second: Source, tell: Callable[[str], None]) -> Paths:
        """Measure all paths that are asked for.

        Args:
            first: One end.
            second: The other.
            tell: Called with what is done next.
        """
        ends = first(), second()
        a, b = (next(iter(e.values())) for e in ends)
        others = {n: o for n, o in ends[0].items() if n not in ("", "train")}
        test = next(iter(others.values())) if others else None
        statistics = STATISTICS[STATISTICS.index(self.batch_norm)]
        metrics = ("loss", "error") if has_labels(a._evaluator) else ("loss",)
        notes: list[str] = []
        paths: dict[str, Section] = {}
        barriers: dict[str, Barrier] = {}

        def add(name: str, path: Section) -> None:
            tell(f"{name}: {self.points} points")
            paths[name] = path
            barriers[name] = barrier(
                a, path, self.points, metrics, test=test, statistics=statistics
            )
            notes.extend(barriers[name].notes)

        add("straight", SegmentPath(a.theta, b.theta))
        theta_b, moved = b.theta, {}
        if self.align:
            tell(f"aligning: {', '.join(self.align)}")
            alignment = align(a, b, self.align, seed=self.seed)  # type: ignore[arg-type]
            theta_b, moved = alignment.theta, alignment.to_dict()
            notes.extend(alignment.notes)
            add("aligned", SegmentPath(a.theta, theta_b))
        trained: dict[str, Any] = {}
        if self.connect is not None:
            tell(f"training a {self.connect} curve: {self.epochs} epochs")
            curve = self._train(a, theta_b, statistics)
            trained = {"losses": list(curve.losses), **curve.details}
            notes.extend(curve.notes)
            add(self.connect, curve.path)
        return Paths(paths, barriers, moved, trained, tuple(dict.fromkeys(notes)))

    def _train(self, a: Objective, theta_b: Any, statistics: Statistics) -> Connection:
        assert self.connect is not None
        return connect(
            a,
            a.theta,
            theta_b,
            kind=self.connect,  # type: ignore[arg-type]
            num_bends=self.bends,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            statistics=statistics,
            seed=self.seed,
        )


def write_paths(found: Paths, path: Path) -> Path:
    """Write what was measured as ``.json`` (everything) or ``.csv`` (a row a point).

    Args:
        found: What was measured.
        path: The file, which appears when complete.
    """
    import pandas as pd

    if path.suffix.lower() == ".json":
        text = json.dumps(found.to_dict(), allow_nan=False)
    else:
        frames: Sequence[pd.DataFrame] = [
            one.to_frame().assign(path=name) for name, one in found.barriers.items()
        ]
        table = pd.concat(frames)
        text = table[["path", *(c for c in table.columns if c != "path")]].to_csv(index=False)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
