"""A study survives kill -9: the same numbers, and only what was in flight is measured again."""

import json
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from study_cases import make
from study_kill import MEASURES

HERE = Path(__file__).parent
COUNT = 6


def numbers(path):
    """Return everything of the scores that must not depend on interrupts, by key."""
    found = {}
    with sqlite3.connect(path) as c:
        for subject, document in c.execute("SELECT subject, document FROM score"):
            score = json.loads(document)
            score["estimate"].pop("cost")
            for name in ("checkpoint", "recipe"):
                score["provenance"].pop(name)
            found[subject, score["measure"]] = score
    c.close()
    return found


def run(folder, runners, kills, seed):
    """Run the study with kills, and return how many hit."""
    done = subprocess.run(
        [
            sys.executable,
            str(HERE / "study_kill.py"),
            str(folder),
            *map(str, (runners, kills, seed)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make(folder, COUNT)
    assert run(folder, 1, 0, 0) == 0
    return folder


@pytest.mark.parametrize("runners", [1, 2])
def test_twenty_kills_change_nothing(tmp_path, undisturbed, runners):
    for file in (*undisturbed.glob("*.pt"), undisturbed / "recipe.py"):
        shutil.copy(file, tmp_path)
    hits = run(tmp_path, runners, 20, seed=runners)
    assert hits >= 10, "the runs ended before they were killed: nothing was tested"
    expected, found = numbers(undisturbed / "study.db"), numbers(tmp_path / "study.db")
    assert len(expected) == COUNT * len(MEASURES)
    assert found == expected
    started = Counter((tmp_path / "log.txt").read_text().splitlines())
    assert len(started) == len(expected)
    again = sum(started.values()) - len(started)
    assert again <= hits  # at most the one in flight, for each kill
    with sqlite3.connect(tmp_path / "study.db") as c:
        assert c.execute("SELECT count(*) FROM claim").fetchone() == (0,)
    c.close()


def test_the_undisturbed_run_measures_each_once(undisturbed):
    started = Counter((undisturbed / "log.txt").read_text().splitlines())
    assert set(started.values()) == {1}


@pytest.mark.slow
def test_a_killed_command_leaves_workers_that_stop_and_a_study_that_goes_on(tmp_path):
    """The same with two worker processes, whose command is killed and started again."""
    make(tmp_path, 8)
    command = [
        sys.executable, "-m", "sharpkit", "score", str(tmp_path), "-r", str(tmp_path / "recipe.py"),
        "-o", str(tmp_path / "study.db"), *(a for m in MEASURES for a in ("-m", m)),
    ]  # fmt: skip
    whole = tmp_path / "whole.db"
    subprocess.run([*command, "-o", str(whole)], check=True, capture_output=True)
    hits = 0
    for delay in (6.0, 8.0, 10.0, 12.0):
        process = subprocess.Popen(
            [*command, "--workers", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.kill()
            hits += 1
            process.wait()
    done = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hits > 0
    assert numbers(tmp_path / "study.db") == numbers(whole)
