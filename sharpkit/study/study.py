"""A finished or running study, to read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sharpkit.results import Scores
from sharpkit.study import tables
from sharpkit.study.store import Store

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Study"]


class Study:
    """What :func:`~sharpkit.study.run.run_study` or ``sharpkit score -o`` has measured so far.

    It is only read, and may be while others write.

    Args:
        path: The file.

    Raises:
        StoreError: If the file is damaged, no study, or of a newer sharpkit.
    """

    def __init__(self, path: str | Path):
        self.store = Store(path, read_only=True)

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.store.close()

    def scores(self, measure: str | None = None) -> pd.DataFrame:
        """Return one row a checkpoint and score; see :func:`~.tables.scores_table`."""
        return tables.scores_table(self.store, measure=measure)

    def table(self, *, errors: bool = True) -> pd.DataFrame:
        """Return one row a checkpoint, a column a measure; see :func:`~.tables.wide_table`."""
        return tables.wide_table(self.store, errors=errors)

    def entries(self) -> pd.DataFrame:
        """Return one row a checkpoint: how many scores, what failed and why."""
        return tables.entries_table(self.store)

    def of(self, checkpoint: str | Path, *, seed: int = 0) -> Scores:
        """Return the scores of one checkpoint with parts, notes and provenance.

        Args:
            checkpoint: Its path.
            seed: Of the measurements.

        Raises:
            KeyError: If the study does not hold it.
        """
        path = self.store.relative(checkpoint)
        rows = self.store.query(
            "SELECT DISTINCT subject FROM entry WHERE path = ? AND seed = ?"
            " AND subject IS NOT NULL ORDER BY updated",
            (path, seed),
        )
        if not rows:
            known = [r[0] for r in self.store.query("SELECT DISTINCT path FROM entry LIMIT 5")]
            raise KeyError(f"No scores of {path!r} with seed {seed}; there are {known} and so on.")
        return Scores(tuple(s for (key,) in rows for s in self.store.scores(key, seed)))

    def export(self, path: str | Path, *, wide: bool = False) -> Path:
        """Write ``.csv``, ``.parquet`` or ``.json``; see :func:`~.tables.export`."""
        return tables.export(self.store, path, wide=wide)
