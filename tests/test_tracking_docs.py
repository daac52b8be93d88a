"""The loops of docs/tracking.md run, and the example too."""

import re
import runpy
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tracking.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]


def run(names, blocks):
    for block in blocks:
        exec(compile(block, "docs/tracking.md", "exec"), names)
    return names


def test_the_plain_loop_and_the_writers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run({"__name__": "page"}, BLOCKS[:1])
    frame = names["tracker"].frame
    assert frame.step.tolist() == [0, 20, 40, 60, 80]
    assert frame.converged.all()
    assert frame.two_over_eta.tolist() == [pytest.approx(76.0)] * 5
    assert pd.read_csv("sharpness.csv").step.tolist() == frame.step.tolist()
    names = run(names, BLOCKS[1:2])
    assert [row["step"] for row in names["rows"]] == [100]
    assert pd.read_csv("sharpness.csv").step.tolist() == [0, 20, 40, 60, 80, 100]


@pytest.mark.parametrize(
    ("package", "block", "steps"), [("lightning", 2, 4), ("transformers", 3, 2)]
)
def test_the_callbacks(package, block, steps, tmp_path, monkeypatch):
    pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    names = run({"__name__": "page"}, [BLOCKS[0], BLOCKS[block]])
    frame = names["callback"].tracker.frame
    assert len(frame) == steps
    assert frame.converged.all()


def test_the_example(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    module = runpy.run_path(str(ROOT / "examples" / "track_digits.py"))
    frame = module["run"](tmp_path, steps=40, rate=1.0, every=20, probes=2, seed=0)
    assert frame.step.tolist() == [0, 20, 40]
    assert frame.converged.all()
    assert pd.read_csv(tmp_path / "track_digits.csv").step.tolist() == [0, 20, 40]
    assert "HVPs a measurement" in capsys.readouterr().out
