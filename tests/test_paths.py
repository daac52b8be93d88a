"""Paths between minima: curves, barriers, training of curves, planes."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from cases import classes, normal, seeded
from torch import nn

import sharpkit as sk
from sharpkit.errors import MeasureError, SettingsError, ShapeError
from sharpkit.landscape import StraightSection
from sharpkit.landscape.paths import (
    BezierPath,
    PolychainPath,
    SegmentPath,
    barrier,
    connect,
    plane_through,
)
from sharpkit.landscape.paths.training import bend_gradients
from sharpkit.objective.states import state_of, with_state

CE = nn.CrossEntropyLoss()
A, B = normal(5, seed=1), normal(5, seed=2)


def curves(*bends):
    return [BezierPath(A, bends, B), PolychainPath(A, bends, B)]


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def objective_of(build=network, n=24, batches=4, inputs=4):
    X, y = normal(n, inputs, seed=3), classes(3, n, seed=4)
    size = n // batches
    return sk.Objective(seeded(build), CE, list(zip(X.split(size), y.split(size), strict=True)))


def ends_of(objective, seeds=(1, 2)):
    return [0.7 * normal(objective.space.dim, seed=s) for s in seeds]


# -- curves ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [SegmentPath(A, B), *curves(normal(5, seed=3), normal(5, seed=4))])
def test_ends_are_exact_and_nothing_lies_beyond(path):
    assert torch.equal(path.point([0.0]), A)
    assert torch.equal(path.point([1.0]), B)
    assert path.point([-0.01]) is None
    assert path.point([1.01]) is None
    assert len(path.axes) == 1
    assert path.axes[0].step == pytest.approx(float((A - B).norm()))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("kind", [0, 1])
def test_even_bends_on_the_segment_make_the_segment(n, kind):
    line = SegmentPath(A, B)
    path = curves(*(line.point([(i + 1) / (n + 1)]) for i in range(n)))[kind]
    for t in (0.0, 0.13, 0.5, 0.77, 1.0):
        assert torch.allclose(path.point([t]), line.point([t]), atol=1e-14)
        assert sum(path.weights(t)) == pytest.approx(1, abs=1e-14)
    assert path.length() == pytest.approx(line.length(), rel=1e-12)


def test_a_bezier_curve_is_what_de_casteljau_gives():
    points = [A, normal(5, seed=3), normal(5, seed=4), B]
    path = BezierPath(A, points[1:3], B)
    for t in (0.2, 0.5, 0.9):
        left = points
        while len(left) > 1:
            left = [(1 - t) * p + t * q for p, q in itertools.pairwise(left)]
        assert torch.allclose(path.point([t]), left[0], atol=1e-14)


def test_a_chain_goes_through_its_corners_and_has_the_length_of_its_pieces():
    corners = [A, normal(5, seed=3), normal(5, seed=4), B]
    path = PolychainPath(A, corners[1:3], B)
    for k, corner in enumerate(corners):
        assert torch.allclose(path.point([k / 3]), corner, atol=1e-14)
    middle = path.point([0.5])
    assert torch.allclose(middle, (corners[1] + corners[2]) / 2, atol=1e-14)
    length = sum(float((p - q).norm()) for p, q in itertools.pairwise(corners))
    assert path.length(7) == pytest.approx(length, rel=1e-12)


def test_only_the_segment_is_straight():
    assert torch.equal(SegmentPath(A, B).units()[0], B - A)
    assert all(path.units() is None for path in curves(A))


def test_paths_keep_copies_of_what_they_were_given():
    a = A.clone()
    path = SegmentPath(a, B)
    a.zero_()
    assert torch.equal(path.point([0.0]), A)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: SegmentPath(A, B[:3]), ShapeError),
        (lambda: SegmentPath(A[None], B[None]), ShapeError),
        (lambda: SegmentPath(A, B.float()), MeasureError),
        (lambda: SegmentPath(A, B / 0), MeasureError),
        (lambda: BezierPath(A, [], B), SettingsError),
        (lambda: PolychainPath(A, [], B), SettingsError),
    ],
)
def test_what_makes_no_path_is_refused(make, error):
    with pytest.raises(error, match="Expected"):
        make()


# -- barriers ----------------------------------------------------------------------------


class Square(nn.Module):
    """A linear map whose loss is a quadratic of the parameters."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        return x @ self.w


def quadratic(sign=1.0):
    X, y = normal(12, 3, seed=5), normal(12, seed=6)
    loss = lambda out, y: sign * (out - y).square().mean()  # noqa: E731
    return sk.Objective(Square(), loss, list(zip(X.split(3), y.split(3), strict=True))), X, y


def test_the_rise_on_a_quadratic_is_its_closed_form():
    objective, X, _ = quadratic()
    a, b = normal(3, seed=7), normal(3, seed=8)
    found = barrier(objective, SegmentPath(a, b), t=11)
    bend = 2 * (X @ (b - a)).square().mean().item()  # d^T H d
    for t, rise in zip(found.t, found.loss.rises, strict=True):
        assert rise == pytest.approx(-t * (1 - t) / 2 * bend, rel=1e-12, abs=1e-14)
    assert found.value <= 0
    assert max(found.loss.rises[1:-1]) < 0
    assert found.loss.values[3] == pytest.approx(float(objective.at(0.7 * a + 0.3 * b).value()))


def test_the_barrier_on_a_concave_quadratic_is_in_the_middle():
    objective, X, _ = quadratic(sign=-1.0)
    a, b = normal(3, seed=7), normal(3, seed=8)
    found = barrier(objective, SegmentPath(a, b), t=11)
    assert found.value == pytest.approx((X @ (b - a)).square().mean().item() / 4)
    assert found.loss.at == 0.5
    assert "0.5" in str(found)


def test_definitions_differ_by_what_the_ends_say():
    objective, a, b = (o := objective_of()), *ends_of(o)
    kinds = {
        d: barrier(objective, SegmentPath(a, b), t=9, definition=d)
        for d in ("linear", "max_end", "mean_end")
    }
    v = np.array(kinds["linear"].loss.values)
    t = np.linspace(0, 1, 9)
    assert abs(v[0] - v[-1]) > 0.01
    assert kinds["linear"].value == pytest.approx(max(v - (1 - t) * v[0] - t * v[-1]))
    assert kinds["max_end"].value == pytest.approx(max(v) - max(v[0], v[-1]))
    assert kinds["mean_end"].value == pytest.approx(max(v) - (v[0] + v[-1]) / 2)
    assert kinds["max_end"].value <= kinds["mean_end"].value
    for name, found in kinds.items():
        assert found.definition == name
        assert json.loads(json.dumps(found.to_dict()))["definition"] == name


def test_the_error_is_that_of_the_difference_by_groups():
    objective, a, b = (o := objective_of()), *ends_of(o)
    found = barrier(objective, SegmentPath(a, b), t=[0, 0.4, 1], groups=4)
    rows = [objective.at(x).grouped_value(4)[1].numpy() for x in (a, 0.6 * a + 0.4 * b, b)]
    parts = 4 * (rows[1] - 0.6 * rows[0] - 0.4 * rows[2])  # each group's own rise
    assert found.loss.rises[1] == pytest.approx(parts.mean())
    assert found.loss.rise_errors[1] == pytest.approx(parts.std(ddof=1) / 2)
    assert found.loss.errors[1] == pytest.approx((4 * rows[1]).std(ddof=1) / 2)
    assert found.loss.rise_errors[0] == 0  # at the ends there is nothing to rise


def test_the_error_of_the_rise_holds_over_draws_of_the_data():
    # The spread of barriers at a known place over independent samples of one population.
    generator = torch.Generator().manual_seed(0)
    model = Square()
    a, b = torch.tensor([1.0, 0, 0]).double(), torch.tensor([0, 1.0, 0]).double()
    rises, errors = [], []
    for _ in range(120):
        X = torch.randn(64, 3, generator=generator, dtype=torch.float64)
        data = (X, torch.randn(64, generator=generator, dtype=torch.float64))
        loss = lambda out, y: (out.tanh() - y).square().mean()  # noqa: E731
        batches = list(zip(*(d.split(4) for d in data), strict=True))
        objective = sk.Objective(model, loss, batches, check=False)
        found = barrier(objective, SegmentPath(a, b), t=[0, 0.5, 1])
        rises.append(found.loss.rises[1])
        errors.append(found.loss.rise_errors[1])
    spread = np.std(rises, ddof=1)
    assert 0.8 < np.sqrt(np.mean(np.square(errors))) / spread < 1.25


def test_held_out_is_below_and_the_maximum_above_where_all_is_noise():
    # The population's rise is the same everywhere between: the maximum finds noise.
    generator = torch.Generator().manual_seed(1)

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x):  # x: a random loss for each of eleven places
            return x[:, (self.w * 10).round().long()[0]] + 0 * self.w

    top, out = [], []
    for _ in range(60):
        x = torch.randn(32, 11, generator=generator, dtype=torch.float64)
        x[:, [0, 10]] = 0
        data = list(zip(x.split(2), torch.zeros(16, 2), strict=True))
        objective = sk.Objective(Table(), lambda o, y: o.mean(), data, check=False)
        ends = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        found = barrier(objective, SegmentPath(*ends), t=[0, *np.linspace(0.1, 0.9, 9), 1])
        top.append(found.value)
        out.append(found.loss.held_out)
    error = np.std(top) / math.sqrt(60)
    assert np.mean(top) > 10 * error  # the truth is 0
    assert np.mean(out) < 2 * np.std(out) / math.sqrt(60)


def test_error_rates_and_other_data_have_barriers_of_their_own():
    objective = objective_of()
    test = sk.Objective(objective.model, CE, (normal(40, 4, seed=9), classes(3, 40, seed=10)))
    a, b = ends_of(objective)
    found = barrier(objective, SegmentPath(a, b), t=5, metrics=("loss", "error"), test=test)
    assert list(found.profiles) == ["loss", "error", "test/loss", "test/error"]
    middle = test.at((a + b) / 2)
    assert found["test/loss"].values[2] == pytest.approx(float(middle.value()))
    assert found["test/error"].values[2] == pytest.approx(middle.error_rate())
    missed = [(test.at(x).margins()[0] <= 0).double() for x in (a, (a + b) / 2, b)]
    each = missed[1] - (missed[0] + missed[2]) / 2
    assert found["test/error"].rise_errors[2] == pytest.approx(
        each.std().item() / math.sqrt(40), rel=1e-9
    )
    assert found.cost.forwards == 5 * 4
    table = found.to_frame()
    assert table["test/error rise error"][2] == found["test/error"].rise_errors[2]
    assert list(table["t"]) == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(SettingsError, match="test/error"):
        found["accuracy"]


def test_a_loss_that_is_not_finite_makes_the_barrier_unknown():
    class Root(Square):
        def forward(self, x):
            return x[:, :1] * self.w.sum().sqrt()

    data = (torch.ones(8, 1).double(), torch.ones(8, 1).double())
    model = Root()
    model.w.data.fill_(1.0)
    objective = sk.Objective(model, nn.MSELoss(), data)
    a, b = torch.tensor([1.0, 0, 0]).double(), torch.tensor([-1.0, 0, 0]).double()
    found = barrier(objective, SegmentPath(a, b), t=5)
    assert math.isnan(found.value)
    assert math.isnan(found.loss.at)
    assert found.error is None
    assert found.loss.held_out is None
    assert found.loss.values[1] == pytest.approx((1 - math.sqrt(0.5)) ** 2)
    assert math.isnan(found.loss.values[-1])
    assert any("unknown" in note and "2 of 5" in note and "0.75" in note for note in found.notes)
    assert found.to_dict()["profiles"]["loss"]["barrier"] is None


def test_a_few_batches_that_cannot_be_cut_have_no_error():
    X, y = normal(6, 3, seed=5), normal(6, seed=6)
    model = Square()
    model.w.data.copy_(normal(3))

    def batch_loss(model, batch):
        out = model(batch[0])
        return (out - batch[1]).square().sum() + len(out) * out.var(correction=0), len(out)

    data = list(zip(X.split(3), y.split(3), strict=True))
    objective = sk.Objective.from_batch_loss(model, batch_loss, data)
    assert not objective.adds_up
    found = barrier(objective, SegmentPath(normal(3), normal(3, seed=1)), t=3)
    assert found.error is None
    assert any("no error" in note for note in found.notes)


@pytest.mark.parametrize(
    "settings",
    [
        {"t": 2},
        {"t": [0, 0.5]},
        {"t": [0, 0.5, 0.5, 1]},
        {"t": [0.1, 0.5, 1]},
        {"definition": "mine"},
        {"metrics": "loss"},
        {"metrics": ("accuracy",)},
        {"groups": 3},
        {"statistics": "guess"},
    ],
)
def test_settings_of_barriers_are_checked(settings):
    objective = objective_of()
    with pytest.raises(SettingsError, match="Expected"):
        barrier(objective, SegmentPath(*ends_of(objective)), **settings)


def test_a_plane_is_no_path_and_another_network_no_test():
    objective = objective_of()
    a, b = ends_of(objective)
    plane, _ = plane_through(a, b, normal(objective.space.dim, seed=9))
    with pytest.raises(SettingsError, match="2 axes"):
        barrier(objective, plane)
    with pytest.raises(SettingsError, match="same parameters"):
        barrier(objective, SegmentPath(a, b), test=quadratic()[0])


# -- running statistics ------------------------------------------------------------------


def normalised():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def test_running_statistics_are_refused_kept_or_estimated_anew():
    objective = objective_of(normalised)
    a, b = ends_of(objective)
    path = SegmentPath(a, b)
    for work in (
        lambda: barrier(objective, path, statistics="refuse"),
        lambda: connect(objective, a, b, epochs=1, statistics="refuse"),
    ):
        with pytest.raises(MeasureError, match="running statistics"):
            work()
    kept = barrier(objective, path, t=3, statistics="keep")
    assert kept.loss.values[1] == pytest.approx(float(objective.at((a + b) / 2).value()))

    def fresh(here):
        state = state_of(here)
        z = normal(24, 4, seed=3) @ state["0.weight"].T + state["0.bias"]
        return with_state(
            here, {**state, "1.running_mean": z.mean(0), "1.running_var": z.var(0, False)}
        )

    anew = barrier(objective, path, t=3, statistics=fresh)
    X, y = normal(24, 4, seed=3), classes(3, 24, seed=4)
    middle = objective.space.unflatten((a + b) / 2)
    z = X @ middle["0.weight"].T + middle["0.bias"]
    z = (z - z.mean(0)) / (z.var(0, False) + 1e-5).sqrt() * middle["1.weight"] + middle["1.bias"]
    outputs = z.relu() @ middle["3.weight"].T + middle["3.bias"]
    assert anew.loss.values[1] == pytest.approx(CE(outputs, y).item())
    assert anew.loss.values[1] != pytest.approx(kept.loss.values[1], rel=1e-3)
    curve = connect(objective, a, b, epochs=2, lr=0.01, statistics=fresh)
    assert all(math.isfinite(x) for x in curve.losses)


def test_by_default_statistics_are_estimated_on_the_first_data_for_all():
    objective = objective_of(normalised)
    a, b = ends_of(objective)
    X, y = normal(30, 4, seed=8), classes(3, 30, seed=9)
    other = sk.Objective(objective.model, CE, (X, y))
    found = barrier(objective, SegmentPath(a, b), t=3, test=other)
    net = copy.deepcopy(objective.model)
    torch.nn.utils.vector_to_parameters((a + b) / 2, net.parameters())
    batches = [inputs for inputs, _ in objective._evaluator.batches()]
    torch.optim.swa_utils.update_bn(batches, net)
    net.eval()
    with torch.no_grad():
        assert found["test/loss"].values[1] == pytest.approx(CE(net(X), y).item())
    assert objective.model[1].running_mean.abs().max() == 0  # the user's own


# -- training ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bezier", "polychain"])
def test_gradients_of_bends_are_those_of_finite_differences(kind):
    objective = objective_of()
    a, b = ends_of(objective)
    bends = [0.5 * normal(objective.space.dim, seed=s) for s in (5, 6)]
    make = {"bezier": BezierPath, "polychain": PolychainPath}[kind]
    path, t, h = make(a, bends, b), 0.37, 1e-6
    found = bend_gradients(path, t, objective.at(path.point([t])).gradient())
    for i in range(2):
        v = normal(objective.space.dim, seed=7)
        values = []
        for sign in (1, -1):
            moved = [bend + sign * h * v if j == i else bend for j, bend in enumerate(bends)]
            values.append(float(objective.at(make(a, moved, b).point([t])).value()))
        slope = (values[0] - values[1]) / (2 * h)
        assert float(found[i] @ v) == pytest.approx(slope, rel=1e-6, abs=1e-10)


def test_one_step_is_the_step_of_the_formula():
    # One batch, one bend, plain SGD: c - lr 2t(1-t) (g + wd phi).
    objective = objective_of(batches=1)
    a, b = ends_of(objective)
    settings = {"epochs": 1, "lr": 0.3, "momentum": 0.0, "weight_decay": 0.2, "decay": False}
    curve = connect(objective, a, b, seed=5, **settings).path
    generator = torch.Generator().manual_seed(5)
    torch.randperm(1, generator=generator)
    t = torch.rand((), generator=generator, dtype=torch.float64).item()
    phi = (1 - t) * a + t * b
    g = objective.at(phi).gradient()
    expected = (a + b) / 2 - 0.3 * 2 * t * (1 - t) * (g + 0.2 * phi)
    assert torch.allclose(curve.bends[0], expected, atol=1e-12)


def test_a_short_batch_counts_by_its_terms():
    # Without momentum at lr -> 0 an epoch's step is lr times the sum of shares times gradients.
    X, y = normal(10, 4, seed=3), classes(3, 10, seed=4)
    data = [(X[:8], y[:8]), (X[8:], y[8:])]
    objective = sk.Objective(seeded(network), CE, data)
    a, b = ends_of(objective)
    lr = 1e-7
    settings = {"epochs": 1, "lr": lr, "momentum": 0.0, "decay": False, "keep_batches": False}
    curve = connect(objective, a, b, seed=3, **settings).path
    generator = torch.Generator().manual_seed(3)
    step = torch.zeros_like(a)
    for (x, labels), share in zip(data, (1.6, 0.4), strict=True):
        t = torch.rand((), generator=generator, dtype=torch.float64).item()
        each = sk.Objective(objective.model, CE, (x, labels))
        step += share * 2 * t * (1 - t) * each.at((1 - t) * a + t * b).gradient()
    assert torch.allclose(((a + b) / 2 - curve.bends[0]) / lr, step, rtol=1e-5, atol=1e-7)


def circle():
    """Minima on the unit circle: the segment between two of them is not low, an arc is."""
    x, y = torch.ones(8, 1).double(), torch.ones(8, 1).double()
    loss = lambda out, y: (out.square().sum(1) - y[:, 0]).square().mean()  # noqa: E731
    return sk.Objective(nn.Linear(1, 2, bias=False).double(), loss, (x, y))


@pytest.mark.parametrize(("kind", "bends"), [("bezier", 1), ("bezier", 2), ("polychain", 3)])
def test_a_trained_curve_goes_round_the_hill(kind, bends):
    objective = circle()
    a, b = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    before = barrier(objective, SegmentPath(a, b)).value
    settings = {"optimizer": "adam"} if bends == 2 else {}
    found = connect(objective, a, b, kind=kind, num_bends=bends, epochs=400, lr=0.03, **settings)
    assert barrier(objective, found.path).value < before / 10
    assert torch.equal(found.path.point([0.0]), a)
    assert torch.equal(found.path.point([1.0]), b)
    assert len(found.path.bends) == bends
    assert found.cost.gradients == 400
    assert np.mean(found.losses[-50:]) < np.mean(found.losses[:10])


def test_the_same_seed_gives_the_same_curve_and_nothing_else_moves():
    objective = objective_of()
    a, b = ends_of(objective)
    model = {n: p.clone() for n, p in objective.model.state_dict().items()}
    state = torch.get_rng_state()
    curves = [connect(objective, a, b, epochs=3, seed=s).path.bends[0] for s in (1, 1, 2)]
    assert torch.equal(curves[0], curves[1])
    assert not torch.equal(curves[0], curves[2])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, model[n]) for n, p in objective.model.state_dict().items())
    assert all(p.grad is None for p in objective.model.parameters())
    own = connect(objective, a, b, epochs=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    assert torch.equal(own.path.bends[0], SegmentPath(a, b).point([0.5]))


def test_weight_decay_draws_the_curve_towards_zero():
    objective = objective_of()
    a, b = ends_of(objective)
    free, drawn = (connect(objective, a, b, epochs=20, weight_decay=w).path for w in (0.0, 1.0))
    assert drawn.point([0.5]).norm() < free.point([0.5]).norm() / 2


def test_a_diverging_curve_is_refused():
    objective = circle()
    a, b = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    with pytest.raises(MeasureError, match="smaller lr"):
        connect(objective, a, b, epochs=50, lr=1e4)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "spline"},
        {"num_bends": 0},
        {"epochs": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"weight_decay": -1.0},
        {"optimizer": "lion"},
    ],
)
def test_settings_of_training_are_checked(settings):
    objective = objective_of()
    with pytest.raises(SettingsError, match="Expected"):
        connect(objective, *ends_of(objective), **settings)
    with pytest.raises(ShapeError, match="Expected"):
        connect(objective, torch.zeros(3), torch.zeros(3))


# -- planes ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_three_points_lie_in_their_plane_at_their_distances(dtype):
    points = [normal(50, seed=s).to(dtype) for s in (1, 2, 3)]
    plane, markers = plane_through(*points, labels=("start", "middle", "end"))
    assert isinstance(plane, StraightSection)
    eps = torch.finfo(dtype).eps
    for marker, point in zip(markers, points, strict=True):
        assert torch.allclose(plane.point(marker.coordinates), point, atol=20 * eps)
        assert marker.distance < 100 * eps
        (x, y), off = plane.coordinates(point)
        assert (x, y) == pytest.approx(marker.coordinates, abs=100 * eps)
        assert off < 100 * eps
    assert markers[0].coordinates == (0.0, 0.0)
    for (i, p), (j, q) in itertools.combinations(enumerate(points), 2):
        drawn = math.dist(markers[i].coordinates, markers[j].coordinates)
        assert drawn == pytest.approx(float((p.double() - q.double()).norm()), rel=1e-5)
    assert abs(plane.cosine) < 100 * eps
    assert [axis.step for axis in plane.axes] == pytest.approx([1.0, 1.0], rel=1e-6)
    assert [m.label for m in markers] == ["start", "middle", "end"]
    assert "distance in theta" in plane.axes[0].label
    assert "end" in plane.axes[1].label


def test_what_spans_no_plane_is_refused():
    a, b = normal(50, seed=1), normal(50, seed=2)
    for other in (0.3 * a + 0.7 * b, 2 * a - b, a, b):
        with pytest.raises(MeasureError, match="Expected three"):
            plane_through(a, b, other)
    with pytest.raises(MeasureError, match="Expected three different"):
        plane_through(a, a, b)
    near = a + 0.5 * (b - a) + 1e-4 * normal(50, seed=3)
    plane_through(a, b, near)  # thin, and a plane
    with pytest.raises(ShapeError, match="Expected"):
        plane_through(a, b, normal(49))
    with pytest.raises(SettingsError, match="labels"):
        plane_through(a, b, normal(50, seed=3), labels=("a", "b"))
    with pytest.raises(MeasureError, match="finite"):
        plane_through(a, b, normal(50, seed=3) / 0)
