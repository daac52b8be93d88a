"""Diagonals that an analysis shares, and the measure made of them, against dense matrices."""

import pytest
import torch
from cases import RAGGED, mlp, plain, relative, seeded

import sharpkit as sk
from sharpkit.analysis import Analysis
from sharpkit.errors import MeasureError
from sharpkit.estimators import SketchedDiagonal
from sharpkit.objective import objective as module


def test_the_sketched_diagonal_is_the_hessians_within_its_errors():
    objective = plain()
    truth = sk.hessian(objective).to_dense().diagonal()
    analysis = Analysis(objective)
    found = analysis.diagonal(method="xdiag", num_probes=51)  # an odd one is left over
    assert isinstance(found, SketchedDiagonal)
    assert found.num_probes == 50
    off = (found.values - truth).abs() / found.errors
    assert float((off < 3).double().mean()) > 0.95
    plainer = analysis.diagonal(method="hutchinson", num_probes=50)
    assert relative(found.values, truth) < 0.3 * relative(plainer.values, truth)
    assert analysis.diagonal(method="xdiag", num_probes=51) is found
    total = found.weighted(torch.ones_like(found.values))
    assert total.value == pytest.approx(float(found.values.sum()), rel=1e-10)
    whole = analysis.diagonal(method="xdiag", num_probes=objective.space.dim)
    assert whole.exact
    assert relative(whole.values, truth) < 1e-10


def test_vectors_that_do_not_fit_are_refused(monkeypatch):
    objective = plain()
    vectors = 2 * 8 * objective.space.dim * 8
    monkeypatch.setattr(module, "available_memory", lambda _: 4 * vectors - 1)
    with pytest.raises(MeasureError, match=r"the 16 vectors of P.* method='hutchinson'"):
        Analysis(objective, max_basis=8).diagonal(method="xdiag", num_probes=8)
    monkeypatch.setattr(module, "available_memory", lambda _: 4 * vectors)
    Analysis(objective, max_basis=8).diagonal(method="xdiag", num_probes=8)


def test_the_ggns_diagonal_is_exact():
    objective = plain()
    found = Analysis(objective).diagonal(method="ggn", num_probes=2)
    assert relative(found.values, sk.ggn(objective).to_dense().diagonal()) < 1e-10
    assert found.exact
    assert (found.num_gradients, float(found.errors.abs().max())) == (3, 0.0)


def test_adams_sharpness_of_each_diagonal():
    objective = plain()
    H, G = (f(objective).to_dense().diagonal() for f in (sk.hessian, sk.ggn))
    requests = [("adam_sharpness", {"method": m, "num_probes": 40}) for m in ("xdiag", "ggn")]
    sketched, ggn = (s.estimate for s in sk.score(objective, requests))
    assert ggn.value == pytest.approx(float(G.sqrt().sum()), rel=1e-10)
    assert ggn.cost.gradients == 3
    assert (ggn.details["diagonal"], ggn.details["negative_share"]) == ("ggn", 0.0)
    assert ggn.error_kind == "bound"
    assert ggn.probe_error < 1e-3 * ggn.value
    truth = float(H.clamp(min=0).sqrt().sum())
    assert abs(sketched.value - truth) <= sketched.probe_error
    assert (sketched.details["diagonal"], sketched.cost.hvps) == ("xdiag", 40)
    assert abs(ggn.value - truth) > 0.01 * truth  # another number


def test_the_ggns_needs_a_criterion():
    def batch_loss(model, batch):
        return model(batch[0]).square().sum(), len(batch[0])

    objective = sk.Objective.from_batch_loss(seeded(mlp), batch_loss, RAGGED)
    with pytest.warns(sk.SharpkitWarning, match="Expected an objective with a criterion"):
        scores = sk.score(objective, ["adam_sharpness:method=ggn", "gradient_norm"])
    assert scores[0].estimate is None
