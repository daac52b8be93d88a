"""The code of docs/landscape.md runs, and the commands there are commands."""

import re
from pathlib import Path

from typer.main import get_command

from sharpkit.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "landscape.md").read_text()


def test_the_page_s_code_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    exec(compile(code, "docs/landscape.md", "exec"), {})
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert int(out[0].split()[-1]) >= 42  # two data sets, 21 points each
    assert 0 < float(out[1].split()[0]) < 1
    assert "filter-normalized" in out[2]


def test_the_page_s_options_exist():
    commands = get_command(app).commands
    for line in re.findall(r"^sharpkit .*$", PAGE, flags=re.M):
        name, *words = line.split("#")[0].split()[1:]
        known = {o for p in commands[name].params for o in p.opts}
        for word in words:
            if re.match(r"-[a-z-]", word):
                assert word in known, f"{word} of {name}"
