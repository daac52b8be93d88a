"""The one pass over the spectrum: the same numbers as alone, exact ones covered, nothing lost."""

import functools
import itertools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from cases import CASES, normal
from test_data_error import mean_of
from torch import nn

import sharpkit as sk
import sharpkit.measures
from sharpkit.errors import ObjectiveError, SettingsError
from sharpkit.estimators.basis import Basis

CE = nn.CrossEntropyLoss()
INPUTS = normal(50, 6)
TARGETS = INPUTS[:, :4].argmax(dim=1)
SETTINGS = {"k": 2, "num_probes": 6, "num_quadratures": 3, "num_steps": 5, "alpha": 1.5}
RUNS = {"num_probes": 3, "num_steps": 5}
ALONE = {
    "hessian_trace": {"num_probes": 6},
    "frobenius_norm": {"num_probes": 6},
    "stable_rank": {"num_probes": 6},
    "top_eigenvalues": {"k": 2},
    "effective_rank": RUNS,
    "negative_mass": RUNS,
    "renyi_sharpness": {"alpha": 1.5, **RUNS},
}


@functools.cache
def network(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            CE(model(INPUTS), TARGETS).backward()
            optimizer.step()
    return model.to(dtype)


def objective(**options):
    return sk.Objective(network(), CE, [(INPUTS, TARGETS)], **options)


def numbers(estimate):
    parts = [(p.label, p.value, p.probe_error, p.converged) for p in estimate.parts]
    return estimate.value, estimate.probe_error, estimate.data_error, estimate.converged, parts


@pytest.fixture(scope="module")
def alone():
    return {n: sk.score(objective(), [(n, s)], seed=5)[0].estimate for n, s in ALONE.items()}


# -- the same numbers --------------------------------------------------------------------


def test_the_summary_has_the_numbers_that_scores_have(alone):
    summary = sk.spectrum(objective(), seed=5, **SETTINGS)
    assert [s.measure for s in summary.scores] == list(ALONE)
    for name, estimate in alone.items():
        assert numbers(summary[name]) == numbers(estimate), name
    assert summary.cost.hvps < 0.6 * sum(e.cost.hvps for e in alone.values())
    assert summary.cost.hvps == sum(s.estimate.cost.hvps for s in summary.scores)
    again = sk.spectrum(objective(), seed=5, **SETTINGS)
    assert all(numbers(again[n]) == numbers(summary[n]) for n in ALONE)
    assert again.density == summary.density or again.density.to_dict()["nodes"] == summary.density.to_dict()["nodes"]  # fmt: skip
    other = sk.spectrum(objective(), seed=6, **SETTINGS)
    assert other["hessian_trace"].value != summary["hessian_trace"].value


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_what_else_was_asked_for_changes_nothing(alone, order):
    names = list(ALONE)
    rng = np.random.default_rng(order)
    names = [names[i] for i in rng.permutation(len(names))]
    extra = [("top_eigenvalues", {"k": 1}), ("top_eigenvalues", {"k": 4, "tol": 1e-9})]
    extra += [("hessian_trace", {"num_probes": 40, "method": "xtrace"}), ("effective_rank", {})]
    requests = [*extra, *((n, ALONE[n]) for n in names), ("frobenius_norm", {})]
    scores = sk.score(objective(), requests, seed=5)
    for name, score in zip(names, list(scores)[len(extra) :], strict=False):
        assert score.measure == name
        found, expected = numbers(score.estimate), numbers(alone[name])
        assert found[0] == pytest.approx(expected[0], rel=1e-11), (name, names)
        assert found[1:3] == pytest.approx(expected[1:3], rel=1e-7, abs=1e-12)
        assert found[3] == expected[3]
        assert [p[1] for p in found[4]] == pytest.approx([p[1] for p in expected[4]], rel=1e-11)


def test_a_bounded_basis_gives_the_same_numbers_within_errors(alone, monkeypatch):
    sizes = []
    append = Basis.append

    def counted(self, X):
        result = append(self, X)
        sizes.append(self.size)
        return result

    monkeypatch.setattr(Basis, "append", counted)
    H = sk.hessian(objective()).to_dense()
    summary = sk.spectrum(objective(), seed=5, max_basis=15, **SETTINGS)
    assert max(sizes) <= 15
    truth = exact_numbers(H, alpha=1.5)
    for name in ALONE:
        low, high = summary[name].interval(0.999)
        assert low <= truth[name] <= high, name
    layers = sk.score(objective(), ["renyi_sharpness_per_layer"], max_basis=15)[0].estimate
    assert max(sizes) <= 15
    assert layers.value == pytest.approx(truth_of_layers(objective()), abs=0.1)
    for most in (3, 115):
        with pytest.raises(SettingsError, match="Expected `max_basis` between 8 and"):
            sk.spectrum(objective(), max_basis=most)


# -- exact numbers -----------------------------------------------------------------------


def exact_numbers(H, alpha=2.0):
    e = torch.linalg.eigvalsh(H)
    p = e.abs() / e.abs().sum()
    p = p[p > 0]
    return {
        "hessian_trace": float(e.sum()),
        "frobenius_norm": float(e.norm()),
        "stable_rank": float((e.norm() / e.abs().max()) ** 2),
        "top_eigenvalues": float(e[-1]),
        "effective_rank": math.exp(float(torch.special.entr(p).sum())),
        "negative_mass": float((-e).clamp(min=0).sum() / e.abs().sum()),
        "renyi_sharpness": float((p**alpha).sum().log() / (alpha - 1)),
        "log_det": float((1 + e.abs()).log().sum()),
    }


def truth_of_layers(whole):
    names = [n for n, s in zip(whole.space.names, whole.space.shapes, strict=True) if len(s) > 1]
    blocks = [sk.hessian(whole.restrict(lambda n, m=m: n == m)).to_dense() for m in names]
    return float(np.mean([exact_numbers(H)["renyi_sharpness"] for H in blocks]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_intervals_hold_the_dense_numbers(case):
    whole = case.objective()
    truth = exact_numbers(case.dense(whole)[2])
    for score in sk.score(whole, list(truth), seed=2, num_groups=4):
        low, high = score.estimate.interval(0.999)
        rounding = 1e-12 * abs(truth["frobenius_norm"])
        assert low - rounding <= truth[score.measure] <= high + rounding, score.measure
        assert score.estimate.data_error >= 0


def test_parts_of_layers(tmp_path):
    whole = objective()
    H = sk.hessian(whole).to_dense()
    scores = sk.score(whole, ["hessian_trace", "renyi_sharpness_per_layer"])
    trace, layers = (s.estimate for s in scores)
    assert [p.label for p in trace.parts] == list(sk.Analysis(whole).by_layer(whole.theta))
    assert sum(p.value for p in trace.parts) == pytest.approx(trace.value, rel=1e-10)
    start = 0
    for part, size in zip(trace.parts, (70, 44), strict=True):
        exact = float(H.diagonal()[start : start + size].sum())
        assert abs(part.value - exact) < 6 * part.probe_error, part.label
        assert part.probe_error < 0.2 * trace.value
        start += size
    assert [p.label for p in layers.parts] == ["0.weight", "2.weight"]
    assert np.mean([p.value for p in layers.parts]) == pytest.approx(layers.value)
    assert layers.value == pytest.approx(truth_of_layers(whole), abs=4 * layers.probe_error)
    labels = ["", *(p.label for p in trace.parts), "", "0.weight", "2.weight"]
    assert scores.to_frame(parts=True)["part"].tolist() == labels
    assert len(scores.to_frame()) == 2
    read = json.loads(scores.to_json())
    assert [p["value"] for p in read[0]["estimate"]["parts"]] == [p.value for p in trace.parts]


def test_parts_of_layers_are_right_on_average():
    whole = objective()
    exact = float(sk.hessian(whole).to_dense().diagonal()[:70].sum())
    seeds = range(40)
    found = [
        sk.score(whole, ["hessian_trace:num_probes=8"], seed=s, num_groups=0)[0].estimate.parts[0]
        for s in seeds
    ]
    z = np.array([(p.value - exact) / p.probe_error for p in found])
    assert abs(np.mean([p.value for p in found]) - exact) < 4 * np.std([p.value for p in found]) / 40**0.5  # fmt: skip
    assert 0.7 < z.std() / math.sqrt(7 / 5) < 1.4


def test_density_and_json():
    summary = sk.spectrum(objective(), **SETTINGS)
    read = json.loads(summary.to_json())
    assert set(read) == {"scores", "density", "cost"}
    for weights in summary.density.weights:
        assert sum(weights) == pytest.approx(1)
    assert len(summary.to_frame()) == len(ALONE)
    assert len(summary.to_frame(parts=True)) > len(ALONE)
    with pytest.raises(KeyError):
        summary["no_such_number"]


# -- dtypes and ways ---------------------------------------------------------------------


def test_a_bfloat16_model_gets_vectors_of_float32():
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).to(torch.bfloat16)
    whole = sk.Objective(model, CE, [(INPUTS.to(torch.bfloat16), TARGETS)])
    analysis = sk.Analysis(whole)
    locked = analysis.spectral().locked
    assert analysis.spectral().operator.dtype == locked.vectors.dtype == torch.float32
    summary = sk.spectrum(whole, **SETTINGS)
    assert not summary.scores.failed
    exact = sk.hessian(sk.Objective(model, CE, [(INPUTS, TARGETS)], dtype=torch.float64))
    truth = exact_numbers(exact.to_dense(), alpha=1.5)
    for name in ("hessian_trace", "frobenius_norm"):
        low, high = summary[name].interval(0.999)
        assert low <= truth[name] <= high


def test_central_differences_have_no_error_from_the_data():
    summary = sk.spectrum(objective(hvp_mode="central_difference"), seed=5, **SETTINGS)
    for name in ALONE:
        assert summary[name].data_error is None
    assert summary["hessian_trace"].value == pytest.approx(
        sk.spectrum(objective(), seed=5, **SETTINGS)["hessian_trace"].value, rel=1e-4
    )


# -- bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"k": 0},
        {"k": 115},
        {"max_basis": 115},
        {"num_groups": 2},
        {"num_quadratures": 1},
        {"num_steps": 0},
    ],
    ids=str,
)
def test_a_summary_that_cannot_be_is_refused_at_once(settings):
    whole = objective()
    before = whole.cost.hvps
    with pytest.raises(SettingsError, match=r"Expected .* Got "):
        sk.spectrum(whole, **settings)
    assert whole.cost.hvps == before


@pytest.mark.parametrize(
    ("settings", "failed"),
    [
        ({"max_matvecs": 0}, ["top_eigenvalues"]),
        ({"tol": 0.0}, ["top_eigenvalues"]),
        ({"alpha": 0.0}, ["renyi_sharpness"]),
        ({"alpha": -1.0}, ["renyi_sharpness"]),
        ({"num_probes": 1}, ["hessian_trace", "frobenius_norm", "stable_rank"]),
    ],
    ids=str,
)
def test_one_bad_setting_leaves_the_other_numbers(settings, failed):
    with pytest.warns(sk.SharpkitWarning, match="failed: Expected") as caught:
        summary = sk.spectrum(objective(), **{**SETTINGS, **settings})
    assert len(caught) == len(failed)
    assert [s.measure for s in summary.scores.failed] == failed
    for score in summary.scores.failed:
        assert score.error.startswith("Expected")
        assert score.error.count(".") < 6
        with pytest.raises(KeyError, match="failed: Expected"):
            summary[score.measure]
    json.loads(summary.to_json())


@pytest.mark.parametrize(
    "request_",
    [
        "top_eigenvalues:k=999",
        "hessian_trace:target_error=0",
        "hessian_trace:target_error=-1",
        "hessian_trace:num_probes=1",
        "hessian_trace:max_probes=1",
        "effective_rank:num_probes=1",
        "negative_mass:num_steps=0",
        "renyi_sharpness:alpha=nan",
        "renyi_sharpness:alpha=3,spectrum=signed",
        "renyi_sharpness_per_layer:alpha=0",
        "log_det:tau=0",
        "log_det:tau=1e-9,spectrum=signed",
    ],
)
def test_one_sentence_each(request_):
    with pytest.warns(sk.SharpkitWarning, match="failed: Expected"):
        scores = sk.score(objective(), [request_, "gradient_norm"])
    assert scores[0].error.startswith("Expected")
    assert scores[1].estimate is not None


def test_a_selection_of_nothing():
    with pytest.raises(ObjectiveError, match="Expected"):
        objective(params="no.such.*")


@pytest.mark.parametrize("max_matvecs", [1, 3, 12])
def test_a_small_budget_keeps_the_best_and_says_what_to_do(max_matvecs):
    request = ("top_eigenvalues", {"k": 3, "tol": 1e-10, "max_matvecs": max_matvecs})
    found = sk.score(objective(), [request])[0].estimate
    assert not found.converged
    assert "Give a larger `max_matvecs` or a larger `tol`" in found.notes[0]
    top = float(torch.linalg.eigvalsh(sk.hessian(objective()).to_dense())[-1])
    assert found.value <= top * (1 + 1e-9)
    assert found.value > 0.3 * top or max_matvecs < 12
    request = ("hessian_trace", {"target_error": 1e-6, "max_probes": 2 * max_matvecs})
    found = sk.score(objective(), [request])[0].estimate
    assert not found.converged
    assert "target error" in found.notes[0]
    assert found.details["num_probes"] == 2 * max_matvecs
    assert found.data_error > 0


def test_a_hessian_of_zero_has_a_trace_and_no_entropy():
    flat = mean_of([torch.zeros(60, 60, dtype=torch.float64)] * 5, [1.0] * 5)
    with pytest.warns(sk.SharpkitWarning, match="failed: Expected a"):
        summary = sk.spectrum(flat, k=1)
    failed = {"stable_rank", "effective_rank", "negative_mass", "renyi_sharpness"}
    assert {s.measure for s in summary.scores.failed} == failed
    for name in ("hessian_trace", "frobenius_norm", "top_eigenvalues"):
        assert summary[name].value == pytest.approx(0, abs=1e-12)
        assert summary[name].data_error == pytest.approx(0, abs=1e-12)
    with pytest.warns(sk.SharpkitWarning, match="Expected a layer whose block"):
        sk.score(flat, ["renyi_sharpness_per_layer"])


def test_a_hessian_of_nan_is_one_sentence_a_measure():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.linspace(0.0, 1.0, 50, dtype=torch.float64))

        def forward(self, x):
            return x @ self.w.abs() ** 1.5

    data = [(normal(8, 50), normal(8, seed=1))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SharpkitWarning)
        bad = sk.Objective(Root(), nn.MSELoss(), data)
        scores = sk.score(bad, ["hessian_trace", "top_eigenvalues", "effective_rank", "gradient_norm"])  # fmt: skip
    assert scores[-1].estimate is not None
    for score in scores:
        if score.estimate is None:
            assert score.error.startswith("Expected"), score.error
        else:
            assert math.isfinite(score.estimate.value), score.measure


def test_a_product_that_fails_once_leaves_the_run_as_it_was(alone, monkeypatch):
    whole = objective()
    analysis = sk.Analysis(whole, seed=5)
    calls, hvp = [], sk.Objective.hvp

    def sometimes(self, vectors):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of luck")
        return hvp(self, vectors)

    monkeypatch.setattr(sk.Objective, "hvp", sometimes)
    with pytest.raises(RuntimeError, match="out of luck"):
        _ = analysis.spectral().locked
    found = sk.measures.get("hessian_trace")(analysis, num_probes=6)
    assert found.value == pytest.approx(alone["hessian_trace"].value, rel=1e-11)


def test_ggn_where_there_is_none():
    def loss(model, batch):
        return CE(model(batch[0]), batch[1]) * len(batch[1]), len(batch[1])

    class Concave(nn.Module):
        def forward(self, outputs, targets):
            return -(outputs - targets).square().mean()

    no_outputs = sk.Objective.from_batch_loss(network(), loss, [(INPUTS, TARGETS)])
    concave = sk.Objective(network(), Concave(), [(INPUTS, normal(50, 4))])
    for whole in (no_outputs, concave):
        with pytest.warns(sk.SharpkitWarning, match="failed: Expected"):
            scores = sk.score(whole, ["renyi_sharpness:spectrum=ggn", "hessian_trace"])
        assert scores[0].error.startswith("Expected")
        assert scores[1].estimate is not None


def test_pairs_of_settings_do_not_mix():
    # Remembered by their settings: no two requests share what they must not.
    whole = objective()
    requests = [
        ("renyi_sharpness", {"alpha": a, "spectrum": s})
        for a, s in itertools.product((0.5, 2.0, math.inf), ("abs", "clipped", "ggn"))
    ]
    together = sk.score(whole, requests)
    for request, score in zip(requests[::2], list(together)[::2], strict=True):
        single = sk.score(objective(), [request])[0].estimate
        assert numbers(single) == numbers(score.estimate), request
    assert len({s.estimate.value for s in together}) == len(requests)
