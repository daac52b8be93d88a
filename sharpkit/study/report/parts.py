"""The parts of scores: numbers of layers, and single eigenvalues."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sharpkit.results import Estimate
from sharpkit.study.store import Store

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EIGENVALUES", "LAYERS", "Documents", "Parts", "read_documents"]

LAYERS, EIGENVALUES = "layers", "eigenvalues"
MOST = 150_000  # parts that a page can hold and stay fast

_EIGENVALUE = re.compile(r"lambda_-?\d+")
_NEITHER = re.compile(r"alpha=.*|smoothed loss")  # other orders, other losses: no layers
# What a document without parts and notes does not contain, as the store writes it.
_QUERY = """
SELECT subject, seed, measure, settings, document FROM score WHERE error IS NULL
AND (instr(document, '"parts": [{') > 0 OR instr(document, '"notes": ["') > 0)
"""


@dataclass(frozen=True)
class Parts:
    """Parts of one kind.

    Attributes:
        frame: One row a part: ``checkpoint``, ``label`` (of the score), ``part``, ``value``,
            ``probe_error``, ``error_kind``, ``converged``; in the order of the checkpoints and,
            within a score, as the measure gave them.
        left_out: Checkpoints whose parts are more than a page can hold.
    """

    frame: pd.DataFrame
    left_out: int = 0


@dataclass(frozen=True)
class Documents:
    """What is only in the documents of scores.

    Attributes:
        parts: By checkpoint, in its order: the kind and the columns of each part.
        notes: Label, checkpoint and text of each note.
    """

    parts: dict[str, list[tuple[str, tuple[Any, ...]]]]
    notes: list[tuple[str, str, str]]

    def of(self, kind: str) -> Parts:
        """Return the parts of one kind, of as many checkpoints as a page can hold."""
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        left_out = 0
        for found in self.parts.values():
            mine = [columns for k, columns in found if k == kind]
            if mine and (left_out or len(rows) + len(mine) > MOST):
                left_out += 1
            else:
                rows += mine
        columns = ["checkpoint", "label", "part", "value", "probe_error", "error_kind",
                   "converged"]  # fmt: skip
        return Parts(pd.DataFrame(rows, columns=columns), left_out)


def read_documents(store: Store, long: pd.DataFrame) -> Documents:
    """Read the parts and notes of all scores.

    Args:
        store: The study.
        long: Of :func:`sharpkit.study.tables.scores_table`.
    """
    held: dict[tuple[Any, ...], Estimate] = {}
    for *key, text in store.query(_QUERY):
        plain = json.loads(text)["estimate"]
        held[tuple(key)] = Estimate.from_dict({**plain, "details": {}})
    parts: dict[str, list[tuple[str, tuple[Any, ...]]]] = {}
    notes: list[tuple[str, str, str]] = []
    columns = [
        long[n].to_numpy(dtype=object)
        for n in ("checkpoint", "label", "subject", "seed", "measure", "settings")
    ]
    for checkpoint, label, *key in zip(*columns, strict=True):
        e = held.get(tuple(key))
        if e is None:
            continue
        notes += [(label, checkpoint, note) for note in e.notes]
        mine = parts.setdefault(checkpoint, [])
        for part in e.parts:
            kind = _kind(part.label)
            if kind and not math.isnan(part.value):
                row = (checkpoint, label, part.label, part.value, part.probe_error)
                mine.append((kind, (*row, e.error_kind, part.converged)))
    return Documents(parts, notes)


def _kind(label: str) -> str | None:
    if _EIGENVALUE.fullmatch(label):
        return EIGENVALUES
    return None if _NEITHER.fullmatch(label) else LAYERS
