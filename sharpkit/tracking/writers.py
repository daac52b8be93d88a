"""Where the rows of a tracker go: CSV, TensorBoard, Weights & Biases, or any function."""

from __future__ import annotations

import csv
import importlib
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from sharpkit.errors import SettingsError, SharpkitError

__all__ = ["CSVWriter", "Row", "TensorBoardWriter", "WandbWriter", "Writer", "as_writers"]

Row: TypeAlias = Mapping[str, Any]
Writer: TypeAlias = Callable[[Row], object]
"""Called with every row, a mapping of the frame's columns to plain values."""


def as_writers(writers: Any) -> list[Writer]:
    """Return a list of writers: of a function, a path of a CSV file, or several of these.

    Raises:
        SettingsError: If something is neither.
    """
    if writers is None:
        return []
    several = isinstance(writers, Iterable) and not isinstance(writers, str)
    found: list[Writer] = []
    for one in writers if several and not callable(writers) else [writers]:
        if isinstance(one, (str, os.PathLike)):
            found.append(CSVWriter(one))
        elif callable(one):
            found.append(one)
        else:
            raise SettingsError(
                "Expected writers to be functions of a row, or paths of CSV files. Got"
                f" {type(one).__name__}. Pass CSVWriter(path), or a function."
            )
    return found


class CSVWriter:
    """Append rows to a CSV file: the header once, every row on the disk when it is written.

    A file that exists is gone on with. When training restarts from a checkpoint, the rows at
    and after the first new step belong to a run that was given up: they are removed before it
    is written, and a last line that was cut off too, so that no step is there twice. Later
    rows are only appended. NaN is an empty field.

    Args:
        path: Of the file; folders are made.

    Raises:
        SettingsError: When written, if the file has other columns.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.csv"
        >>> CSVWriter(path)({"step": 0, "lambda_max": 2.5})
        >>> CSVWriter(path)({"step": 10, "lambda_max": 3.5})
        >>> path.read_text().split()
        ['step,lambda_max', '0,2.5', '10,3.5']
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._begun = False

    def __call__(self, row: Row) -> None:
        """Append a row."""
        if not self._begun:
            self._begin(row)
            self._begun = True
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(_line(_text(value) for value in row.values()))
            file.flush()
            os.fsync(file.fileno())

    def _begin(self, row: Row) -> None:
        header = _line(row)
        kept = [header]
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            lines = list(csv.reader(io.StringIO(whole)))
            if lines and lines[0] != list(row):
                raise SettingsError(
                    f"Expected {self.path} to have the columns {', '.join(row)}. It has"
                    f" {', '.join(lines[0])}. Give another path, or move the file away."
                )
            at = list(row).index("step")
            kept += [_line(line) for line in lines[1:] if float(line[at]) < row["step"]]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        new.write_text("".join(kept), encoding="utf-8", newline="")
        new.replace(self.path)


def _line(values: Iterable[object]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(values)
    return out.getvalue()


def _text(value: object) -> object:
    # repr: every digit of a number, so that what is read is what was measured.
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return value


def _numbers(row: Row) -> dict[str, float]:
    # What can be drawn: finite numbers, with the step left out.
    found = {n: float(v) for n, v in row.items() if isinstance(v, (int, float)) and n != "step"}
    return {n: v for n, v in found.items() if math.isfinite(v)}


class TensorBoardWriter:
    """Write a row's finite numbers as TensorBoard scalars ``<prefix>/<column>``.

    Args:
        log: A ``SummaryWriter``, or the folder for a new one.
        prefix: Before the names.

    Raises:
        SharpkitError: If a folder is given and TensorBoard is not installed.
    """

    def __init__(self, log: Any, prefix: str = "sharpness"):
        if isinstance(log, (str, os.PathLike)):
            try:
                module = importlib.import_module("torch.utils.tensorboard")
            except ImportError as error:
                raise SharpkitError(
                    "Expected TensorBoard to be installed, for TensorBoardWriter of a folder."
                    " It is not. Run pip install tensorboard, or write a CSV file."
                ) from error
            log = module.SummaryWriter(os.fspath(log))
        self._log, self._prefix = log, prefix

    def __call__(self, row: Row) -> None:
        """Write a row."""
        for name, value in _numbers(row).items():
            self._log.add_scalar(f"{self._prefix}/{name}", value, row["step"])
        self._log.flush()


class WandbWriter:
    """Log a row's finite numbers to Weights & Biases as ``<prefix>/<column>``.

    Their axis is ``<prefix>/step``, so that the run's own counter is left alone.

    Args:
        run: Of ``wandb.init``; None: the one that is active when the first row comes.
        prefix: Before the names.

    Raises:
        SharpkitError: When written, if no run is given and none is active, or the package is
            not installed.
    """

    def __init__(self, run: Any = None, prefix: str = "sharpness"):
        self._run, self._prefix = run, prefix
        self._begun = False

    def __call__(self, row: Row) -> None:
        """Log a row."""
        axis = f"{self._prefix}/step"
        if not self._begun:
            self._run = self._run if self._run is not None else _active_run()
            self._run.define_metric(axis)
            self._run.define_metric(f"{self._prefix}/*", step_metric=axis)
            self._begun = True
        named = {f"{self._prefix}/{n}": v for n, v in _numbers(row).items()}
        self._run.log({axis: row["step"], **named})


def _active_run() -> Any:
    try:
        run = importlib.import_module("wandb").run
    except ImportError as error:
        raise SharpkitError(
            "Expected wandb to be installed, for WandbWriter. It is not. Run pip install wandb,"
            " or write a CSV file."
        ) from error
    if run is None:
        raise SharpkitError("Expected an active run of wandb. Got none. Call wandb.init() first.")
    return run
