"""The tables of a report beside its numbers: settings, origin, failures, notes, warnings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sharpkit import measures
from sharpkit.study.report.parts import Documents
from sharpkit.study.store import Store

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Facts",
    "code_table",
    "data_warnings",
    "failures_table",
    "measures_table",
    "notes_table",
    "origin_table",
    "runs_table",
]

FEW = 4  # values that are listed; of more only the number is told
SHORT = 12  # characters of a hash


@dataclass(frozen=True)
class Facts:
    """A table of texts.

    Attributes:
        title: What it is of.
        columns: Their names.
        rows: Texts and numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def measures_table(long: pd.DataFrame) -> Facts:
    """Return a row a label: definition, settings, how many scores, what they cost."""
    rows = []
    scored = long[long["label"].notna()]
    for label, mine in scored.groupby("label", sort=True):
        name = str(mine["measure"].iloc[0])
        known = name in measures.names()
        good = mine[mine["error"].isna()]
        rows.append(
            (
                str(label),
                measures.get(name).definition if known else "",
                str(mine["settings"].iloc[0]),
                len(mine),
                int((~good["converged"]).sum()),
                len(mine) - len(good),
                int(mine["hvps"].fillna(0).sum()),
                int(mine["gradients"].fillna(0).sum()),
                round(float(mine["seconds"].fillna(0.0).sum()), 1),
            )
        )
    columns = ("measure", "what it is", "settings", "scores", "not converged", "failed", "HVPs",
               "gradients", "seconds")  # fmt: skip
    return Facts("Measures and settings", columns, tuple(rows))


def runs_table(store: Store) -> Facts:
    """Return a row a recipe, set of options and seed."""
    rows = store.query(
        "SELECT recipe, options, seed, count(*), count(error) FROM entry"
        " GROUP BY recipe, options, seed ORDER BY recipe, seed"
    )
    columns = ("recipe", "options", "seed", "checkpoints", "failed")
    return Facts("Runs", columns, tuple(rows))


_CODE = """
SELECT e.recipe, u.recipe, u.data, u.version, count(DISTINCT e.path)
FROM entry e JOIN subject u ON u.key = e.subject
GROUP BY e.recipe, u.recipe, u.data, u.version ORDER BY e.recipe, count(DISTINCT e.path) DESC
"""


def code_table(store: Store) -> Facts:
    """Return a row a recipe, hash of its code, fingerprint of its data and version."""
    rows = [
        (recipe, code[:SHORT], data[:SHORT], version, count)
        for recipe, code, data, version, count in store.query(_CODE)
    ]
    columns = ("recipe", "hash of the recipe", "fingerprint of the data", "sharpkit", "checkpoints")
    return Facts("Code and data", columns, tuple(rows))


# One document of each subject, without reading the others.
_ONE_EACH = """
SELECT (SELECT document FROM score s WHERE s.subject = k.subject AND s.seed = k.seed LIMIT 1)
FROM (SELECT DISTINCT subject, seed FROM score) k
"""


def origin_table(store: Store) -> Facts:
    """Return a row a fact of the scores' origin, with its values and how often they occur."""
    found: dict[str, Counter[str]] = {}
    for (text,) in store.query(_ONE_EACH):
        for name, value in _flat(json.loads(text)["provenance"]):
            found.setdefault(name, Counter())[value] += 1
    rows = [(name, _listed(values)) for name, values in sorted(found.items())]
    return Facts("Origin of the scores", ("what", "values (checkpoints)"), tuple(rows))


def _flat(value: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{before}{key}.")
        else:
            yield before + key, item if isinstance(item, str) else json.dumps(item)


def _listed(values: Counter[str]) -> str:
    if len(values) == 1:
        return next(iter(values))
    if len(values) > FEW:
        return f"{len(values)} different values"
    return "; ".join(f"{value} ({count})" for value, count in values.most_common())


def data_warnings(store: Store) -> tuple[str, ...]:
    """Return sentences on what makes the scores of a study hard to compare."""
    found = []
    seen: dict[str, list[set[str]]] = {}
    for recipe, code, data, version, _ in store.query(_CODE):
        sets = seen.setdefault(recipe, [set(), set(), set()])
        for kept, value in zip(sets, (code, data, version), strict=True):
            kept.add(value)
    for recipe, (codes, fingerprints, _) in seen.items():
        if len(fingerprints) > 1:
            found.append(
                f"{recipe} gave {len(fingerprints)} different data sets"
                f" ({_hashes(fingerprints)}). Scores on different data cannot be compared."
            )
        if len(codes) > 1:
            found.append(
                f"{recipe} was changed between scores: {len(codes)} versions of its code"
                f" ({_hashes(codes)})."
            )
    versions = set().union(*(sets[2] for sets in seen.values()))
    if len(versions) > 1:
        found.append(
            f"Scores come from several versions of sharpkit: {', '.join(sorted(versions))}."
        )
    return tuple(found)


def _hashes(values: Iterable[str]) -> str:
    short = sorted(v[:SHORT] for v in values)
    return ", ".join(short[:FEW]) + (", ..." if len(short) > FEW else "")


def failures_table(long: pd.DataFrame) -> pd.DataFrame:
    """Return a row a checkpoint that could not be loaded, or a score that failed."""
    failed = long[long["error"].notna()][["checkpoint", "label", "error"]]
    return failed.rename(columns={"label": "measure"}).reset_index(drop=True)


def notes_table(store: Store, documents: Documents) -> pd.DataFrame:
    """Return a row a note and label: how often, and an example of a checkpoint.

    Args:
        store: The study.
        documents: Of its scores.
    """
    import pandas as pd

    notes: list[tuple[str, str, str]] = list(documents.notes)
    for path, text in store.query("SELECT path, notes FROM entry WHERE notes != '[]'"):
        notes += [("", path, note) for note in json.loads(text)]
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    for label, path, note in notes:
        counts[label, note] += 1
        first.setdefault((label, note), path)
    rows: Sequence[tuple[Any, ...]] = [
        (label, note, count, first[label, note]) for (label, note), count in counts.most_common()
    ]
    return pd.DataFrame(rows, columns=["measure", "note", "count", "first"])
