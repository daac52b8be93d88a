"""What a report shows, taken from a study."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharpkit import __version__
from sharpkit.errors import SettingsError
from sharpkit.study.correlation import StudyCorrelation, correlate_study
from sharpkit.study.correlation.study_frame import find_column
from sharpkit.study.report.facts import (
    Facts,
    code_table,
    data_warnings,
    failures_table,
    measures_table,
    notes_table,
    origin_table,
    runs_table,
)
from sharpkit.study.report.parts import EIGENVALUES, LAYERS, Parts, read_documents
from sharpkit.study.report.taus import measured_taus, seconds_needed
from sharpkit.study.store import Store
from sharpkit.study.tables import META, scores_table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ReportData", "collect"]

USUAL_GAP = "gap"
PATIENCE = 60.0  # seconds that intervals may take unless they are asked for


@dataclass(frozen=True)
class ReportData:
    """What a report shows.

    Attributes:
        title: Of the page.
        study: Name of the study's file.
        made: When, as text.
        version: Of sharpkit, which made the report.
        rows: One row a checkpoint and score: ``checkpoint``, ``group``, ``label``, ``value``,
            ``probe_error``, ``error_kind``, ``data_error``, ``gap``, ``converged``, ``error``.
        gap: Metadata entry of the gap; None if there is none.
        group: Metadata entry of the groups; None if there is none.
        taus: One row a measure, as :func:`sharpkit.study.correlation.correlate_study` gives
            it; empty without a gap.
        filter: The sentence that says which models are correlated; or why none are.
        remarks: Sentences that limit the correlations.
        layers: Parts of scores that belong to layers.
        eigenvalues: Parts of scores that are single eigenvalues.
        facts: Tables of settings and origin.
        failures: One row a checkpoint or score that failed.
        notes: One row a note.
        warnings: What the reader must know first.
    """

    title: str
    study: str
    made: str
    version: str
    rows: pd.DataFrame
    gap: str | None
    group: str | None
    taus: pd.DataFrame
    filter: str
    remarks: tuple[str, ...]
    layers: Parts
    eigenvalues: Parts
    facts: tuple[Facts, ...]
    failures: pd.DataFrame
    notes: pd.DataFrame
    warnings: tuple[str, ...]


def collect(
    store: Store,
    *,
    gap: str | None = None,
    group: str | None = None,
    cluster: str | None = None,
    title: str | None = None,
    intervals: bool = False,
) -> ReportData:
    """Read from a study what its report shows.

    Args:
        store: The study.
        gap: Metadata entry of the generalization gap; None: the one called ``gap``, if any.
        group: Metadata entry of the groups.
        cluster: Metadata entry of what models are alike by.
        title: Of the page; None: the file's name.
        intervals: Whether to compute intervals of the correlations however long it takes;
            otherwise those of very large studies have none, and the page says so.

    Raises:
        SettingsError: If an entry is not among the metadata.
        StoreError: If the study cannot be read.

    Cost: reading; and the correlations, see
    :func:`sharpkit.study.correlation.correlate_study`, up to a minute.
    """
    long = scores_table(store)
    names = [c.removeprefix(META) for c in long.columns if c.startswith(META)]
    chosen = {
        "group": _entry(names, group, "group"),
        "cluster": _entry(names, cluster, "cluster"),
        "gap": _entry(names, gap, "gap") if gap is not None else _usual_gap(names),
    }
    taus, sentence, remarks = _correlation(long, chosen, intervals)
    documents = read_documents(store, long)
    return ReportData(
        title=title or f"Sharpness of {store.path.name}",
        study=store.path.name,
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        rows=_rows(long, chosen["gap"], chosen["group"]),
        gap=chosen["gap"],
        group=chosen["group"],
        taus=taus,
        filter=sentence,
        remarks=remarks,
        layers=documents.of(LAYERS),
        eigenvalues=documents.of(EIGENVALUES),
        facts=(
            measures_table(long),
            runs_table(store),
            code_table(store),
            origin_table(store),
        ),
        failures=failures_table(long),
        notes=notes_table(store, documents),
        warnings=data_warnings(store),
    )


def _entry(names: Sequence[str], name: str | None, what: str) -> str | None:
    if name is None:
        return None
    found = find_column(names, name)
    if found is None:
        raise SettingsError(
            f"Expected the {what} {name!r} among the metadata ({', '.join(names) or 'none'})."
            " Let the recipe's metadata() give it."
        )
    return found


def _usual_gap(names: Sequence[str]) -> str | None:
    ending = [n for n in names if n.rsplit(".", 1)[-1] == USUAL_GAP]
    if USUAL_GAP in ending:
        return USUAL_GAP
    return ending[0] if len(ending) == 1 else None


def _rows(long: pd.DataFrame, gap: str | None, group: str | None) -> pd.DataFrame:
    import pandas as pd

    shown = ["checkpoint", "label", "value", "probe_error", "error_kind", "data_error"]
    rows = long[[*shown, "converged", "error"]].copy()
    rows.insert(1, "group", None if group is None else long[META + group])
    number = None if gap is None else pd.to_numeric(long[META + gap], errors="coerce")
    rows.insert(7, "gap", number)
    rows["gap"] = rows["gap"].astype(float)
    return rows


def _correlation(
    long: pd.DataFrame, chosen: dict[str, str | None], intervals: bool
) -> tuple[pd.DataFrame, str, tuple[str, ...]]:
    import pandas as pd

    gap, group, cluster = chosen["gap"], chosen["group"], chosen["cluster"]
    scored = long[long["label"].notna()]
    if gap is None:
        text = (
            "Nothing is correlated: no metadata entry is called `gap`. Let the recipe's"
            " metadata() give the generalization gap, or name an entry with --gap."
        )
        return pd.DataFrame(), text, ()
    if not len(scored):
        return pd.DataFrame(), "Nothing is correlated: the study holds no score.", ()
    needed = seconds_needed(scored)
    if needed > PATIENCE and not intervals:
        frame, sentence = measured_taus(long, gap, group)
        remark = (
            f"Tau has no intervals and no p-values here: for a study of this size they take about"
            f" {needed / 60:.0f} minutes. Use --intervals, or sharpkit correlate."
        )
        return frame, sentence, (remark,)
    found: StudyCorrelation = correlate_study(long, gap=gap, group=group, cluster=cluster)
    return found.frame, found.filter, found.warnings
