"""Worst cases over balls and means over perturbations: ascent, shards, published code."""

import itertools
import math
import re
from pathlib import Path

import oracles_ball as oracles
import pytest
import torch
from cases import CASES, CE, X, Y, masked_tokens, mlp, normal, seeded
from test_measures import quadratic, random_quadratic, trust_region
from torch import nn

import sharpkit as sk
from sharpkit.errors import MeasureError, ObjectiveError, SettingsError, SharpkitWarning
from sharpkit.estimators import maximize_in_ball, project, random_in_ball, steepest
from sharpkit.geometry import scale_of
from sharpkit.measures._andriushchenko import RHO_GRIDS, published_marks
from sharpkit.testing import symmetric_pair


def measured(objective, name, seed=0, **settings):
    groups = settings.pop("num_groups", 8)
    score = sk.score(objective, [(name, settings)], seed=seed, num_groups=groups)[0]
    assert score.error is None, score.error
    return score.estimate


def climb(f, start, rho, norm, steps=20, seed=0, **options):
    value, slope = f(torch.zeros_like(start))
    g = torch.Generator().manual_seed(seed)
    return maximize_in_ball(
        f, start_value=value, start_gradient=slope, rho=rho, norm=norm, steps=steps, generator=g,
        **options,
    )  # fmt: skip


def of_quadratic(H, b):
    return lambda z: ((b @ z + 0.5 * z @ H @ z).item(), b + H @ z)


# -- the ball ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("seed", range(5))
def test_the_projection_is_the_nearest_point(norm, seed):
    point = 2 * normal(7, seed=seed)
    near = project(point, 1.3, norm)
    p = {"l1": 1, "l2": 2, "linf": math.inf}[norm]
    assert near.norm(p) <= 1.3 + 1e-12
    # The angle to every point of the ball is obtuse, which only the nearest point has.
    g = torch.Generator().manual_seed(seed)
    others = [random_in_ball(point, 1.3, norm, g) for _ in range(200)]
    others += [1.3 * steepest(point - near, norm)]
    assert max(torch.dot(point - near, q - near).item() for q in others) <= 1e-12
    inside = 0.1 * near
    assert torch.equal(project(inside, 1.3, norm), inside)


@pytest.mark.parametrize(("norm", "p"), [("l1", 1), ("l2", 2), ("linf", math.inf)])
def test_random_starts_fill_the_ball_evenly(norm, p):
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([random_in_ball(torch.zeros(3), 2.0, norm, g) for _ in range(3000)])
    shares = (draws.norm(p, dim=1) / 2.0) ** 3  # of the volume inside: uniform
    assert shares.max() <= 1 + 1e-5
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / 12, abs=0.005)
    assert draws.mean(dim=0).abs().max() < 0.1


# -- the ascent ----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "flat", "steps"), [(6, 1.0, 20), (12, 1.0, 20), (6, 1e-3, 40)])
def test_l2_is_the_trust_region_solution(size, flat, steps):
    for seed in range(10):
        A, b, w = random_quadratic(seed, size)
        slope = flat * (A @ w + b)
        truth = trust_region(A, slope, 0.3)
        best = climb(of_quadratic(A, slope), slope, 0.3, "l2", steps=steps)
        assert best.value == pytest.approx(truth, rel=1e-6)
        assert best.value <= truth * (1 + 1e-12)
        assert best.evaluations <= steps
        assert best.point.norm() <= 0.3 * (1 + 1e-12)


def test_l2_near_a_critical_point_takes_an_eigenvectors_time():
    # Where the slope hardly points to the top eigenvector and the next one is close, the
    # ascent is slow, and 20 steps leave a percent: of twenty problems, one.
    errors = []
    for seed in range(20):
        A, b, w = random_quadratic(seed, 12)
        slope = 1e-3 * (A @ w + b)
        truth = trust_region(A, slope, 0.3)
        values = [climb(of_quadratic(A, slope), slope, 0.3, "l2", steps=n).value for n in (20, 40)]
        errors.append([1 - v / truth for v in values])
    few, more = torch.tensor(errors).sort(dim=0).values.T
    assert few[-1] < 0.02
    assert few[10] < 1e-9
    assert more[-2] < 1e-9


def test_linf_is_exact_on_separable_quadratics_that_fall_and_rise():
    for seed in range(10):
        a, b = normal(2, 6, seed=seed)
        rho = 0.7
        top = -b / a  # of a falling parabola, if it lies inside
        ends = torch.maximum(rho * b + a * rho**2 / 2, -rho * b + a * rho**2 / 2)
        inside = (a < 0) & (top.abs() < rho)
        truth = torch.where(inside, b * top + a * top**2 / 2, ends).sum().item()
        best = climb(of_quadratic(torch.diag(a), b), b, rho, "linf", steps=80)
        assert best.value == pytest.approx(truth, rel=1e-9)


def test_l1_finds_far_more_than_the_first_coordinate():
    # A convex function is largest at a corner, of which there are 2P: they can be listed.
    found, first = [], []
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        R = torch.randn(100, 100, generator=g, dtype=torch.float64)
        D = torch.exp(torch.randn(100, generator=g, dtype=torch.float64))
        H = D[:, None] * (R @ R.T / 100) * D
        b = 1e-3 * torch.randn(100, generator=g, dtype=torch.float64)
        rho = 3.0
        truth = (rho * b.abs() + 0.5 * rho**2 * H.diagonal()).max().item()
        f = of_quadratic(H, b)
        best = climb(f, b, rho, "l1")
        assert best.point.abs().sum() <= rho * (1 + 1e-12)
        found.append(best.value / truth)
        first.append(f(rho * steepest(b, "l1"))[0] / truth)
        assert best.value <= truth * (1 + 1e-12)
    assert sum(found) / 10 > 0.9
    assert sum(first) / 10 < 0.5


def test_restarts_find_what_lies_behind_a_valley_and_tell_the_spread():
    class Peaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.2, 0.0], dtype=torch.float64))

    def batch_loss(model, batch):  # a low peak uphill, a high one out of sight
        w = model.w
        low = torch.exp(-2 * ((w[0] - 0.5) ** 2 + w[1] ** 2))
        return low + 3 * torch.exp(-30 * ((w[0] + 0.3) ** 2 + (w[1] + 0.7) ** 2)), 1

    objective = sk.Objective.from_batch_loss(Peaks(), batch_loss, [torch.zeros(1)])
    alone = measured(objective, "sam_sharpness", rho=1.0)
    many = measured(objective, "sam_sharpness", rho=1.0, restarts=12)
    base = objective.value().item()
    assert alone.value + base == pytest.approx(1.0, abs=0.01)
    assert many.value + base == pytest.approx(3.105, abs=0.01)
    rises = many.details["rises_of_starts"]
    assert len(rises) == 13
    assert rises[0] == alone.value
    assert many.details["spread_of_starts"] == max(rises) - min(rises)
    assert many.cost.gradients <= 13 * 20 + 2
    again = measured(objective, "sam_sharpness", rho=1.0, restarts=12)
    assert again.details == many.details


def test_what_is_exactly_zero_stays_zero_in_every_start():
    A, b, w = random_quadratic(4)
    w[[1, 4]] = 0.0
    objective = quadratic(A, b, w)
    free = w != 0
    T = torch.diag(w.abs()[free])
    truth = trust_region(T @ A[free][:, free] @ T, T @ (A @ w + b)[free], 0.3)
    for settings in ({}, {"restarts": 3}):
        e = measured(objective, "adaptive_sharpness_worst", rho=0.3, steps=60, **settings)
        assert e.value == pytest.approx(truth, rel=1e-6)
        assert e.details["frozen"] == 2


def test_frozen_entries_are_zero_at_every_point_looked_at():
    frozen = torch.tensor([True, False, False, True, False])
    for norm in ("l1", "l2", "linf"):
        seen = []

        def f(z, seen=seen):
            seen.append(z)
            free = z.masked_fill(frozen, 0.0)
            return (free @ free).item(), 2 * free  # without a gradient at 0

        best = climb(f, torch.zeros(5).double(), 1.0, norm, restarts=3, frozen=frozen)
        assert best.value > 0.9
        assert torch.stack(seen)[:, frozen].abs().max() == 0
        assert len(best.tops) == 4


def test_a_loss_that_is_not_finite_in_the_ball_is_kept_out_and_said():
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))

    def batch_loss(model, batch):  # finite only where w > 0.5
        return -torch.log(model.w - 0.5).sum(), 1

    objective = sk.Objective.from_batch_loss(Log(), batch_loss, [torch.zeros(1)])
    for settings in ({}, {"restarts": 3}):
        e = measured(objective, "sam_sharpness", rho=1.0, **settings)
        assert math.isfinite(e.value)
        assert e.value > 0
        assert e.details["non_finite_steps"] > 0
        assert any("largest finite rise" in note for note in e.notes)


def test_no_more_gradients_are_spent_than_asked_for():
    objective = sk.Objective(seeded(mlp), CE, [(X, Y)])
    for norm in ("l1", "l2", "linf"):
        e = measured(objective, "sam_sharpness", norm=norm, steps=7, restarts=2)
        assert e.cost.gradients <= 3 * 7 + 2  # and one at theta, one for its rounding
        assert e.cost.forwards == 2  # the data error


def trained():
    """A small ReLU network near a minimum of its loss."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g, dtype=torch.float64)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = seeded(lambda: mlp(nn.Tanh, 2))
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=400, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss = loss + 1e-3 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)

    def batch_loss(module, batch):
        inputs, targets = batch
        decay = 1e-3 * sum(p.square().sum() for p in module.parameters())
        loss = nn.functional.cross_entropy(module(inputs), targets, reduction="sum")
        return loss + decay * len(targets), len(targets)

    return sk.Objective.from_batch_loss(model, batch_loss, [(x, y)])


def test_one_step_badly_underestimates_near_a_minimum():
    # The paper's own figures go from 0.17 with one step to 2.26 with five.
    objective = trained()
    one = measured(objective, "sam_sharpness_one_step")
    many = measured(objective, "sam_sharpness", steps=40)
    top = torch.linalg.eigvalsh(torch.stack([
        objective.hvp(e) for e in torch.eye(objective.space.dim, dtype=torch.float64)
    ]))[-1].item()  # fmt: skip
    assert objective.gradient().norm() < 1e-3
    assert many.value == pytest.approx(0.5 * 0.05**2 * top, rel=0.1)
    assert one.value < 0.5 * many.value


@pytest.mark.parametrize("kind", ["node_scale", "orthogonal"])
def test_worst_cases_are_what_a_plain_ascent_gives(kind):
    objective = symmetric_pair(kind, 1)[0]
    found = {"asam_sharpness": oracles.asam, "fisher_sam_sharpness": oracles.fisher_sam,
             "keskar_sharpness": oracles.keskar, "m_sharpness": oracles.m_sharpness}  # fmt: skip
    for name, exact in found.items():
        e, truth = measured(objective, name, steps=60), exact(objective)
        assert e.value == pytest.approx(truth, rel=2e-3), name
        assert e.error_kind == "lower_bound"


def test_the_smoothed_loss_is_what_many_draws_give():
    objective = symmetric_pair("node_scale", 1)[0]
    e, truth = measured(objective, "gaussian_smoothed_sharpness"), oracles.smoothed(objective)
    assert abs(e.value - truth) < 5 * e.probe_error
    assert e.probe_error < 0.2 * truth
    (smoothed,) = e.parts
    assert smoothed.value == pytest.approx(objective.value().item() + e.value, rel=1e-12)


# -- metrics -------------------------------------------------------------------------------


def test_scales_are_sizes_rows_and_tensors():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 2)).double()
    objective = sk.Objective(model, CE, (normal(5, 2, 2, 2), Y[:5] % 2))
    for scaling in ("elementwise", "filter", "layer"):
        c = scale_of(objective.space, objective.theta, scaling)
        torch.testing.assert_close(c, oracles.scales(objective, scaling), rtol=1e-12, atol=0)
    with pytest.raises(SettingsError, match="Expected `scaling`"):
        scale_of(objective.space, objective.theta, "rows")


@pytest.mark.parametrize("scaling", ["filter", "layer"])
@pytest.mark.parametrize("name", ["adaptive_sharpness_worst", "adaptive_sharpness_average"])
def test_coarser_scales_keep_layers_and_permutations_only(name, scaling):
    kept, draws = {"layer_scale", "permutation"}, name.endswith("average")
    for symmetry in ("layer_scale", "permutation", "node_scale"):
        few = {"num_pairs": 100 if symmetry in kept else 1000} if draws else {}
        a, b = (
            measured(o, name, scaling=scaling, num_groups=0, **few)
            for o in symmetric_pair(symmetry, 1)
        )
        slack = 6 * math.hypot(a.probe_error, b.probe_error) if draws else 1e-6 * a.value
        same = abs(a.value - b.value) <= slack
        assert same == (symmetry in kept), (symmetry, a, b)


@pytest.mark.parametrize("scaling", ["filter", "layer"])
def test_coarser_scales_give_what_a_plain_ascent_gives(scaling):
    objective = symmetric_pair("node_scale", 2)[0]
    c = oracles.scales(objective, scaling)
    for norm, rho in (("l2", 0.05), ("linf", 2e-3)):
        e = measured(
            objective, "adaptive_sharpness_worst", norm=norm, rho=rho, scaling=scaling, steps=60
        )
        truth = oracles.climbed(objective, c, rho, box=norm == "linf")
        assert e.value == pytest.approx(truth, rel=1e-3)


def test_asam_without_eta_on_all_is_adaptive_sharpness():
    objective = symmetric_pair("node_scale", 0)[0]
    asam = measured(objective, "asam_sharpness", eta=0.0, weights_only=False)
    adaptive = measured(objective, "adaptive_sharpness_worst")
    assert asam.value == adaptive.value
    for weights_only, norm, rho in ((True, "linf", 0.01), (False, "l2", 0.3)):
        e = measured(
            objective, "asam_sharpness", rho=rho, eta=0.05, weights_only=weights_only, norm=norm,
            steps=60,
        )  # fmt: skip
        T = oracles.asam_diagonal(objective, 0.05, weights_only)
        assert e.value == pytest.approx(
            oracles.climbed(objective, T, rho, box=norm == "linf"), rel=1e-3
        )


def test_fisher_of_the_examples_and_of_their_mean():
    objective = sk.Objective(seeded(mlp), CE, [(X[:8], Y[:8]), (X[8:], Y[8:])])
    squares = oracles.example_squares(objective)
    torch.testing.assert_close(objective.fisher_diagonal(), squares, rtol=1e-10, atol=1e-15)
    F = objective.per_example_gradients()
    torch.testing.assert_close(squares, F.square().mean(dim=0), rtol=1e-10, atol=1e-15)
    e = measured(objective, "fisher_sam_sharpness", fisher="examples", damping=0.01, steps=60)
    truth = oracles.climbed(objective, (squares + 0.01).rsqrt(), 0.05)
    assert e.value == pytest.approx(truth, rel=1e-3)
    g = objective.gradient()
    e = measured(objective, "fisher_sam_sharpness", eta=300.0, steps=60)
    truth = oracles.climbed(objective, (1 + 300 * g**2).rsqrt(), 0.05)
    assert e.value == pytest.approx(truth, rel=1e-3)
    sam = measured(objective, "sam_sharpness")
    assert measured(objective, "fisher_sam_sharpness", eta=0.0).value == sam.value
    assert e.value < 0.99 * sam.value


@pytest.mark.parametrize(
    "request_text",
    [
        "asam_sharpness:eta=-1",
        "asam_sharpness:norm=l1",
        "fisher_sam_sharpness:eta=-1",
        "fisher_sam_sharpness:fisher=examples,damping=0",
        "fisher_sam_sharpness:fisher=full",
        "gaussian_smoothed_sharpness:sigma=0",
        "keskar_sharpness:epsilon=0",
        "keskar_sharpness:subspace=0",
        "keskar_sharpness:subspace=100000",
        "m_sharpness:m=0",
        "sam_sharpness:restarts=-1",
        "sam_sharpness:shard_size=0",
        "adaptive_sharpness_worst:scaling=rows",
        "adaptive_sharpness_worst:compat=someone",
        "adaptive_sharpness_worst:compat=andriushchenko2023,restarts=1",
        "adaptive_sharpness_worst:compat=andriushchenko2023,norm=l1",
        "adaptive_sharpness_average:compat=andriushchenko2023,scaling=layer",
        "adaptive_sharpness_average:compat=andriushchenko2023,num_draws=1",
        "adaptive_sharpness_average:norm=l1",
    ],
)
@pytest.mark.filterwarnings("ignore::sharpkit.SharpkitWarning")
def test_bad_settings_give_one_clear_sentence(request_text):
    objective = symmetric_pair("node_scale", 0)[0]
    try:
        error = sk.score(objective, [request_text])[0].error
    except SettingsError as refused:
        error = str(refused)
    assert error is not None
    assert error.startswith("Expected")
    assert "Got" in error


# -- Keskar --------------------------------------------------------------------------------


def test_keskar_in_a_subspace_is_the_box_of_its_coordinates():
    objective = symmetric_pair("orthogonal", 1)[0]
    P, p = objective.space.dim, 3
    e = measured(objective, "keskar_sharpness", subspace=p, epsilon=1e-2, steps=60)
    g = sk.Analysis(objective).generator("keskar_sharpness subspace")
    A = torch.randn((p, P), generator=g, dtype=torch.float64).T / math.sqrt(P)
    width = (torch.linalg.pinv(A) @ objective.theta).abs() + 1
    box = oracles.Box(1e-2)
    start = 1e-2 * (width * (A.T @ objective.gradient())).sign()
    top = oracles.climb(objective, lambda z: A @ (width * z), 1e-2, box, start)
    assert e.value == pytest.approx(100 * top / (1 + objective.value().item()), rel=1e-4)
    whole = measured(objective, "keskar_sharpness", epsilon=1e-2, steps=60)
    assert 0 < e.value < whole.value


def test_keskar_needs_a_loss_above_minus_one():
    w = random_quadratic(0)[2]
    low = quadratic(-10 * torch.eye(6).double(), torch.zeros(6).double(), w)
    with pytest.warns(sk.SharpkitWarning, match="loss above -1"):
        assert sk.score(low, ["keskar_sharpness"])[0].estimate is None
    with pytest.raises(MeasureError):
        sk.measures.get("keskar_sharpness")(sk.Analysis(low))


# -- shards --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shards_are_the_examples_in_order_whatever_the_batches(case):
    model = case.model()
    for sizes in ((11,), (8, 3), (1, 2, 8)):
        objective = case.objective(*sizes)
        shards = list(objective.shards(4))
        starts = [0, 4, 8]
        assert [s.num_examples for s in shards] == [4, 4, 3]
        for start, shard in zip(starts, shards, strict=True):
            x, y = case.inputs[start : start + 4], case.targets[start : start + 4]
            alone = sk.Objective(model, case.criterion, [(x, y)], case.params)
            assert shard.value().item() == pytest.approx(alone.value().item(), rel=1e-12)
            assert shard.num_terms == pytest.approx(alone.num_terms)
            torch.testing.assert_close(shard.gradient(), alone.gradient(), rtol=1e-9, atol=1e-13)
            assert shard.data_fingerprint == alone.data_fingerprint
        terms = torch.tensor([s.num_terms for s in shards])
        values = torch.tensor([s.value().item() for s in shards], dtype=torch.float64)
        whole = (terms / terms.sum()).double() @ values
        assert whole.item() == pytest.approx(objective.value().item(), rel=1e-6)


def test_shards_come_from_loaders_and_at_other_parameters_too():
    data = torch.utils.data.TensorDataset(X, Y)
    g = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True, generator=g)
    state = g.get_state()
    before = torch.get_rng_state()
    objective = sk.Objective(seeded(mlp), CE, loader, memory_budget=1)
    moved = objective.at(objective.theta + 0.1)
    values = [s.value().item() * s.num_examples for s in moved.shards(4)]
    assert sum(values) / 11 == pytest.approx(moved.value().item(), rel=1e-12)
    next(iter(objective.shards(2)))  # left half way
    assert torch.equal(g.get_state(), state)
    assert torch.equal(torch.get_rng_state(), before)
    part = objective.restrict("0.*")
    assert next(iter(part.shards(4))).space.dim == part.space.dim


def test_a_shard_without_a_loss_term_is_left_out():
    case = next(c for c in CASES if c.name == "masked tokens")
    assert bool((masked_tokens()[3] == -100).all())
    shards = list(case.objective(11).shards(1))
    assert len(shards) == 10
    e = measured(case.objective(11), "m_sharpness", m=1, steps=3)
    assert e.details["num_shards"] == 10


def test_what_shards_cost_counts_by_their_share():
    objective = sk.Objective(seeded(mlp), CE, [(X, Y)])
    before = objective.cost
    for shard in objective.shards(4):
        shard.gradient()
        shard.hvp(torch.ones(shard.space.dim, dtype=torch.float64))
        assert shard.cost.gradients == 1
    spent = objective.cost - before
    assert (spent.gradients, spent.hvps, spent.forwards) == (1, 1, 1)


def test_a_loss_that_mixes_examples_has_no_shards_but_its_batches():
    def batch_loss(model, batch):  # normalised over the batch
        z = model(batch[0])
        z = (z - z.mean(dim=0)) / (z.std(dim=0) + 1)
        return nn.functional.cross_entropy(z, batch[1], reduction="sum"), len(z)

    data = [(X[:6], Y[:6]), (X[6:], Y[6:])]
    objective = sk.Objective.from_batch_loss(seeded(mlp), batch_loss, data)
    with pytest.raises(ObjectiveError, match="takes the batches as they are"):
        objective.shards(4)
    assert [s.num_examples for s in objective.shards()] == [6, 5]
    with pytest.raises(SettingsError, match="at least 1"):
        objective.shards(0)


@pytest.mark.parametrize(
    "request_", ["m_sharpness", "sam_sharpness", "monge_sharpness", "asam_sharpness"]
)
def test_sharded_measures_are_means_over_slices(request_):
    model = seeded(mlp)
    objective = sk.Objective(model, CE, [(X[:5], Y[:5]), (X[5:], Y[5:])])
    name = "sam_sharpness" if request_ == "m_sharpness" else request_
    setting = {"m": 4} if request_ == "m_sharpness" else {"shard_size": 4}
    e = measured(objective, request_, **setting)
    slices = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
    values = [measured(sk.Objective(model, CE, [s]), name).value for s in slices]
    mean = (4 * values[0] + 4 * values[1] + 3 * values[2]) / 11
    assert e.value == pytest.approx(mean, rel=1e-6)
    assert e.data_error is None  # three shards cannot tell
    assert e.details["num_shards"] == 3
    assert e.details["largest"] == pytest.approx(max(values), rel=1e-6)
    assert e.value > 1.0001 * measured(objective, name).value


def test_the_spread_over_shards_is_the_data_error():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 4, generator=g).double(), torch.randint(3, (40,), generator=g)
    objective = sk.Objective(seeded(mlp), CE, [(x, y)])
    e = measured(objective, "m_sharpness", m=8, steps=5)
    values = torch.tensor([
        measured(s, "sam_sharpness", steps=5, num_groups=0).value for s in objective.shards(8)
    ]).double()  # fmt: skip
    assert e.data_error == pytest.approx((values.std() / 5**0.5).item(), rel=1e-5)
    assert torch.tensor(e.data_draws).double().mean().item() == pytest.approx(e.value, rel=1e-6)
    assert e.value == pytest.approx(values.mean().item(), rel=1e-6)


# -- the error from the data ---------------------------------------------------------------


def linear(seed, count):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=g, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -1.0, 0.5]).double() + torch.randn(count, generator=g).double()
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.5, -0.5, -0.2]]))
    return sk.Objective(model, nn.MSELoss(), [(x, y[:, None])])


def calibration(name, runs, count, **settings):
    w = linear(0, 16).theta
    closed = {"gaussian_smoothed_sharpness": 0.3**2 * 3,
              "adaptive_sharpness_average": 0.3**2 * w.square().sum().item()}  # fmt: skip
    truth = closed.get(name)  # of the population, where E x x^T is the identity
    if truth is None:
        truth = measured(linear(10**6, 200_000), name, num_groups=0, **settings).value
    z = []
    for seed in range(runs):
        e = measured(linear(seed, count), name, seed=seed, num_groups=16, **settings)
        noise = e.probe_error if e.error_kind == "stderr" else 0.0
        z.append((e.value - truth) / math.hypot(e.data_error, noise))
    return torch.tensor(z)


# The direction of the largest rise hardly moves with the data here, so that the error at the
# fixed perturbation is that of the number. (Where a slope is zero for the population, each
# sample finds a rise of its own in it, and the worst case of samples is larger on average.)
CALIBRATED = [
    ("sam_sharpness_one_step", {"rho": 0.3}),
    ("sam_sharpness", {"rho": 0.3, "steps": 6}),
    ("keskar_sharpness", {"epsilon": 0.1, "steps": 6}),
    ("gaussian_smoothed_sharpness", {"sigma": 0.3, "num_pairs": 100}),
    ("adaptive_sharpness_average", {"rho": 0.3, "num_pairs": 100}),
]


@pytest.mark.parametrize(("name", "settings"), CALIBRATED[:3])
def test_the_data_error_is_about_right(name, settings):
    z = calibration(name, 60, 400, **settings)
    assert abs(z.mean()) < 4 / len(z) ** 0.5 + 0.1
    assert 0.7 < z.std() < 1.3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), CALIBRATED)
def test_the_data_error_is_right_over_many_samples(name, settings):
    z = calibration(name, 400 if "steps" in settings else 150, 400, **settings)
    assert abs(z.mean()) < 0.25
    assert 0.85 < z.std() < 1.2


def m_calibration(runs):
    whole = linear(10**6, 8 * 4000)
    truth = measured(whole, "m_sharpness", m=8, rho=0.3, steps=5).value
    z = []
    for seed in range(runs):
        e = measured(linear(seed, 8 * 24), "m_sharpness", m=8, rho=0.3, steps=5)
        z.append((e.value - truth) / e.data_error)
    return torch.tensor(z)


@pytest.mark.slow
def test_the_data_error_of_shards_is_right_over_many_samples():
    z = m_calibration(200)
    assert abs(z.mean()) < 0.3
    assert 0.85 < z.std() < 1.2


# -- the published code --------------------------------------------------------------------


def page():
    text = (Path(__file__).parents[1] / "docs" / "andriushchenko2023.md").read_text()
    numbers = [float(x) for x in re.findall(r"The published number is ([\d.]+);", text)]
    tops = [float(x) for x in re.findall(r"over the ball is ([\d.]+)\.", text)]
    rows = re.findall(
        r"^\| \d \| ([\d.]+) \| ([-\d.]+), ([-\d.]+) \| ([-\d.]+), ([-\d.]+) \| ([\d.]+) \|$",
        text,
        re.MULTILINE,
    )
    values = [[float(x) for x in row] for row in rows]
    return {"l2": values[:6], "linf": values[6:]}, numbers, tops


@pytest.mark.parametrize(("norm", "rho", "index"), [("l2", 0.5, 0), ("linf", 0.1, 1)])
def test_the_worked_example_is_what_the_formulas_give(norm, rho, index):
    tables, numbers, tops = page()
    A, w = torch.diag(torch.tensor([3.0, 1.0]).double()), torch.tensor([1.0, -0.5]).double()
    rows, rise = oracles.published(
        lambda p: 0.5 * p @ A @ p, lambda p: A @ p, w, rho, norm, steps=6
    )
    assert len(tables[norm]) == len(rows) == 6
    for (eta, z, delta, loss), row in zip(rows, tables[norm], strict=True):
        assert [eta, *z.tolist(), *delta.tolist(), loss] == pytest.approx(row, abs=5.1e-5)
    assert rise == pytest.approx(numbers[index], abs=5.1e-5)
    objective = quadratic(A, torch.zeros(2).double(), w)
    settings = {"norm": norm, "rho": rho}
    compat = {"compat": "andriushchenko2023", "steps": 6}
    e = measured(objective, "adaptive_sharpness_worst", **settings, **compat)
    assert e.value == pytest.approx(rise, rel=1e-12 if norm == "linf" else 5e-5)
    ours = measured(objective, "adaptive_sharpness_worst", **settings)
    assert ours.value == pytest.approx(tops[index], abs=5.1e-5)
    T = torch.diag(w.abs())
    if norm == "l2":
        assert tops[0] == pytest.approx(trust_region(T @ A @ T, T @ A @ w, rho), abs=5.1e-5)


def quadratic_functions(A, b):
    return lambda p: 0.5 * p @ A @ p + b @ p, lambda p: A @ p + b


def objective_functions(objective):
    return lambda p: objective.at(p).value(), lambda p: objective.at(p).gradient()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("steps", [1, 3, 8, 20, 50])
def test_the_published_ascent_on_quadratics(norm, steps):
    for seed in range(6):
        A, b, w = random_quadratic(seed)
        w = w.sign() * (0.2 + w.abs())
        rho = 0.4 if norm == "l2" else 0.2
        loss, slope = quadratic_functions(A, b)
        _, rise = oracles.published(loss, slope, w, rho, norm, steps)
        e = measured(
            quadratic(A, b, w), "adaptive_sharpness_worst", rho=rho, norm=norm, steps=steps,
            compat="andriushchenko2023",
        )  # fmt: skip
        assert e.value == pytest.approx(rise, rel=1e-3 if norm == "l2" else 1e-10)


def test_the_published_number_is_a_plain_mean_over_batches():
    model = seeded(mlp)
    batches = [(X[:8], Y[:8]), (X[8:], Y[8:])]
    settings = {"rho": 0.01, "norm": "linf", "compat": "andriushchenko2023"}
    e = measured(sk.Objective(model, CE, batches), "adaptive_sharpness_worst", **settings)
    rises = []
    for x, y in batches:
        single = sk.Objective(model, CE, [(x, y)])
        loss, slope = objective_functions(single)
        _, rise = oracles.published(loss, slope, single.theta, 0.01, "linf", 20)
        rises.append(rise)
    assert e.value == pytest.approx(sum(rises) / 2, rel=1e-9)
    joined = sk.Objective(model, CE, [(X, Y)])
    cut = measured(joined, "adaptive_sharpness_worst", shard_size=8, **settings)
    assert cut.value == pytest.approx(e.value, rel=1e-9)


def test_the_published_projection_is_skipped_at_a_zero_weight_and_said():
    A, b, w = random_quadratic(3)
    w[2] = 0.0
    objective = quadratic(A, b, w)
    e = measured(objective, "adaptive_sharpness_worst", rho=0.3, compat="andriushchenko2023")
    assert any("does not project" in note for note in e.notes)
    inside = measured(objective, "adaptive_sharpness_worst", rho=0.3, steps=60)
    assert math.isfinite(e.value)
    assert e.value > inside.value  # it left the ball


def test_the_published_checkpoints_and_radii():
    assert published_marks(20) == {5, 9, 12, 15, 16, 18, 19, 20}
    for grids in RHO_GRIDS.values():
        for grid in grids.values():
            assert all(b == pytest.approx(2 * a) for a, b in itertools.pairwise(grid))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_published_average_and_its_error(norm):
    A, b, w = random_quadratic(3)
    share = 1 if norm == "l2" else 1 / 3
    truth = 0.5 * share * 0.1**2 * (w**2 * A.diagonal()).sum().item()
    objective = quadratic(A, b, w)
    z = []
    for seed in range(100):
        e = measured(
            objective, "adaptive_sharpness_average", seed=seed, norm=norm, rho=0.1,
            compat="andriushchenko2023",
        )  # fmt: skip
        z.append((e.value - truth) / e.probe_error)
    z = torch.tensor(z)
    assert abs(z.mean()) < 4 / len(z) ** 0.5
    assert 0.8 < z.std() < 1.25


def test_the_published_average_takes_draws_of_its_own_for_each_batch():
    objective = sk.Objective(seeded(mlp), CE, [(X[:5], Y[:5]), (X[5:], Y[5:])])
    e = measured(objective, "adaptive_sharpness_average", compat="andriushchenko2023")
    analysis, means, variances = sk.Analysis(objective), [], []
    for index, shard in enumerate(objective.shards()):
        g = analysis.generator(f"adaptive_sharpness_average {index}")
        w = shard.theta
        draws = [
            0.1 * w.abs() * torch.randn(w.shape, generator=g, dtype=w.dtype) for _ in range(20)
        ]
        rises = torch.tensor([oracles.rises(shard)(d) for d in draws], dtype=torch.float64)
        means.append(rises.mean().item())
        variances.append(rises.var().item() / 20)
    assert e.value == pytest.approx(sum(means) / 2, rel=1e-9)
    assert e.probe_error == pytest.approx(math.sqrt(sum(variances)) / 2, rel=1e-9)


# -- normalised logits ---------------------------------------------------------------------


class Times(nn.Module):
    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x):
        return self.factor * self.model(x) + 2.0


def test_normalised_logits_have_no_scale():
    model = seeded(mlp)
    plain, loud = (sk.LogitNormalized(Times(model, c)).eval() for c in (1.0, 50.0))
    z = plain(X)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(11).double())
    torch.testing.assert_close(z.mean(dim=1), torch.zeros(11).double(), rtol=0, atol=1e-15)
    raw = model(X)
    expected = raw - raw.mean(dim=1, keepdim=True)
    torch.testing.assert_close(z, expected / expected.norm(dim=1, keepdim=True))
    for name in ("sam_sharpness", "adaptive_sharpness_worst", "gradient_norm", "hessian_trace"):
        a, b = (measured(sk.Objective(m, CE, [(X, Y)]), name) for m in (plain, loud))
        assert a.value == pytest.approx(b.value, rel=1e-6), name
        a, b = (
            measured(sk.Objective(Times(model, c).eval(), CE, [(X, Y)]), name) for c in (1.0, 50.0)
        )
        assert abs(b.value / a.value - 1) > 0.5, name
    scaled = seeded(mlp)
    with torch.no_grad():  # the last layer: adaptive sharpness of normalised logits stays
        scaled[4].weight.mul_(7)
        scaled[4].bias.mul_(7)
    a, b = (
        measured(
            sk.Objective(sk.LogitNormalized(m).eval(), CE, [(X, Y)]), "adaptive_sharpness_worst"
        )
        for m in (model, scaled)
    )
    assert a.value == pytest.approx(b.value, rel=1e-6)


def test_logits_of_zero_stay_zero_and_other_outputs_are_refused():
    wrapped = sk.LogitNormalized(nn.Identity())
    assert wrapped(torch.ones(2, 3)).abs().max() == 0
    assert wrapped.training == nn.Identity().training
    tokens = sk.LogitNormalized(nn.Identity(), dim=1)(normal(2, 3, 4))
    torch.testing.assert_close(tokens.norm(dim=1), torch.ones(2, 4).double())
    with pytest.raises(ObjectiveError, match="returns logits"):
        wrapped([1, 2])


def test_an_ascent_stopped_by_the_ball_ends_where_rounding_says_otherwise():
    # In float32 the corner lies a little inside, and the value of each call is a little lower.
    slope, calls = torch.tensor([10.0, -3.0]), itertools.count()

    def function(z):
        return float(slope @ z) - 1e-6 * next(calls), slope

    rho = 0.041314640823364904
    best = maximize_in_ball(
        function,
        start_value=0.0,
        start_gradient=slope,
        rho=rho,
        norm="linf",
        steps=20,
        generator=torch.Generator().manual_seed(0),
    )
    assert best.value == pytest.approx(13 * rho, rel=1e-5)


def test_published_average_has_the_rounding_of_the_losses_in_its_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    o = sk.Objective(model, nn.CrossEntropyLoss(), (x, y))
    for seed in range(4):  # the rise is some 1e-12, the losses are rounded to 1e-7
        (score,) = sk.score(
            o, ["adaptive_sharpness_average:compat=andriushchenko2023,rho=1e-6"], seed=seed
        )
        assert abs(score.estimate.value) < 3 * score.estimate.probe_error


def test_a_ball_too_large_for_squares():
    o = sk.Objective(
        nn.Linear(2, 1).double(), lambda z, t: (z * t).mean(),
        (torch.eye(2).double(), torch.ones(2, 1).double()),
    )  # fmt: skip
    (score,) = sk.score(o, ["sam_sharpness:rho=1e200"])
    gradient = o.gradient().norm().item()
    assert score.estimate.value == pytest.approx(1e200 * gradient, rel=1e-9)
    with pytest.warns(SharpkitWarning, match="`sigma`"):
        sk.score(o, ["gaussian_smoothed_sharpness:sigma=0"])
