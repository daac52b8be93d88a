"""What a study holds, as tables and files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit import measures
from sharpkit.errors import SettingsError, StoreError
from sharpkit.study.store import Store

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EXPORTS", "documents", "entries_table", "export", "scores_table", "wide_table"]

EXPORTS = (".csv", ".parquet", ".json")
META = "meta."

_COLUMNS = (
    "path", "recipe", "options", "seed", "subject", "metadata", "entry_error", "measure",
    "settings", "value", "probe_error", "data_error", "error_kind", "dof", "converged", "hvps",
    "gradients", "forwards", "seconds", "error", "finished",
)  # fmt: skip
_QUERY = """
SELECT e.path, e.recipe, e.options, e.seed, e.subject, e.metadata, e.error, s.measure,
       s.settings, s.value, s.probe_error, s.data_error, s.error_kind, s.dof, s.converged,
       s.hvps, s.gradients, s.forwards, s.seconds, s.error, s.finished
FROM entry e LEFT JOIN score s ON s.subject = e.subject AND s.seed = e.seed
"""


def scores_table(
    store: Store,
    *,
    measure: str | None = None,
    checkpoint: str | None = None,
    metadata: bool = True,
) -> pd.DataFrame:
    """Return one row a checkpoint and score.

    Columns: ``checkpoint`` (its path from the study's folder), ``label`` (the measure, with the
    settings that are not the default, and with options, recipe and seed where the study holds
    several), ``measure``, ``settings`` (JSON), ``seed``, ``value``, ``probe_error``,
    ``data_error``, ``error_kind``, ``dof``, ``converged``, ``hvps``, ``gradients``,
    ``forwards``, ``seconds``, ``error``, ``recipe``, ``options`` (JSON), ``subject``,
    ``finished``, and ``meta.<name>`` for what the recipe says of the checkpoint. A checkpoint
    that could not be loaded has one row without a measure, and its error.

    Args:
        store: The study.
        measure: Only this measure.
        checkpoint: Only this checkpoint.
        metadata: Whether to add the columns of metadata.
    """
    import pandas as pd

    conditions, values = [], []
    for column, value in (("s.measure", measure), ("e.path", checkpoint)):
        if value is not None:
            conditions.append(f"{column} = ?")
            values.append(value)
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    order = " ORDER BY e.path, s.finished, s.measure"
    frame = pd.DataFrame(store.query(_QUERY + where + order, values), columns=list(_COLUMNS))
    frame["error"] = frame["error"].where(frame["measure"].notna(), frame.pop("entry_error"))
    for name in ("value", "probe_error", "data_error", "dof", "seconds"):
        frame[name] = frame[name].astype(float)
    frame["converged"] = frame["converged"].fillna(0).astype(bool)
    frame.insert(0, "label", _labels(store, frame))
    frame = frame.rename(columns={"path": "checkpoint"})
    known = frame.pop("metadata").to_numpy(dtype=object)
    first = ["checkpoint", "label", "measure", "settings", "seed"]
    frame = frame[first + [c for c in frame.columns if c not in first]]
    if not metadata:
        return frame
    flat = {text: _flat(json.loads(text)) for text in set(known)}
    names = sorted({name for row in flat.values() for name in row})
    extra = {META + n: [flat[text].get(n) for text in known] for n in names}
    return pd.concat([frame, pd.DataFrame(extra, index=frame.index)], axis=1)


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            found |= _flat(item, f"{before}{key}.")
        else:
            found[before + key] = json.dumps(item) if isinstance(item, list) else item
    return found


def _labels(store: Store, frame: pd.DataFrame) -> list[str | None]:
    # Measure, settings that differ from the default, and whatever else tells rows apart.
    kinds = store.query("SELECT DISTINCT recipe, options, seed FROM entry")
    several = [len({k[i] for k in kinds}) > 1 for i in range(3)]
    options = _differences([json.loads(k[1]) for k in kinds])
    short: dict[tuple[Any, ...], str] = {}
    labels: list[str | None] = []
    # As plain objects: pandas' own texts are slow to go through one by one.
    names = ("measure", "settings", "recipe", "options", "seed")
    for key in zip(*(frame[n].to_numpy(dtype=object) for n in names), strict=True):
        if not isinstance(key[0], str):
            labels.append(None)
            continue
        if key not in short:
            name, settings, recipe, option, seed = key
            parts = _special(name, json.loads(settings))
            if several[1]:
                chosen = json.loads(option)
                parts += [f"{n}={_short(chosen.get(n))}" for n in options]
            if several[0]:
                parts.append(f"recipe={recipe}")
            if several[2]:
                parts.append(f"seed={seed}")
            short[key] = f"{name}({', '.join(parts)})" if parts else name
        labels.append(short[key])
    return labels


def _special(name: str, settings: Mapping[str, Any]) -> list[str]:
    usual = measures.get(name).settings if name in measures.names() else {}
    return [f"{k}={_short(v)}" for k, v in settings.items() if k not in usual or v != usual[k]]


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _differences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = sorted({n for row in rows for n in row})
    return [n for n in names if len({json.dumps(row.get(n)) for row in rows}) > 1]


def wide_table(store: Store, *, errors: bool = True) -> pd.DataFrame:
    """Return one row a checkpoint: metadata, then a column a measure.

    Metadata are called as the recipe calls them; what has the name of another column keeps the
    ``meta.`` before it.

    Args:
        store: The study.
        errors: Whether to put ``<label>.error`` (one standard error or the bound) and
            ``<label>.converged`` beside each value.
    """
    import pandas as pd

    long = scores_table(store)
    meta = [c for c in long.columns if c.startswith(META)]
    base = long.drop_duplicates("checkpoint").set_index("checkpoint")
    measured = long[long["measure"].notna()]
    labels = list(dict.fromkeys(measured["label"]))
    taken = {"checkpoint", "error"}
    taken.update(x + ending for x in labels for ending in ("", ".error", ".converged"))
    names = {c: c.removeprefix(META) for c in meta}
    result = base[meta].rename(columns={c: n for c, n in names.items() if n not in taken})
    errors_of = dict(store.query("SELECT path, error FROM entry WHERE error IS NOT NULL"))
    result["error"] = [errors_of.get(name) for name in result.index]
    columns: dict[str, pd.Series[Any]] = {}
    for label in labels:
        rows = measured[measured["label"] == label].drop_duplicates("checkpoint")
        rows = rows.set_index("checkpoint").reindex(result.index)
        columns[label] = rows["value"]
        if errors:
            columns[f"{label}.error"] = rows["probe_error"]
            columns[f"{label}.converged"] = rows["converged"]
    return pd.concat([result, pd.DataFrame(columns, index=result.index)], axis=1).reset_index()


def entries_table(store: Store) -> pd.DataFrame:
    """Return one row a checkpoint, recipe and set of options: how many scores, what failed."""
    import pandas as pd

    rows = store.query(
        "SELECT e.path, e.recipe, e.options, e.seed, count(s.measure), count(s.error), e.error,"
        " e.notes, u.provenance, u.version FROM entry e"
        " LEFT JOIN score s ON s.subject = e.subject AND s.seed = e.seed"
        " LEFT JOIN subject u ON u.key = e.subject"
        " GROUP BY e.path, e.recipe, e.options, e.seed ORDER BY e.path"
    )
    columns = ["checkpoint", "recipe", "options", "seed", "scores", "failed", "error", "notes",
               "provenance", "version"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def export(store: Store, path: str | Path, *, wide: bool = False) -> Path:
    """Write the study as ``.csv``, ``.parquet`` or ``.json``; the file appears when complete.

    Args:
        store: The study.
        path: The ending says the format. JSON holds everything, parts and details too.
        wide: One row a checkpoint instead of one a score.

    Raises:
        SettingsError: If the ending is another one, or Parquet's library is missing.
        StoreError: If the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in EXPORTS:
        raise SettingsError(f"Expected a name that ends in {', '.join(EXPORTS)}. Got {path}.")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=kind)
    except OSError as error:
        raise StoreError(
            f"Expected a folder to write to. {path}: {error.strerror}. Make it, or name another."
        ) from error
    os.close(handle)
    try:
        if kind == ".json":
            Path(temporary).write_text(json.dumps(documents(store), allow_nan=False))
        else:
            table = wide_table(store) if wide else scores_table(store)
            if kind == ".csv":
                table.to_csv(temporary, index=False)
            else:
                _parquet(table, temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise StoreError(
                f"Expected to write {path}. {error.strerror}. Name another file."
            ) from error
        raise
    return path


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def _parquet(table: pd.DataFrame, path: str) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "Expected pyarrow, which writes Parquet. It is not installed. Use"
            " pip install sharpkit[parquet], or a name that ends in .csv."
        ) from error
    for name in table.columns:  # a column of one type each: texts where metadata are mixed
        if table[name].dtype == object:
            kinds = {type(v) for v in table[name] if v is not None and v == v}
            if len(kinds) > 1 and not kinds <= {int, float}:
                table[name] = [None if v is None else str(v) for v in table[name]]
    table.to_parquet(path, index=False)


def documents(store: Store) -> dict[str, Any]:
    """Return everything that the study holds as plain data, parts and details too."""
    rows = store.query(
        "SELECT e.path, e.recipe, e.options, e.seed, e.metadata, e.error, e.notes, e.subject"
        " FROM entry e ORDER BY e.path"
    )
    found: dict[tuple[str, int], list[Any]] = {}
    for key, seed, text in store.query(
        "SELECT subject, seed, document FROM score ORDER BY finished, measure"
    ):
        found.setdefault((key, seed), []).append(json.loads(text))
    return {
        "sharpkit_study": 1,
        "checkpoints": [
            {
                "checkpoint": path,
                "recipe": recipe,
                "options": json.loads(options),
                "seed": seed,
                "metadata": json.loads(metadata),
                "error": error,
                "notes": json.loads(notes),
                "scores": found.get((subject, seed), []),
            }
            for path, recipe, options, seed, metadata, error, notes, subject in rows
        ],
    }
