"""The front door: what it refuses, what it survives, what it returns."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import sharpkit as sk
from sharpkit import measures
from sharpkit.errors import SettingsError, UnknownMeasureError
from sharpkit.results import Estimate, Part
from sharpkit.scoring import parse_request
from sharpkit.testing import symmetric_pair


@pytest.fixture
def objective():
    return symmetric_pair("node_scale", 0)[0]


@pytest.fixture
def broken():
    name = "broken_for_a_test"

    @measures.register(
        name, symbol="-", reference="none", cost="none", invariant_to=set(), degree=None,
        nonnegative=False,
    )  # fmt: skip
    def fail(analysis):
        """Fail."""
        raise KeyError("out of luck")

    yield name
    del measures.registry._REGISTRY[name]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ("no_such_measure", UnknownMeasureError),
        ("hessian_trace:probes=3", SettingsError),
        ("hessian_trace:num_probes=3,num_probes=4", SettingsError),
        ("hessian_trace:num_probes=3.5", SettingsError),
        ("hessian_trace:num_probes", SettingsError),
        ("sam_sharpness:norm=l7", SettingsError),
        (("hessian_trace", {"num_probes": True}), SettingsError),
        (("hessian_trace", {"num_probes": 8}, "more"), SettingsError),
        (("hessian_trace", "num_probes=8"), SettingsError),
        ((5, {}), SettingsError),
        (5, SettingsError),
        (None, SettingsError),
    ],
)
def test_bad_requests_are_refused_before_anything_is_computed(objective, request_, error):
    begun = []
    with pytest.raises(error, match=r"Expected .* Got "):
        sk.score(objective, ["gradient_norm", request_], progress=begun.append)
    assert not begun


@pytest.mark.parametrize("names", [5, 2.0])
def test_names_that_are_no_names(objective, names):
    with pytest.raises(SettingsError, match="Expected names of measures"):
        sk.score(objective, names)


@pytest.mark.parametrize("seed", ["0", 1.5, None, True])
def test_a_seed_is_a_whole_number(objective, seed):
    with pytest.raises(SettingsError, match="Expected `seed`"):
        sk.score(objective, ["gradient_norm"], seed=seed)


def test_no_objective():
    with pytest.raises(SettingsError, match="Expected an Objective"):
        sk.score(nn.Linear(1, 1), ["gradient_norm"])


def test_requests_are_read_alike_however_they_are_written():
    text = parse_request("sam_sharpness: rho = 0.1 ,steps=5")
    pairs = parse_request(("sam_sharpness", {"rho": 0.1, "steps": 5}))
    assert text == pairs
    assert parse_request("hessian_trace:target_error=none")[1]["target_error"] is None
    assert type(parse_request(("sam_sharpness", {"rho": 1}))[1]["rho"]) is float


def test_whatever_a_measure_raises_the_others_stay(objective, broken):
    seen = []
    with pytest.warns(sk.SharpkitWarning, match="failed: KeyError: 'out of luck'"):
        scores = sk.score(objective, [broken, "gradient_norm"], on_score=seen.append)
    assert seen == list(scores)
    assert scores[broken].estimate is None
    assert scores["gradient_norm"].estimate.value > 0
    assert [s.measure for s in scores.failed] == [broken]
    frame = scores.to_frame(parts=True)
    assert frame["value"].isna().tolist() == [True, False]
    assert json.loads(scores.to_json())[0]["error"] == "KeyError: 'out of luck'"


def test_settings_out_of_range_are_one_sentence_of_that_measure(objective):
    with pytest.warns(sk.SharpkitWarning, match="Expected `rho` to be finite and greater than 0"):
        scores = sk.score(objective, ["sam_sharpness:rho=inf", "gradient_norm"])
    assert scores["sam_sharpness"].error.startswith("Expected `rho`")
    assert scores["gradient_norm"].estimate is not None


def test_frames_and_json(objective):
    scores = sk.score(objective, ["top_eigenvalues:k=2", "gradient_norm"], seed=4)
    frame = scores.to_frame(parts=True)
    assert frame["part"].tolist() == ["", "lambda_1", "lambda_2", "lambda_-1", "lambda_-2", ""]
    assert len(scores.to_frame()) == 2
    read = json.loads(scores.to_json())
    assert read[0]["estimate"]["parts"][1]["value"] == scores[0].estimate.parts[1].value
    assert read[0]["seed"] == 4
    assert len(sk.score(objective, []).to_frame()) == 0


def test_results_hold_plain_floats_and_strict_json():
    e = Estimate(
        torch.tensor(2.0, dtype=torch.float64), torch.tensor(0.5), "bound",
        parts=(Part("a", torch.tensor(1.0), None),),
        details={"t": torch.ones(2), "i": torch.tensor(3), "nan": math.nan, "set": {1}},
    )  # fmt: skip
    assert type(e.value) is type(e.probe_error) is type(e.parts[0].value) is float
    plain = json.loads(json.dumps(e.to_dict(), allow_nan=False))
    assert plain["details"] == {"t": [1.0, 1.0], "i": 3, "nan": None, "set": [1]}


def test_each_purpose_and_seed_has_its_own_stream(objective):
    def draw(seed, purpose):
        return torch.rand(4, generator=sk.Analysis(objective, seed=seed).generator(purpose))

    draws = [draw(s, p) for s in range(-2, 20) for p in ("lanczos", "hessian_trace", "noise")]
    assert len({tuple(d.tolist()) for d in draws}) == len(draws)
    assert torch.equal(draw(3, "lanczos"), draw(3, "lanczos"))


def test_a_perturbation_that_the_dtype_swallows_is_not_called_converged():
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = nn.Linear(40, 3).to(torch.bfloat16)
    x, y = torch.randn(16, 40).to(torch.bfloat16), torch.randint(3, (16,))
    torch.set_rng_state(torch_state)
    objective = sk.Objective(model, nn.CrossEntropyLoss(), (x, y))
    for name in ("sam_sharpness_one_step:rho=0.001", "sam_sharpness:rho=0.001"):
        estimate = sk.score(objective, [name])[0].estimate
        assert not estimate.converged
        assert any("bfloat16 changes the perturbation" in note for note in estimate.notes)


@pytest.fixture
def needy(monkeypatch):
    monkeypatch.setattr(measures.registry, "_REGISTRY", dict(measures.registry._REGISTRY))

    @measures.register(
        "moved", symbol="|theta - theta_0|", reference="none", cost="none",
        invariant_to=set(), degree=0, nonnegative=True, needs={"initial", "optimizer"},
    )  # fmt: skip
    def moved(analysis: sk.Analysis) -> Estimate:
        """Distance over the learning rate."""
        gap = (analysis.theta - analysis.initial).norm()
        return Estimate(gap / analysis.optimizer.setting("lr"), 0.0, "bound")

    return "moved"


def test_what_a_measure_needs_is_asked_for_by_name(objective, needy):
    start = objective.theta - 3.0
    sgd = torch.optim.SGD(objective.model.parameters(), lr=0.5)
    expected = 2 * (9 * objective.space.dim) ** 0.5
    for initial in (start, objective.space.unflatten(start)):
        for optimizer in (sgd, sgd.state_dict()):
            score = sk.score(objective, needy, initial=initial, optimizer=optimizer)[0]
            assert score.estimate.value == pytest.approx(expected)
    with pytest.warns(sk.SharpkitWarning, match=r"Pass initial=\.\.\..*sharpkit\.score"):
        scores = sk.score(objective, [needy, "gradient_norm"], optimizer=sgd)
    assert scores[0].estimate is None
    assert scores[1].estimate.value > 0
    with pytest.warns(sk.SharpkitWarning, match=r"Pass optimizer=\.\.\..*sharpkit\.score"):
        assert sk.score(objective, needy, initial=start)[0].estimate is None


def test_all_measures_are_all_whose_needs_are_met(objective, needy, monkeypatch):
    kept = {n: measures.get(n) for n in ("gradient_norm", needy)}
    monkeypatch.setattr(measures.registry, "_REGISTRY", kept)
    assert [s.measure for s in sk.score(objective)] == ["gradient_norm"]
    sgd = torch.optim.SGD(objective.model.parameters(), lr=0.5)
    both = sk.score(objective, initial=objective.theta, optimizer=sgd)
    assert [s.measure for s in both] == ["gradient_norm", needy]


def test_dear_measures_are_asked_for_by_name_or_with_all(objective, monkeypatch):
    names = ["gradient_norm", "parameter_norm", "pac_bayes_bound"]
    kept = {n: measures.get(n) for n in names}
    kept["gradient_norm"] = dataclasses.replace(kept["gradient_norm"], dear=True)
    monkeypatch.setattr(measures.registry, "_REGISTRY", kept)

    def asked(request):
        return [(s.measure, s.settings) for s in sk.score(objective, request)]

    norm = ("parameter_norm", dict(kept["parameter_norm"].settings))
    assert asked(None) == [norm]
    assert asked("gradient_norm") == [("gradient_norm", {})]
    assert asked("all") == [("gradient_norm", {}), norm]  # the bound needs initial parameters
    own = "parameter_norm:which=weights"
    by_weights = ("parameter_norm", {**norm[1], "which": "weights"})
    assert asked([own, "all"]) == [by_weights, ("gradient_norm", {})]


@pytest.mark.parametrize(
    ("initial", "words"),
    [
        (torch.zeros(3), r"`initial` of shape"),
        ({}, r"every parameter\. It lacks"),
        (4.0, "a module, a state dict or theta"),
        (nn.Linear(40, 3), "Expected `initial`|does not fit"),
    ],
)
def test_initial_parameters_that_do_not_fit(objective, initial, words):
    with pytest.raises(SettingsError, match=words):
        sk.score(objective, "gradient_norm", initial=initial)
