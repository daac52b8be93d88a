"""Points of a slice in other processes of this machine."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sharpkit.errors import SettingsError
from sharpkit.landscape.points import CHUNK, Evaluation, Index, Row
from sharpkit.landscape.section import Section
from sharpkit.objective import Objective
from sharpkit.objective.states import state_hash
from sharpkit.objective.tallies import Metric, Tallies

__all__ = ["Job", "Pool"]

Factory = Callable[[], Mapping[str, Objective]]


@dataclass(frozen=True)
class Job:
    """What a process needs to evaluate points.

    Attributes:
        factory: Makes the objectives by data set; a function that can be pickled.
        section: Where.
        grid: Coordinates along each axis.
        metrics: As for ``compute_slice``.
        num_groups: Likewise.
        batch_norm: Likewise.
        loss_max: Likewise.
        summed_to: As for :class:`Evaluation`.
        expected: Marks of the objectives that the factory must return; None: any.
    """

    factory: Factory
    section: Section
    grid: tuple[np.ndarray, ...]
    metrics: Mapping[str, Metric | None]
    num_groups: int
    batch_norm: str
    loss_max: float | None
    summed_to: float | None = None
    expected: tuple[str, ...] | None = None

    def evaluation(self) -> Evaluation:
        """Return what evaluates the points, with objectives of its own.

        Raises:
            SettingsError: If they are not those that are expected.
        """
        objectives = self.factory()
        if self.expected is not None and marks(objectives) != self.expected:
            raise SettingsError(
                "Expected a factory that returns the same data, buffers and fixed parameters in"
                " every process as here. Got others: seed what is drawn, or use workers=1."
            )
        sets = {
            name: Tallies(
                objective,
                self.metrics,
                num_groups=self.num_groups,
                batch_norm=self.batch_norm,
            )
            for name, objective in objectives.items()
        }
        return Evaluation(self.section, self.grid, sets, self.loss_max, self.summed_to)


def marks(objectives: Mapping[str, Objective]) -> tuple[str, ...]:
    """Return a mark of each objective's data, buffers and fixed parameters.

    Args:
        objectives: By data set.
    """
    return tuple(
        f"{name} {state_hash(o.at(torch.zeros_like(o.theta)))} {o.data_fingerprint}"
        for name, o in objectives.items()
    )


class Pool:
    """Processes that evaluate points; each builds the objectives once.

    Args:
        job: What they need.
        workers: How many.

    Raises:
        SettingsError: If the job cannot be sent to another process.
    """

    def __init__(self, job: Job, workers: int):
        self.workers = workers
        self._folder = tempfile.TemporaryDirectory(prefix="sharpkit-")
        self._path = Path(self._folder.name) / "job.pickle"
        try:
            self._path.write_bytes(pickle.dumps(job))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            self.close()
            raise SettingsError(
                "Expected a factory, section and metrics that can be sent to other processes:"
                f" functions of a module, no lambdas. {error}. Use workers=1."
            ) from error

    def rows(self, indices: Sequence[Index]) -> Iterator[tuple[Index, Row]]:
        """Yield what is found at points, as it comes."""
        import joblib

        size = max(1, min(CHUNK, -(-len(indices) // (4 * self.workers))))
        chunks = [indices[i : i + size] for i in range(0, len(indices), size)]
        with joblib.parallel_config("loky", n_jobs=max(self.workers, 2), inner_max_num_threads=1):
            run = joblib.Parallel(return_as="generator_unordered", batch_size=1)
            tasks = (joblib.delayed(_evaluate)(str(self._path), c, os.getpid()) for c in chunks)
            for found in run(tasks):
                yield from found

    def close(self) -> None:
        """Delete what was written for the processes."""
        self._folder.cleanup()


_held: dict[str, Any] = {}  # the evaluation of this process, by file


def _evaluate(path: str, chunk: Sequence[Index], parent: int) -> list[tuple[Index, Row]]:
    # In a worker's process. The parent alone answers to Ctrl-C.
    if os.getpid() != parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(1)
    if path not in _held:
        _held.clear()
        _held[path] = pickle.loads(Path(path).read_bytes()).evaluation()
    return list(_held[path].rows(chunk))
