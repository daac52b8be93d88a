"""The commands of studies: score into a file, export it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from sharpkit import __version__
from sharpkit.results import Scores
from sharpkit.scoring import MeasureRequest
from sharpkit.study import tables
from sharpkit.study.forecast import forecast
from sharpkit.study.identity import Options
from sharpkit.study.recipe import load_recipe
from sharpkit.study.run import EngineName, RunReport, check_run, run_study
from sharpkit.study.run import Progress as Told
from sharpkit.study.store import Store
from sharpkit.study.work import Outcome

__all__ = ["export_study", "score_into_study"]

FEW = 3  # checkpoints whose tables are printed; of more the study has them


def score_into_study(
    path: Path,
    files: Sequence[Path],
    recipe: Path,
    requests: Sequence[MeasureRequest] | None,
    options: Options,
    *,
    workers: int,
    threads: int,
    engine: EngineName,
    address: str | None,
    retry_failed: bool,
    as_json: bool,
    out: Console,
    log: Console,
    show: Callable[[Path, Scores, str | None], None],
) -> int:
    """Score checkpoints into a study, and return how many failed.

    Args:
        path: The study.
        files: Checkpoints.
        recipe: The recipe's file.
        requests: Measures.
        options: How to evaluate.
        workers: Processes.
        threads: Threads of torch in each.
        engine: Where they run.
        address: Of a Ray cluster.
        retry_failed: Whether to measure again what failed.
        as_json: Print JSON instead of tables.
        out: For results.
        log: For progress and notes.
        show: Prints the scores of one checkpoint.
    """
    check_run(workers, threads, engine)
    load_recipe(recipe)  # refuse before the study's file is made
    log.print(
        f"{len(files)} checkpoint{'s' * (len(files) > 1)} into {path},"
        f" {workers} worker{'s' * (workers > 1)}" + (" on Ray" if engine == "ray" else ""),
        markup=False,
    )
    with contextlib.closing(Store(path)) as store:
        line = forecast(store, files, recipe, requests, options, workers)
    if line:
        log.print(line, markup=False)
    shown: set[str] = set()
    bad: list[Outcome] = []

    def on_outcome(outcome: Outcome) -> None:
        for note in outcome.notes:
            if note not in shown:
                shown.add(note)
                log.print(f"note: {note}", style="yellow", markup=False)
        if outcome.error or outcome.failed:
            bad.append(outcome)
            text = outcome.error or f"{outcome.failed} measures failed"
            log.print(f"{outcome.entry.path}: {text}", style="red", markup=False)

    with _bar(log, len(files)) as told:
        report = run_study(
            path,
            files,
            recipe,
            requests,
            options=options,
            workers=workers,
            threads=threads,
            engine=engine,
            address=address,
            retry_failed=retry_failed,
            progress=told,
            on_outcome=on_outcome,
        )
    with Store(path, read_only=True, check=False) as store:
        if as_json:
            _print_json(out, store, report)
        elif len(report.outcomes) <= FEW:
            for outcome in report.outcomes:
                held = store.scores(outcome.subject, options.seed)
                show(Path(outcome.entry.path), Scores(tuple(held)), outcome.error)
    if not as_json:
        out.print(Text(_summary(path, report)))
    return len(bad)


def _summary(path: Path, report: RunReport) -> str:
    text = f"{report.measured} scores measured in {report.seconds:.0f} s"
    if report.present:
        text += f", {report.present} were there"
    bad = len(report.failed)
    if bad:
        text += f"; {bad} of {len(report.outcomes)} checkpoints failed, fully or in part"
    return f"{text}. Study: {path}"


def _print_json(out: Console, store: Store, report: RunReport) -> None:
    asked = [o.entry for o in report.outcomes]
    wanted = [(e.path, e.recipe, json.loads(e.options), e.seed) for e in asked]
    document = tables.documents(store)
    document["sharpkit"] = __version__
    names = ("checkpoint", "recipe", "options", "seed")
    document["checkpoints"] = [
        c for c in document["checkpoints"] if tuple(c[n] for n in names) in wanted
    ]
    out.file.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def _bar(log: Console, files: int) -> Iterator[Callable[[Told], None] | None]:
    if not log.is_terminal:
        with _lines(log, files) as told:
            yield told
        return
    columns = (
        BarColumn(bar_width=20),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=log, transient=True) as bar:
        task = bar.add_task("", total=None, state="")

        def tell(at: Told) -> None:
            bar.update(
                task,
                total=at.total,
                completed=at.done,
                description=at.now,
                state=f"{at.checkpoints}/{files}",
            )

        yield tell


@contextlib.contextmanager
def _lines(log: Console, files: int) -> Iterator[Callable[[Told], None]]:
    # In a log file: a line when a tenth more is done, at most one in ten seconds.
    started, last, shown = time.perf_counter(), 0.0, 0

    def tell(at: Told) -> None:
        nonlocal last, shown
        now = time.perf_counter() - started
        tenth = 10 * at.done // max(at.total, 1)
        if tenth > shown and now - last >= 10:
            last, shown = now, tenth
            left = now * (at.total - at.done) / max(at.done, 1)
            log.print(
                f"{at.checkpoints}/{files} checkpoints, {now:.0f} s, about {left:.0f} s left",
                markup=False,
            )

    yield tell


def export_study(path: Path, output: Path | None, *, wide: bool, out: Console) -> None:
    """Write a study's tables to a file, or as CSV to stdout."""
    with Store(path, read_only=True) as store:
        if output is not None:
            tables.export(store, output, wide=wide)
            return
        table: Any = tables.wide_table(store) if wide else tables.scores_table(store)
        out.file.write(table.to_csv(index=False))
