"""Errors from the data being a sample: groups, first-order changes, calibration."""

import functools
import math

import numpy as np
import pytest
import torch
from cases import CASES, X, Y, mlp, normal, seeded
from torch import nn

import sharpkit as sk
from sharpkit.errors import SettingsError
from sharpkit.estimators.deflation import Locked
from sharpkit.estimators.quadrature import deflated_quadrature
from sharpkit.objective.batches import DEAL, dealt
from sharpkit.objective.groups import group_error
from sharpkit.operators import SymmetricOperator

BY_NAME = {case.name: case for case in CASES}
SIZES = [(11,), (8, 3), (4, 4, 3), (1,) * 11]


# -- groups ------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", ["mlp, cross-entropy", "masked tokens", "class weights"])
def test_forms_of_groups_sum_to_the_whole(name, sizes, matrix):
    objective = BY_NAME[name].objective(*sizes)
    V, U = normal(objective.space.dim, 3), normal(objective.space.dim, 3, seed=1)
    AV = (sk.hessian if matrix == "hessian" else sk.ggn)(objective) @ V
    before = objective.cost
    found = objective.grouped_forms(V, [V, U], matrix=matrix, num_groups=5)
    assert (objective.cost - before).hvps == 3
    whole = torch.stack([(V * AV).sum(0), (U * AV).sum(0)])
    assert torch.allclose(found.forms.sum(1), whole, rtol=1e-12, atol=1e-12)
    assert found.forms.dtype == torch.float64
    assert float(found.weights.sum()) == pytest.approx(1, rel=1e-12)
    assert int((found.weights > 0).sum()) == 5


def test_one_group_is_what_its_examples_alone_give():
    case = BY_NAME["mlp, cross-entropy"]
    objective = case.objective(11)
    V = normal(objective.space.dim, 1)
    forms = objective.grouped_forms(V, [V], num_groups=4)
    x, y = dealt((X, Y), 4)[1]
    alone = sk.Objective(case.model(), case.criterion, [(x, y)])
    share = len(x) / 11
    assert float(forms.weights[1]) == pytest.approx(share)
    expected = share * float(V[:, 0] @ alone.hvp(V[:, 0]))
    assert float(forms.forms[0, 1, 0]) == pytest.approx(expected, rel=1e-10)


def test_whole_batches_go_to_groups_at_random_one_after_the_other_in_each():
    case = BY_NAME["mlp, cross-entropy"]
    objective = case.objective(*(1,) * 11)
    V = normal(objective.space.dim, 2)
    forms = objective.grouped_forms(V, [V], num_groups=4)
    assert (forms.weights * 11).round().tolist() == [3, 3, 3, 2]
    in_turn = [float(case.objective(11).at(objective.theta).value())]  # the loss of all
    weights, losses = objective.grouped_value(4)
    assert float(losses.sum()) == pytest.approx(in_turn[0])
    single = [float(sk.Objective(case.model(), case.criterion, [(X[i:i + 1], Y[i:i + 1])]).value())
              for i in range(11)]  # fmt: skip
    turn = [sum(single[g::4]) / 11 for g in range(4)]
    assert losses.tolist() != pytest.approx(turn)
    assert float(weights.sum()) == pytest.approx(1)


def test_dealt_pieces():
    x, scale, words = torch.arange(7), torch.ones(3), list("abcdefg")
    pieces = dealt({"x": x, "scale": scale, "words": words}, 3)
    assert sorted(i for p in pieces for i in p["x"].tolist()) == list(range(7))
    assert [len(p["x"]) for p in pieces] == [3, 2, 2]
    assert all(p["words"] == [words[i] for i in p["x"].tolist()] for p in pieces)
    assert all(p["scale"] is scale for p in pieces)
    assert len(dealt((x, x), 20)) == 7
    assert [len(p[1]) for p in dealt((x, torch.ones(7)), 3, {".1"})] == [7, 7, 7]
    assert len(dealt((x[:1], x[:1]), 4)) == len(dealt((x, x), 1)) == 1
    again = dealt((torch.arange(7), x), 3)
    assert [p["x"].tolist() for p in pieces] == [p[0].tolist() for p in again]


@pytest.mark.parametrize(("batch", "most"), [(120, 1.4), (5, 2.5)])
def test_sorted_data_have_the_error_of_shuffled_ones_at_least(batch, most):
    # Four classes of very different losses. In turn they would be a stratified sample, whose
    # scatter is that within classes only: here a quarter of the right one. Batches of one class
    # are alike inside, so that dealing whole ones out says too much rather.
    def data(k):
        g = torch.Generator().manual_seed(k)
        y = torch.randint(0, 4, (120,), generator=g)
        noise = torch.randn(120, 1, generator=g, dtype=torch.float64)
        return (y[:, None] + 0.15 * noise), torch.zeros(120, 1, dtype=torch.float64)

    net = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.ones_(net.weight)
    stated, values = [], []
    for k in range(40):
        x, y = data(k)
        x = x[x[:, 0].argsort()]
        objective = sk.Objective(
            net, torch.nn.MSELoss(), list(zip(x.split(batch), y.split(batch), strict=True))
        )
        weights, losses = objective.grouped_value(8)
        stated.append(group_error(losses, weights)[0])
        values.append(float(losses.sum()))
    ratio = np.sqrt(np.mean(np.square(stated))) / np.std(values, ddof=1)
    assert 0.7 < ratio < most


REQUESTS = [
    "hessian_trace",
    "hessian_trace:method=hutchinson",
    "top_eigenvalues:k=1",
    "frobenius_norm",
    "stable_rank",
    "effective_rank",
    "negative_mass",
    "renyi_sharpness",
    "log_det",
    "renyi_sharpness_per_layer",
]


def test_no_error_without_groups():
    few = sk.Objective(seeded(mlp), nn.CrossEntropyLoss(), [(X[:3], Y[:3])])
    many = sk.Objective(seeded(mlp), nn.CrossEntropyLoss(), [(X, Y)])
    for objective, num_groups in ((few, 8), (many, 0)):
        for score in sk.score(objective, REQUESTS, num_groups=num_groups):
            assert score.estimate.data_error is None, score.measure
            assert score.estimate.data_draws == ()
    for score in sk.score(many, REQUESTS, num_groups=4):
        assert score.estimate.data_error > 0, score.measure
    for num_groups in (1, 3, -2):
        with pytest.raises(SettingsError, match="Expected `num_groups`"):
            sk.score(many, REQUESTS, num_groups=num_groups)


def test_a_loss_that_does_not_add_up_is_not_cut():
    def spread(model, batch):
        out = model(batch[0])
        return (out - out.mean(dim=0)).square().sum(), len(out)

    data = [(normal(4, 3, seed=s), torch.zeros(4)) for s in range(2)]
    objective = sk.Objective.from_batch_loss(nn.Linear(3, 2).double(), spread, data)
    V = normal(objective.space.dim, 1)
    found = objective.grouped_forms(V, [V], num_groups=8)
    assert int((found.weights > 0).sum()) == 2
    whole = float(V[:, 0] @ objective.hvp(V[:, 0]))
    assert float(found.forms.sum()) == pytest.approx(whole, rel=1e-12)
    assert sk.score(objective, ["hessian_trace"])[0].estimate.data_error is None


def test_group_error_is_that_of_a_weighted_mean():
    values = torch.tensor([3.0, 5.0, 4.0, 8.0, 6.0], dtype=torch.float64)
    error, draws = group_error(values / 5, torch.full((5,), 0.2, dtype=torch.float64))
    assert error == pytest.approx(float(values.std()) / math.sqrt(5))
    assert draws == pytest.approx(values.tolist())
    # Unequal groups of a constant do not differ, and empty ones are no groups.
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    error, draws = group_error(7 * weights, weights)
    assert error < 1e-14
    assert draws == pytest.approx([7.0] * 4)
    assert group_error(values[:4], torch.tensor([1.0, 1.0, 1.0, 0.0])) is None


def test_errors_and_pseudo_values_agree():
    objective = sk.Objective(seeded(mlp), nn.CrossEntropyLoss(), [(X, Y)])
    for score in sk.score(objective, REQUESTS[:-1], num_groups=5):
        e = score.estimate
        draws = np.array(e.data_draws)
        assert draws.mean() == pytest.approx(e.value, rel=1e-9), score.measure
        assert draws.std(ddof=1) / math.sqrt(5) == pytest.approx(e.data_error, rel=1e-9)
        low, high = e.interval(0.95, data=True)
        assert high - low > 2 * 2.77 * e.data_error  # Student's t with 4 degrees of freedom


# -- first-order changes -----------------------------------------------------------------


class Quadratics(nn.Module):
    """The mean of w.S_n w / 2 over examples S_n with weights c_n."""

    def __init__(self, dim):
        super().__init__()
        self.w = nn.Parameter(torch.ones(dim, dtype=torch.float64))


def mean_of(matrices, weights):
    def loss(model, batch):
        S, c = batch[0][0], float(batch[1])
        return 0.5 * c * model.w @ S @ model.w, c

    data = [(S[None], torch.tensor([c])) for S, c in zip(matrices, weights, strict=True)]
    return sk.Objective.from_batch_loss(Quadratics(len(matrices[0])), loss, data)


def symmetric(n, seed):
    A = normal(n, n, seed=seed)
    return (A + A.T) / 2


def matrices_with(eigenvalues, count=6, size=1e-4):
    n = len(eigenvalues)
    Q = torch.linalg.qr(normal(n, n, seed=50))[0]
    A = Q @ torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    return [A + size * symmetric(n, 60 + i) for i in range(count)]


WEIGHTS = [1.0, 2.0, 1.5, 1.0, 3.0, 0.5]
MIXED = [5.0, 3.0, -2.0, 1.2, -0.8, 0.5, 0.3]
LONG = [8.0, -6.5, 5.0, 4.1, -3.3, 2.7, 2.2, -1.8, 1.4, 1.1, -0.9, 0.7, 0.55, 0.45, -0.35]
CHANGES = [
    "hessian_trace",
    "top_eigenvalues:k=1",
    "top_eigenvalues:k=1,which=smallest",
    "frobenius_norm",
    "stable_rank",
    "effective_rank",
    "negative_mass",
    *(f"renyi_sharpness:alpha={a}" for a in ("0.5", "1", "1.5", "2", "inf")),
    "renyi_sharpness:spectrum=signed",
    "renyi_sharpness:spectrum=clipped",
    "renyi_sharpness:spectrum=clipped,alpha=1",
    "renyi_sharpness:spectrum=clipped,alpha=inf",
    "log_det",
    "log_det:tau=7,spectrum=signed",
]


@functools.cache
def measured(spectrum, group, step):
    weights = list(WEIGHTS)
    if group is not None:
        weights[group] *= 1 + step
    objective = mean_of(matrices_with(spectrum), weights)
    return {r: s.estimate for r, s in zip(CHANGES, sk.score(objective, CHANGES, num_groups=6 if group is None else 0), strict=True)}  # fmt: skip


@pytest.mark.parametrize("spectrum", [tuple(MIXED), tuple(LONG)], ids=len)
@pytest.mark.parametrize("request_", CHANGES)
def test_what_a_group_weighs_moves_the_number_as_predicted(request_, spectrum):
    # A pseudo-value is the number plus G times its derivative by the group's log weight.
    estimate = measured(spectrum, None, 0.0)[request_]
    predicted = (np.array(estimate.data_draws) - estimate.value) / 6
    places = torch.randperm(6, generator=torch.Generator().manual_seed(DEAL))
    for group in (0, 4):
        moved = [measured(spectrum, group, s)[request_].value for s in (0.01, -0.01)]
        change = (moved[0] - moved[1]) / 0.02
        scale = max(abs(predicted).max(), 1e-7)
        assert abs(change - predicted[places[group]]) < 0.02 * scale, group


@pytest.mark.parametrize("bulk", [0.0, 0.2, 1.0])
def test_scaling_groups_scales_numbers_of_large_matrices(bulk):
    # Each group's matrix is a multiple of one, with many equal eigenvalues: whatever the
    # probes are, numbers of degree one move along and shapes do not move.
    n = 60
    A = torch.diag(torch.tensor([9.0, 6.0, -4.0, *[bulk] * (n - 3)], dtype=torch.float64))
    factors = [0.7, 1.2, 1.1, 0.9, 1.3, 0.8]
    objective = mean_of([f * A for f in factors], [1.0] * 6)
    requests = [
        "hessian_trace", "frobenius_norm", "stable_rank", "effective_rank",
        "negative_mass", "renyi_sharpness", "renyi_sharpness:spectrum=signed",
    ]  # fmt: skip
    estimates = [s.estimate for s in sk.score(objective, requests, num_groups=6)]
    relative = float(np.std(factors, ddof=1) / math.sqrt(6) / np.mean(factors))
    for e in estimates[:2]:
        assert e.data_error == pytest.approx(relative * abs(e.value), rel=0.05)
    for e in estimates[2:]:
        assert e.data_error < 0.03 * relative * max(abs(e.value), 1)


# -- calibration -------------------------------------------------------------------------

CALIBRATED = [
    "hessian_trace",
    "hessian_trace:method=hutchinson",
    "top_eigenvalues:k=1",
    "frobenius_norm",
    "stable_rank",
    "effective_rank",
    "negative_mass",
    "renyi_sharpness",
    "renyi_sharpness:spectrum=ggn",
    "renyi_sharpness:spectrum=signed",
    "renyi_sharpness:alpha=inf",
    "log_det",
]
SETS, EXAMPLES = 120, 128


def population(n, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=g, dtype=torch.float64)
    y = (2 * torch.rand(n, generator=g)).long()
    return x, torch.where(x[:, 0] > 0.3, torch.zeros_like(y), y)


@pytest.fixture(scope="module")
def samples():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False)
        ).double()

    def scores(n, seed, num_groups):
        objective = sk.Objective(model, nn.CrossEntropyLoss(), population(n, seed))
        return [s.estimate for s in sk.score(objective, CALIBRATED, seed=seed % 97, num_groups=num_groups)]  # fmt: skip

    truth = [e.value for e in scores(50_000, 10**6, 0)]
    rows = [scores(EXAMPLES, seed, 8) for seed in range(SETS)]
    values = np.array([[e.value for e in row] for row in rows])
    errors = np.array([[e.data_error for e in row] for row in rows])
    return np.array(truth), values, errors


@pytest.mark.slow
@pytest.mark.parametrize("request_", CALIBRATED)
def test_data_errors_are_calibrated(samples, request_):
    i = CALIBRATED.index(request_)
    truth, values, errors = (a[..., i] for a in samples)
    # Eight groups give an error with seven degrees of freedom: compare mean squares.
    spread = values.std() / math.sqrt(float((errors**2).mean()))
    z = (values - truth) / errors
    print(f"{request_}: {spread:.2f}, z {z.mean():.2f} +- {z.std():.2f}")
    assert 0.8 < spread < 1.25
    assert 0.8 < z.std() / math.sqrt(7 / 5) < 1.3
    assert abs(z.mean()) < 0.7  # a sample's spectrum is wider than the population's


@pytest.mark.parametrize("steps", [7, 12])
def test_slopes_of_a_run_that_ended_by_itself_are_exact(steps):
    eigenvalues = torch.tensor([3.0, 2.0, -1.0, 0.5, 4.0, -2.5, 1.5], dtype=torch.float64)
    A = SymmetricOperator.wrap(torch.diag(eigenvalues))
    nothing = Locked(torch.zeros(7, 0, dtype=torch.float64), np.zeros(0), np.zeros(0), 1e-14, 0)
    generator = torch.Generator().manual_seed(0)
    run = deflated_quadrature(A, nothing, num_probes=2, num_steps=steps, generator=generator)
    z = run.bases[0][0] * math.sqrt(run.masses[0])
    found = run.bases[0].T @ torch.as_tensor(run.slopes(np.sign, 0))
    assert torch.allclose(found, eigenvalues.sign() * z, atol=1e-9)
