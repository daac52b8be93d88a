"""The page of a report: one file with its data, style and script, and nothing from elsewhere."""

from __future__ import annotations

import html
import math
import os
import string
import tempfile
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.errors import StoreError
from sharpkit.offline import digest, embed, visible
from sharpkit.results import format_value
from sharpkit.study.report.data import ReportData
from sharpkit.study.report.parts import Parts

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["page", "write_page"]

SCRIPTS = (
    "base.js", "chart.js", "scatter.js", "forest.js", "table.js", "layers.js", "spectra.js",
    "facts.js",
)  # fmt: skip
MOST_NOTES = 400


def page(data: ReportData) -> str:
    """Return the page.

    All that comes from the study is data in JSON, in which no character can end the element
    that holds it, and reaches the page as text only. The policy in the page's head allows
    the page's own script and style, by their hashes, and no connection.

    Args:
        data: What to show.
    """
    script = "(() => {\n'use strict';\n" + "\n".join(map(_asset, SCRIPTS)) + "\n})();\n"
    style = _asset("report.css")
    return string.Template(_asset("report.html")).substitute(
        title=html.escape(visible(data.title)),
        style=style,
        script=script,
        style_hash=digest(style),
        script_hash=digest(script),
        data=embed(_plain(data)),
    )


def write_page(data: ReportData, path: str | Path) -> Path:
    """Write the page; the file appears when it is complete.

    Args:
        data: What to show.
        path: The file.

    Raises:
        StoreError: If the file cannot be written.
    """
    path = Path(path)
    text = page(data)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".html")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise StoreError(
            f"Expected to write the report {path}. {error.strerror}. Name another file."
        ) from error
    return path


def _asset(name: str) -> str:
    return (resources.files("sharpkit.study.report") / "page" / name).read_text("utf-8")


# -- the data ----------------------------------------------------------------------------


def _plain(data: ReportData) -> dict[str, Any]:
    models = _Index()
    labels = _Index()
    errors = _Index()
    groups = _Index()
    # As plain objects: pandas' own texts are slow to go through one by one.
    rows = {str(c): data.rows[c].to_numpy(dtype=object).tolist() for c in data.rows}
    gaps: dict[int, float | str | None] = {}
    of_model: dict[int, int] = {}
    model_of_row = []
    columns = (rows["checkpoint"], rows["group"], rows["gap"])
    for name, group, gap in zip(*columns, strict=True):
        # A file under two recipes may have two gaps.
        model = models((name, _text(group), gap if gap == gap else None))
        if model not in gaps:
            gaps[model] = _number(gap)
            of_model[model] = groups(_text(group)) if _text(group) else -1
        model_of_row.append(model)
    kinds = ("stderr", "bound", "lower_bound", "rounding")
    shown = [
        format_value(v, None if e is None or e != e else e, k if k in kinds else "stderr")
        for v, e, k in zip(rows["value"], rows["probe_error"], rows["error_kind"], strict=True)
    ]
    return {
        "title": data.title,
        "study": data.study,
        "made": data.made,
        "version": data.version,
        "gap": data.gap,
        "group": data.group,
        "groups": groups.values,
        "models": {
            "name": [key[0] for key in models.values],
            "group": list(of_model.values()),
            "gap": list(gaps.values()),
        },
        "labels": labels.values,  # filled by the next line: the same list
        "rows": {
            "model": model_of_row,
            "label": [labels(x) if isinstance(x, str) else -1 for x in rows["label"]],
            "value": _numbers(rows["value"]),
            "error": _numbers(rows["probe_error"]),
            "kind": [kinds.index(k) if k in kinds else -1 for k in rows["error_kind"]],
            "data": _numbers(rows["data_error"]),
            "ok": [int(v) for v in rows["converged"]],
            "failed": [errors(x) if isinstance(x, str) else -1 for x in rows["error"]],
            "shown": shown,
        },
        "errors": errors.values,
        "taus": _table(data.taus),
        "filter": data.filter,
        "remarks": list(data.remarks),
        "layers": _parts(data.layers),
        "eigenvalues": _parts(data.eigenvalues),
        "facts": [{"title": f.title, "columns": f.columns, "rows": f.rows} for f in data.facts],
        "failures": _table(data.failures),
        "notes": _table(data.notes.head(MOST_NOTES)),
        "notes_left_out": max(len(data.notes) - MOST_NOTES, 0),
        "warnings": list(data.warnings),
    }


class _Index:
    # Numbers things in the order in which they come.
    def __init__(self) -> None:
        self.values: list[Any] = []
        self._place: dict[Any, int] = {}

    def __call__(self, key: Any) -> int:
        if key not in self._place:
            self._place[key] = len(self.values)
            self.values.append(key)
        return self._place[key]


def _parts(parts: Parts) -> dict[str, Any]:
    frame = {str(c): parts.frame[c].to_numpy(dtype=object).tolist() for c in parts.frame}
    names, labels, checkpoints = _Index(), _Index(), _Index()
    return {
        "checkpoint": [checkpoints(x) for x in frame["checkpoint"]],
        "label": [labels(x) for x in frame["label"]],
        "part": [names(x) for x in frame["part"]],
        "value": _numbers(frame["value"]),
        "shown": [
            format_value(v, None if e is None or e != e else e, k)
            for v, e, k in zip(
                frame["value"], frame["probe_error"], frame["error_kind"], strict=True
            )
        ],
        "error": _numbers(frame["probe_error"]),
        "ok": [int(v) for v in frame["converged"]],
        "checkpoints": checkpoints.values,
        "labels": labels.values,
        "parts": names.values,
        "left_out": parts.left_out,
    }


def _table(frame: pd.DataFrame) -> dict[str, Any]:
    return {
        "columns": [str(c) for c in frame.columns],
        "rows": [[_cell(v) for v in row] for row in frame.itertuples(index=False)],
    }


def _cell(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return _number(value) if isinstance(value, float) else value


def _numbers(values: Iterable[float]) -> list[float | str | None]:
    return [_number(v) for v in values]


def _number(value: float | None) -> float | str | None:
    # JSON has no infinity: a text, as in the documents of scores.
    if value is None or value != value:
        return None
    value = float(value)
    return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def _text(value: Any) -> str | None:
    return None if value is None or value != value else str(value)
