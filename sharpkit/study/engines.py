"""Where the workers of a study run: in this process, in others, or on a Ray cluster."""

from __future__ import annotations

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch

from sharpkit.scoring import parse_requests
from sharpkit.study.owner import Owner
from sharpkit.study.store import FATAL, Entry, Store
from sharpkit.study.work import Outcome, Task, work

__all__ = ["Engine", "gone", "local", "take_slot"]

Engine: TypeAlias = Callable[[Sequence[Task]], Iterator[Outcome]]
"""Runs tasks, and gives their outcomes as they come."""


def local(store: Store, workers: int) -> Engine:
    """Return an engine of so many processes on this machine; one worker is this process."""
    if workers == 1:

        def alone(tasks: Sequence[Task]) -> Iterator[Outcome]:
            owner = Owner.here()
            try:
                for task in tasks:
                    yield work(task, store, owner)
            finally:
                owner.leave()

        return alone

    def several(tasks: Sequence[Task]) -> Iterator[Outcome]:
        waiting = {t.entry: replace(t, parent=os.getpid()) for t in tasks}
        alone: list[Entry] = []  # those at which a worker may have died come one by one
        deaths: Counter[Entry] = Counter()
        with tempfile.TemporaryDirectory(prefix="sharpkit-") as slots:
            while waiting:
                suspect = alone[0] if alone else None
                batch = [waiting[suspect]] if suspect else list(waiting.values())
                try:
                    for outcome in _processes(batch, store.path, workers, slots):
                        del waiting[outcome.entry]
                        yield outcome
                except _lost():
                    # A worker was killed, and the pool with it.
                    at_measure = store.bury(store.dead(), count=suspect is not None)
                    if suspect is None:
                        alone = list(waiting)[: 2 * workers]
                        continue
                    if at_measure:  # what had failed before was forgotten; deaths are not
                        waiting[suspect] = replace(waiting[suspect], retry=False)
                    deaths[suspect] += not at_measure
                    if deaths[suspect] >= FATAL:
                        yield gone(store, waiting.pop(suspect))
                alone = [e for e in alone if e in waiting]

    return several


def gone(store: Store, task: Task) -> Outcome:
    """Record that workers died while they loaded a checkpoint, and return that outcome."""
    error = (
        "Expected the process to outlive the loading of the checkpoint. It ended each time (killed,"
        " perhaps for want of memory). Use fewer workers or a machine with more memory."
    )
    store.fail(task.entry, parse_requests(task.names).text, error)
    return Outcome(task.entry, error=error)


def _processes(tasks: Sequence[Task], path: Path, workers: int, slots: str) -> Iterator[Outcome]:
    import joblib

    # With one job joblib would stay in this process.
    with joblib.parallel_config("loky", n_jobs=max(workers, 2), inner_max_num_threads=1):
        run = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
        yield from run(joblib.delayed(_in_process)(task, path, slots) for task in tasks)


def _lost() -> type[Exception]:
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    lost: type[Exception] = TerminatedWorkerError
    return lost


_held: dict[str, int] = {}  # the slot of this worker, by folder


def _in_process(task: Task, path: Path, slots: str) -> Outcome:
    # In a worker's process. The parent alone answers to Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    device = task.options.device
    if device is not None and torch.device(device) == torch.device("cuda"):
        count = torch.cuda.device_count()
        if count > 1:
            device = f"cuda:{take_slot(slots) % count}"
            task = replace(task, options=replace(task.options, device=device))
    owner = Owner.here()
    try:
        with Store(path, check=False) as store:
            return work(task, store, owner)
    finally:
        owner.leave()


def take_slot(folder: str) -> int:
    """Return this process's number among the workers of a run, the same at each call.

    The first worker that asks gets 0. A number is free again when its worker has ended.

    Args:
        folder: Of the run.
    """
    import fcntl  # not on Windows, where no two GPUs are dealt out

    if folder not in _held:
        slot = 0
        while True:
            handle = os.open(os.path.join(folder, f"slot{slot}"), os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                slot += 1
                continue
            _held[folder] = slot  # the lock lives as long as the process
            break
    return _held[folder]
