"""Slices as one page to turn, zoom and point at; it needs no network."""

from __future__ import annotations

import html
import importlib
import math
import string
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from sharpkit import __version__
from sharpkit.errors import SettingsError
from sharpkit.landscape import Slice, Status
from sharpkit.landscape.caption import caption, name_of
from sharpkit.landscape.export import write_whole
from sharpkit.offline import digest, embed, visible
from sharpkit.plots.contour import alike, check_plane, region_words
from sharpkit.plots.places import is_trajectory, split_places
from sharpkit.plots.surface import height_at

__all__ = ["interactive_page"]

WORDS = {
    Status.MEASURED: "measured",
    Status.INTERPOLATED: "interpolated",
    Status.CUT: "above loss_max",
    Status.NOT_FINITE: "not finite",
    Status.OUTSIDE: "outside the section",
    Status.SKIPPED: "not measured: above it by its neighbours",
    Status.MISSING: "not measured yet",
}
# As the contours of the page show them; the others are dots.
SYMBOLS = {Status.CUT: chr(0x25B2), Status.NOT_FINITE: chr(0xD7)}


def interactive_page(
    slices: Slice | Sequence[Slice],
    path: str | Path,
    *,
    title: str | None = None,
    log: bool = False,
) -> Path:
    """Write slices as one HTML file with everything in it; it appears when complete.

    Planes are surfaces that turn, or contours; pointing shows coordinates, value, error and how
    the point is known. What is not known is a gap. Several slices share their range of values,
    and are chosen from a list; lines are drawn together. Colours follow the system's light or
    dark. Without WebGL the page says so and shows contours.

    The page's policy allows its own scripts, by their hashes, and no connection; names and notes
    are data, shown as text.

    Args:
        slices: One, or several of the same dimension that have the same values.
        path: The file.
        title: Of the page; None: the slice's title or checkpoint.
        log: Whether values begin on a logarithmic scale; the page has a switch.

    Raises:
        SettingsError: If plotly is not installed, slices do not fit together, or no value is
            finite.

    Cost: the file has some 5 MB, plotly's script.
    """
    held = [slices] if isinstance(slices, Slice) else list(slices)
    _check(held)
    if title is None:
        names = [name_of(s) for s in held]
        title = names[0] if len(held) == 1 and names[0] else "Slices of the loss landscape"
    library, script = _library(), _asset("slices.js")
    text = string.Template(_asset("slices.html")).substitute(
        title=html.escape(visible(title)),
        version=html.escape(__version__),
        style=_asset("slices.css"),
        library=library,
        library_hash=digest(library),
        script=script,
        script_hash=digest(script),
        data=embed(_data(held, log)),
    )
    return write_whole(Path(path), text)


def _check(held: Sequence[Slice]) -> None:
    if not held or len({s.dim for s in held}) != 1 or len({s.names for s in held}) != 1:
        raise SettingsError(
            "Expected one slice, or several of the same dimension and with the same values. Got"
            f" {len(held)}: {'; '.join(f'{s.dim}-D, ' + ', '.join(s.names) for s in held)}."
        )
    for s in held:
        if s.dim == 2:
            check_plane(s, "plot_line")
    for name in held[0].names:
        if not any(np.isfinite(s[name]).any() for s in held):
            raise SettingsError(
                f"Expected finite values of {name}. There are none. Take a smaller range, or a"
                " larger loss_max."
            )


def _library() -> str:
    try:
        offline = importlib.import_module("plotly.offline")
    except ImportError as error:
        raise SettingsError(
            "Expected plotly, which draws the interactive page. It is not installed. Use: pip"
            " install sharpkit[plots]"
        ) from error
    # As a browser reads it: its hash is of the text with these ends of lines.
    return str(offline.get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")


def _asset(name: str) -> str:
    return (resources.files("sharpkit.plots") / "page" / name).read_text("utf-8")


def _data(held: Sequence[Slice], log: bool) -> dict[str, Any]:
    words = {int(k): w for k, w in WORDS.items()}
    return {
        "dim": held[0].dim,
        "log": log,
        "words": [words[k] for k in sorted(words)],
        "caption": visible(caption(held)),
        "slices": [_slice(s, k) for k, s in enumerate(held, 1)],
    }


def _slice(s: Slice, number: int) -> dict[str, Any]:
    labels = [visible(a.label) for a in s.axes]
    if len(set(labels)) < len(labels):
        labels = [f"direction {k}: {label}" for k, label in enumerate(labels, 1)]
    return {
        "name": visible(name_of(s) or f"slice {number}"),
        "caption": visible(caption(s)),
        "notes": [visible(n) for n in s.notes],
        "gaps": visible(_gaps(s)),
        "axes": labels,
        "alike": s.dim == 2 and alike(s),
        "x": _numbers(s.grid[0]),
        "y": _numbers(s.grid[1]) if s.dim == 2 else None,
        "status": s.status.astype(int).T.tolist(),
        "values": [
            {
                "name": visible(" ".join(name.rsplit("/", 1))),
                "values": _array(values),
                "errors": _array(s.errors[name]) if name in s.errors else None,
            }
            for name, values in s.values.items()
        ],
        "markers": _markers(s) if s.dim == 2 else [],
    }


def _markers(s: Slice) -> list[dict[str, Any]]:
    centre, _ = split_places(s)
    joined = is_trajectory(s, None)
    return [
        {
            "label": visible(m.label),
            "at": [float(c) for c in m.coordinates],
            "joined": joined and m not in centre,
            "heights": _numbers(height_at(s, v, m.coordinates) for v in s.values.values()),
        }
        for m in s.markers
    ]


def _gaps(s: Slice) -> str:
    words = region_words(s)
    found = [
        f"{count} {words[kind]} ({SYMBOLS.get(kind, chr(0x25CF))})"
        for kind in words
        if (count := int((s.status == kind).sum()))
    ]
    return f"Gaps, in points of the grid: {'; '.join(found)}." if found else ""


def _array(values: np.ndarray) -> Any:
    # A plane as rows of y, as the page's figures want it.
    if values.ndim == 1:
        return _numbers(values)
    return [_numbers(row) for row in values.T]


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [float(v) if math.isfinite(v) else None for v in values]
