"""The code of docs/studies.md runs and does what the page says."""

import re
from pathlib import Path

import pytest
from study_cases import make

from sharpkit.study import Study

PAGE = (Path(__file__).parents[1] / "docs" / "studies.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    make(tmp_path / "runs", 2)
    (tmp_path / "runs" / "recipe.py").rename(tmp_path / "recipe.py")
    (block,) = BLOCKS
    names = {"Path": Path}
    exec(compile(block, "docs/studies.md", "exec"), names)
    assert capsys.readouterr().out == "6 0 []\n"
    assert len(names["long"]) == 6
    assert list(names["wide"]["checkpoint"]) == ["runs/net0.pt", "runs/net1.pt"]
    (value,) = (
        names["long"].query("label == 'hessian_trace' and checkpoint == 'runs/net0.pt'").value
    )
    assert names["trace"].value == value
    assert (tmp_path / "study.json").stat().st_size > 1000
    with Study("study.db") as study, pytest.raises(KeyError, match="there are"):
        study.of("runs/net9.pt")
