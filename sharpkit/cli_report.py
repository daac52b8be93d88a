"""The commands that show a study: correlate and report."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sharpkit.errors import SettingsError, StoreError
from sharpkit.study.correlation import StudyCorrelation, correlate_study
from sharpkit.study.correlation.multiple import Correction
from sharpkit.study.correlation.ranks import Statistic
from sharpkit.study.report import ReportData, collect, write_page
from sharpkit.study.store import Store
from sharpkit.study.tables import scores_table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["correlate", "report_study", "write_figures"]

MOST_ROWS = 40  # checkpoints in a drawn figure; its CSV has all

StudyArgument = Annotated[Path, typer.Argument(help="File that sharpkit score -o wrote.")]
GroupOption = Annotated[
    str | None, typer.Option("--group", help="Metadata entry of the groups, as the architecture.")
]
ClusterOption = Annotated[
    str | None,
    typer.Option("--cluster", help="Metadata entry of what models are alike by, as the setting."),
]


# -- correlate ---------------------------------------------------------------------------


def correlate(
    study: StudyArgument,
    gap: Annotated[str, typer.Option("--gap", help="Metadata entry of the generalization gap.")],
    group: GroupOption = None,
    cluster: ClusterOption = None,
    statistic: Annotated[
        str, typer.Option("--statistic", help="kendall, spearman or pearson.")
    ] = "kendall",
    axes: Annotated[
        str | None,
        typer.Option("--axes", help="Hyperparameters, with commas: granulated tau, sign-errors."),
    ] = None,
    partial: Annotated[
        str | None,
        typer.Option("--partial", help="Entries or measures to hold fixed, with commas."),
    ] = None,
    correction: Annotated[
        str, typer.Option("--correction", help="Of p for several measures: holm, bh or none.")
    ] = "holm",
    seed: Annotated[int, typer.Option(help="Of bootstrap and permutations.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the whole table as .csv.")
    ] = None,
) -> None:
    """Correlate every measure of a study with the gap: tau, intervals, p-values."""
    for name, value, allowed in (
        ("--statistic", statistic, get_args(Statistic)),
        ("--correction", correction, get_args(Correction)),
    ):
        if value not in allowed:
            raise SettingsError(f"Expected {name} to be one of {', '.join(allowed)}. Got {value}.")
    if output is not None and output.suffix.lower() != ".csv":
        raise SettingsError(f"Expected a name that ends in .csv. Got {output}.")
    with Store(study, read_only=True) as store:
        long = scores_table(store)
    found = correlate_study(
        long,
        gap=gap,
        group=group,
        cluster=cluster,
        axes=_listed(axes) or None,
        partial=_listed(partial),
        statistic=statistic,  # type: ignore[arg-type]
        correction=correction,  # type: ignore[arg-type]
        seed=seed,
    )
    if output is not None:
        _writing(output, lambda: found.frame.to_csv(output, index=False))
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n")
        return
    out = Console(file=sys.stdout, highlight=False)
    for table in _tables(found, group):
        out.print(table)
    out.print(Text(found.filter))
    for text in found.warnings:
        out.print(Text(f"note: {text}", style="yellow"))


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _tables(found: StudyCorrelation, group: str | None) -> list[Table]:
    symbol = {"kendall": "tau", "spearman": "rho", "pearson": "r"}[found.settings["statistic"]]
    kinds = [("", "pooled"), ("_within", f"within {group}"), ("_partial", "partial")]
    frame = found.frame
    tables = []
    for ending, name in kinds:
        if f"tau{ending}" not in frame:
            continue
        table = _table(f"{symbol} with {found.settings['gap']}, {name}", "measure")
        for column in ("n", f"{symbol} [95% interval]", "p", "p adj."):
            table.add_column(column, no_wrap=True, justify="right" if column != "n" else "left")
        for row in frame.to_dict("records"):
            shown = _interval(*(row[f"{k}{ending}"] for k in ("tau", "low", "high")))
            mark = " !" if ending == "_within" and row.get("disagree") else ""
            ps = (_p(row.get(f"p{ending}")), _p(row.get(f"p{ending}_adjusted")))
            table.add_row(*map(Text, (str(row["measure"]), str(row["n"]), shown + mark, *ps)))
        tables.append(table)
    if "psi" in frame:
        table = _table("Granulated tau and sign-errors", "measure")
        for name in ("psi", "sign-error", "robust"):
            table.add_column(name, no_wrap=True)
        for row in frame.to_dict("records"):
            table.add_row(
                Text(str(row["measure"])),
                Text(_interval(row["psi"], row["psi_low"], row["psi_high"])),
                Text(_two(row["sign_error"])),
                Text(_interval(row["robust_sign_error"], row["robust_low"], row["robust_high"])),
            )
        tables.append(table)
    return tables


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    return table


def _two(value: float) -> str:
    return f"{value:+.2f}" if math.isfinite(value) else "-"


def _interval(value: float, low: float, high: float) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return _two(value)
    return f"{_two(value)} [{low:+.2f}, {high:+.2f}]"


def _p(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2g}"


# -- report ------------------------------------------------------------------------------


def report_study(
    study: StudyArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Page to write, ending in .html.")
    ] = Path("report.html"),
    gap: Annotated[
        str | None,
        typer.Option("--gap", help="Metadata entry of the gap; default the one called gap."),
    ] = None,
    group: GroupOption = None,
    cluster: ClusterOption = None,
    figures: Annotated[
        Path | None,
        typer.Option("--figures", help="Folder for the figures as PNG, SVG and CSV, too."),
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Of the page.")] = None,
    intervals: Annotated[
        bool,
        typer.Option("--intervals", help="Intervals of tau, also if they take more than a minute."),
    ] = False,
) -> None:
    """Write a study as one page that needs no network: tables, figures, settings, origin."""
    if output.suffix.lower() not in (".html", ".htm"):
        raise SettingsError(f"Expected a name that ends in .html. Got {output}.")
    with Store(study, read_only=True) as store:
        data = collect(
            store, gap=gap, group=group, cluster=cluster, title=title, intervals=intervals
        )
    write_page(data, output)
    out = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    log = Console(file=sys.stderr, highlight=False)
    for text in (data.filter, *data.warnings):
        log.print(Text(f"note: {text}", style="yellow"))
    size = output.stat().st_size / 2**20
    out.print(Text(f"{output}: {len(data.rows)} rows, {size:.1f} MiB"))
    if figures is not None:
        written = write_figures(data, figures)
        out.print(Text(f"{figures}: {len(written)} files"))


def _writing(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise StoreError(
            f"Expected to write {path}. {error.strerror}. Name another file."
        ) from error


def write_figures(data: ReportData, folder: Path) -> list[Path]:
    """Write every figure of a report as PNG and SVG, and what it draws as CSV.

    Args:
        data: What the report shows.
        folder: Made if there is none.

    Raises:
        StoreError: If a file cannot be written.
    """
    _writing(folder, lambda: folder.mkdir(parents=True, exist_ok=True))
    names: set[str] = set()
    written: list[Path] = []

    def put(name: str, frame: pd.DataFrame, axes: Any) -> None:
        from sharpkit import plots

        stem = _free(name, names)
        table = folder / f"{stem}.csv"
        _writing(table, functools.partial(frame.to_csv, table, index=False))
        for ending in (".png", ".svg"):
            path = folder / f"{stem}{ending}"
            _writing(path, functools.partial(plots.save_figure, axes, path))
            written.append(path)
        written.append(table)

    _put_gaps(data, put)
    if len(data.taus):
        put("tau", data.taus, _forest(data))
    for kind, parts in (("layers", data.layers), ("spectra", data.eigenvalues)):
        for label, rows in parts.frame.groupby("label", sort=True):
            put(f"{kind}_{label}", rows, _drawn(kind, rows, str(label)))
    return written


def _free(name: str, names: set[str]) -> str:
    # Labels and files from checkpoints are no names of files: what is special is replaced.
    stem = re.sub(r"[^A-Za-z0-9_.=-]+", "_", name).strip("._")[:80]
    found, number = stem, 1
    while found in names:
        number += 1
        found = f"{stem}_{number}"
    names.add(found)
    return found


Put = Callable[[str, Any, Any], None]


def _put_gaps(data: ReportData, put: Put) -> None:
    import numpy as np

    if data.gap is None:
        return
    rows = data.rows[data.rows["label"].notna() & data.rows["error"].isna()]
    rows = rows[np.isfinite(rows["value"]) & np.isfinite(rows["gap"])]
    for label, mine in rows.groupby("label", sort=True):
        put(f"gap_{label}", mine, _scatter(data, mine, str(label)))


def _scatter(data: ReportData, rows: pd.DataFrame, label: str) -> Any:
    from sharpkit import plots

    frame = rows.rename(columns={"value": label, "gap": str(data.gap)})
    frame["group"] = rows["group"].map(lambda v: "models" if v is None else str(v))
    return plots.plot_against_gap(
        frame, label, gap=str(data.gap), group="group", error="probe_error",
        legend=data.group is not None, kind="error_kind", converged="converged",
    )  # fmt: skip


def _forest(data: ReportData) -> Any:
    from sharpkit import plots

    return plots.plot_taus(data.taus, within=f"within {data.group}")


def _drawn(kind: str, rows: pd.DataFrame, label: str) -> Any:
    from sharpkit import plots

    every = rows["checkpoint"].drop_duplicates()
    some = rows[rows["checkpoint"].isin(every.head(MOST_ROWS))]
    title = label if len(every) <= MOST_ROWS else f"{label}: the first {MOST_ROWS} of {len(every)}"
    draw = plots.plot_parts if kind == "layers" else plots.plot_eigenvalues
    return draw(some, title=title)
