"""sharpkit audit: verdicts within errors, claims that are contradicted, tables, figure, pages."""

import json
import math
from pathlib import Path

import pytest
import torch
from cases import CE, classes, mlp, normal, seeded
from torch import nn

import sharpkit as sk
from sharpkit import measures
from sharpkit.auditing import _change
from sharpkit.cli import run
from sharpkit.errors import SettingsError
from sharpkit.plots import plot_audit, save_figure
from sharpkit.results import Cost, Estimate, Score
from sharpkit.study.catalogue import catalogue_markdown

RECIPE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))

def data():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 4, generator=g), torch.randint(3, (30,), generator=g)
    return [(x[:20], y[:20]), (x[20:], y[20:])]

loss = nn.CrossEntropyLoss()
"""

QUICK = ["gradient_norm", "adaptive_sharpness_worst", "hessian_trace"]


def relu_objective():
    return sk.Objective(seeded(lambda: mlp(nn.ReLU)), CE, (normal(11, 4), classes(3, 11)))


@pytest.fixture(scope="module")
def result():
    return sk.audit(relu_objective(), [*QUICK, "top_eigenvalues:k=2"], elements=2)


def estimate(value, error=0.0, kind="stderr", **more):
    return Estimate(value, error, kind, **more)


def verdict(a, b, measure="gradient_norm", symmetry="node_scale"):
    scores = [Score(measure, e, dict(measures.get(measure).settings), 0) for e in (a, b)]
    return _change(*scores, symmetry, 1e-6)


# -- verdicts ----------------------------------------------------------------------------


def test_a_move_within_the_errors_is_not_resolved():
    change = verdict(estimate(1.0, 0.2), estimate(1.3, 0.2))
    assert change.verdict == "unresolved"
    assert change.ratio == pytest.approx(1.3)
    assert verdict(estimate(1.0, 1e-3), estimate(1.002, 1e-3)).verdict == "unchanged"
    assert verdict(estimate(1.0, 1e-3), estimate(1.02, 1e-3)).verdict == "moved"
    assert verdict(estimate(1.0, 0.2), estimate(1.0 + 1e-7, 0.2)).verdict == "unchanged"
    assert verdict(estimate(1.0, 0.0), estimate(1.0 + 3e-6, 0.0)).verdict == "moved"


def test_the_room_is_that_of_99_99_percent():
    change = verdict(estimate(1.0, 0.01), estimate(1.05, 0.01))
    assert change.verdict == "unchanged"  # within 5.2%, which would have shown a tenth
    assert change.room * 1.05 == pytest.approx(3.8906 * 0.01 * 2**0.5, rel=1e-4)
    assert verdict(estimate(1.0, 0.01), estimate(1.06, 0.01)).verdict == "moved"


def test_few_draws_need_a_larger_move():
    many, few = ((estimate(1.0, 0.01, dof=d), estimate(1.1, 0.01, dof=d)) for d in (100, 3))
    assert verdict(*many).verdict == "moved"
    assert verdict(*few).verdict == "unresolved"


def test_bounds_add_and_unknown_errors_resolve_nothing():
    assert (
        verdict(estimate(1.0, 0.1, "bound"), estimate(1.15, 0.1, "bound")).verdict == "unresolved"
    )
    assert verdict(estimate(1.0, 0.1, "bound"), estimate(1.3, 0.1, "bound")).verdict == "moved"
    lower = [estimate(v, 0.01, "lower_bound") for v in (1.0, 1.015)]
    assert verdict(*lower).verdict == "unchanged"
    assert verdict(estimate(1.0, None), estimate(5.0, None)).verdict == "unresolved"


def test_ascents_that_end_elsewhere_contradict_no_claim():
    a = estimate(1.0, 1e-6, "lower_bound")
    near = verdict(a, estimate(1.02, 1e-6, "lower_bound"), symmetry="permutation")
    assert near.verdict == "unresolved"
    assert near.room == pytest.approx(0.05)
    assert verdict(a, estimate(1.1, 1e-6, "lower_bound"), symmetry="permutation").contradicts
    assert verdict(a, estimate(1.0 + 1e-7, 1e-6, "lower_bound")).verdict == "unchanged"


def test_what_did_not_converge_contradicts_no_claim_by_a_little():
    a = estimate(1.0, 0.1, "bound", converged=False)
    assert verdict(a, estimate(1.4, 0.1, "bound"), symmetry="permutation").verdict == "unresolved"
    assert verdict(a, estimate(3.0, 0.1, "bound"), symmetry="permutation").contradicts


def test_signs_and_zeros():
    change = verdict(estimate(-1.0, 0.01), estimate(1.0, 0.01))
    assert (change.verdict, change.ratio) == ("moved", None)
    assert verdict(estimate(0.0), estimate(0.0)).verdict == "unchanged"


def test_random_errors_alone_hardly_ever_look_like_a_move():
    # Normal draws, errors estimated from 4 of them, as the entropies have.
    g = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(4000):
        pair = []
        for _ in range(2):
            x = 1 + 0.1 * torch.randn(4, generator=g)
            pair.append(estimate(float(x.mean()), float(x.std() / 2), dof=3))
        wrong += verdict(*pair).verdict == "moved"
    assert wrong <= 4


# -- the audit ---------------------------------------------------------------------------


def test_what_survives_is_what_claims_to(result):
    assert [s.name for s in result.symmetries] == ["layer_scale", "node_scale", "permutation"]
    assert result.surviving == ("adaptive_sharpness_worst",)
    assert result.contradicted == ()
    for kind in ("layer_scale", "node_scale"):
        change = result.worst("gradient_norm", kind)
        assert change.verdict == "moved"
        assert not change.claimed
        assert abs(change.ratio - 1) > 1e-3
    same = result.worst("gradient_norm", "permutation")
    assert same.claimed
    assert same.ratio == pytest.approx(1, abs=1e-12)
    assert len(result.of("gradient_norm", "node_scale")) == 2


def test_the_numbers_are_those_of_score(result):
    scores = sk.score(relu_objective(), QUICK, num_groups=0)
    for name in QUICK:
        assert result.worst(name, "permutation").before.value == scores[name].estimate.value


def test_the_same_seed_gives_the_same_bits():
    first, again, other = (sk.audit(relu_objective(), ["gradient_norm"], seed=s) for s in (1, 1, 2))
    values = [[c.after.value for c in r.changes] for r in (first, again, other)]
    assert values[0] == values[1] != values[2]


def test_nothing_of_the_users_is_changed():
    objective = relu_objective()
    before = {n: t.clone() for n, t in objective.model.state_dict().items()}
    theta, states = objective.theta, torch.get_rng_state()
    sk.audit(objective, ["gradient_norm"])
    assert all(torch.equal(before[n], t) for n, t in objective.model.state_dict().items())
    assert torch.equal(theta, objective.theta)
    assert torch.equal(states, torch.get_rng_state())
    assert all(p.grad is None for p in objective.model.parameters())


def test_a_false_claim_is_contradicted_and_shouted(tmp_path, monkeypatch, capsys):
    @measures.register(
        "boastful", symbol="|g|", reference="none", cost="1 gradient",
        invariant_to={"permutation", "node_scale"}, degree=1, nonnegative=True,
    )  # fmt: skip
    def boastful(analysis):
        """Gradient norm with a claim too many."""
        return measures.get("gradient_norm")(analysis)

    try:
        audited = sk.audit(relu_objective(), ["boastful", "gradient_norm"])
        assert [(c.measure, c.symmetry) for c in audited.contradicted] == [
            ("boastful", "node_scale")
        ]
        _folder(tmp_path, monkeypatch)
        assert run(["audit", "a.pt", "-r", "recipe.py", "-m", "boastful"]) == 1
        out = capsys.readouterr().out
        assert "CLAIM CONTRADICTED: boastful claims node_scale" in " ".join(out.split())
        assert " c !!" in out
    finally:
        del measures.registry._REGISTRY["boastful"]


def test_initial_parameters_move_along():
    @measures.register(
        "distance", symbol="|w-w0|", reference="none", cost="none", needs={"initial"},
        invariant_to={"permutation"}, degree=0, nonnegative=True,
    )  # fmt: skip
    def distance(analysis):
        """Distance from the start."""
        length = float((analysis.theta - analysis.initial).norm())
        return Estimate(length, 1e-12 * length, "rounding", cost=Cost())

    @measures.register(
        "second_moment", symbol="v", reference="none", cost="none", needs={"optimizer"},
        invariant_to={"permutation"}, degree=0, nonnegative=True,
    )  # fmt: skip
    def second_moment(analysis):
        """What an optimizer knows."""
        raise NotImplementedError

    try:
        objective = relu_objective()
        start = seeded(lambda: mlp(nn.ReLU))
        with torch.no_grad():
            for p in start.parameters():
                p.mul_(0.3)
        audited = sk.audit(objective, ["distance", "second_moment"], initial=start)
        assert audited.worst("distance", "permutation").verdict == "unchanged"
        assert audited.worst("distance", "node_scale").verdict == "moved"
        assert "optimizer" in audited.left_out["second_moment"]
        without = sk.audit(objective, ["distance"])
        assert list(without.left_out) == ["distance"]
        assert without.changes == ()
    finally:
        for name in ("distance", "second_moment"):
            del measures.registry._REGISTRY[name]


def test_a_measure_that_fails_keeps_the_others():
    with pytest.warns(sk.SharpkitWarning, match="Got 5000"):
        audited = sk.audit(relu_objective(), ["top_eigenvalues:k=5000", "gradient_norm"])
    failed = audited.worst("top_eigenvalues:k=5000", "permutation")
    assert failed.verdict == "failed"
    assert "Got 5000" in failed.error
    assert audited.worst("gradient_norm", "permutation").verdict == "unchanged"
    assert audited.surviving == ()


def test_json_is_strict_and_the_frame_complete(result):
    read = json.loads(result.to_json(), parse_constant=pytest.fail)
    assert [s["name"] for s in read["symmetries"]] == ["layer_scale", "node_scale", "permutation"]
    assert read["surviving"] == ["adaptive_sharpness_worst"]
    assert len(read["changes"]) == len(result.changes) == 4 * 3 * 2
    assert {"measure", "symmetry", "ratio", "verdict", "claimed"} <= set(read["changes"][0])
    frame = result.to_frame()
    assert len(frame) == 24
    assert set(frame["verdict"]) <= {"unchanged", "moved", "unresolved"}
    assert "top_eigenvalues:k=2" in set(frame["measure"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["hesian_trace"]}, "Did you mean 'hessian_trace'"),
        ({"names": ["gradient_norm"], "kinds": ["mirror"]}, "kinds of symmetry among"),
        ({"names": ["gradient_norm"], "elements": 0}, "`elements` to be at least 1"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, message):
    with pytest.raises(sk.SharpkitError, match=message):
        sk.audit(relu_objective(), **arguments)
    with pytest.raises(SettingsError, match="Expected an Objective"):
        sk.audit(nn.Linear(2, 1))


# -- figure ------------------------------------------------------------------------------


def test_the_figure_has_a_dot_for_each_change(result, tmp_path):
    axes = plot_audit(result, title="a network")
    dots = [c for c in axes.containers if len(c)]
    assert len(dots) == len(result.changes)
    drawn = sorted(float(c[0].get_xdata()[0]) for c in dots)
    expected = sorted(math.log10(c.ratio) for c in result.changes)
    assert drawn == pytest.approx(expected)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [
        "layer scale", "node scale", "permutation",
    ]  # fmt: skip
    labels = [t.get_text() for t in axes.get_xticklabels()]
    assert "1" in labels
    assert len(set(labels)) == len(labels) <= 9
    assert save_figure(axes, tmp_path / "audit.png").stat().st_size > 10_000


# -- command line ------------------------------------------------------------------------


def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "recipe.py").write_text(RECIPE)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    torch.save(model.state_dict(), tmp_path / "a.pt")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    _folder(tmp_path, monkeypatch)
    return tmp_path


def test_the_table_fits_80_columns(folder, capsys):
    requests = [x for n in (*QUICK, "effective_rank") for x in ("-m", n)]
    assert run(["audit", "a.pt", "-r", "recipe.py", "-o", "fig.svg", *requests]) == 0
    out, err = capsys.readouterr()
    assert all(len(line) <= 80 for line in out.splitlines())
    assert err == ""
    for kind in ("batch_norm_scale", "layer_scale", "node_scale", "permutation"):
        assert kind in out
    row = next(line for line in out.splitlines() if line.startswith("adaptive_sharpness_worst"))
    assert row.count("= c") == 4
    assert "Survive every symmetry found: adaptive_sharpness_worst." in out
    assert (folder / "fig.svg").stat().st_size > 1000


def test_json_goes_to_stdout(folder, capsys):
    arguments = ["audit", "a.pt", "-r", "recipe.py", "-m", "gradient_norm", "--json"]
    assert run([*arguments, "--elements", "2", "--dtype", "float32"]) == 0
    read = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert len(read["changes"]) == 8
    assert read["scores"][0]["provenance"]["dtype"] == "float32"
    permuted = [c for c in read["changes"] if c["symmetry"] == "permutation"]
    assert {c["verdict"] for c in permuted} == {"unchanged"}


def test_nothing_found_is_one_sentence(folder, capsys):
    text = RECIPE.replace(
        "nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)", "nn.Linear(4, 3)"
    )
    (folder / "linear.py").write_text(text + "\nload_weights = False\n")
    assert run(["audit", "a.pt", "-r", "linear.py", "-m", "gradient_norm", "-o", "fig.png"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith("No exact symmetry was found in this network")
    assert not (folder / "fig.png").exists()


def test_a_failed_measure_gives_status_1(folder, capsys):
    requests = ["-m", "top_eigenvalues:k=5000", "-m", "gradient_norm"]
    assert run(["audit", "a.pt", "-r", "recipe.py", *requests]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "top_eigenvalues:k=5000 failed: Expected" in out
    assert "gradient_norm" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-m", "hesian_trace"], "Did you mean 'hessian_trace'"),
        (["-m", "gradient_norm", "-o", "fig.gif"], "to end in .png, .pdf or .svg"),
        (["-m", "gradient_norm", "-o", "none/fig.png"], "Expected the folder none to exist"),
        (["-m", "gradient_norm", "--elements", "0"], "`elements` to be at least 1"),
        (["-m", "gradient_norm", "--dtype", "float8"], "Got 'float8'"),
    ],
)
def test_wrong_use_on_the_command_line(folder, capsys, more, message):
    assert run(["audit", "a.pt", "-r", "recipe.py", *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in " ".join(err.split())


# -- the catalogue -----------------------------------------------------------------------


def test_the_catalogue_is_that_of_the_registry(capsys):
    page = Path(__file__).parent.parent / "docs" / "measures.md"
    written = page.read_text()
    assert written == catalogue_markdown(), "Run: sharpkit measures --markdown > docs/measures.md"
    assert run(["measures", "--markdown"]) == 0
    assert capsys.readouterr().out == written
    assert run(["measures", "gradient_norm", "--markdown"]) == 2


def test_the_monge_entry_says_what_it_is_not():
    page = catalogue_markdown()
    for name in ("monge_sharpness", "monge_sharpness_first_order"):
        entry = page.split(f"### {name}\n")[1].split("\n### ")[0]
        assert "invariant to isometries only" in " ".join(entry.split())
        assert "- changed by: layer_scale, node_scale" in entry
