"""The code of docs/paths.md runs and does what the page says."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "paths.md"


def test_the_page_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(compile(block, "docs/paths.md", "exec"), names)
    assert "error" in capsys.readouterr().out
    assert names["aligned"].distance_after < names["aligned"].distance_before
    assert names["straight"].value > 0
    assert [m.label for m in names["markers"]] == ["A", "B", "bend"]
