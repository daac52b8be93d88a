"""A slice as data: values, errors, what was measured, and all that a caption needs."""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from sharpkit.errors import SettingsError, ShapeError
from sharpkit.landscape.section import Axis
from sharpkit.results import Cost, to_plain

__all__ = ["Marker", "Slice", "Status", "load_slice"]

FORMAT = 1
DAMAGE = (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError, MemoryError,
          OverflowError, struct.error, zipfile.BadZipFile, zlib.error)  # fmt: skip
"""What reading a damaged ``.npz`` raises."""


class Status(IntEnum):
    """What is known of a point of a slice."""

    MEASURED = 0
    INTERPOLATED = 1  # from measured neighbours, within the stated tolerance
    CUT = 2  # the loss is above loss_max, and was not summed to the end; values are NaN
    NOT_FINITE = 3  # measured: infinite or NaN; values are NaN
    OUTSIDE = 4  # the section has no such point, such as beyond the end of a geodesic
    SKIPPED = 5  # not measured: above loss_max by its neighbours; values are NaN
    MISSING = 6  # not measured yet: the run was stopped


@dataclass(frozen=True)
class Marker:
    """A point to show in a slice: the centre, a checkpoint of a trajectory.

    Attributes:
        label: What it is.
        coordinates: One or two.
        distance: How far from the section it lies in theta (0: on it).
    """

    label: str
    coordinates: tuple[float, ...]
    distance: float = 0.0


@dataclass(frozen=True)
class Slice:
    """Values on a line or a grid.

    Attributes:
        axes: One or two; the first is x.
        grid: Coordinates along each axis, ascending.
        values: By name (``"loss"``, ``"accuracy"``, ``"test/loss"`` with several data sets):
            ``[nx]`` or ``[nx, ny]``, NaN where nothing is known.
        errors: Likewise, one standard error from the data being a sample; may lack names.
        rise_errors: Likewise, of the difference from the centre: the same examples are used
            everywhere, so it is smaller than that of the value.
        status: :class:`Status` of each point, ``[nx]`` or ``[nx, ny]``.
        quadratic: The quadratic model of ``"loss"`` on the same grid, where it was asked for.
        markers: Points to show.
        details: Title, seed, examples, data fingerprint, BatchNorm mode, tolerance, versions.
        notes: Sentences for a person.
        cost: What it cost.

    Example:
        >>> axis = Axis("tensor", "multiples of d", 1.0)
        >>> x = np.linspace(-1, 1, 3)
        >>> s = Slice((axis,), (x,), {"loss": x**2}, status=np.zeros(3, dtype=np.int8))
        >>> s.loss.tolist(), s.dim
        ([1.0, 0.0, 1.0], 1)
    """

    axes: tuple[Axis, ...]
    grid: tuple[np.ndarray, ...]
    values: Mapping[str, np.ndarray]
    status: np.ndarray
    errors: Mapping[str, np.ndarray] = field(default_factory=dict)
    rise_errors: Mapping[str, np.ndarray] = field(default_factory=dict)
    quadratic: np.ndarray | None = None
    markers: tuple[Marker, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        shape = tuple(len(g) for g in self.grid)
        if len(self.axes) != len(self.grid) or not 1 <= len(shape) <= 2:
            raise ShapeError(
                f"Expected one or two axes with a grid each. Got {len(self.axes)} axes and"
                f" {len(self.grid)} grids."
            )
        arrays = {**self.values, "status": self.status}
        arrays |= {f"error of {n}": a for n, a in self.errors.items()}
        arrays |= {f"rise error of {n}": a for n, a in self.rise_errors.items()}
        if self.quadratic is not None:
            arrays["quadratic"] = self.quadratic
        for name, array in arrays.items():
            if array.shape != shape:
                raise ShapeError(f"Expected {name} of shape {shape}. Got {array.shape}.")

    @property
    def dim(self) -> int:
        """1 or 2."""
        return len(self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the values."""
        return tuple(self.values)

    @property
    def loss(self) -> np.ndarray:
        """The loss (of the first data set)."""
        return self[next(n for n in self.names if n.rsplit("/", 1)[-1] == "loss")]

    def __getitem__(self, name: str) -> np.ndarray:
        """Return values by name."""
        if name not in self.values:
            raise SettingsError(f"Expected one of {', '.join(self.names)}. Got {name!r}.")
        return self.values[name]

    def save(self, path: str | Path) -> Path:
        """Write everything to a ``.npz`` file, which appears when complete.

        Raises:
            SettingsError: If the name does not end in ``.npz``.
        """
        path = Path(path)
        if path.suffix.lower() != ".npz":
            raise SettingsError(f"Expected a name that ends in .npz. Got {path}.")
        arrays: dict[str, np.ndarray] = {"status": self.status.astype(np.int8)}
        arrays |= {f"grid{i}": np.asarray(g, dtype=float) for i, g in enumerate(self.grid)}
        for kind in ("values", "errors", "rise_errors"):
            arrays |= {f"{kind}:{n}": a for n, a in getattr(self, kind).items()}
        if self.quadratic is not None:
            arrays["quadratic"] = self.quadratic
        about = {
            "format": FORMAT,
            "axes": [asdict(a) for a in self.axes],
            "markers": [asdict(m) for m in self.markers],
            "details": self.details,
            "notes": self.notes,
            "cost": vars(self.cost),
        }
        arrays["about"] = np.array(json.dumps(to_plain(about), allow_nan=False))
        part = path.with_name(f"{path.name}.{os.getpid()}.part.npz")
        try:
            np.savez_compressed(part, **arrays)  # type: ignore[arg-type]
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return path


def load_slice(path: str | Path) -> Slice:
    """Read what :meth:`Slice.save` wrote; nothing in the file is run.

    Raises:
        SettingsError: If the file is missing, or holds no slice.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            arrays = {n: held[n] for n in held.files}
        about = json.loads(str(arrays["about"]))
        if about["format"] > FORMAT:
            raise SettingsError(
                f"Expected a slice of format {FORMAT} or older. {path} has {about['format']}."
                " Use a newer sharpkit."
            )

        def named(kind: str) -> dict[str, np.ndarray]:
            start = f"{kind}:"
            return {n.removeprefix(start): a for n, a in arrays.items() if n.startswith(start)}

        return Slice(
            axes=tuple(Axis(**a) for a in about["axes"]),
            grid=tuple(arrays[f"grid{i}"] for i in range(len(about["axes"]))),
            values=named("values"),
            errors=named("errors"),
            rise_errors=named("rise_errors"),
            status=arrays["status"],
            quadratic=arrays.get("quadratic"),
            markers=tuple(
                Marker(m["label"], tuple(m["coordinates"]), m["distance"]) for m in about["markers"]
            ),
            details=about["details"],
            notes=tuple(about["notes"]),
            cost=Cost(**about["cost"]),
        )
    except DAMAGE as error:
        if isinstance(error, SettingsError):
            raise
        text = " ".join(str(error).split())
        raise SettingsError(
            f"Expected a slice that sharpkit wrote (.npz). {path}: {text or type(error).__name__}."
        ) from error


def mesh(grid: Sequence[np.ndarray]) -> list[tuple[float, ...]]:
    """Return the coordinates of all points, the last axis fastest."""
    points = np.stack(np.meshgrid(*grid, indexing="ij"), axis=-1).reshape(-1, len(grid))
    return [tuple(map(float, p)) for p in points]
