"""Captions and exports: what another program or reader gets is what the slice holds."""

import base64
import csv
import struct
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from report_cases import HOSTILE
from slice_cases import DETAILS, FILTER, axis, bowl, holes, line, path

from sharpkit.errors import SettingsError
from sharpkit.landscape import Axis, Marker, Slice, Status, caption, load_slice, save_slice
from sharpkit.landscape.export import os as export_os

# -- captions --------------------------------------------------------------------------------


def full():
    first = axis(7, ignored=["a.bias", "bn.weight", "bn.bias", "b.bias", "c.bias"], num_ignored=21,
                 normalization="filter, by output channel", theta_norm=12.5)  # fmt: skip
    second = Axis("eigen", "steps of 0.5", 0.5, None, {"eigenvalue": 31.25, "residual": 1e-5})
    s = holes(axes=(first, second))
    return replace(
        s,
        errors={"loss": s.loss},
        details={**DETAILS, "canonical": True, "command": ["sharpkit", "slice", "a b.pt"]},
        markers=(Marker("theta", (0.0, 0.0)), Marker("far", (0.5, 0.5), 2.5)),
    )


def test_a_caption_says_all_that_the_slice_knows():
    s = full()
    text = caption(s)
    n = s.status.size
    for part in (
        "Loss of runs/net.pt (12,345 parameters, float32) on train: 4,096, test: 512 examples.",
        f"x: random, filter-normalized (seed 7), in {FILTER}; x = 1 is 3.25 from the centre",
        "normalization: filter, by output channel; norm of theta 12.5.",
        "Zero in x's direction: 21 tensors (a.bias, bn.weight, bn.bias, b.bias, ...).",
        "y: eigenvector of the Hessian, in steps of 0.5; y = 1 is 0.5 from the centre;"
        " eigenvalue 31.25; residual 1e-05.",
        "Cosine of the two directions: 0.0012.",
        "Taken at the canonical representative of the network.",
        "Grid: x from -1 to 1, 21 points; y from -0.8 to 1.2, 15 points:",
        f"{round(100 * (s.status == Status.MEASURED).sum() / n)}% measured",
        f"{round(100 * (s.status == Status.INTERPOLATED).sum() / n)}% interpolated within a"
        " tolerance of 0.01",
        f"{round(100 * (s.status == Status.CUT).sum() / n)}% cut (the loss is above loss_max = 5)",
        "Largest deviation of the interpolation at points measured to check it: 0.0031.",
        "BatchNorm statistics: kept as trained.",
        "Errors are those of the data being a sample, from 16 groups of examples.",
        "the farthest lies 2.5 away in theta.",
        "Seed 3.",
        "Made with sharpkit 0.1.0, torch 2.13.0.",
        "Data 4f1a09c2.",
        "Command: sharpkit slice a b.pt",
    ):
        assert part in text, part
    assert "\n" not in text


def test_a_caption_says_nothing_that_the_slice_does_not_know():
    x = np.linspace(0, 1, 5)
    text = caption(Slice((axis(None),), (x,), {"loss": x}, np.zeros(5, np.int8), details={}))
    assert text == (
        f"Loss. x: random, filter-normalized, in {FILTER}; x = 1 is 3.25 from the centre."
        " Grid: x from 0 to 1, 5 points: all measured."
    )
    several = {"batch_norm": "re-estimated", "num_examples": 99, "num_groups": {"a": 4, "b": 8}}
    s = Slice((axis(None),), (x,), {"test/loss": x}, np.zeros(5, np.int8), {"test/loss": x},
              details=several)  # fmt: skip
    text = caption(s)
    assert text.startswith("Test loss on 99 examples.")
    assert "re-estimated at every point" in text
    assert "from a: 4, b: 8 groups" in text


def test_shares_are_never_none_of_something():
    status = np.zeros(1000, np.int8)
    status[0] = Status.CUT
    x = np.arange(1000.0)
    text = caption(Slice((axis(),), (x,), {"loss": x}, status, details={}))
    assert "99% measured, less than 1% cut" in text


def test_several_slices_say_once_what_they_share():
    one, two = bowl(), replace(bowl(), details={**DETAILS, "title": "SAM", "seed": 4})
    text = caption([replace(one, details={**DETAILS, "title": "SGD"}), two])
    assert text.count("Made with") == 1
    assert text.count(FILTER) == 2  # once an axis
    assert text.endswith("[SGD] Seed 3. [SAM] Seed 4.")


def test_a_caption_is_plain_text():
    s = replace(bowl(), details={"checkpoint": "\n".join(HOSTILE), "title": "\x1b[31m"})
    text = caption(s)
    assert text.isprintable()
    assert "\x1b" not in caption([s, line()])


# -- tables ----------------------------------------------------------------------------------


def test_a_table_gives_the_numbers_back(tmp_path):
    s = holes()
    s = replace(s, errors={"loss": s.loss / 7}, rise_errors={"loss": s.loss / 11},
                quadratic=np.cos(s.loss[0, 0] + np.arange(s.status.size).reshape(s.status.shape)))  # fmt: skip
    frame = pd.read_csv(save_slice(s, tmp_path / "s.csv"), dtype=str)
    numbers = frame.columns.drop("status")
    frame[numbers] = frame[numbers].astype(float)  # by Python, to the last digit
    x, y = f"x [{FILTER}]", f"y [{FILTER}]"
    assert list(frame) == [x, y, "status", "loss", "loss error", "loss rise error", "quadratic model"]  # fmt: skip
    assert len(frame) == s.status.size
    shape = s.status.shape
    np.testing.assert_array_equal(frame[x].to_numpy().reshape(shape)[:, 0], s.grid[0])
    np.testing.assert_array_equal(frame[y].to_numpy().reshape(shape)[0], s.grid[1])
    for name, array in (
        ("loss", s.loss),
        ("loss error", s.errors["loss"]),
        ("loss rise error", s.rise_errors["loss"]),
        ("quadratic model", s.quadratic),
    ):
        np.testing.assert_array_equal(frame[name].to_numpy().reshape(shape), array)
    words = frame["status"].to_numpy().reshape(shape)
    for kind in Status:
        np.testing.assert_array_equal(words == kind.name.lower(), s.status == kind)


def test_a_table_of_a_line(tmp_path):
    s = line()
    with save_slice(s, tmp_path / "s.CSV").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:3] == [f"x [{FILTER}]", "status", "train/loss"]
    assert len(rows) == 21
    assert rows[4][1:3] == ["not_finite", ""]
    assert float(rows[0][2]) == s["train/loss"][0]


# -- surfaces for ParaView -------------------------------------------------------------------


class Vtp:
    """A reader of VTK XML PolyData with inline, uncompressed base64: by the format's words."""

    TYPES = {"Float64": ("d", 8), "Int64": ("q", 8), "Int8": ("b", 1)}  # noqa: RUF012

    def __init__(self, path):
        root = ElementTree.parse(path).getroot()
        assert root.tag == "VTKFile"
        assert root.get("type") == "PolyData"
        assert root.get("byte_order") == "LittleEndian"
        assert root.get("header_type") == "UInt64"
        assert root.get("compressor") is None
        (piece,) = root.findall("PolyData/Piece")
        self.points = self._array(piece.find("Points/DataArray"))
        assert len(self.points) == int(piece.get("NumberOfPoints"))
        found = piece.find("PointData")
        self.scalars = found.get("Scalars")
        self.data = {a.get("Name"): self._array(a) for a in found}
        assert all(len(a) == len(self.points) for a in self.data.values())
        self.cells = {}
        for kind in ("Verts", "Lines", "Strips", "Polys"):
            arrays = {a.get("Name"): self._array(a) for a in piece.find(kind)}
            ends = [int(e) for e in arrays["offsets"]]
            assert len(ends) == int(piece.get(f"NumberOf{kind}"))
            assert (ends[-1] if ends else 0) == len(arrays["connectivity"])
            starts = [0, *ends][:-1]
            self.cells[kind] = [
                [int(v) for v in arrays["connectivity"][a:b]]
                for a, b in zip(starts, ends, strict=True)
            ]

    def _array(self, element):
        assert element.get("format") == "binary"
        letter, size = self.TYPES[element.get("type")]
        raw = base64.b64decode(element.text.strip(), validate=True)
        (length,) = struct.unpack("<Q", raw[:8])
        assert length == len(raw) - 8
        assert length % size == 0
        values = struct.unpack(f"<{length // size}{letter}", raw[8:])
        width = int(element.get("NumberOfComponents"))
        return np.array(values).reshape(-1, width) if width > 1 else np.array(values)


def test_a_surface_has_every_whole_cell_and_no_other(tmp_path):
    s = replace(holes(), errors={"loss": holes().loss / 7})
    found = Vtp(save_slice(s, tmp_path / "s.vtp"))
    known = np.isfinite(s.loss)
    assert len(found.points) == known.sum()
    place = {(a, b): k for k, (a, b, _) in enumerate(found.points)}
    x, y = s.grid
    expected = set()
    for i in range(len(x) - 1):
        for j in range(len(y) - 1):
            square = [(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)]
            if all(known[c] for c in square):
                expected.add(tuple(place[x[a], y[b]] for a, b in square))
    assert {tuple(c) for c in found.cells["Polys"]} == expected
    assert len(found.cells["Polys"]) == len(expected) < (len(x) - 1) * (len(y) - 1)
    assert not found.cells["Lines"]
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            if known[i, j]:
                k = place[a, b]
                assert found.points[k, 2] == found.data["loss"][k] == s.loss[i, j]
                assert found.data["status"][k] == s.status[i, j]
                assert found.data["loss error"][k] == s.loss[i, j] / 7
    assert found.scalars == "loss"
    # Seen from above cells turn the same way: their normals point up.
    for cell in found.cells["Polys"]:
        p = found.points[cell, :2]
        a, b = p[1] - p[0], p[2] - p[0]
        assert a[0] * b[1] - a[1] * b[0] > 0


def test_the_height_can_be_another_value(tmp_path):
    s = bowl()
    s = replace(s, values={"loss": s.loss, "accuracy": 1 - s.loss / 10})
    found = Vtp(save_slice(s, tmp_path / "s.vtp", name="accuracy"))
    np.testing.assert_array_equal(found.points[:, 2], (1 - s.loss / 10).ravel())
    assert found.scalars == "accuracy"
    with pytest.raises(SettingsError, match="Got 'speed'"):
        save_slice(s, tmp_path / "t.vtp", name="speed")


def test_a_line_is_in_pieces_at_its_gaps(tmp_path):
    x = np.arange(7.0)
    y = np.array([1.0, 2.0, np.nan, 4.0, np.nan, 6.0, 7.0])
    s = Slice((axis(),), (x,), {"loss": y}, np.where(np.isnan(y), 3, 0).astype(np.int8))
    found = Vtp(save_slice(s, tmp_path / "s.vtp"))
    assert found.points.tolist() == [[0, 1, 0], [1, 2, 0], [3, 4, 0], [5, 6, 0], [6, 7, 0]]
    assert found.cells["Lines"] == [[0, 1], [3, 4]]
    assert found.cells["Verts"] == [[2]]  # alone between two gaps, and not lost


def test_names_cannot_leave_their_place(tmp_path):
    label = "a -- b --> c \x00 <x>"
    values = {f"{name}/loss": bowl().loss for name in HOSTILE}
    s = replace(path(), values=values, axes=(axis(label=label), axis(label="\ud800")),
                status=bowl().status)  # fmt: skip
    found = Vtp(save_slice(s, tmp_path / "s.vtp"))
    shown = ["".join(c if c.isprintable() else "?" for c in n) for n in values]
    assert list(found.data) == ["status", *shown]
    text = (tmp_path / "s.vtp").read_text("utf-8")
    assert text.count("-->") == 1
    header = save_slice(s, tmp_path / "s.csv").read_text("utf-8").splitlines()[0]
    assert len(next(csv.reader([header]))) == 3 + len(values)


def test_vtk_itself_reads_it(tmp_path):
    vtk = pytest.importorskip("vtk", reason="vtk is not installed")
    reader = vtk.vtkXMLPolyDataReader()
    s = holes()
    reader.SetFileName(str(save_slice(s, tmp_path / "s.vtp")))
    reader.Update()
    assert reader.GetErrorCode() == 0
    found = reader.GetOutput()
    assert found.GetNumberOfPoints() == np.isfinite(s.loss).sum()
    assert found.GetNumberOfPolys() == len(Vtp(tmp_path / "s.vtp").cells["Polys"])


# -- files -----------------------------------------------------------------------------------


def test_the_ending_chooses_the_format(tmp_path):
    s = bowl()
    again = load_slice(save_slice(s, tmp_path / "s.npz"))
    np.testing.assert_array_equal(again.loss, s.loss)
    with pytest.raises(SettingsError, match=r"\.npz, \.csv or \.vtp"):
        save_slice(s, tmp_path / "s.h5")


@pytest.mark.parametrize("ending", ["csv", "vtp"])
def test_a_file_appears_when_it_is_complete(tmp_path, monkeypatch, ending):
    file = tmp_path / f"s.{ending}"
    file.write_text("before")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(export_os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_slice(bowl(), file)
    assert file.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
