"""Score many checkpoints into a study, with one or several workers."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from sharpkit import measures
from sharpkit.errors import SettingsError
from sharpkit.scoring import MeasureRequest, listed, parse_requests
from sharpkit.study.engines import Engine, local
from sharpkit.study.identity import Options
from sharpkit.study.owner import Owner
from sharpkit.study.recipe import load_recipe
from sharpkit.study.source import source_hash
from sharpkit.study.store import Entry, Store
from sharpkit.study.work import Outcome, Task

__all__ = ["EngineName", "Progress", "RunReport", "check_run", "run_study"]

EngineName: TypeAlias = Literal["local", "ray"]
POLL = 0.5  # seconds between two looks at how far the workers are


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done: Measures done, counting those that were there; an estimate while checkpoints
            are worked at.
        total: Measures in all, likewise.
        checkpoints: Checkpoints finished.
        now: What is measured at present, such as ``"mlp.pt: hessian_trace"``.
    """

    done: int
    total: int
    checkpoints: int
    now: str


@dataclass(frozen=True)
class RunReport:
    """What a run did.

    Attributes:
        outcomes: One a checkpoint, in the order in which they ended.
        seconds: Spent in all.
    """

    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def measured(self) -> int:
        """Scores measured now."""
        return sum(o.measured for o in self.outcomes)

    @property
    def present(self) -> int:
        """Scores that were there already."""
        return sum(o.present for o in self.outcomes)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Checkpoints that ended early or have measures that failed."""
        return tuple(o for o in self.outcomes if o.error or o.failed)


def run_study(
    path: str | Path,
    checkpoints: Iterable[str | Path],
    recipe: str | Path,
    names: MeasureRequest | Iterable[MeasureRequest] | None = None,
    *,
    options: Options | None = None,
    workers: int = 1,
    threads: int = 1,
    engine: EngineName = "local",
    address: str | None = None,
    retry_failed: bool = False,
    progress: Callable[[Progress], None] | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> RunReport:
    """Score checkpoints into a study, measuring only what is missing there.

    Each score is on the disk as soon as it is measured. A run that was interrupted or killed
    is continued by running it again; several runs may work at one study at the same time.
    The numbers do not depend on workers, engines and interrupts.

    Args:
        path: The study's file; made if there is none.
        checkpoints: Files.
        recipe: The recipe's file; it is the user's own code and runs as such.
        names: Measures, as for :func:`sharpkit.score`.
        options: How to evaluate.
        workers: Processes.
        threads: Threads of torch in each; 0: torch's own choice. The last digits of numbers
            may depend on it.
        engine: ``"local"`` processes, or ``"ray"``, which needs Ray.
        address: Of a Ray cluster; None starts Ray on this machine.
        retry_failed: Whether to measure again what failed.
        progress: Told now and then how far it is.
        on_outcome: Called after each checkpoint.

    Returns:
        What became of each checkpoint.

    Raises:
        StoreError: If the study cannot be used.
        RecipeError: If the recipe cannot be used.
        SettingsError: If a setting makes no sense.
        UnknownMeasureError: If there is no measure of a name.
    """
    started = time.perf_counter()
    check_run(workers, threads, engine)
    options = options or Options()
    options.torch_dtype()
    wanted = listed(names)
    requests = parse_requests(wanted)  # refuse before anything is computed
    load_recipe(recipe)
    code, token = source_hash(Path(recipe)), uuid.uuid4().hex
    with Store(path) as store:
        where = store.relative(recipe)
        tasks = [
            Task(
                Path(c).resolve(),
                Path(recipe).resolve(),
                code,
                Entry(store.relative(c), where, options.text(), options.seed),
                wanted,
                options,
                token,
                retry_failed,
                threads,
            )
            for c in checkpoints
        ]
        expected = len(requests.parsed)
        if requests.others != "none":
            dear = requests.others == "all"
            asked = {m.name for m, _ in requests.parsed}
            others = [n for n in measures.names() if n not in asked]
            expected += sum(dear or not measures.get(n).dear for n in others)
        outcomes: list[Outcome] = []
        if engine == "ray":
            from sharpkit.study.ray_engine import on_ray

            run = on_ray(store, workers, address)
        else:
            run = local(store, workers)
        with _told(store, tasks, expected, outcomes, progress):
            for outcome in _every(store, tasks, run):
                outcomes.append(outcome)
                if on_outcome:
                    on_outcome(outcome)
    return RunReport(tuple(outcomes), time.perf_counter() - started)


def check_run(workers: int, threads: int, engine: str) -> None:
    """Refuse numbers of workers and threads, and engines, that make no sense.

    Raises:
        SettingsError: Naming which.
    """
    for name, value, least in (("workers", workers, 1), ("threads", threads, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingsError(
                f"Expected `{name}` to be a whole number of at least {least}. Got {value!r}."
            )
    if engine not in ("local", "ray"):
        raise SettingsError(f"Expected the engine to be local or ray. Got {engine!r}.")


def _every(store: Store, tasks: Sequence[Task], run: Engine) -> Iterator[Outcome]:
    # Until all are done; those at which another process works come again when it is through.
    waiting = list(tasks)
    while waiting:
        by_entry = {t.entry: t for t in waiting}
        busy: list[tuple[str, Task]] = []  # two files may hold one subject
        for outcome in run(waiting):
            if outcome.busy:
                busy.append((outcome.subject, by_entry[outcome.entry]))
            else:
                yield outcome
        waiting = [task for _, task in busy]
        while waiting and _all_held(store, [key for key, _ in busy]):
            time.sleep(POLL)


def _all_held(store: Store, keys: Sequence[str]) -> bool:
    held = {k: (o, b) for k, o, b in store.query("SELECT subject, owner, beat FROM claim")}
    return all(k in held and Owner.read(held[k][0]).is_alive(held[k][1]) for k in keys)


@contextmanager
def _told(
    store: Store,
    tasks: Sequence[Task],
    expected: int,
    outcomes: Sequence[Outcome],
    progress: Callable[[Progress], None] | None,
) -> Iterator[None]:
    if progress is None:
        yield
        return
    stop = threading.Event()
    names = {(t.entry.path, t.entry.seed): t.checkpoint.name for t in tasks}

    def look() -> None:
        running = store.query(
            "SELECT entry.path, entry.seed, claim.measure, (SELECT count(*) FROM score WHERE"
            " score.subject = claim.subject AND score.seed = claim.seed) FROM claim JOIN entry"
            " ON entry.subject = claim.subject AND entry.seed = claim.seed"
        )
        mine = [r for r in running if (r[0], r[1]) in names]
        ended = len(outcomes)
        done = ended * expected + sum(min(r[3], expected) for r in mine)
        now = ", ".join(f"{names[r[0], r[1]]}: {r[2]}" for r in mine if r[2])
        progress(Progress(min(done, expected * len(tasks)), expected * len(tasks), ended, now))

    def watch() -> None:
        while not stop.wait(POLL):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
        stop.set()
        thread.join()
        look()
    finally:
        stop.set()
        thread.join()
