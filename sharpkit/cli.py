"""The command line: the only module that prints or exits.

Results go to stdout; progress, notes and errors to stderr. Exit status: 0 done, 1 some
checkpoints or checks failed (the rest is kept), 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from sharpkit import __version__, measures
from sharpkit.auditing import audit as audit_objective
from sharpkit.cli_audit import report
from sharpkit.cli_landscape import draw_slice, measure_path
from sharpkit.cli_options import (
    INTERRUPTED,
    OK,
    SOME_FAILED,
    WRONG_USE,
    DeviceOption,
    DtypeOption,
    ParamsOption,
    RecipeOption,
    TrustOption,
    check_figure,
    leave,
    progress_bar,
    read_device,
    read_dtype,
    stderr,
    stdout,
)
from sharpkit.cli_report import correlate, report_study
from sharpkit.cli_spectrum import draw_spectrum
from sharpkit.cli_study import export_study, score_into_study
from sharpkit.cli_tables import describe, frame_table, print_measure, print_result
from sharpkit.errors import SettingsError, SharpkitError, SharpkitWarning
from sharpkit.results import Scores
from sharpkit.scoring import ALL, parse_request
from sharpkit.study.catalogue import catalogue_markdown
from sharpkit.study.checkpoints import find_checkpoints
from sharpkit.study.doctor import examine
from sharpkit.study.identity import Options
from sharpkit.study.recipe import load_recipe
from sharpkit.study.runner import CheckpointScores, score_checkpoints

__all__ = ["app", "main"]

app = typer.Typer(
    name="sharpkit",
    help="Measure how sharp the minimum is that a trained network lies in.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@contextmanager
def _notes_on_stderr() -> Iterator[None]:
    # sharpkit's warnings become one-line notes; those of other libraries stay as they are.
    usual = warnings.showwarning
    seen: set[str] = set()

    def show(message: Any, category: Any, *rest: Any, **named: Any) -> None:
        if not issubclass(category, SharpkitWarning):
            usual(message, category, *rest, **named)
        elif str(message) not in seen:
            seen.add(str(message))
            stderr().print(f"note: {message}", style="yellow", markup=False)

    with warnings.catch_warnings():
        warnings.simplefilter("always", SharpkitWarning)
        warnings.showwarning = show
        yield


# -- score -------------------------------------------------------------------------------


@app.command()
def score(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Files, folders or globs (.pt .pth .ckpt .safetensors)."),
    ],
    recipe: RecipeOption,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            "-m", "--measure", help="NAME or NAME:key=value,...; default all but dear ones."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    parts: Annotated[
        bool, typer.Option("--parts", help="Show parts too: layers, further eigenvalues.")
    ] = False,
    groups: Annotated[
        int, typer.Option(help="Groups of the data for the data's error; 0: none.")
    ] = 8,
    max_basis: Annotated[
        int | None, typer.Option(help="Most Krylov vectors to hold; default what fits.")
    ] = None,
    canonical: Annotated[
        bool,
        typer.Option("--canonical", help="Balance attention heads and other factors first."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Study to score into: only what is missing there."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes; needs -o.")] = 1,
    threads: Annotated[
        int, typer.Option(help="Threads of torch in each process of a study; 0: torch's choice.")
    ] = 1,
    engine: Annotated[str, typer.Option(help="Where workers run: local or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; default: Ray on this machine.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure again what failed in the study.")
    ] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    params: ParamsOption = None,
    trust_pickle: TrustOption = False,
) -> None:
    """Score checkpoints: every measure with its error.

    Prints one table a checkpoint. With -o the scores go into a study, each as soon as it is
    measured; the same command again, also after an interrupt, measures only what is missing.
    The recipe is your own code and runs as such.
    """
    requests = measure or None  # None: those whose needs are met, without the dear ones
    for request in requests or ():
        if request != ALL:
            parse_request(request)  # refuse before anything is computed
    if output is not None:
        _score_into_study(
            output,
            find_checkpoints(checkpoints),
            recipe,
            requests,
            Options(
                dtype=dtype if read_dtype(dtype) else None,
                device=read_device(device),
                params=tuple(params) if params else None,
                max_basis=max_basis,
                num_groups=groups,
                canonical=canonical,
                seed=seed,
                trust_pickle=trust_pickle,
            ),
            as_json=as_json,
            parts=parts,
            workers=workers,
            threads=threads,
            engine=engine,
            address=address,
            retry_failed=retry_failed,
        )
        return
    if workers != 1 or engine != "local" or retry_failed:
        raise SettingsError(
            "Expected a study for --workers, --engine and --retry-failed. Add -o STUDY.db."
        )
    some = requests is not None and ALL not in requests
    count = len(requests or ()) if some else len(measures.names())
    loaded = load_recipe(recipe)
    files = find_checkpoints(checkpoints)
    out, finished = stdout(), []

    def on_result(result: CheckpointScores) -> None:
        finished.append(result)
        if not as_json:
            print_result(out, result, parts)

    status = OK
    try:
        with progress_bar() as bar:
            task = bar.add_task("", total=len(files) * count)
            started = -1

            def progress(path: Path, name: str) -> None:
                nonlocal started
                started += 1
                bar.update(task, completed=started, description=f"{path.name}: {name}")

            def next_file(result: CheckpointScores) -> None:
                nonlocal started
                on_result(result)
                started = len(finished) * count - 1
                bar.update(task, completed=started + 1)

            score_checkpoints(
                files,
                loaded,
                requests,
                seed=seed,
                dtype=read_dtype(dtype),
                device=read_device(device),
                params=params or None,
                trust_pickle=trust_pickle,
                max_basis=max_basis,
                num_groups=groups,
                canonical=canonical,
                progress=progress,
                on_result=next_file,
            )
    except KeyboardInterrupt:
        status = INTERRUPTED
    if as_json:
        document = {"sharpkit": __version__, "checkpoints": [r.to_dict() for r in finished]}
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    if status == INTERRUPTED:
        stderr().print(f"interrupted: {len(finished)} of {len(files)} checkpoints shown")
        leave(status)
    bad = [r for r in finished if r.failed]
    if bad:
        stderr().print(
            f"{len(bad)} of {len(files)} checkpoints failed, fully or in part; the rest is"
            " complete.",
            style="red",
        )
    leave(SOME_FAILED if bad else OK)


def _score_into_study(
    path: Path,
    files: list[Path],
    recipe: Path,
    requests: list[str] | None,
    options: Options,
    *,
    as_json: bool,
    parts: bool,
    **how: Any,
) -> None:
    out = stdout()

    def show(checkpoint: Path, scores: Scores, error: str | None) -> None:
        print_result(out, CheckpointScores(checkpoint, scores, {}, error), parts)

    try:
        bad = score_into_study(
            path,
            files,
            recipe,
            requests,
            options,
            as_json=as_json,
            out=out,
            log=stderr(),
            show=show,
            **how,
        )
    except KeyboardInterrupt:
        stderr().print(f"interrupted: what was measured is in {path}; go on with the same command")
        leave(INTERRUPTED)
    leave(SOME_FAILED if bad else OK)


@app.command(name="export")
def export_command(
    study: Annotated[Path, typer.Argument(help="File that sharpkit score -o wrote.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Name ending in .csv, .parquet or .json.")
    ] = None,
    wide: Annotated[
        bool, typer.Option("--wide", help="One row a checkpoint instead of one a score.")
    ] = False,
) -> None:
    """Write a study as a table: CSV to stdout, or a file."""
    export_study(study, output, wide=wide, out=stdout())


app.command()(correlate)
app.command(name="report")(report_study)
app.command(name="slice")(draw_slice)
app.command(name="path")(measure_path)
app.command(name="spectrum")(draw_spectrum)


# -- measures ----------------------------------------------------------------------------


@app.command(name="measures")
def list_measures(
    name: Annotated[str | None, typer.Argument(help="Show one measure in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the whole catalogue as Markdown.")
    ] = False,
) -> None:
    """List the measures: definition, invariances, cost."""
    if markdown:
        if name or as_json:
            raise SettingsError("Expected --markdown alone: it prints the whole catalogue.")
        sys.stdout.write(catalogue_markdown())
        return
    chosen = [measures.get(name)] if name else [measures.get(n) for n in measures.names()]
    out = stdout()
    if as_json:
        rows = [describe(m) for m in chosen]
        sys.stdout.write(json.dumps(rows[0] if name else rows, indent=2) + "\n")
        return
    if name:
        print_measure(out, chosen[0])
        return
    table = Table(box=None, pad_edge=False, show_lines=False)
    table.add_column("measure", no_wrap=True)
    for column in ("what it is", "cost"):
        table.add_column(column, overflow="fold")
    for m in chosen:
        table.add_row(Text(m.name, style="bold"), Text(m.definition), Text(m.cost))
    out.print(table)
    out.print("\nsharpkit measures NAME shows formula, settings, invariances, reference.")


# -- audit -------------------------------------------------------------------------------


@app.command()
def audit(
    checkpoint: Annotated[Path, typer.Argument(help="One file of weights.")],
    recipe: RecipeOption,
    measure: Annotated[
        list[str] | None,
        typer.Option("-m", "--measure", help="NAME or NAME:key=value,...; default all."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Draw the factors: .png, .pdf, .svg.")
    ] = None,
    elements: Annotated[int, typer.Option(help="Random elements of each symmetry.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of elements and measures.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Evaluate in float64, float32 or bfloat16.")
    ] = "float64",
    device: DeviceOption = None,
    params: ParamsOption = None,
    trust_pickle: TrustOption = False,
) -> None:
    """Apply exact symmetries of the network, and tell which measures move."""
    for request in measure or ():
        parse_request(request)  # refuse before anything is computed
    if output is not None:
        check_figure(output)
    loaded = load_recipe(recipe)
    objective, _ = loaded.objective(
        checkpoint,
        dtype=read_dtype(dtype),
        device=read_device(device),
        params=params or None,
        trust_pickle=trust_pickle,
    )
    with progress_bar() as bar:
        task = bar.add_task("", total=None)

        def progress(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total)

        result = audit_objective(
            objective,
            measure or None,
            elements=elements,
            seed=seed,
            initial=loaded.beside(checkpoint).get("initial"),
            progress=progress,
        )
    if as_json:
        sys.stdout.write(result.to_json() + "\n")
    else:
        out = stdout()
        for item in report(result):
            out.print(item)
    if output is not None and result.symmetries:
        from sharpkit.plots import plot_audit, save_figure

        save_figure(plot_audit(result, title=checkpoint.name), output)
    failed = any(c.verdict == "failed" for c in result.changes)
    leave(SOME_FAILED if failed or result.contradicted else OK)


# -- doctor ------------------------------------------------------------------------------


@app.command()
def doctor(
    recipe: RecipeOption,
    checkpoint: Annotated[Path | None, typer.Argument(help="Load these weights first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    params: ParamsOption = None,
    trust_pickle: TrustOption = False,
) -> None:
    """Check that model, loss and data can be measured, and forecast time and memory."""
    loaded = load_recipe(recipe)
    objective, _ = loaded.objective(
        checkpoint,
        dtype=read_dtype(dtype),
        device=read_device(device),
        params=params or None,
        trust_pickle=trust_pickle,
    )
    findings = examine(objective)
    out = stdout()
    if as_json:
        rows = [vars(f) for f in findings]
        sys.stdout.write(json.dumps(rows, indent=2, allow_nan=False) + "\n")
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            mark = {
                None: Text("-"),
                True: Text("ok", "green"),
                False: Text("FAIL", "bold red"),
            }
            table.add_row(mark[finding.passed], Text(finding.name), Text(finding.text))
        out.print(table)
    leave(SOME_FAILED if any(f.passed is False for f in findings) else OK)


# -- demo --------------------------------------------------------------------------------


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller zoo, under 40 s.")] = False,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Folder for checkpoints, data and figures."),
    ] = Path("sharpkit-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the measurements.")] = 0,
) -> None:
    """Train a small real zoo, score it, correlate sharpness with generalization, draw it."""
    from sharpkit.demo.run import run_demo

    started = time.perf_counter()
    out = stdout()
    with progress_bar() as bar:
        task = bar.add_task("", total=None)

        def progress(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total)

        report = run_demo(output, quick=quick, seed=seed, progress=progress)
    out.print(f"{report.num_models} models trained on scikit-learn digits, scored with seed {seed}")
    out.print(frame_table("Sharpness of each model", report.table))
    out.print(frame_table("Kendall tau with the generalization gap (test - train CE)", report.taus))
    for line in report.remarks:
        out.print(Text(line, style="yellow"))
    out.print("\nWritten:")
    for path in report.files:
        out.print(Text(f"  {path}"))
    out.print(f"{time.perf_counter() - started:.0f} s in all")
    leave(SOME_FAILED if report.failures else OK)


# -- entry -------------------------------------------------------------------------------


def _version(show: bool) -> None:
    if show:
        sys.stdout.write(f"sharpkit {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    del version, debug  # read before the command is parsed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Example:
        >>> run(["--version"])  # doctest: +ELLIPSIS
        sharpkit ...
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = ["--debug"] * debug + [a for a in arguments if a != "--debug"]
    try:
        with _notes_on_stderr():
            app(arguments, prog_name="sharpkit")
    except SystemExit as ended:  # how typer ends, also after a usage error (2)
        return ended.code if isinstance(ended.code, int) else OK
    except KeyboardInterrupt:
        stderr().print("interrupted")
        return INTERRUPTED
    except SharpkitError as error:
        if debug:
            raise
        stderr().print(Text(f"sharpkit: {' '.join(str(error).split())}", style="red"))
        return WRONG_USE
    return OK
