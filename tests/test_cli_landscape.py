"""The commands slice, path and spectrum, on two small trained networks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sharpkit.cli import run
from sharpkit.landscape import Status, load_slice
from sharpkit.study.pathing import PathRequest
from sharpkit.study.slicing import Source

RECIPE = """
import torch

loss = torch.nn.CrossEntropyLoss()
g = torch.Generator().manual_seed(0)
y = torch.arange(150) % 3
x = torch.randn(150, 4, generator=g) + 2 * torch.nn.functional.one_hot(y, 4)


def model():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def data():
    return [(x[:100], y[:100])]


def test_data():
    return [(x[100:], y[100:])]
"""


def cli(command):
    return run(command.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("nets")
    (place / "recipe.py").write_text(RECIPE)
    held = {}
    exec(RECIPE, held)
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = held["model"]()
        optimizer = torch.optim.SGD(net.parameters(), 0.3)
        for step in range(61):
            if step % 20 == 0:
                torch.save(net.state_dict(), place / f"net{seed}-{step}.pt")
            optimizer.zero_grad()
            held["loss"](net(held["x"][:100]), held["y"][:100]).backward()
            optimizer.step()
    return place


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    for name in folder.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_line_with_its_figure_and_data_is_drawn_again_without_the_model(here, capsys):
    command = "slice net0-60.pt -r recipe.py --test -x -1:1:11 --quadratic -o a.png -o a.csv"
    assert cli(command) == 0
    out = capsys.readouterr()
    assert "11 points: 11 measured" in out.out
    assert "filter" in out.out
    assert "s each" in out.err
    found = load_slice("a.npz")
    assert found.names == ("train/loss", "train/accuracy", "test/loss", "test/accuracy")
    assert found.details["num_examples"] == {"train": 100, "test": 50}
    assert found.quadratic is not None
    table = pd.read_csv("a.csv", comment="#")
    np.testing.assert_allclose(table["train/loss"], found["train/loss"], rtol=1e-6)
    assert Path("a.png").stat().st_size > 10_000
    assert not Path("a.png.parts").exists()
    for name in ("recipe.py", "net0-60.pt"):
        Path(name).unlink()
    assert run(["slice", "a.npz", "-o", "again.svg"]) == 0
    assert Path("again.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("directions", "checkpoints", "more"),
    [
        ("layer", "net0-60.pt", ""),
        ("eigen", "net0-60.pt", "--rise 0.2"),
        ("negative", "net0-60.pt", ""),
        ("gradient,eigen", "net0-60.pt", "--orthogonal"),
        ("adversarial", "net0-60.pt", "--rho 0.1"),
        ("geodesic", "net0-60.pt", ""),
        ("trajectory", "net0-0.pt net0-20.pt net0-40.pt net0-60.pt", ""),
        ("endpoints", "net0-60.pt net1-60.pt net0-0.pt", ""),
        ("tensor:net1-60.pt,filter", "net0-60.pt", ""),
    ],
)
def test_planes_along_all_directions(here, capsys, directions, checkpoints, more):
    command = (
        f"slice {checkpoints} -r recipe.py -x -1:1:5 -y -1:1:4 -d {directions} -o p.npz {more}"
    )
    assert cli(command) == 0
    found = load_slice("p.npz")
    assert found.status.shape == (5, 4)
    assert (found.status == Status.MEASURED).all()
    assert np.ptp(found.loss) > 0
    kinds = {a.kind for a in found.axes}
    expected = {"eigen": {"eigen"}, "trajectory": {"trajectory"}, "geodesic": {"geodesic"}}
    if directions in expected:
        assert kinds == expected[directions]
    if directions == "trajectory":
        assert len(found.markers) == 4
        assert "random walk" in " ".join(capsys.readouterr().err.split())
    asked = {"eigen": ("rise", 0.2), "adversarial": ("rho", 0.1)}
    if directions in asked:
        name, value = asked[directions]
        assert found.axes[0].details[name] == pytest.approx(value)
    if directions == "negative":
        assert [a.details["end"] for a in found.axes] == ["largest", "smallest"]
    if directions == "layer":
        assert [a.seed for a in found.axes] == [0, 1]
    if directions == "gradient,eigen":
        assert found.details["cosine"] == pytest.approx(0, abs=1e-5)


def test_lines_between_two_and_several_checkpoints_at_once(here, capsys):
    assert cli("slice net0-60.pt net1-60.pt -r recipe.py -d endpoints -o e.npz") == 0
    found = load_slice("e.npz")
    assert [m.label for m in found.markers] == ["net0-60", "net1-60"]
    ends = [float(found.loss[np.abs(found.grid[0] - t).argmin()]) for t in (0.0, 1.0)]
    assert cli("slice net0-60.pt net1-60.pt -r recipe.py -x -1:1:5 -o both.png") == 0
    centres = [float(load_slice(f"both-{i}.npz").loss[2]) for i in (1, 2)]
    assert ends == pytest.approx(centres, rel=1e-5)
    assert "both-2.npz written" in capsys.readouterr().out


def test_checkpoints_of_several_runs_that_are_called_alike(here):
    for run_ in ("a", "b"):
        Path(run_).mkdir()
    Path("a/last.pt").write_bytes(Path("net0-60.pt").read_bytes())
    Path("b/last.pt").write_bytes(Path("net1-60.pt").read_bytes())
    assert cli("slice a/last.pt b/last.pt -r recipe.py -x -1:1:5 -o two.png") == 0
    first, second = (load_slice(f"two-{i}.npz") for i in (1, 2))
    assert np.abs(first.loss - second.loss).max() > 1e-3
    assert not Path("two.png.parts").exists()


def test_data_are_saved_before_figures_and_never_over_other_files(here, capsys):
    assert cli("slice net0-60.pt -r recipe.py -x -1:1:5 --show f1 -o a.png") == 2
    assert "'f1'" in capsys.readouterr().err
    assert np.isfinite(load_slice("a.npz").loss).all()
    assert cli("slice net0-60.pt -r recipe.py -x -1:1:5 -o a.png") == 0  # over an older slice
    np.savez("mine.npz", x=np.zeros(3))
    before = Path("mine.npz").read_bytes()
    assert cli("slice net0-60.pt -r recipe.py -x -1:1:5 -o mine.png") == 2
    assert "another file of this name" in " ".join(capsys.readouterr().err.split())
    assert Path("mine.npz").read_bytes() == before


def test_the_canonical_form_is_another_point_of_the_same_function(here, capsys):
    assert cli("slice net0-60.pt -r recipe.py -x -1:1:5 -o relu.npz --canonical") == 0
    assert "no pairs of factors" in " ".join(capsys.readouterr().err.split())
    two = (
        RECIPE.replace("torch.nn.ReLU(), ", "")
        .replace("(4, 8)", "(4, 2)")
        .replace("(8, 3)", "(2, 3)")
    )
    Path("recipe.py").write_text(two)
    held = {}
    exec(two, held)
    net = held["model"]()
    with torch.no_grad():
        net[0].weight *= 5
    torch.save(net.state_dict(), "net0-60.pt")
    for name, more in (("plain", ""), ("form", "--canonical")):
        assert cli(f"slice net0-60.pt -r recipe.py -x -1:1:5 -o {name}.npz {more}") == 0
    plain, form = load_slice("plain.npz"), load_slice("form.npz")
    assert form.details["canonical"]
    assert not plain.details["canonical"]
    assert form.loss[2] == pytest.approx(plain.loss[2], rel=1e-5)
    norms = [one.axes[0].details["theta_norm"] for one in (plain, form)]
    assert norms[1] < 0.9 * norms[0]  # balanced


def test_what_differs_but_does_not_move_is_told(here, capsys):
    command = "slice net0-60.pt net1-60.pt -d endpoints -x 0:1:3 -o e.npz"
    assert cli(f"{command} -r recipe.py --params *.weight") == 0
    said = " ".join(load_slice("e.npz").notes)
    assert "0.bias, 2.bias differ" in said
    assert "those of net1-60.pt everywhere" in said
    assert cli(f"{command} -r recipe.py") == 0
    assert not load_slice("e.npz").notes
    normed = RECIPE.replace("torch.nn.ReLU()", "torch.nn.BatchNorm1d(8), torch.nn.ReLU()")
    Path("recipe.py").write_text(normed)
    held = {}
    exec(normed, held)
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = held["model"]()
        net(held["x"])
        torch.save(net.state_dict(), f"net{seed}-60.pt")
    assert cli(f"{command} -r recipe.py") == 0
    assert "those of net1-60.pt everywhere, also at net0-60.pt" in load_slice("e.npz").notes[0]
    assert cli(f"{command} -r recipe.py --batch-norm reestimate") == 0
    assert not load_slice("e.npz").notes
    capsys.readouterr()


def test_cut_refined_and_shown_on_a_page(here, capsys):
    pytest.importorskip("plotly")
    command = "slice net0-60.pt -r recipe.py -x -2:2:25 -y -2:2:25 --refine 0.03 --loss-max 2"
    assert run([*command.split(), "-o", "s.html", "-o", "s.vtp", "-o", "s.pdf"]) == 0
    found = load_slice("s.npz")
    assert (found.status == Status.INTERPOLATED).any()
    assert (found.status == Status.CUT).any()
    assert np.nanmax(found.loss) <= 2
    assert "at most" in capsys.readouterr().err
    assert Path("s.html").stat().st_size > 10**6
    assert b"PolyData" in Path("s.vtp").read_bytes()
    assert Path("s.pdf").read_bytes().startswith(b"%PDF")


def test_paths_straight_aligned_and_trained(here, capsys):
    command = "path net0-60.pt net1-60.pt -r recipe.py --align permutation,scale --connect bezier"
    more = "--epochs 10 --lr 0.2 -t 9 --test -o p.png -o p.json -o p.csv --json"
    assert run([*command.split(), *more.split()]) == 0
    out = json.loads(capsys.readouterr().out)
    assert list(out["paths"]) == ["straight", "aligned", "bezier"]
    table = pd.read_csv("p.csv")
    assert set(table["path"]) == {"straight", "aligned", "bezier"}
    assert len(table) == 27
    assert json.loads(Path("p.json").read_text())["alignment"]["distance_after"] > 0
    ends = table.groupby("path")["loss"].agg(["first", "last"])
    assert ends["first"].nunique() == 1
    assert ends["last"].tolist() == pytest.approx([ends["last"].iloc[0]] * 3, rel=1e-4)
    assert cli("path net0-60.pt net1-60.pt -r recipe.py -t 5") == 0
    shown = capsys.readouterr().out
    assert "barrier" in shown
    assert "straight" in shown


def test_each_path_is_between_the_ends_that_it_says(here):
    request = PathRequest(align=("permutation",), connect="bezier", epochs=2, points=5)
    ends = [Source(Path("recipe.py"), Path(f"net{i}-60.pt"), test=True) for i in (0, 1)]
    found = request.measure(*ends, lambda _: None)
    a, b = (next(iter(end().values())).theta for end in ends)
    straight, aligned, curve = (found.paths[n] for n in ("straight", "aligned", "bezier"))
    assert torch.allclose(straight.point([1.0]), b)
    assert torch.allclose(straight.point([0.0]), a)
    assert (aligned.point([1.0]) - a).norm() < 0.999 * (b - a).norm()
    assert torch.allclose(curve.point([1.0]), aligned.point([1.0]), atol=1e-6)
    rows = found.table()
    assert {"test/loss", "test/error"} <= set(rows["value"])
    for one in found.slices():
        assert [m.coordinates for m in one.markers] == [(0.0,), (1.0,)]
        assert any(n.startswith("test") for n in one.names)


def test_the_spectrum_s_ends_are_the_eigenvalues(here, capsys):
    assert cli("spectrum net0-60.pt -r recipe.py -k 2 -o s.svg --dtype float64 --json") == 0
    out = json.loads(capsys.readouterr().out)
    from sharpkit.study.recipe import load_recipe

    objective, _ = load_recipe("recipe.py").objective(Path("net0-60.pt"), dtype=torch.float64)
    H = torch.stack([objective.hvp(e) for e in torch.eye(objective.space.dim).double()])
    values = torch.linalg.eigvalsh(H)
    top = next(s for s in out["scores"] if s["measure"] == "top_eigenvalues")
    found = {p["label"]: p["value"] for p in top["estimate"]["parts"]}
    assert found["lambda_1"] == pytest.approx(float(values[-1]), rel=1e-3)
    assert found["lambda_-1"] == pytest.approx(float(values[0]), abs=1e-3 * float(values[-1]))
    assert cli("spectrum net0-60.pt -r recipe.py -k 1 --cumulative -o c.png") == 0
    assert "hessian_trace" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("slice net0-60.pt -o a.png", "--recipe FILE.py"),
        ("slice net0-60.pt -r recipe.py", "-o FILE"),
        ("slice net0-60.pt -r recipe.py -o a.txt", "ends in .png"),
        ("slice net0-60.pt -r recipe.py -o no/a.png", "folder no to exist"),
        ("slice net0-60.pt -r recipe.py -o a.png -x 1:2", "such as -1:1:51"),
        ("slice net0-60.pt -r recipe.py -o a.png -d rows", "directions among"),
        ("slice net0-60.pt -r recipe.py -o a.png -d filter,eigen", "one or two for a plane"),
        ("slice net0-60.pt -r recipe.py -o a.png -y auto -d geodesic,eigen", "alone"),
        ("slice net0-60.pt -r recipe.py -o a.png -d endpoints", "Expected 2 checkpoints"),
        ("slice net0-60.pt -r recipe.py -o a.png -y auto -d trajectory", "at least 3 checkpoints"),
        ("slice net0-60.pt -r recipe.py -o a.png --metric f1", "'f1' without a function"),
        ("slice recipe.npz -o a.png", "Expected a slice that sharpkit wrote"),
        ("path net0-60.pt net1-60.pt -r recipe.py --align units", "--align of"),
        ("path net0-60.pt net1-60.pt -r recipe.py --connect line", "bezier or polychain"),
        ("path net0-60.pt net1-60.pt -r recipe.py -t 2", "at least 3 points"),
        ("path net0-60.pt net1-60.pt -r recipe.py --batch-norm no", "--batch-norm among"),
        ("path net0-60.pt net1-60.pt -r recipe.py -o a.html", "ends in .png"),
        ("spectrum net0-60.pt -r recipe.py -o a.npz", ".png"),
    ],
)
def test_wrong_use_is_said_in_a_sentence(here, capsys, command, words):
    assert cli(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert "Got" in said or "Make it" in said or "Expected" in said
    assert not list(here.glob("*.parts"))


def test_without_test_data_the_recipe_is_asked_for_them(here, capsys):
    Path("recipe.py").write_text(RECIPE.replace("def test_data", "def other_data"))
    assert cli("slice net0-60.pt -r recipe.py --test -o a.png") == 2
    assert "test_data()" in capsys.readouterr().err


def _default_sigint():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupted_command_goes_on_where_it_was(here):
    slow = (
        RECIPE.replace(
            "def model():\n    return ",
            "class Slow(torch.nn.Module):\n    def forward(self, x):\n        import time\n"
            "        time.sleep(0.02)\n        return x\n\n\ndef model():\n    return ",
        )
        .replace("Sequential(", "Sequential(Slow(), ")
        .replace("Linear(4, 8)", "Linear(4, 8)")
    )
    net = torch.load("net0-60.pt")
    torch.save({f"{int(k[0]) + 1}{k[1:]}": v for k, v in net.items()}, "slow.pt")
    Path("recipe.py").write_text(slow)
    command = [sys.executable, "-m", "sharpkit", "slice", "slow.pt", "-r", "recipe.py"]
    command += ["-x", "-1:1:401", "-o", "a.npz"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=_default_sigint,
    ) as process:  # fmt: skip
        assert "401 points" in process.stderr.readline()
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(30) == 130
    assert "go on with the same command" in " ".join(said.split())
    assert list(Path("a.npz.parts").glob("*/part-*.npz"))
    Path("recipe.py").write_text(slow.replace("0.02", "0.0"))  # the same function, only faster
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "from before" in " ".join(done.stderr.split())
    assert (load_slice("a.npz").status == Status.MEASURED).all()
    assert not Path("a.npz.parts").exists()


@pytest.mark.slow
def test_under_torchrun_points_are_shared_out_and_the_slice_is_the_same(here):
    plain = [sys.executable, "-m", "sharpkit"]
    spread = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
              "--master-port", str(20_000 + os.getpid() % 20_000), "-m", "sharpkit"]  # fmt: skip
    command = ["slice", "net0-60.pt", "-r", "recipe.py", "--test", "-x", "-1:1:7", "-y", "-1:1:6"]
    for how, name in ((plain, "one.npz"), (spread, "two.npz")):
        done = subprocess.run(
            [*how, *command, "-o", name], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written") == 1
    one, two = load_slice("one.npz"), load_slice("two.npz")
    for name in one.names:
        np.testing.assert_array_equal(one[name], two[name])
        np.testing.assert_array_equal(one.errors[name], two.errors[name])
