"""Slices for other programs: tables (CSV) and surfaces (VTK, for ParaView)."""

from __future__ import annotations

import base64
import csv
import io
import os
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from sharpkit.errors import SettingsError
from sharpkit.landscape.caption import caption
from sharpkit.landscape.result import Slice, Status, mesh

__all__ = ["save_slice"]

VTK_TYPES = {"f8": "Float64", "i8": "Int64", "i1": "Int8"}


def save_slice(one: Slice, path: str | Path, *, name: str | None = None) -> Path:
    """Write a slice in the format that the ending of the name chooses; it appears when complete.

    - ``.npz``: everything, for :func:`load_slice`.
    - ``.csv``: a row a point: coordinates (the unit is in the header), the word for how the
      point is known, values, one standard error of each and of its rise from the centre, the
      quadratic model. What is not known is an empty cell.
    - ``.vtp``: VTK XML PolyData, for ParaView. Points are ``(x, y, value)``, a line's
      ``(x, value, 0)``; cells join finite neighbours only, and a finite point without a cell is
      a vertex. All values and errors are point data, and so is ``status``.

    Args:
        one: The slice.
        path: The file.
        name: The value that is the height of a ``.vtp``; None: the loss.

    Raises:
        SettingsError: If the ending is none of these, or the slice has no such value.

    Example:
        >>> import tempfile
        >>> from sharpkit.landscape import Axis
        >>> x = np.array([0.0, 1.0])
        >>> s = Slice((Axis("tensor", "multiples of d", 1.0),), (x,), {"loss": x**2},
        ...           np.zeros(2, dtype=np.int8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(save_slice(s, Path(folder) / "s.csv").read_text())
        x [multiples of d],status,loss
        0.0,measured,0.0
        1.0,measured,1.0
        <BLANKLINE>
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending == ".npz":
        return one.save(path)
    if ending == ".csv":
        return write_whole(path, _csv(one))
    if ending == ".vtp":
        return write_whole(path, _vtp(one, name))
    raise SettingsError(f"Expected a name that ends in .npz, .csv or .vtp. Got {path}.")


def write_whole(path: Path, text: str) -> Path:
    """Write a file that appears when it is complete."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _columns(one: Slice) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, values in one.values.items():
        found[name] = values
        if name in one.errors:
            found[f"{name} error"] = one.errors[name]
        if name in one.rise_errors:
            found[f"{name} rise error"] = one.rise_errors[name]
    if one.quadratic is not None:
        found["quadratic model"] = one.quadratic
    return found


def _csv(one: Slice) -> str:
    columns = _columns(one)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    axes = [f"{letter} [{a.label}]" for letter, a in zip("xy", one.axes, strict=False)]
    rows.writerow([_printable(c) for c in (*axes, "status", *columns)])
    values = [np.asarray(c, dtype=float).ravel() for c in columns.values()]
    for i, (point, status) in enumerate(zip(mesh(one.grid), one.status.ravel(), strict=True)):
        # repr keeps every digit.
        held = [repr(float(c[i])) if not np.isnan(c[i]) else "" for c in values]
        rows.writerow([*map(repr, point), Status(int(status)).name.lower(), *held])
    return text.getvalue()


# -- VTK -----------------------------------------------------------------------------------


def _vtp(one: Slice, name: str | None) -> str:
    height = np.asarray(one.loss if name is None else one[name], dtype=float)
    known = np.isfinite(height)
    place = np.where(known, np.cumsum(known.ravel()).reshape(known.shape) - 1, -1)
    coordinates = np.array(mesh(one.grid))[known.ravel()]
    heights = height[known]
    if one.dim == 1:
        points = np.column_stack([coordinates[:, 0], heights, np.zeros_like(heights)])
        cells = np.column_stack([place[:-1], place[1:]])
        kind = "Lines"
    else:
        points = np.column_stack([coordinates, heights])
        corners = (place[:-1, :-1], place[1:, :-1], place[1:, 1:], place[:-1, 1:])
        cells = np.stack(corners, axis=-1).reshape(-1, 4)  # counter-clockwise from above
        kind = "Polys"
    cells = cells[(cells >= 0).all(axis=1)]
    lone = np.setdiff1d(np.arange(len(points)), cells)[:, None]
    groups = {"Verts": lone, "Lines": cells[:0], "Strips": cells[:0], "Polys": cells[:0]}
    groups[kind] = cells
    data = {"status": one.status.astype(np.int8), **_columns(one)}
    counts = " ".join(f'NumberOf{n}="{len(c)}"' for n, c in groups.items())
    lines = [
        '<?xml version="1.0"?>',
        f"<!-- {_comment(one)} -->",
        '<VTKFile type="PolyData" version="1.0" byte_order="LittleEndian" header_type="UInt64">',
        "<PolyData>",
        f'<Piece NumberOfPoints="{len(points)}" {counts}>',
        "<PointData Scalars=" + quoteattr(_printable(name or _first_loss(one))) + ">",
        *(_array(n, a[known]) for n, a in data.items()),
        "</PointData>",
        "<Points>",
        _array("Points", points, components=3),
        "</Points>",
    ]
    for n, c in groups.items():
        ends = c.shape[1] * np.arange(1, len(c) + 1)
        lines += [f"<{n}>", _array("connectivity", c.ravel()), _array("offsets", ends), f"</{n}>"]
    return "\n".join([*lines, "</Piece>", "</PolyData>", "</VTKFile>", ""])


def _first_loss(one: Slice) -> str:
    return next(n for n in one.names if one[n] is one.loss)


def _array(name: str, array: np.ndarray, components: int = 1) -> str:
    # Inline: the number of bytes and the bytes themselves are one base64 text. Plain numbers
    # would be easier to read, but not every VTK reads "nan".
    if array.dtype != np.int8:
        array = array.astype("<f8" if array.dtype.kind == "f" else "<i8")
    raw = np.ascontiguousarray(array).tobytes()
    text = base64.b64encode(np.array(len(raw), dtype="<u8").tobytes() + raw).decode()
    kind = VTK_TYPES[array.dtype.str[1:]]
    return (
        f'<DataArray type="{kind}" Name={quoteattr(_printable(name))}'
        f' NumberOfComponents="{components}" format="binary">{text}</DataArray>'
    )


def _comment(one: Slice) -> str:
    units = "; ".join(f"{x}: {a.label}" for x, a in zip("xy", one.axes, strict=False))
    text = escape(_printable(f"Slice by sharpkit. {units}. {caption(one)}"))
    while "--" in text:
        text = text.replace("--", "- -")
    return text


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
