"""The Fashion-MNIST zoo, in small: it runs, goes on where it was, and its page says what it has."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import fashion_networks  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    try:
        return fashion_networks.fetch(tmp_path_factory.mktemp("fashion"))
    except SystemExit as error:
        pytest.skip(f"Fashion-MNIST is not here: {error}")


def run(folder, page, data):
    command = [sys.executable, str(ROOT / "examples" / "zoo_fashion_mnist.py"), "--quick"]
    command += ["--workers", "1", "--folder", str(folder), "-o", str(page)]
    environment = {**os.environ, fashion_networks.WHERE: str(data), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_quick_zoo_is_trained_scored_and_told(tmp_path, data):
    page = tmp_path / "page.md"
    first = run(tmp_path / "zoo", page, data)
    assert first.count(" s\n") == 8  # models trained
    text = page.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| top_eigenvalues |")]
    assert len(rows) == 1
    assert "8 models" in text
    assert "of 8 models are correlated" in text
    assert (tmp_path / "page-gap.png").stat().st_size > 10_000
    again = run(tmp_path / "zoo", page, data)
    assert " s\n" not in again  # nothing is trained twice
    assert page.read_text() == text


@pytest.mark.slow
def test_the_gallery_is_made_by_one_command(tmp_path, data):
    page = tmp_path / "gallery.md"
    command = [sys.executable, str(ROOT / "examples" / "gallery.py"), "-o", str(page)]
    environment = {**os.environ, fashion_networks.WHERE: str(data), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"!\[.*\]\((gallery/.*\.png)\)", page.read_text())
    assert len(shown) >= 12
    assert all((tmp_path / name).stat().st_size > 10_000 for name in shown)
    committed = re.findall(r"!\[.*\]\((gallery/.*\.png)\)", (ROOT / "docs/gallery.md").read_text())
    assert shown == committed


def test_the_zoo_has_at_least_sixty_models_of_three_families_with_names_of_their_own():
    specs = fashion_networks.specs()
    assert len(specs) >= 60
    assert {s.family for s in specs} == {"mlp", "cnn", "vit"}
    assert len({s.name for s in specs}) == len(specs)
    assert {"sgd", "adam", "sam", "msam"} <= {s.optimizer for s in specs}
