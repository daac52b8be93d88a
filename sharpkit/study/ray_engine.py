"""A study's workers on Ray: on this machine, or on the machines of a cluster.

Workers never touch the study's file: SQLite does not work over network file systems. They
speak to one keeper beside the command that was started, and the keeper writes.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sharpkit.errors import SettingsError, SharpkitError
from sharpkit.results import Score
from sharpkit.study.engines import Engine, gone
from sharpkit.study.identity import Subject
from sharpkit.study.owner import Owner
from sharpkit.study.store import FATAL, Begun, Entry, Store
from sharpkit.study.work import Outcome, Task, work

__all__ = ["on_ray"]


class Keeper:
    """Holds the study's file for workers that may be on other machines."""

    def __init__(self, path: str):
        self.store = Store(path, check=False)
        self.here = Owner.here()

    def owner(self, token: str) -> Owner:
        """Return in whose name a worker claims: its claims end with this process."""
        return replace(self.here, token=token)

    def call(self, name: str, values: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Return what a method of the store returns."""
        return getattr(self.store, name)(*values, **named)


class RemoteLedger:
    """The ledger of a worker: passes everything on to the keeper."""

    def __init__(self, keeper: Any, get: Callable[[Any], Any]):
        self._keeper, self._get = keeper, get

    def _call(self, name: str, *values: Any, **named: Any) -> Any:
        return self._get(self._keeper.call.remote(name, values, named))

    def begin(
        self, entry: Entry, subject: Subject, asked: str, owner: Owner, **named: Any
    ) -> Begun:
        """Claim a subject."""
        begun: Begun = self._call("begin", entry, subject, asked, owner, **named)
        return begun

    def choose(self, key: str, asked: str, chosen: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Keep what a request stands for."""
        self._call("choose", key, asked, chosen)

    def start(self, key: str, seed: int, measure: str, settings: str) -> None:
        """Note the measure in flight."""
        self._call("start", key, seed, measure, settings)

    def record(self, key: str, score: Score) -> None:
        """Write a score."""
        self._call("record", key, score)

    def beat(self, owner: Owner) -> None:
        """Give a sign of life."""
        self._call("beat", owner)

    def finish(self, entry: Entry, key: str, owner: Owner, *, notes: Sequence[str] = ()) -> None:
        """Give the claim back."""
        self._call("finish", entry, key, owner, notes=notes)

    def fail(self, entry: Entry, asked: str, error: str, **named: Any) -> None:
        """Record why a checkpoint ended."""
        self._call("fail", entry, asked, error, **named)


def on_ray(store: Store, workers: int, address: str | None) -> Engine:
    """Return an engine of so many Ray workers.

    Args:
        store: The study, on this machine.
        workers: Tasks at the same time.
        address: Of the cluster; None starts Ray on this machine, with so many cores.

    Raises:
        SettingsError: If Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise SettingsError(
            "Expected Ray for --engine ray. It is not installed. Use pip install sharpkit[ray],"
            " or --engine local."
        ) from error

    def run(tasks: Sequence[Task]) -> Iterator[Outcome]:
        started = not ray.is_initialized()
        if started:
            _start(ray, workers, address)
        keeper = None
        try:
            keeper = _keeper(ray, store)
            yield from _dealt(ray, store, keeper, tasks, workers)
        finally:
            if keeper is not None:
                ray.kill(keeper)
            if started:
                ray.shutdown()

    return run


def _start(ray: Any, workers: int, address: str | None) -> None:
    local = {} if address else {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **local,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise SettingsError(
            f"Expected Ray to start{f' at {address}' if address else ''}. It says: {text[:200]}."
        ) from error


def _keeper(ray: Any, store: Store) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind = ray.remote(num_cpus=0, scheduling_strategy=here)(Keeper)
    return kind.remote(os.path.abspath(store.path))


def _dealt(
    ray: Any, store: Store, keeper: Any, tasks: Sequence[Task], workers: int
) -> Iterator[Outcome]:
    function = ray.remote(max_retries=0)(_remote)
    waiting = list(tasks)
    running: dict[Any, tuple[Task, Owner]] = {}
    lost: Counter[Entry] = Counter()
    while waiting or running:
        while waiting and len(running) < workers:
            task, token = waiting.pop(0), uuid.uuid4().hex[:12]
            device = task.options.device or ""
            needs = {"num_cpus": max(task.threads, 1), "num_gpus": int(device.startswith("cuda"))}
            owner = ray.get(keeper.owner.remote(token))
            running[function.options(**needs).remote(task, keeper, owner)] = (task, owner)
        ended, _ = ray.wait(list(running), num_returns=1)
        task, owner = running.pop(ended[0])
        try:
            yield ray.get(ended[0])
        except SharpkitError:
            raise
        except ray.exceptions.RayError:  # the worker or its machine is gone
            if store.bury([owner.text], count=True):
                task = replace(task, retry=False)  # deaths are not to be forgotten
            else:
                lost[task.entry] += 1
            if lost[task.entry] >= FATAL:
                yield gone(store, task)
            else:
                waiting.insert(0, task)


def _remote(task: Task, keeper: Any, owner: Owner) -> Outcome:
    import ray

    return work(task, RemoteLedger(keeper, ray.get), owner)
