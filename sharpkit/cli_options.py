"""Options, consoles and endings that the commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from sharpkit.errors import SettingsError

OK, SOME_FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

RecipeOption = Annotated[
    Path, typer.Option("--recipe", "-r", help="Python file with model(), data() and loss.")
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="Evaluate in float32, float64 or bfloat16.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="For example cpu or cuda:0; default the model's."),
]
ParamsOption = Annotated[
    list[str] | None,
    typer.Option("--params", help="Glob of parameter names; may be repeated."),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Load checkpoints that can run code. Know their origin."),
]


def stdout() -> Console:
    """Return where results go."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=False)


def stderr() -> Console:
    """Return where progress, notes and errors go."""
    return Console(file=sys.stderr, highlight=False)


def read_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of an option, or refuse it."""
    if name is not None and name not in DTYPES:
        raise SettingsError(f"Expected --dtype to be one of {', '.join(DTYPES)}. Got {name!r}.")
    return DTYPES[name] if name else None


def read_device(name: str | None) -> str | None:
    """Return the device of an option, or refuse it."""
    if name is None:
        return None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        text = str(error).splitlines()[0]
        raise SettingsError(f"Expected --device to be usable. {name!r} is not: {text}") from None
    return name


def progress_bar() -> Progress:
    """Return a bar on stderr; none where it is no terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr(),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def check_figure(path: Path) -> None:
    """Refuse a name that is no figure's, before anything is computed."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise SettingsError(f"Expected a figure's name to end in .png, .pdf or .svg. Got {path}.")
    if not path.parent.is_dir():
        raise SettingsError(f"Expected the folder {path.parent} to exist. Make it first.")


def leave(status: int) -> None:
    """End the command with a status, unless all went well."""
    if status != OK:
        raise typer.Exit(status)
