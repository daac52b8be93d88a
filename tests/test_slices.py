"""Slices: equal to closed forms, the same however they are computed, nothing left behind."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from section_cases import digits_like, objectives, plane, quadratic
from torch import nn

from sharpkit import Objective
from sharpkit.errors import MeasureError, ObjectiveError, SettingsError, ShapeError
from sharpkit.landscape import (
    Direction,
    Status,
    StraightSection,
    compute_slice,
    load_slice,
    parse_range,
)

GRID = np.linspace(-1.0, 1.0, 7)


def test_on_a_quadratic_every_slice_is_the_closed_form():
    objective, A, b, c = quadratic()
    theta = objective.theta
    values, vectors = torch.linalg.eigh(A)
    generator = torch.Generator().manual_seed(1)
    some = torch.randn(theta.shape, generator=generator, dtype=theta.dtype)

    def L(t):
        return float(t @ A @ t / 2 + b @ t + c)

    for first, second in ((vectors[:, -1], vectors[:, 0]), (some, vectors[:, -1])):
        directions = [
            Direction(first, "tensor", "x", step=0.7),
            Direction(second, "tensor", "y", step=-2.0),
        ]
        line = compute_slice(StraightSection(theta, directions[:1]), objective, GRID)
        expected = [L(theta + x * 0.7 * first) for x in GRID]
        np.testing.assert_allclose(line.loss, expected, rtol=0, atol=1e-10)
        section = StraightSection(theta, directions)
        plane_ = compute_slice(section, objective, GRID, GRID[:5], quadratic=True)
        expected = [[L(theta + x * 0.7 * first - y * 2 * second) for y in GRID[:5]] for x in GRID]
        np.testing.assert_allclose(plane_.loss, expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(plane_.quadratic, expected, rtol=0, atol=1e-10)
    # Along the eigenvector of lambda the curvature is lambda (times the square of the step).
    axis = Direction(vectors[:, -1], "eigen", "v1", step=0.5)
    found = compute_slice(StraightSection(theta, [axis]), objective, GRID, quadratic=True)
    np.testing.assert_allclose(found.details["curvature"], [[float(values[-1]) * 0.25]], rtol=1e-10)


def test_refining_a_quadratic_measures_a_tenth_and_loses_nothing():
    objective, *_ = quadratic()
    full = compute_slice(plane(objective), objective, "-1:1:41", "-1:1:41")
    few = compute_slice(plane(objective), objective, "-1:1:41", "-1:1:41", refine=0.01)
    assert (few.status == Status.MEASURED).mean() < 0.2
    np.testing.assert_allclose(few.loss, full.loss, rtol=0, atol=1e-10)
    assert few.details["max_check_error"]["loss"] < 1e-10
    assert few.details["num_checked"] >= 8


def test_values_are_those_of_the_objective_at_each_point_with_any_split_of_the_data():
    objective, test = objectives(batch=7)
    section = plane(objective)
    found = compute_slice(
        section, {"train": objective, "test": test}, [-0.5, 0.0, 0.5], [-1.0, 0.3], metrics=["accuracy"]
    )  # fmt: skip
    whole = objectives(batch=1000)
    for i, x in enumerate(found.grid[0]):
        for j, y in enumerate(found.grid[1]):
            theta = section.point((x, y))
            for name, o in (("train", whole[0]), ("test", whole[1])):
                there = o.at(theta)
                assert found[f"{name}/loss"][i, j] == pytest.approx(float(there.value()), abs=1e-10)
                rate = 1 - there.error_rate()
                assert found[f"{name}/accuracy"][i, j] == pytest.approx(rate, abs=1e-12)
    again = compute_slice(section, whole[0], found.grid[0], found.grid[1])
    np.testing.assert_allclose(again.loss, found["train/loss"], atol=1e-10)


def test_class_weights_and_ignored_labels_count_as_the_criterion_counts():
    model, x, y = digits_like()
    y = y.clone()
    y[::5] = -100
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=x.dtype))
    objective = Objective(model, loss, [(x[:50], y[:50]), (x[50:], y[50:])])
    found = compute_slice(plane(objective), objective, GRID, GRID[:3], metrics=["accuracy"])
    for i, a in enumerate(GRID):
        there = objective.at(plane(objective).point((a, GRID[1])))
        assert found.loss[i, 1] == pytest.approx(float(there.value()), abs=1e-10)
        assert found["accuracy"][i, 1] == pytest.approx(1 - there.error_rate(), abs=1e-12)


@pytest.mark.parametrize("kind", ["batch_loss", "function", "sequence", "mse"])
def test_other_losses_than_rows_of_classes(kind):
    model, x, y = digits_like()
    if kind == "batch_loss":
        objective = Objective.from_batch_loss(
            model,
            lambda m, b: (nn.functional.cross_entropy(m(b["x"]), b["y"], reduction="sum"), len(b["y"])),
            [{"x": x[:60], "y": y[:60]}, {"x": x[60:], "y": y[60:]}],
        )  # fmt: skip
    elif kind == "function":
        objective = Objective(model, lambda o, t: nn.functional.cross_entropy(o, t), (x, y))
    elif kind == "sequence":  # outputs with a row a token, not an example
        net = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 3), nn.Flatten(0, 1)).double()
        objective = Objective(net, nn.CrossEntropyLoss(), (x, y.repeat_interleave(2)), check=False)
    else:
        objective = Objective(model, nn.MSELoss(), (x, nn.functional.one_hot(y).to(x)))
    section = StraightSection(objective.theta, plane(objective).directions[:1])
    found = compute_slice(section, objective, GRID)
    expected = [float(objective.at(section.point((a,))).value()) for a in GRID]
    np.testing.assert_allclose(found.loss, expected, rtol=1e-12)
    has_errors = "loss" in found.errors
    assert has_errors == (kind != "sequence")  # tokens of an example are not independent


def test_errors_cover_what_other_data_would_give():
    # Truth: the mean over 4000 examples; samples of 100 must scatter by the stated errors.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(4000, 3, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * torch.randn(4000, dtype=torch.float64) > 0).long()
    everything = Objective(net, nn.CrossEntropyLoss(), (x, y))
    section = plane(everything)
    truth = compute_slice(section, everything, [0.0, 0.6], [0.0, 0.8], metrics=["accuracy"])
    z, z_rise = [], []
    for k in range(40):
        part = slice(100 * k, 100 * k + 100)
        sample = Objective(net, nn.CrossEntropyLoss(), (x[part], y[part]))
        found = compute_slice(section, sample, [0.0, 0.6], [0.0, 0.8], metrics=["accuracy"])
        for name in ("loss", "accuracy"):
            z.append((found[name] - truth[name])[1, 1] / found.errors[name][1, 1])
            rise = found[name][1, 1] - found[name][0, 0] - truth[name][1, 1] + truth[name][0, 0]
            z_rise.append(rise / found.rise_errors[name][1, 1])
    for found in (z, z_rise):  # t with 7 degrees of freedom has a spread of 1.18
        assert abs(np.mean(found)) < 4 * 1.18 / math.sqrt(len(found) / 2)
        assert 0.85 < np.std(found) < 1.6
    found = compute_slice(section, everything, [0.0, 0.6], [0.0, 0.8])
    assert found.rise_errors["loss"][0, 0] == 0
    assert found.rise_errors["loss"][1, 1] > 0


def test_metrics_of_the_user_by_example_and_by_batch():
    objective, _ = objectives(batch=1000)

    def confidence(outputs, targets):
        return outputs.softmax(1).amax(1)

    def mean_norm(outputs, targets):
        return outputs.norm(dim=1).mean()

    found = compute_slice(
        plane(objective), objective, GRID, GRID[:2], metrics={"confidence": confidence, "norm": mean_norm}
    )  # fmt: skip
    theta = plane(objective).point((GRID[2], GRID[1]))
    model = copy.deepcopy(objective.model)
    torch.nn.utils.vector_to_parameters(theta, model.parameters())
    x = digits_like()[1][:80]
    outputs = model(x).detach()
    assert found["confidence"][2, 1] == pytest.approx(float(outputs.softmax(1).amax(1).mean()))
    assert found["norm"][2, 1] == pytest.approx(float(outputs.norm(dim=1).mean()))
    assert "confidence" in found.errors
    assert "norm" not in found.errors  # one number a batch says nothing of its scatter


def test_what_is_not_finite_stays_a_gap_and_what_is_high_is_cut():
    model, x, y = digits_like()
    objective = Objective(model, nn.MSELoss(), (x, nn.functional.one_hot(y).to(x)))
    direction = Direction(objective.theta, "tensor", "multiples of theta", step=1e50)
    section = StraightSection(objective.theta, [direction])
    found = compute_slice(section, objective, [-1e15, -1.0, 0.0, 1.0, 1e150], loss_max=1e250)
    assert found.status.tolist() == [
        Status.CUT, Status.MEASURED, Status.MEASURED, Status.MEASURED, Status.NOT_FINITE
    ]  # fmt: skip
    assert np.isnan(found.loss[[0, 4]]).all()
    assert np.isfinite(found.loss[1:4]).all()
    plain = compute_slice(section, objective, [-1e15, 0.0, 1e150])
    assert plain.status.tolist() == [Status.MEASURED, Status.MEASURED, Status.NOT_FINITE]


def test_cutting_early_and_late_say_the_same():
    objective, test = objectives(batch=5)
    section = plane(objective)
    sets = {"train": objective, "test": test}
    full = compute_slice(section, sets, "-3:3:21", "-3:3:21")
    cut = compute_slice(section, sets, "-3:3:21", "-3:3:21", loss_max=1.5)
    high = full["train/loss"] > 1.5
    assert 0.1 < high.mean() < 0.9
    assert ((cut.status == Status.CUT) == high).all()
    for name in full.names:
        assert np.isnan(cut[name][high]).all()
        np.testing.assert_allclose(cut[name][~high], full[name][~high], atol=1e-12)
    few = compute_slice(section, sets, "-3:3:21", "-3:3:21", loss_max=1.5, refine=0.02)
    known = ~np.isnan(few["train/loss"])
    assert (known == ~high).mean() > 0.98  # the edge is predicted where it is not measured
    both = known & ~high
    np.testing.assert_allclose(few["train/loss"][both], full["train/loss"][both], rtol=0.05)
    assert set(np.unique(few.status)) <= {
        Status.MEASURED, Status.INTERPOLATED, Status.CUT, Status.SKIPPED
    }  # fmt: skip


def test_model_buffers_and_random_state_stay_as_they_were():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    objective = Objective(model, nn.CrossEntropyLoss(), [(x[:16], y[:16]), (x[16:], y[16:])])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()

    def stop(progress):
        if progress.done > 3:
            raise KeyboardInterrupt

    for batch_norm in ("keep", "reestimate"):
        compute_slice(
            plane(objective), objective, GRID, GRID, batch_norm=batch_norm, metrics=["accuracy"]
        )
        with pytest.raises(KeyboardInterrupt):
            compute_slice(
                plane(objective), objective, GRID, GRID, batch_norm=batch_norm, progress=stop
            )

        def bad(outputs, targets):
            raise RuntimeError("no metric")

        with pytest.raises(RuntimeError, match="no metric"):
            compute_slice(plane(objective), objective, GRID, GRID, metrics={"bad": bad})
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    assert not any(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_reestimated_statistics_are_those_of_update_bn():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    model.eval()
    x, y = torch.randn(32, 4).double(), torch.randint(0, 3, (32,))
    test = torch.randn(20, 4).double(), torch.randint(0, 3, (20,))
    batches = [(x[:16], y[:16]), (x[16:], y[16:])]
    objective = Objective(model, nn.CrossEntropyLoss(), batches)
    other = Objective(model, nn.CrossEntropyLoss(), test)
    section = plane(objective)
    found = compute_slice(
        section, {"train": objective, "test": other}, [-0.7, 0.0, 0.5], [0.0, 0.4], batch_norm="reestimate"
    )  # fmt: skip
    own = copy.deepcopy(model)
    torch.nn.utils.vector_to_parameters(section.point((0.5, 0.4)), own.parameters())
    torch.optim.swa_utils.update_bn([b[0] for b in batches], own)
    own.eval().requires_grad_(False)
    loss = nn.CrossEntropyLoss()
    assert found["train/loss"][2, 1] == pytest.approx(float(loss(own(x), y)), abs=1e-10)
    assert found["test/loss"][2, 1] == pytest.approx(float(loss(own(test[0]), test[1])), abs=1e-10)
    kept = compute_slice(section, objective, [-0.7, 0.0, 0.5], [0.0, 0.4])
    assert abs(kept.loss[2, 1] - found["train/loss"][2, 1]) > 1e-3
    assert kept.details["batch_norm"] == "kept"
    assert found.details["batch_norm"] == "re-estimated"
    single = Objective(model, loss, [(x[:1], y[:1]), (x[1:], y[1:])])
    with pytest.raises(ObjectiveError, match="more than one value for each channel"):
        compute_slice(section, single, [0.0, 1.0], [0.0, 1.0], batch_norm="reestimate")


def test_an_interrupted_slice_goes_on_with_the_same_bits(tmp_path):
    objective, test = objectives(batch=9)
    section, folder = plane(objective), tmp_path / "parts"
    sets = {"train": objective, "test": test}
    grid = {"x": "-1:1:9", "y": "-1:1:8", "metrics": ["accuracy"], "loss_max": 2.0}
    whole = compute_slice(section, sets, **grid)
    seen = []

    def stop(progress):
        seen.append(progress.done)
        if progress.done - seen[0] > 20:
            raise KeyboardInterrupt

    for _ in range(2):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            compute_slice(section, sets, **grid, parts=folder, progress=stop)
    assert seen[0] > 20  # the second run began where the first one ended
    (folder / "part-broken.npz").write_bytes(b"no archive")
    resumed = compute_slice(section, sets, **grid, parts=folder)
    assert resumed.cost.forwards < whole.cost.forwards - 50
    for name in whole.names:
        np.testing.assert_array_equal(resumed[name], whole[name])
        np.testing.assert_array_equal(resumed.errors[name], whole.errors[name])
        np.testing.assert_array_equal(resumed.rise_errors[name], whole.rise_errors[name])
    np.testing.assert_array_equal(resumed.status, whole.status)
    for other in ({"loss_max": 3.0}, {"x": "-1:1:11"}, {"metrics": []}):
        with pytest.raises(SettingsError, match="those of another one"):
            compute_slice(section, sets, **{**grid, **other}, parts=folder)
    moved = StraightSection(objective.theta + 1e-3, section.directions)
    with pytest.raises(SettingsError, match="another section"):
        compute_slice(moved, sets, **grid, parts=folder)


def test_workers_find_the_same_bits():
    section = plane(objectives()[0])
    grid = {"x": "-1:1:5", "y": "-1:1:4", "metrics": ["accuracy"], "refine": 0.02}
    one = compute_slice(section, None, factory=sets_of_objectives, **grid)
    two = compute_slice(section, None, factory=sets_of_objectives, workers=2, **grid)
    for name in one.names:
        np.testing.assert_array_equal(two[name], one[name])
        np.testing.assert_array_equal(two.errors[name], one.errors[name])
    with pytest.raises(SettingsError, match="no lambdas"):
        compute_slice(section, None, factory=lambda: sets_of_objectives(), workers=2, **grid)


def sets_of_objectives():
    return dict(zip(("train", "test"), objectives(), strict=True))


def test_a_slice_is_saved_and_read_without_the_model(tmp_path):
    objective, _ = objectives()
    found = compute_slice(
        plane(objective), objective, GRID, GRID, metrics=["accuracy"], quadratic=True,
        refine=0.05, loss_max=0.9, details={"title": 'a "title"'},
    )  # fmt: skip
    path = found.save(tmp_path / "slice.npz")
    again = load_slice(path)
    assert again.axes == found.axes
    assert again.markers == found.markers
    assert again.details == json.loads(json.dumps(found.details))
    for kind in ("values", "errors", "rise_errors"):
        for name, array in getattr(found, kind).items():
            np.testing.assert_array_equal(getattr(again, kind)[name], array)
    np.testing.assert_array_equal(again.status, found.status)
    np.testing.assert_array_equal(again.quadratic, found.quadratic)
    assert again.cost == found.cost
    (tmp_path / "other.npz").write_bytes(path.read_bytes()[:200])
    np.savez(tmp_path / "foreign.npz", a=np.zeros(2))
    for name in ("other.npz", "foreign.npz", "missing.npz"):
        with pytest.raises(SettingsError, match="Expected a slice that sharpkit wrote"):
            load_slice(tmp_path / name)
    with pytest.raises(SettingsError, match=r"ends in \.npz"):
        found.save(tmp_path / "slice.txt")


def test_wrong_use_is_said():
    objective, _ = objectives()
    section = plane(objective)
    line = StraightSection(objective.theta, section.directions[:1])
    for text in ("-1:1", "1:-1:5", "a:b:3", "-1:1:1", "-1:1:2.5", "0:nan:3", "0:1:3:4"):
        with pytest.raises(SettingsError, match="such as -1:1:51"):
            parse_range(text)
    for x in ([1.0, 0.0], [0.0], [0.0, math.nan], [[0.0, 1.0]]):
        with pytest.raises((SettingsError, ValueError)):
            parse_range(x)
    cases = [
        ((section, objective, GRID), {}, "each of the 2 axes"),
        ((line, objective, GRID), {"loss_max": math.inf}, "finite `loss_max`"),
        ((line, objective, GRID), {"refine": 2.0}, "between 0 and 1"),
        ((line, objective, GRID), {"workers": 2}, "a `factory`"),
        ((line, None, GRID), {}, "Got neither"),
        ((line, objective, GRID), {"metrics": ["f1"]}, "'f1' without a function"),
        ((line, objective, GRID), {"metrics": {"loss": len}}, "none of them called"),
        ((line, objective, GRID), {"batch_norm": "maybe"}, "'keep' or 'reestimate'"),
        ((line, objective, GRID), {"num_groups": 0}, "at least 1 group"),
        ((line, objective, GRID), {"metrics": {"m": lambda o, t: o}}, None),
    ]
    for args, named, message in cases:
        if message is None:
            compute_slice(*args, **named)  # a value a class is averaged
            continue
        with pytest.raises(SettingsError, match=message):
            compute_slice(*args, **named)
    with pytest.raises(ObjectiveError, match="one value an example"):
        compute_slice(line, objective, GRID, metrics={"m": lambda o, t: o[:3]})
    d = section.directions[0]
    with pytest.raises(MeasureError, match="positive, finite length"):
        StraightSection(objective.theta, [Direction(0 * d.vector, "tensor", "x")])
    with pytest.raises(MeasureError, match="parallel"):
        StraightSection(objective.theta, [d, Direction(-2 * d.vector, "tensor", "x")])
    with pytest.raises(ShapeError, match="of shape"):
        StraightSection(objective.theta, [Direction(d.vector[:3], "tensor", "x")])
    with pytest.raises(SettingsError, match="one or two"):
        StraightSection(objective.theta, [])


def test_coordinates_of_a_point_and_its_distance():
    objective, _ = objectives()
    section = plane(objective)
    at, distance = section.coordinates(section.point((0.3, -0.7)))
    assert at == pytest.approx((0.3, -0.7))
    assert distance == pytest.approx(0.0, abs=1e-12)
    u, v = section.units()
    away = torch.randn(u.shape, dtype=u.dtype, generator=torch.Generator().manual_seed(5))
    basis = torch.linalg.qr(torch.stack([u, v], 1)).Q
    away -= basis @ (basis.T @ away)
    at, distance = section.coordinates(section.point((0.3, -0.7)) + 2 * away / away.norm())
    assert at == pytest.approx((0.3, -0.7))
    assert distance == pytest.approx(2.0)
