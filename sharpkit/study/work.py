"""Score one checkpoint into a study: what every worker of every engine does."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from sharpkit import measures
from sharpkit.errors import RecipeError, SharpkitError, SharpkitWarning, StoreError
from sharpkit.results import Score
from sharpkit.scoring import MeasureRequest, Prepared, Request, measure_all, parse_requests, prepare
from sharpkit.study.identity import Options, Subject, identify, settings_text
from sharpkit.study.owner import BEAT, Owner
from sharpkit.study.recipe import Recipe, load_recipe
from sharpkit.study.source import source_hash
from sharpkit.study.store import Begun, Entry

__all__ = ["Ledger", "Outcome", "Task", "work"]


class Ledger(Protocol):
    """Where a worker writes: the study itself, or someone who holds it."""

    def begin(
        self,
        entry: Entry,
        subject: Subject,
        asked: str,
        owner: Owner,
        *,
        metadata: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        retry: bool = False,
    ) -> Begun:
        """See :meth:`sharpkit.study.store.Store.begin`; so for the others."""

    def choose(self, key: str, asked: str, chosen: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Keep what a request stands for."""

    def start(self, key: str, seed: int, measure: str, settings: str) -> None:
        """Note the measure in flight."""

    def record(self, key: str, score: Score) -> None:
        """Write a score."""

    def beat(self, owner: Owner) -> None:
        """Give a sign of life."""

    def finish(self, entry: Entry, key: str, owner: Owner, *, notes: Sequence[str] = ()) -> None:
        """Give the claim back."""

    def fail(
        self,
        entry: Entry,
        asked: str,
        error: str,
        *,
        metadata: Mapping[str, Any] | None = None,
        claim: tuple[str, Owner] | None = None,
    ) -> None:
        """Record why a checkpoint ended."""


@dataclass(frozen=True)
class Task:
    """A checkpoint to score.

    Attributes:
        checkpoint: The file.
        recipe: The recipe's file.
        recipe_hash: Of its code, as it was when the run began.
        entry: What the study files it under.
        names: Measures, as for :func:`sharpkit.score`.
        options: How to evaluate.
        run: Tells runs apart.
        retry: Whether failed measures are to be measured again.
        threads: Threads of torch; 0: as many as there are now.
        parent: The process that ended means: stop after the present measure; 0: go on.
    """

    checkpoint: Path
    recipe: Path
    recipe_hash: str
    entry: Entry
    names: tuple[MeasureRequest, ...] | None
    options: Options
    run: str
    retry: bool = False
    threads: int = 1
    parent: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        entry: Of the task.
        subject: Key of what was scored; empty if it could not be loaded.
        busy: Whether another process is at it, so that nothing was done.
        measured: Scores measured now.
        present: Scores that were there already.
        failed: Measures that failed, now or earlier.
        error: Why the checkpoint ended early; None if it did not.
        notes: Warnings on the way.
        seconds: Spent in all.
        measuring: Spent in measures.
    """

    entry: Entry
    subject: str = ""
    busy: bool = False
    measured: int = 0
    present: int = 0
    failed: int = 0
    error: str | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    measuring: float = 0.0


_recipes: dict[str, Recipe] = {}  # by run: a worker loads the data of a run once


def work(task: Task, ledger: Ledger, owner: Owner) -> Outcome:
    """Measure what is missing of a checkpoint, and write each score as soon as it is there.

    Args:
        task: What to do.
        ledger: Where to write.
        owner: The present process.
    """
    started = time.perf_counter()
    before = torch.get_num_threads()
    if task.threads:
        torch.set_num_threads(task.threads)
    try:
        with _collected() as notes:
            outcome = _work(task, ledger, owner, notes)
    finally:
        torch.set_num_threads(before)
    unique = tuple(dict.fromkeys(notes))
    return replace(outcome, notes=unique, seconds=time.perf_counter() - started)


def _work(task: Task, ledger: Ledger, owner: Owner, notes: Sequence[str]) -> Outcome:
    requests = parse_requests(task.names)
    metadata: dict[str, Any] = {}
    claim: tuple[str, Owner] | None = None
    try:
        recipe = _recipe(task)
        metadata = recipe.metadata(task.checkpoint)
        options = task.options
        objective, origin = recipe.objective(
            task.checkpoint,
            dtype=options.torch_dtype(),
            device=options.device,
            params=None if options.params is None else list(options.params),
            trust_pickle=options.trust_pickle,
        )
        beside = recipe.beside(task.checkpoint)
        subject = identify(objective, task.recipe_hash, beside, options)
        begun = ledger.begin(
            task.entry,
            subject,
            requests.text,
            owner,
            metadata=metadata,
            provenance=origin,
            retry=task.retry,
        )
        if not begun.mine:
            return Outcome(task.entry, subject.key, busy=True)
        claim = (subject.key, owner)
        prepared: Prepared | None = None

        def ready() -> Prepared:
            nonlocal prepared
            if prepared is None:
                prepared = prepare(
                    objective,
                    seed=options.seed,
                    max_basis=options.max_basis,
                    num_groups=options.num_groups,
                    canonical=options.canonical,
                    provenance={**origin, "recipe": str(task.recipe)},
                    **beside,
                )
            return prepared

        with _heart(ledger, owner):
            if begun.chosen is None:
                chosen = ready().resolve(requests)
                ledger.choose(subject.key, requests.text, [(m.name, s) for m, s in chosen])
            else:
                chosen = [(measures.get(name), dict(given)) for name, given in begun.chosen]
            keys = {(m.name, settings_text(s)) for m, s in chosen}
            missing = [r for r in chosen if (r[0].name, settings_text(r[1])) not in begun.done]
            taken, seconds = _measure(task, ledger, subject.key, missing, ready, begun.fatal)
        ledger.finish(task.entry, subject.key, owner, notes=tuple(dict.fromkeys(notes)))
    except KeyboardInterrupt:
        if claim:
            ledger.finish(task.entry, claim[0], owner)
        raise
    except StoreError:
        if claim:
            with suppress(StoreError):
                ledger.finish(task.entry, claim[0], owner)
        raise
    except Exception as failure:  # whatever it is: the other checkpoints must go on
        text = " ".join(str(failure).split())
        error = text if isinstance(failure, SharpkitError) else f"{type(failure).__name__}: {text}"
        ledger.fail(task.entry, requests.text, error, metadata=metadata, claim=claim)
        return Outcome(task.entry, claim[0] if claim else "", error=error)
    return Outcome(
        task.entry,
        subject.key,
        measured=len(taken),
        present=len(chosen) - len(missing),
        failed=sum(s.error is not None for s in taken) + len(keys & begun.failed),
        measuring=seconds,
    )


def _measure(
    task: Task,
    ledger: Ledger,
    key: str,
    missing: Sequence[Request],
    ready: Callable[[], Prepared],
    fatal: frozenset[tuple[str, str]],
) -> tuple[list[Score], float]:
    taken: list[Score] = []
    seconds = 0.0
    for measure, settings in missing:
        if task.parent and os.getppid() != task.parent:
            break  # nobody waits for this any more
        text = settings_text(settings)
        ledger.start(key, task.options.seed, measure.name, text)
        prepared = ready()
        if (measure.name, text) in fatal:
            error = (
                "Expected the process to outlive the measure. It ended each time (killed, perhaps"
                " for want of memory). Try --max-basis, fewer workers, or leave the measure out."
            )
            score = Score(
                measure.name, None, settings, task.options.seed, prepared.provenance, error
            )
        else:
            begun = time.perf_counter()
            (score,) = measure_all(
                prepared.analysis, [(measure, settings)], provenance=prepared.provenance
            )
            seconds += time.perf_counter() - begun
        ledger.record(key, score)
        taken.append(score)
    return taken, seconds


def _recipe(task: Task) -> Recipe:
    if task.run not in _recipes:
        _recipes.clear()  # one recipe's data at a time
        recipe = load_recipe(task.recipe)
        if source_hash(task.recipe) != task.recipe_hash:  # nothing is filed under other code
            raise RecipeError(
                f"Expected {task.recipe} and its neighbours as they were when the run began. They"
                " were changed since, or are others on this machine. Run the command again."
            )
        _recipes[task.run] = recipe
    return _recipes[task.run]


@contextmanager
def _collected() -> Iterator[list[str]]:
    # sharpkit's warnings go into the list; those of other libraries where they usually go.
    found: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", SharpkitWarning)
        usual = warnings.showwarning

        def show(message: Any, category: Any, *rest: Any, **named: Any) -> None:
            if issubclass(category, SharpkitWarning):
                found.append(str(message))
            else:
                usual(message, category, *rest, **named)

        warnings.showwarning = show
        yield found


@contextmanager
def _heart(ledger: Ledger, owner: Owner) -> Iterator[None]:
    # A sign of life now and then, so that other machines know that the claim is held.
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(BEAT):
            with suppress(StoreError):  # the next one will do
                ledger.beat(owner)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
