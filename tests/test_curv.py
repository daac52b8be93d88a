"""Relative and normalized flatness, Adam's relatives and the edge of stability."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from oracles_curv import dense, searched_scales, weights
from torch import nn

import sharpkit as sk
from sharpkit.analysis import Analysis
from sharpkit.errors import MeasureError, SettingsError, ShapeError
from sharpkit.estimators import (
    Krylov,
    block_sums,
    block_traces,
    deflation,
    exact_diagonal,
    lock,
)
from sharpkit.measures import get
from sharpkit.measures._scales import best_scales
from sharpkit.measures.edge_of_stability import sgd_threshold
from sharpkit.operators import SymmetricOperator, congruent, gram_root
from sharpkit.testing import check_operator, symmetric_pair

CE = nn.CrossEntropyLoss()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double().eval()


def labels(n, count, seed=1):
    return torch.randint(n, (count,), generator=torch.Generator().manual_seed(seed))


def measure(name, objective, seed=0, num_groups=0, **settings):
    return get(name)(Analysis(objective, seed=seed, num_groups=num_groups), **settings)


def wide(seed=0):
    """A network whose layers are too large for exact traces with few probes."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 12)), seed)
    return sk.Objective(model, CE, (normal(40, 8, seed=seed + 1), labels(12, 40)))


def fitted():
    """The same near a minimum, where the blocks of the Hessian are positive."""
    model = wide().model
    x = normal(40, 8, seed=1)
    with torch.no_grad():
        targets = model(x) + 0.1 * normal(40, 12, seed=2)
    return sk.Objective(model, nn.MSELoss(), (x, targets))


def z_scores(truth, estimates):
    return np.array([(e.value - truth) / e.probe_error for e in estimates])


def assert_calibrated(z):
    assert abs(z.mean()) < 4 / math.sqrt(len(z)), f"mean {z.mean():.2f}"
    slack = 4 / math.sqrt(2 * len(z))
    assert 1 - slack < z.std() < 1 + slack + 0.1, f"spread {z.std():.2f}"


# -- the operator ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 5), 0), ((5, 3), 1), ((3, 2, 2, 2), 0), ((7,), 0)]
)
def test_the_gram_operator_is_the_dense_one(shape, axis):
    W, size = normal(*shape), math.prod(shape)
    A = normal(size, size, seed=1)
    A = A + A.T
    rows = (W if W.ndim > 1 else W[None]).movedim(axis, 0).flatten(1)
    C = rows @ rows.T
    # Where each entry of the neurons-first order stands in the weight's own.
    index = torch.arange(size).reshape(W.shape if W.ndim > 1 else (1, size))
    order = index.movedim(axis, 0).flatten()
    values, Q = torch.linalg.eigh(C)
    root = (Q * values.clamp(min=0).sqrt()) @ Q.T
    T = torch.zeros(size, size).double()
    T[order[:, None], order] = torch.kron(root, torch.eye(rows.shape[1]).double())
    operator = congruent(SymmetricOperator.wrap(A), gram_root(W, axis=axis))
    check_operator(operator, T @ A @ T)


def test_gram_roots_refuse_what_they_cannot_map():
    root = gram_root(normal(2, 3))
    with pytest.raises(ShapeError, match=r"\(6, K\)"):
        root(torch.zeros(5, 1))
    with pytest.raises(ShapeError, match="2 axes"):
        gram_root(normal(2, 3), axis=2)
    with pytest.raises(sk.SharpkitError, match="finite"):
        gram_root(torch.full((2, 2), math.nan))


# -- relative flatness -------------------------------------------------------------------


def double_loop(H, W):
    """Sum <w_s, w_t> tr H_st over all pairs, for H [out, in, out, in]."""
    pairs = itertools.product(range(len(W)), repeat=2)
    return sum((W[s] @ W[t]).item() * H[s, :, t, :].trace().item() for s, t in pairs)


@pytest.mark.parametrize("kind", ["linear", "conv", "transposed"])
def test_relative_flatness_is_the_double_loop(kind):
    build = {
        "linear": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        "conv": lambda: nn.Sequential(
            nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
        ),
        "transposed": lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)
        ),
    }[kind]
    x = {"linear": normal(9, 4), "conv": normal(9, 1, 3, 3), "transposed": normal(9, 2, 2, 2)}[kind]
    objective = sk.Objective(seeded(build), CE, (x, labels(3, 9)))
    _, weight, here = weights(objective)[0]
    axis = 1 if kind == "transposed" else 0
    shape = weight.shape
    H = dense(objective)[here, here].reshape(*shape, *shape)
    H = H.movedim((axis, axis + len(shape)), (0, len(shape)))
    W = weight.movedim(axis, 0).flatten(1)
    H = H.reshape(*W.shape, *W.shape)
    found = measure("relative_flatness", objective, layer="0.weight")
    assert found.value == pytest.approx(double_loop(H, W), rel=1e-10)
    assert found.error_kind == "rounding"
    largest = sum(
        w.square().sum().item() * torch.linalg.eigvalsh(H[s, :, s, :])[-1].item()
        for s, w in enumerate(W)
    )
    found = measure("relative_flatness_max", objective, layer="0.weight")
    assert abs(found.value - largest) <= found.probe_error + 1e-9
    assert found.converged


def linear_pair(left, right):
    """Two networks of one function: C W_1 and W_2 C^-1 for W_1 and W_2, or W_1 A and so on."""
    build = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False), nn.Linear(3, 3), nn.Tanh()
    )
    model = seeded(build)
    other = copy.deepcopy(model)
    with torch.no_grad():
        if left is not None:  # of layer 1
            other[1].weight.copy_(left @ model[1].weight)
            other[2].weight.copy_(model[2].weight @ torch.linalg.inv(left))
        if right is not None:
            other[1].weight.copy_(model[1].weight @ right)
            other[0].weight.copy_(torch.linalg.inv(right) @ model[0].weight)
    data = (normal(12, 4), normal(12, 3, seed=2))
    return [sk.Objective(m, nn.MSELoss(), data) for m in (model, other)]


def test_relative_flatness_is_invariant_from_the_left_only():
    left, right = normal(3, 3, seed=5), normal(5, 5, seed=6)
    rotation, scales = torch.linalg.qr(right)[0], torch.diag(torch.tensor([2.0, 0.5, 3, 1, 1]))
    cases = [
        ("relative_flatness", {}, (left, None), True),
        ("relative_flatness", {}, (None, rotation), True),
        ("relative_flatness", {}, (None, 3 * torch.eye(5).double()), True),
        ("relative_flatness", {}, (None, scales.double()), False),
        ("relative_flatness", {}, (None, right), False),
        ("relative_flatness_max", {"form": "joint"}, (left, None), True),
        (
            "relative_flatness_max",
            {},
            (torch.diag(torch.tensor([2.0, 0.1, 5])).double(), None),
            True,
        ),
        ("relative_flatness_max", {}, (left, None), False),
    ]
    for name, settings, (a, b), invariant in cases:
        first, second = (
            measure(name, o, layer="1.weight", **settings).value for o in linear_pair(a, b)
        )
        assert (abs(first - second) < 1e-5 * abs(first)) == invariant, (name, settings)


def test_relative_flatness_ignores_the_scale_of_the_layers_own_neurons():
    before, after = symmetric_pair("node_scale", 1)
    for layer, same in (("0.weight", True), ("4.weight", False)):
        a, b = (measure("relative_flatness", o, layer=layer).value for o in (before, after))
        assert (abs(a - b) < 1e-9 * abs(a)) == same


def test_relative_flatness_is_the_rise_under_multiplicative_noise():
    objective = wide()
    weight = weights(objective)[-1][1]
    truth = measure("relative_flatness", objective, num_probes=400).value
    operator = sk.hessian(objective.restrict("2.weight"))
    g = torch.Generator().manual_seed(0)
    forms = []
    for _ in range(400):
        v = (weight @ torch.randn(30, 30, generator=g, dtype=torch.float64)).flatten()
        forms.append((v @ (operator @ v)).item())
    assert abs(np.mean(forms) - truth) < 4 * np.std(forms) / math.sqrt(len(forms))


def test_relative_flatness_of_all_layers_is_the_sum_of_its_parts():
    objective = wide()
    every = measure("relative_flatness", objective, layer="*", num_groups=8)
    assert [p.label for p in every.parts] == ["0.weight", "2.weight"]
    assert every.value == pytest.approx(sum(p.value for p in every.parts), rel=1e-12)
    assert every.data_error > 0
    assert np.mean(every.data_draws) == pytest.approx(every.value, rel=1e-9)
    last = measure("relative_flatness", objective, num_groups=8)
    assert last.value == every.parts[1].value
    assert last.data_error is not None


def flatness_runs(count, **settings):
    objective = wide()
    runs = [
        measure("relative_flatness", objective, seed=seed, num_probes=8, **settings)
        for seed in range(count)
    ]
    truth = 0.0
    for name, weight, _ in weights(objective):
        if settings or name == "2.weight":
            operator = sk.hessian(objective.restrict(name))
            exact = congruent(operator, gram_root(weight))
            truth += exact_diagonal(exact).values.sum().item()
    return z_scores(truth, runs)


def test_errors_of_relative_flatness_are_calibrated():
    assert_calibrated(flatness_runs(40))


@pytest.mark.slow
def test_errors_of_relative_flatness_are_calibrated_over_many_seeds():
    assert_calibrated(flatness_runs(200))
    assert_calibrated(flatness_runs(60, layer="*"))


def test_a_target_error_is_met_or_said_to_be_missed():
    objective = wide()
    met = measure("relative_flatness", objective, target_error=0.05)
    assert met.probe_error <= 0.05 * met.value * 1.001
    missed = measure("relative_flatness", objective, target_error=1e-6, max_probes=20)
    assert not missed.converged
    assert missed.notes[0].startswith("2.weight: The target error")


# -- by largest eigenvalues --------------------------------------------------------------


def neuron_terms(objective):
    _, W, here = weights(objective)[0]
    H = dense(objective)[here, here].reshape(*W.shape, *W.shape)
    return [
        w.square().sum().item() * torch.linalg.eigvalsh(H[s, :, s, :])[-1].item()
        for s, w in enumerate(W)
    ]


def sampled_runs(count):
    objective = wide()
    settings = {"layer": "0.weight", "max_neurons": 12}
    runs = [measure("relative_flatness_max", objective, s, **settings) for s in range(count)]
    assert all(e.error_kind == "stderr" and e.dof == 11 for e in runs)
    return z_scores(sum(neuron_terms(objective)), runs)


def test_a_sample_of_neurons_has_the_error_of_a_sample():
    z = sampled_runs(12)
    assert abs(z.mean()) < 4 / math.sqrt(len(z))
    assert 0.4 < z.std() < 2


@pytest.mark.slow
def test_a_sample_of_neurons_is_calibrated_over_many_seeds():
    z = sampled_runs(200)
    # Of a skewed population: Student's t with 11 degrees of freedom, and a little more.
    assert abs(z.mean()) < 4 / math.sqrt(len(z)) + 0.1
    assert 0.85 < z.std() < 1.35


def test_the_joint_form_is_the_top_eigenvalue():
    objective = wide()
    _, weight, here = weights(objective)[-1]
    C = torch.kron(weight @ weight.T, torch.eye(30).double())
    top = torch.linalg.eigvals(C @ dense(objective)[here, here]).real.max().item()
    found = measure("relative_flatness_max", objective, form="joint", num_groups=8)
    assert abs(found.value - top) <= found.probe_error
    assert found.converged
    assert found.data_error > 0


def test_samples_of_several_layers_keep_their_few_draws():
    found = measure("relative_flatness_max", wide(), layer="*", max_neurons=3)
    assert [p.dof for p in found.parts] == [2, 2]
    variances = [p.probe_error**2 for p in found.parts]
    dof = sum(variances) ** 2 / sum(v**2 / 2 for v in variances)
    assert found.dof == pytest.approx(dof, rel=1e-12)
    assert 2 <= found.dof <= 4
    # One layer sampled, one whole: the draws are the sampled one's, or a little more.
    mixed = measure("relative_flatness_max", wide(), layer="*", max_neurons=12)
    assert [p.dof for p in mixed.parts] == [11, None]
    assert mixed.dof == pytest.approx(11, rel=0.01)


def test_all_neurons_of_all_layers():
    objective = wide()
    found = measure("relative_flatness_max", objective, layer="*")
    assert found.error_kind == "bound"
    assert abs(found.parts[0].value - sum(neuron_terms(objective))) <= found.parts[0].probe_error
    assert found.value == pytest.approx(sum(p.value for p in found.parts), rel=1e-12)


# -- normalized flatness -----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_alternating_scales_reach_the_global_minimum(seed):
    h, q = normal(6, 4, seed=seed).exp(), (3 * normal(6, 4, seed=seed + 50)).exp()
    if seed % 2:  # zeros here and there, as for h that came out negative
        h, q = h * (normal(6, 4, seed=9) > -0.7), q * (normal(6, 4, seed=10) > -1)
    truth = searched_scales(h, q)
    found = best_scales(h, q)
    assert found.value == pytest.approx(truth, rel=1e-7)
    assert abs(found.value - truth) <= found.remaining + 1e-8 * truth
    elsewhere = best_scales(h, q, start=(5 * normal(4, seed=77)).exp())
    assert elsewhere.value == pytest.approx(found.value, rel=1e-8)
    a, b = found.rows, found.columns
    at = (a[:, None] * b * h + q / (a[:, None] * b)).sum().item() / 2
    assert at == pytest.approx(found.value, rel=1e-8)


def test_scales_without_a_minimum_reach_the_infimum():
    h = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 3.0]]).double()
    q = torch.tensor([[1.0, 5.0], [7.0, 9.0], [0.0, 0.0]]).double()
    # Rows two and three can be had for nothing, and then so can column two.
    assert best_scales(h, q).value == pytest.approx(1.0, rel=1e-12)
    assert best_scales(torch.zeros(2, 2).double(), torch.ones(2, 2).double()).value == 0.0
    # Triangular: only the diagonal costs, as the corner is bought off for ever.
    triangle = best_scales(torch.eye(2).double(), torch.tensor([[1.0, 1.0], [0.0, 1.0]]).double())
    assert triangle.value - 2.0 <= triangle.remaining
    assert triangle.value >= 2.0
    assert triangle.value < 2.01


def test_normalized_flatness_by_channels_and_free():
    build = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )
    objective = sk.Objective(seeded(build), CE, (normal(9, 2, 3, 3), labels(2, 9)))
    h = dense(objective).diagonal().clamp(min=0)
    free = channels = 0.0
    for _, w, here in weights(objective):
        free += (w.flatten().abs() * h[here].sqrt()).sum().item()
        shape = (*w.shape[:2], -1)
        sums = [x.reshape(shape).sum(dim=2) for x in (h[here], w.square())]
        channels += searched_scales(*sums)
    found = measure("normalized_flatness", objective)
    assert found.value == pytest.approx(channels, rel=1e-7)
    assert found.value == pytest.approx(sum(p.value for p in found.parts), rel=1e-12)
    single = measure("normalized_flatness", objective, scales="free")
    assert single.value == pytest.approx(free, rel=1e-9)
    assert single.value < found.value


def noisy_flatness(count, scales, objective):
    exact = measure("normalized_flatness", objective, method="exact", scales=scales)
    covered = 0
    for seed in range(count):
        for num_probes in (16, 128):
            settings = {"method": "hutchinson", "num_probes": num_probes, "scales": scales}
            noisy = measure("normalized_flatness", objective, seed, **settings)
            covered += abs(noisy.value - exact.value) <= noisy.probe_error
    return covered / (2 * count)


@pytest.mark.parametrize("scales", ["rows_columns", "free"])
def test_the_bound_of_normalized_flatness_holds(scales):
    assert noisy_flatness(3, scales, fitted()) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["rows_columns", "free"])
def test_the_bound_of_normalized_flatness_holds_over_seeds(scales):
    for objective in (fitted(), wide()):
        assert noisy_flatness(30, scales, objective) >= 0.95


def test_normalized_flatness_of_the_gauss_newton_matrix():
    objective = wide()
    exact = measure("normalized_flatness", objective, method="ggn")
    assert exact.details["negative_share"] == 0
    assert exact.converged
    assert exact.probe_error < 1e-6 * exact.value


# -- Adam and its relatives --------------------------------------------------------------


class DiagonalNetwork(nn.Module):
    """theta = (u, v), the function z . (u*u - v*v)."""

    def __init__(self, u, v):
        super().__init__()
        self.u, self.v = nn.Parameter(u), nn.Parameter(v)

    def forward(self, z):
        return z @ (self.u.square() - self.v.square())


def on_the_manifold(dim=12, examples=7):
    u, v = normal(dim), normal(dim, seed=1)
    z = normal(examples, dim, seed=2).sign()
    model = DiagonalNetwork(u, v)
    half = lambda outputs, targets: 0.5 * (outputs - targets).square().mean()  # noqa: E731
    with torch.no_grad():
        y = model(z)
    return sk.Objective(model, half, (z, y)), torch.cat([u, v])


def test_adams_relatives_on_the_diagonal_linear_network():
    objective, theta = on_the_manifold()
    h = 4 * theta.square()
    assert dense(objective).diagonal() == pytest.approx(h, rel=1e-12)
    kappa = 0.3 / math.sqrt(0.25)
    roots = 2 * theta.abs()
    expected = {
        ("hessian_trace", ()): h.sum().item(),
        ("adam_sharpness", ()): roots.sum().item(),
        ("adam_sharpness", (("epsilon", 0.3), ("noise_scale", 0.25))): (
            (roots - kappa * (roots / kappa + 1).log()).sum().item()
        ),
        ("adame_sharpness", (("exponent", 0.5),)): roots.sum().item(),
        ("adame_sharpness", (("exponent", 0.0),)): h.sum().item(),
        ("adame_sharpness", (("exponent", 0.9),)): (4**0.1 * theta.abs() ** 0.2).sum().item(),
        ("adam_mini_sharpness", ()): sum(math.sqrt(12 * p.sum().item()) for p in h.split(12)),
        ("adalayer_sharpness", ()): sum(math.sqrt(12 * p.sum().item()) for p in h.split(12)),
        ("adalayer_sharpness", (("by", "layer"),)): math.sqrt(24 * h.sum().item()),
    }
    for (name, settings), value in expected.items():
        found = measure(name, objective, **dict(settings))
        assert found.value == pytest.approx(value, rel=1e-9), (name, settings)
        # At zero residual the Gauss-Newton matrix is the Hessian.
        if name != "hessian_trace":
            criterion = sk.Objective(objective.model, nn.MSELoss(), objective_data(objective))
            found = measure(name, criterion, method="ggn", **dict(settings))
            exact = measure(name, criterion, method="exact", **dict(settings))
            assert found.value == pytest.approx(exact.value, rel=1e-9), (name, settings)


def objective_data(objective):
    (batch,) = list(objective._evaluator._data)
    return batch


def test_single_entries_as_blocks_are_adams():
    # Rows of one entry.
    model = seeded(lambda: nn.Sequential(nn.Linear(1, 9, bias=False), nn.Tanh(), nn.Flatten()))
    objective = sk.Objective(model, nn.MSELoss(), (normal(6, 1), normal(6, 9, seed=1)))
    mini, adam = (measure(f"{n}_sharpness", objective).value for n in ("adam_mini", "adam"))
    assert mini == pytest.approx(adam, rel=1e-12)
    whole = measure("adam_mini_sharpness", objective, partition="tensors").value
    trace = measure("hessian_trace", objective).value
    assert whole == pytest.approx(math.sqrt(9 * trace), rel=1e-12)


def test_epsilon_turns_adam_into_sgd():
    objective, theta = on_the_manifold()
    trace = 4 * theta.square().sum().item()
    for kappa in (1e4, 1e7):
        found = measure("adam_sharpness", objective, epsilon=kappa).value
        assert found == pytest.approx(trace / (2 * kappa), rel=2 / kappa * 10)
    small = measure("adam_sharpness", objective, epsilon=1e-12).value
    assert small == pytest.approx(measure("adam_sharpness", objective).value, rel=1e-9)
    scaled = measure("adam_sharpness", objective, epsilon=0.2, noise_scale=4.0).value
    assert scaled == pytest.approx(measure("adam_sharpness", objective, epsilon=0.1).value)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        scores = torch.softmax(self.q_proj(x) @ self.k_proj(x).transpose(1, 2), dim=-1)
        return self.out(scores @ x).mean(dim=1)


def test_heads_share_a_step():
    objective = sk.Objective(seeded(Attention), CE, (normal(7, 3, 4), labels(2, 7)))
    h, total, start = dense(objective).diagonal(), 0.0, 0
    for rows, size in ((2, 24), (2, 24), (2, 8), (1, 2)):  # q, k by heads; out by rows; bias
        for block in h[start : start + size].chunk(rows):
            total += math.sqrt(len(block) * max(block.sum().item(), 0))
        start += size
    found = measure("adam_mini_sharpness", objective, method="exact", heads=2)
    assert found.value == pytest.approx(total, rel=1e-9)
    assert found.details["num_blocks"] == 7
    with pytest.raises(SettingsError, match="to divide the rows of"):
        measure("adam_mini_sharpness", objective, heads=4)
    with pytest.raises(SettingsError, match="matches none"):
        measure("adam_mini_sharpness", objective, heads=2, head_weights="*.query.weight")


def block_runs(count):
    objective = wide()
    h = dense(objective).diagonal()
    cuts = [(240, 30), (30, 1), (360, 12), (12, 1)]
    truth, z, largest = block_sums(h, cuts), [], []
    direction = normal(len(truth), seed=4)
    for seed in range(count):
        traces = Analysis(objective, seed=seed, num_groups=0).row_traces(num_probes=8)
        z.append(((traces.values - truth) / traces.errors).numpy())
        bound = (direction.square() * traces.largest_variances).sum().sqrt()
        largest.append(float((traces.values - truth) @ direction / bound))
    return np.array(z), np.array(largest)


def check_blocks(count):
    z, largest = block_runs(count)
    assert abs(z.mean()) < 0.15
    assert 0.85 < z.std() < 1.15
    # Of a random weighted sum only a bound of the error is known.
    assert np.std(largest) < 1 + 4 / math.sqrt(2 * count)
    assert abs(np.mean(largest)) < 4 / math.sqrt(count)


def test_block_traces_are_unbiased_and_their_errors_calibrated():
    check_blocks(30)


@pytest.mark.slow
def test_block_traces_are_calibrated_over_many_seeds():
    check_blocks(300)


def test_loosely_known_pairs_leave_block_traces_unbiased(monkeypatch):
    monkeypatch.setattr(deflation, "LOCK_SHARE", 0.6)
    Q = torch.linalg.qr(normal(40, 40))[0]
    A = SymmetricOperator.wrap((Q * torch.logspace(1, -2, 40, dtype=torch.float64)) @ Q.T)
    krylov = Krylov(A, torch.Generator().manual_seed(0))
    for _ in range(3):
        krylov.step()
    locked = lock(krylov, 3)
    assert locked.size > 0
    truth = block_sums(A.to_dense().diagonal(), [(40, 8)])
    g = torch.Generator().manual_seed(1)
    found = block_traces(A, locked, [(40, 8)], num_probes=6000, generator=g)
    assert ((found.values - truth) / found.errors).abs().max() < 4
    assert (block_sums(locked.cross, [(40, 8)]) / found.errors).abs().max() > 8


def test_merged_blocks_are_unions():
    traces = Analysis(wide(), num_groups=0).row_traces(num_probes=4)
    labels = torch.tensor([0] * 31 + [1] * 13)
    merged = traces.merged(labels)
    assert merged.sizes.tolist() == [270, 372]
    assert merged.values.sum().item() == pytest.approx(traces.values.sum().item(), rel=1e-12)
    assert merged.samples[:, 0] == pytest.approx(traces.samples[:, :31].sum(dim=1))


def shared_coverage(name, count, objective, **settings):
    exact = measure(name, objective, method="exact", **settings).value
    runs = [
        measure(name, objective, seed, method="hutchinson", num_probes=probes, **settings)
        for seed in range(count)
        for probes in (4, 32)
    ]
    return np.mean([abs(e.value - exact) <= e.probe_error for e in runs]), runs


@pytest.mark.parametrize("name", ["adam_mini_sharpness", "adalayer_sharpness"])
def test_the_bounds_of_shared_steps_hold(name):
    share, runs = shared_coverage(name, 5, fitted())
    assert share == 1.0
    assert runs[-1].converged
    assert runs[-1].probe_error < 0.1 * runs[-1].value


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam_mini_sharpness", "adalayer_sharpness"])
def test_the_bounds_of_shared_steps_hold_over_seeds(name):
    assert shared_coverage(name, 60, fitted())[0] >= 0.95
    assert shared_coverage(name, 60, wide())[0] >= 0.95  # blocks near zero and below


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adame_sharpness", {"exponent": 0.25}),
        ("adame_sharpness", {"exponent": 0.75}),
        ("adam_sharpness", {"epsilon": 0.01}),
        ("adam_sharpness", {"epsilon": 0.3}),
    ],
)
def test_the_bounds_of_powers_hold_over_seeds(name, settings):
    for objective in (fitted(), wide()):
        assert shared_coverage(name, 40, objective, **settings)[0] >= 0.95


def test_negative_blocks_are_said():
    def upside_down(outputs, targets):
        return -(outputs - targets).square().mean()

    model = seeded(lambda: nn.Linear(3, 2))
    objective = sk.Objective(model, upside_down, (normal(6, 3), normal(6, 2, seed=1)))
    for name in ("adam_mini_sharpness", "adalayer_sharpness", "adame_sharpness"):
        found = measure(name, objective)
        assert found.value == 0
        assert found.details["negative_share"] == 1
        assert "defined at minimisers" in found.notes[0]
    found = measure("normalized_flatness", objective)
    assert found.value == 0
    assert "defined at minimisers" in found.notes[0]


# -- the edge of stability ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "nesterov", "dampening"),
    [(0.0, False, 0.0), (0.9, False, 0.0), (0.9, False, 0.5), (0.9, True, 0.0), (0.5, True, 0.0)],
)
def test_thresholds_are_where_torchs_steps_turn_unstable(momentum, nesterov, dampening):
    options = {"momentum": momentum, "nesterov": nesterov, "dampening": dampening}
    edge = sgd_threshold(0.1, **options)
    sizes = {}
    for factor in (0.99, 1.01):
        x = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=0.1, **options)
        for _ in range(3000):
            optimizer.zero_grad()
            (0.5 * factor * edge * x.square()).sum().backward()
            optimizer.step()
        sizes[factor] = abs(x.item())
    assert sizes[0.99] < 1e-3
    assert sizes[1.01] > 1e3


def bowl():
    """A quadratic in one weight vector with eigenvalues 4 and 1 (mean squares, no half)."""
    model = seeded(lambda: nn.Linear(2, 1, bias=False))
    data = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double(), torch.zeros(2, 1).double())
    return model, sk.Objective(model, nn.MSELoss(), data)


def edge(objective, optimizer=None, **settings):
    analysis = Analysis(objective, num_groups=0, optimizer=optimizer)
    return get("edge_of_stability")(analysis, **settings)


def test_the_edge_of_stability_of_sgd():
    model, objective = bowl()
    plain = edge(objective, learning_rate=0.1)
    assert plain.value == pytest.approx(4 * 0.1 / 2, rel=1e-9)
    assert plain.details["threshold"] == pytest.approx(20)
    cases = [
        ({}, 0.2),
        ({"momentum": 0.9}, 0.4 / 3.8),
        ({"momentum": 0.9, "dampening": 0.5}, 0.2 / 3.8),
        ({"momentum": 0.9, "nesterov": True}, 0.4 * 2.8 / 3.8),
    ]
    for options, value in cases:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
        assert edge(objective, optimizer).value == pytest.approx(value, rel=1e-9), options
        assert edge(objective, optimizer.state_dict()).value == pytest.approx(value, rel=1e-9)
    decayed = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    assert "weight decay of 0.01" in edge(objective, decayed).notes[0]
    asked = edge(objective, learning_rate=0.1, momentum=0.9, nesterov=True)
    assert asked.value == pytest.approx(0.4 * 2.8 / 3.8, rel=1e-9)


def test_the_edge_of_stability_of_adam_is_that_of_its_preconditioned_hessian():
    model, objective = bowl()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, eps=0.0)
    objective_gradient = objective.gradient()
    model.weight.grad = objective_gradient.reshape(1, 2).clone()
    with torch.no_grad():
        kept = model.weight.clone()
        optimizer.step()
        model.weight.copy_(kept)
    model.weight.grad = None
    # One step from nothing: P = (1 - beta1) |g|.
    P = 0.1 * objective_gradient.abs()
    top = (torch.tensor([4.0, 1.0]).double() / P).max().item()
    analysis = Analysis(objective, num_groups=0, optimizer=optimizer)
    found = get("preconditioned_eigenvalue")(analysis)
    assert found.value == pytest.approx(top, rel=1e-6)
    assert found.details["threshold"] == pytest.approx(380)
    ratio = get("edge_of_stability")(analysis)
    assert ratio.value == pytest.approx(top / 380, rel=1e-6)
    assert ratio.value == found.details["ratio"]
    assert not ratio.notes
    optimizer.param_groups[0]["weight_decay"] = 0.01
    assert "weight decay of 0.01" in edge(objective, optimizer).notes[0]
    with pytest.raises(SettingsError, match="beta1 of its own"):
        edge(objective, optimizer, momentum=0.5)


def test_optimizers_without_a_threshold_are_refused():
    model, objective = bowl()
    with pytest.raises(MeasureError, match="None was given"):
        edge(objective)
    with pytest.raises(MeasureError, match="Expected SGD, Adam or AdamW"):
        edge(objective, torch.optim.Adagrad(model.parameters()))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MeasureError, match="Adam or AdamW"):
        get("preconditioned_eigenvalue")(Analysis(objective, optimizer=sgd))
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(MeasureError, match="positive learning rate"):
        edge(objective, frozen)


def test_adaptive_eigenvalue_is_the_limit_of_adaptive_sharpness():
    model, objective = bowl()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 3.0]]))
    objective = sk.Objective(
        model, nn.MSELoss(), (torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([[1.0], [3.0]]).double())
    )  # fmt: skip
    found = measure("adaptive_eigenvalue", objective)
    assert found.value == pytest.approx(max(4 * 0.25, 1 * 9.0), rel=1e-9)
    worst = measure("adaptive_sharpness_worst", objective, rho=1e-2, steps=60)
    assert worst.value == pytest.approx(0.5e-4 * found.value, rel=1e-3)


def test_float32_agrees_with_float64():
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 5)))
    x, y = normal(30, 8), labels(5, 30)
    double = sk.Objective(model, CE, (x, y))
    single = sk.Objective(copy.deepcopy(model).float(), CE, (x.float(), y))
    exact = {"method": "exact"}
    cases = [
        ("relative_flatness", {}),
        ("relative_flatness_max", {}),
        ("adaptive_eigenvalue", {}),
        ("normalized_flatness", exact),
        ("adam_mini_sharpness", exact),
        ("adalayer_sharpness", exact),
        ("adame_sharpness", exact),
    ]
    for name, settings in cases:
        a, b = (measure(name, o, num_groups=0, **settings) for o in (double, single))
        assert b.value == pytest.approx(a.value, rel=2e-3), name
        assert abs(a.value - b.value) <= a.probe_error + b.probe_error, name


@pytest.mark.parametrize(
    "request_text",
    [
        "relative_flatness:layer=nothing",
        "relative_flatness:num_probes=1",
        "relative_flatness:target_error=0",
        "relative_flatness_max:form=sum",
        "relative_flatness_max:max_neurons=1",
        "normalized_flatness:scales=none",
        "normalized_flatness:num_probes=1",
        "adam_sharpness:epsilon=-1",
        "adam_sharpness:noise_scale=0",
        "adame_sharpness:exponent=1",
        "adam_mini_sharpness:partition=heads",
        "adalayer_sharpness:by=row",
        "edge_of_stability:learning_rate=0",
        "edge_of_stability:learning_rate=0.1,momentum=1",
        "adaptive_eigenvalue:tol=0",
        "adaptive_eigenvalue:max_matvecs=0",
    ],
)
def test_bad_settings_give_one_clear_sentence(request_text):
    objective = symmetric_pair("node_scale", 0)[0]
    try:
        with pytest.warns(sk.SharpkitWarning, match="Expected"):
            error = sk.score(objective, [request_text])[0].error
    except SettingsError as refused:
        error = str(refused)
    except pytest.fail.Exception:
        with pytest.raises(SettingsError, match="Expected") as caught:
            sk.score(objective, [request_text])
        error = str(caught.value)
    assert error.startswith("Expected")
    assert "Got" in error
