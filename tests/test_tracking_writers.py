"""Where rows go: files that can be gone on with, and writers that fail."""

import csv
import math
import sys
import types
import warnings
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from test_tracking import CE, X, Y, network, train

from sharpkit.errors import SettingsError, SharpkitError, SharpkitWarning
from sharpkit.tracking import CSVWriter, TensorBoardWriter, Tracker, WandbWriter


def row(step, value=1.5, **more):
    return {"step": step, "lambda_max": value, "converged": True, "note": "", **more}


def steps(path):
    with path.open() as file:
        return [int(line["step"]) for line in csv.DictReader(file)]


def test_the_file_is_the_frame_to_the_last_digit(tmp_path):
    path = tmp_path / "new" / "run.csv"
    net = network()
    tracker = Tracker(net, CE, (X, Y), every=3, writers=path)
    train(net, tracker=tracker)
    read = pd.read_csv(path, dtype=str)  # floats are read by Python, to the last digit
    frame = tracker.frame
    assert list(read.columns) == list(frame.columns)
    for name in frame.columns.drop("note"):
        if frame[name].dtype == bool:
            assert read[name].tolist() == frame[name].astype(str).tolist()
        else:
            np.testing.assert_array_equal(read[name].astype(float), frame[name].astype(float))


def test_a_file_is_gone_on_with_and_no_step_is_there_twice(tmp_path):
    path = tmp_path / "run.csv"
    first = CSVWriter(path)
    for step in (0, 10, 20, 30):
        first(row(step))
    again = CSVWriter(path)  # restarted from a checkpoint at 20
    again(row(20, 7.0))
    assert steps(path) == [0, 10, 20]
    again(row(30))
    assert steps(path) == [0, 10, 20, 30]
    assert path.read_text().count("lambda_max") == 1
    assert "20,7.0" in path.read_text()


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "run.csv"
    CSVWriter(path)(row(0))
    path.write_text(path.read_text() + "10,1.")
    CSVWriter(path)(row(20))
    assert steps(path) == [0, 20]


def test_texts_with_commas_and_nan(tmp_path):
    path = tmp_path / "run.csv"
    CSVWriter(path)(row(0, math.nan, more='a, "b"'))
    CSVWriter(path)(row(1, more=""))
    with path.open() as file:
        (line, _) = csv.DictReader(file)
    assert line["more"] == 'a, "b"'
    assert line["lambda_max"] == ""


def test_other_columns_are_refused_and_the_file_stays(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("step,loss\n0,1.0\n")
    with pytest.raises(SettingsError, match="columns step, lambda_max"):
        CSVWriter(path)(row(1))
    assert path.read_text() == "step,loss\n0,1.0\n"


def test_a_writer_that_fails_loses_no_row_and_is_told_of_once():
    calls, seen = [], []

    def fails(row):
        calls.append(row["step"])
        raise OSError("disk full")

    tracker = Tracker(network(), CE, (X, Y), every=1, writers=[fails, seen.append])
    with pytest.warns(SharpkitWarning, match=r"The writer fails failed at step 0.*disk full"):
        tracker.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.step()
    assert calls == [0, 1]
    assert [r["step"] for r in seen] == tracker.frame.step.tolist() == [0, 1]


def test_a_writer_cannot_change_the_row():
    tracker = Tracker(network(), CE, (X, Y), writers=[dict.clear])
    tracker.step()
    assert tracker.frame.lambda_max[0] > 0


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        writer = TensorBoardWriter(tmp_path)
    tracker = Tracker(network(), CE, (X, Y), every=5, writers=writer)
    for step in range(11):
        tracker.step(step)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = events.Scalars("sharpness/lambda_max")
    assert [e.step for e in found] == [0, 5, 10]
    assert [e.value for e in found] == pytest.approx(tracker.frame.lambda_max.tolist(), rel=1e-6)
    assert "sharpness/trace" not in events.Tags()["scalars"]  # not asked for


def test_tensorboard_takes_a_writer():
    class Log:
        scalars: ClassVar = []

        def add_scalar(self, *args):
            self.scalars.append(args)

        def flush(self):
            self.scalars.append("flush")

    TensorBoardWriter(Log(), prefix="curvature")(row(3, 2.0))
    expected = [("curvature/lambda_max", 2.0, 3), ("curvature/converged", 1.0, 3), "flush"]
    assert Log.scalars == expected


class Run:
    def __init__(self):
        self.calls = []

    def define_metric(self, name, **more):
        self.calls.append(("define", name, more))

    def log(self, values):
        self.calls.append(("log", values))


DEFINED = [
    ("define", "sharpness/step", {}),
    ("define", "sharpness/*", {"step_metric": "sharpness/step"}),
]


@pytest.mark.parametrize("given", [True, False])
def test_wandb(given, monkeypatch):
    run, module = Run(), types.ModuleType("wandb")
    module.run = run
    monkeypatch.setitem(sys.modules, "wandb", module)
    writer = WandbWriter(run if given else None)
    writer(row(0, math.nan))
    writer(row(5, 2.0))
    assert run.calls == [
        *DEFINED,
        ("log", {"sharpness/step": 0, "sharpness/converged": 1.0}),
        ("log", {"sharpness/step": 5, "sharpness/lambda_max": 2.0, "sharpness/converged": 1.0}),
    ]


def test_wandb_without_a_run_or_the_package(monkeypatch):
    module = types.ModuleType("wandb")
    module.run = None
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(SharpkitError, match="active run"):
        WandbWriter()(row(0))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SharpkitError, match="wandb to be installed"):
        WandbWriter()(row(0))


def test_packages_that_are_missing(monkeypatch):
    import sharpkit.tracking.hf as hf
    import sharpkit.tracking.lightning as lightning

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SharpkitError, match="TensorBoard to be installed"):
        TensorBoardWriter("folder")
    for name in ("transformers", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    for module, package in ((hf, "transformers"), (lightning, "Lightning")):
        module._callback.cache_clear()
        with pytest.raises(SharpkitError, match=f"Expected {package} to be installed"):
            _ = module.SharpnessCallback
        with pytest.raises(AttributeError):
            _ = module.Nothing


def test_threads_and_precision_stay():
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    Tracker(network(), CE, (X, Y)).measure()
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
