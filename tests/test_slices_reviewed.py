"""Slices in odd cases: losses that are no plain sums, damaged parts, statistics of odd layers."""

import copy
import random

import numpy as np
import pytest
import torch
from section_cases import Vector, digits_like, objectives, plane
from torch import nn
from torch.nn import functional as F

from sharpkit import Objective
from sharpkit.errors import ObjectiveError, SettingsError
from sharpkit.landscape import (
    Axis,
    Direction,
    GeodesicSection,
    Marker,
    Slice,
    Status,
    StraightSection,
    compute_slice,
    gradient_direction,
    load_slice,
    random_direction,
    remove_parts,
)
from sharpkit.landscape.refine import fill_grid
from sharpkit.objective import tallies
from sharpkit.objective.batches import taken
from sharpkit.objective.statistics import reestimated

GRID = np.linspace(-1.0, 1.0, 5)


def line(objective):
    return StraightSection(objective.theta, plane(objective).directions[:1])


def pieces(x, y, sizes):
    stops = np.cumsum(sizes)
    return [(x[b - s : b], y[b - s : b]) for s, b in zip(sizes, stops, strict=True)]


def values(section, objective, grid=GRID):
    return [float(objective.at(section.point((a,))).value()) for a in grid]


# -- losses --------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[7] * 16, [60, 60]])
def test_a_loss_that_mixes_examples_is_asked_of_each_batch_as_it_comes(sizes):
    model, x, y = digits_like()

    def loss(outputs, targets):
        spread = (outputs - outputs.mean(0)).square().mean()
        return spread + F.cross_entropy(outputs, targets)

    objective = Objective(model, loss, pieces(x, y, sizes), check=False)
    for groups in (1, 8):
        found = compute_slice(line(objective), objective, GRID, num_groups=groups)
        np.testing.assert_allclose(found.loss, values(line(objective), objective), atol=1e-12)


def test_each_pass_starts_from_the_same_random_state():
    class Noisy(nn.Linear):
        def forward(self, x):
            shift = random.random() + np.random.rand() + torch.rand(1)
            return super().forward(x) + shift * torch.arange(3)

    torch.manual_seed(0)
    x, y = torch.randn(24, 4), torch.arange(24) % 3
    model = Noisy(4, 3)
    states = torch.get_rng_state(), random.getstate()
    objective = Objective(model, nn.CrossEntropyLoss(), pieces(x, y, [12, 12]), check=False)
    found = compute_slice(line(objective), objective, GRID)
    np.testing.assert_allclose(found.loss, values(line(objective), objective), rtol=1e-6)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()


@pytest.mark.parametrize("kind", ["squares", "weights", "beyond", "negative"])
def test_a_cut_says_what_the_whole_loss_says(kind, monkeypatch):
    monkeypatch.setattr(tallies, "HELD", 1)  # look after every batch
    model, x, y = digits_like()
    hot = F.one_hot(y, 3).to(x)
    data = pieces(x, hot, [20] * 6)
    if kind == "squares":  # three terms an example
        objective = Objective(model, nn.MSELoss(), data)
    elif kind == "weights":
        weight = torch.tensor([0.2, 0.1, 0.3], dtype=x.dtype)
        loss = nn.CrossEntropyLoss(weight=weight)
        objective = Objective(model, loss, pieces(x, y, [20] * 6))
    elif kind == "beyond":  # targets that are no probabilities: later terms are negative
        data = [(a, torch.full_like(t, 1.0 if i < 3 else 8.0)) for i, (a, t) in enumerate(data)]
        data = [(a + 2 * (i >= 3), t) for i, (a, t) in enumerate(data)]
        objective = Objective(model, nn.BCEWithLogitsLoss(), data)
    else:
        signs = [
            (a, torch.full((len(a),), 1.0 if i < 3 else -1.2)) for i, (a, _) in enumerate(data)
        ]
        objective = Objective(model, lambda o, t: (o.square().sum(1) * t).mean(), signs)
    section = line(objective)
    full = compute_slice(section, objective, "-2:2:21")
    limit = float(np.sort(full.loss)[7:9].mean())
    cut = compute_slice(section, objective, "-2:2:21", loss_max=limit)
    assert ((cut.status == Status.CUT) == (full.loss > limit)).all()
    low = full.loss <= limit
    np.testing.assert_allclose(cut.loss[low], full.loss[low], atol=1e-12)


@pytest.mark.parametrize("how", ["criterion", "batch_loss"])
def test_errors_hold_when_the_data_are_sorted_by_class(how):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def draw(count, seed):
        g = torch.Generator().manual_seed(seed)
        y = torch.randint(0, 3, (count,), generator=g).sort().values
        return torch.randn(count, 3, generator=g).double() + 2 * F.one_hot(y, 3), y

    def objective(x, y):
        if how == "criterion":
            return Objective(net, nn.CrossEntropyLoss(), (x, y))
        loss = lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="sum"), len(b[1]))  # noqa: E731
        return Objective.from_batch_loss(net, loss, [(x, y)])

    whole = objective(*draw(20_000, 999))
    truth = compute_slice(line(whole), whole, [0.0, 0.7])
    z = []
    for seed in range(60):
        found = compute_slice(line(whole), objective(*draw(120, seed)), [0.0, 0.7])
        rise = (found.loss - truth.loss) @ [-1.0, 1.0]
        z.append(rise / found.rise_errors["loss"][1])
    assert 0.9 < np.std(z) < 1.9  # dealt out in turn: 2.8


def test_what_is_as_high_as_the_limit_is_not_above_it():
    model, x, y = digits_like()
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    full = compute_slice(line(objective), objective, GRID)
    for i, limit in enumerate(full.loss):
        cut = compute_slice(line(objective), objective, GRID, loss_max=limit)
        assert cut.status[i] == Status.MEASURED
        assert ((cut.status == Status.CUT) == (full.loss > limit)).all()


def test_labels_that_are_tied_are_not_met():
    model, x, y = digits_like()
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    section = StraightSection(objective.theta, [Direction(objective.theta, "tensor", "x")])
    found = compute_slice(section, objective, [-1.0, 0.0], metrics="accuracy")
    assert found["accuracy"][0] == 0  # all logits are zero
    assert found["accuracy"][1] == pytest.approx(1 - objective.error_rate())


def test_a_metric_s_means_of_batches_are_weighted_by_their_examples():
    model, x, y = digits_like()
    objective = Objective(model, nn.CrossEntropyLoss(), pieces(x, y, [10, 90, 20]))
    found = compute_slice(
        line(objective), objective, [0.0, 1.0], metrics={"m": lambda o, t: o[:, 0].mean()}
    )
    assert found["m"][0] == pytest.approx(float(model(x)[:, 0].mean().detach()), rel=1e-9)


def test_errors_of_interpolated_points_are_those_of_their_neighbours():
    _, x, y = digits_like()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
    usual = {"x": "-1:1:33", "y": "-1:1:33"}
    full = compute_slice(plane(objective), objective, **usual)
    few = compute_slice(plane(objective), objective, **usual, refine=0.05)
    made_up = few.status == Status.INTERPOLATED
    assert made_up.sum() > 100
    for name in ("errors", "rise_errors"):
        assert np.isfinite(getattr(few, name)["loss"]).all()
        ratio = getattr(few, name)["loss"][made_up] / getattr(full, name)["loss"][made_up]
        assert np.median(ratio) == pytest.approx(1.0, abs=0.1)
        assert ratio.min() > 0.5
    flat = few.errors["loss"][made_up]
    assert flat.max() > 1.2 * flat.min()


@pytest.mark.parametrize("shift", [0.0, -4.0])
def test_interpolation_goes_on_over_the_edge_of_what_is_cut(shift):
    def loss(model, batch):  # from 1 to 4, or from -3 to 0
        return model(batch).square().sum() * 1.5 + 1.0 + shift, 1.0

    data = [torch.zeros(1, 1).double()]
    bowl = Objective.from_batch_loss(Vector(torch.zeros(2).double()), loss, data)
    axes = [Direction(e, "tensor", "e") for e in torch.eye(2).double()]
    section = StraightSection(bowl.theta, axes)
    full = compute_slice(section, bowl, "-1:1:41", "-1:1:41")
    limit = float(np.quantile(full.loss, 0.5)) + 1e-6
    few = compute_slice(section, bowl, "-1:1:41", "-1:1:41", loss_max=limit, refine=0.01)
    low = full.loss <= limit
    np.testing.assert_allclose(few.loss[low], full.loss[low], atol=1e-9)
    assert np.isnan(few.loss[~low]).all()
    assert np.isin(few.status, [Status.MEASURED, Status.CUT]).mean() < 0.2


def test_some_examples_of_a_batch():
    batch = {"x": torch.arange(4), "name": ["a", "b", "c", "d"], "scale": torch.ones(4)}
    found = taken(batch, torch.tensor([2, 0]), shared={".scale"})
    assert found["x"].tolist() == [2, 0]
    assert found["name"] == ["c", "a"]
    assert len(found["scale"]) == 4


def test_what_is_infinite_in_a_metric_is_a_gap_without_an_error():
    objective, _ = objectives()

    def metric(outputs, targets):
        return torch.where(outputs[:, 0] > 1.0, torch.inf, outputs[:, 0])

    found = compute_slice(line(objective), objective, "-3:3:13", metrics={"m": metric})
    gap = np.isnan(found["m"])
    assert 0 < gap.sum() < 13
    assert (found.status == Status.MEASURED).all()
    assert np.isfinite(found.loss).all()
    assert np.isnan(found.errors["m"][gap]).all()
    assert np.isfinite(found.errors["m"][~gap]).all()


def test_a_sum_that_overflows_is_a_gap_without_an_error():
    objective, _ = objectives()

    def metric(outputs, targets):
        return torch.full((len(outputs),), 1e307, dtype=torch.float64)

    found = compute_slice(line(objective), objective, GRID, metrics={"m": metric})
    assert np.isnan(found["m"]).all()
    assert "m" not in found.errors


def test_one_metric_by_its_name_and_no_data():
    objective, _ = objectives()
    found = compute_slice(line(objective), objective, GRID, metrics="accuracy")
    assert found.names == ("loss", "accuracy")
    with pytest.raises(SettingsError, match="at least one data set"):
        compute_slice(line(objective), {}, GRID)


# -- BatchNorm -----------------------------------------------------------------------------


class Norms(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.bn, self.spare = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.first(x)
        if self.how == "twice":
            h = self.first(torch.relu(self.bn(h)))
        if self.how != "sometimes" or len(x) > 12:
            h = self.bn(h)
        return self.last(h)


@pytest.mark.parametrize("how", ["once", "twice", "sometimes"])
def test_statistics_of_a_layer_called_more_or_less_than_once_a_batch(how):
    torch.manual_seed(0)
    model = Norms(how).double().eval()
    x, y = torch.randn(40, 4).double(), torch.randint(0, 3, (40,))
    same = pieces(x, y, [20, 20] if how != "sometimes" else [12, 28])
    found = reestimated(Objective(model, nn.CrossEntropyLoss(), same))._evaluator.buffers
    own = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn([b for b, _ in same], own)
    for name in ("bn.running_mean", "bn.running_var"):
        assert torch.allclose(found[name], own.get_buffer(name), atol=1e-12)
    assert torch.equal(found["spare.running_var"], torch.ones(4).double())  # never called
    assert model.bn.momentum == 0.1


def test_statistics_weigh_batches_by_their_examples():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval()
    x, y = torch.randn(40, 4).double(), torch.randint(0, 3, (40,))
    objective = Objective(model, nn.CrossEntropyLoss(), pieces(x, y, [10, 30]))
    found = reestimated(objective)._evaluator.buffers
    assert torch.allclose(found["0.running_mean"], x.mean(0))
    expected = x[:10].var(0) / 4 + 3 * x[10:].var(0) / 4
    assert torch.allclose(found["0.running_var"], expected)
    model[0].track_running_stats = False
    with pytest.raises(ObjectiveError, match="track_running_stats is off"):
        reestimated(objective)


# -- parts ---------------------------------------------------------------------------------


def test_points_with_a_gap_in_a_metric_are_read_again(tmp_path):
    objective, _ = objectives()

    def metric(outputs, targets):
        return outputs[:, 0] * (torch.nan if float(outputs.max()) > 2.0 else 1.0)

    def measure():
        return compute_slice(
            line(objective), objective, "-3:3:13", metrics={"m": metric}, parts=tmp_path
        )

    first, again = measure(), measure()
    assert 0 < np.isnan(first["m"]).sum() < 13
    assert again.cost.forwards < 5
    for name in first.names:
        np.testing.assert_array_equal(again[name], first[name])
        np.testing.assert_array_equal(again.errors[name], first.errors[name])
        np.testing.assert_array_equal(again.rise_errors[name], first.rise_errors[name])


def test_parts_of_another_function_are_refused(tmp_path):
    model, x, y = digits_like()
    head, bias = Objective(model, nn.CrossEntropyLoss(), (x, y)), "2.bias"
    usual = {"parts": tmp_path, "metrics": {"m": lambda o, t: o[:, 0]}}
    objective = head.restrict("*.weight")
    section = line(objective)
    compute_slice(section, objective, GRID, **usual)
    smooth = Objective(model, nn.CrossEntropyLoss(label_smoothing=0.3), (x, y)).restrict("*.weight")
    near = Objective(model, nn.CrossEntropyLoss(), (x + 1e-9, y)).restrict("*.weight")
    with torch.no_grad():
        model.get_parameter(bias).add_(1e-9)
    moved = Objective(model, nn.CrossEntropyLoss(), (x, y)).restrict("*.weight")
    for other, named, word in [
        (smooth, {}, "value at the origin"),
        (objective, {"metrics": {"m": lambda o, t: o[:, 1]}}, "value at the origin"),
        (near, {}, "another data"),
        (moved, {}, "another state"),
        (objective, {"batch_norm": "reestimate"}, "another batch_norm"),
        (objective, {"num_groups": 4}, "another groups"),
    ]:
        with pytest.raises(SettingsError, match=word):
            compute_slice(section, other, GRID, **{**usual, **named})
    compute_slice(section, objective, GRID, **usual)


def test_damaged_files_are_left_out_or_refused_in_a_sentence(tmp_path):
    objective, _ = objectives()
    whole = compute_slice(line(objective), objective, GRID, parts=tmp_path / "p")
    path = whole.save(tmp_path / "s.npz")
    (part,) = (tmp_path / "p").glob("part-*.npz")
    rng = random.Random(0)
    kept, saved = part.read_bytes(), path.read_bytes()

    def damaged(data):
        if rng.random() < 0.5:
            return data[: rng.randrange(len(data))]
        found = bytearray(data)
        found[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(found)

    for i in range(60):
        path.write_bytes(damaged(saved))
        try:
            load_slice(path)
        except SettingsError as error:
            assert "Expected a slice" in str(error)  # noqa: PT017
        if i % 4 == 0:
            part.write_bytes(damaged(kept))
            for other in (tmp_path / "p").glob("part-*.npz"):
                if other != part:
                    other.unlink()
            again = compute_slice(line(objective), objective, GRID, parts=tmp_path / "p")
            np.testing.assert_array_equal(again.loss, whole.loss)
    (tmp_path / "p" / "plan.json").write_bytes(b"\xff\x00")
    with pytest.raises(SettingsError, match="cannot be read"):
        compute_slice(line(objective), objective, GRID, parts=tmp_path / "p")


def test_a_folder_that_goes_away_is_said_and_one_is_removed_without_strangers(tmp_path):
    objective, _ = objectives()
    folder = tmp_path / "p"

    def lose(progress):
        if progress.done == 3:
            remove_parts(folder)

    with pytest.raises(SettingsError, match="Expected to write points to"):
        compute_slice(line(objective), objective, GRID, parts=folder, progress=lose)
    assert not folder.exists()
    compute_slice(line(objective), objective, GRID, parts=folder)
    (folder / "mine.npz").write_bytes(b"1")
    remove_parts(folder)
    assert [p.name for p in folder.iterdir()] == ["mine.npz"]
    (folder / "mine.npz").unlink()
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingsError, match="Expected a folder"):
        compute_slice(line(objective), objective, GRID, parts=tmp_path / "file")


def test_what_was_measured_stays_measured_under_a_looser_tolerance(tmp_path):
    objective, _ = objectives()
    usual = {"x": "-2:2:25", "y": "-2:2:25", "parts": tmp_path, "loss_max": 1.2}
    fine = compute_slice(plane(objective), objective, **usual, refine=0.001)
    loose = compute_slice(plane(objective), objective, **usual, refine=0.3)
    measured = fine.status == Status.MEASURED
    assert (loose.status[measured] == Status.MEASURED).all()
    np.testing.assert_array_equal(loose.loss[measured], fine.loss[measured])
    gaps = np.isin(loose.status, [Status.CUT, Status.SKIPPED])
    assert np.isnan(loose.loss[gaps]).all()


def drawn_anew():
    model, x, y = digits_like()
    torch.seed()
    return {"": Objective(model, nn.CrossEntropyLoss(), (x + torch.randn(120, 4), y))}


def test_workers_whose_objectives_differ_are_refused():
    here = drawn_anew()
    with pytest.raises(SettingsError, match="the same data, buffers"):
        compute_slice(line(here[""]), here, GRID, workers=2, factory=drawn_anew)


def test_markers_keep_their_distance(tmp_path):
    axis = Axis("tensor", "multiples of d", 1.0)
    marker = Marker("epoch 3", (0.5,), 0.25)
    x = np.linspace(-1, 1, 3)
    held = Slice((axis,), (x,), {"loss": x}, status=np.zeros(3, dtype=np.int8), markers=(marker,))
    assert load_slice(held.save(tmp_path / "s.npz")).markers == (marker,)


# -- refinement and directions -------------------------------------------------------------


def test_the_miss_of_held_out_points_is_what_was_missed():
    x = np.linspace(-1.0, 1.0, 65)
    true = 2.0 + np.sin(4 * x)
    batches = []

    def measure(indices):
        batches.append(list(indices))
        return {i: np.array([true[i]]) for i in indices}

    # Every interpolated point is held out.
    found = fill_grid([x], (32,), measure, lambda i: False, [True], tolerance=0.05, checks=1.0)
    assert not found.predicted.any()
    assert found.num_checked == len(batches[-1]) > 8
    # What they had been taken to be: cubics through the points that were measured before.
    without = fill_grid([x], (32,), measure, lambda i: False, [True], tolerance=0.05, checks=0.0)
    at = [i for i in batches[-1] if i not in batches[-2]]
    assert found.worst > 0
    assert found.worst * 0.05 * true.min() <= found.worst_miss[0] <= 0.05 * true.max()
    assert len(at) <= 8
    misses = np.abs(without.values[:, 0] - true)
    assert misses.max() <= found.worst_miss[0] * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(2, 2), (3, 51), (51, 2), (2, 51)])
def test_narrow_and_uneven_grids_away_from_the_centre(shape):
    objective, _ = objectives()
    x, y = np.linspace(0.5, 1, shape[0]), np.linspace(-1.3, -1, shape[1]) ** 3
    found = compute_slice(plane(objective), objective, x, y, refine=0.01)
    full = compute_slice(plane(objective), objective, x, y)
    np.testing.assert_allclose(found.loss, full.loss, rtol=0.01)
    assert (found.status == Status.INTERPOLATED).any() == (max(shape) > 2)


def of_vector(function, theta):
    data = [torch.zeros(1, 1)]
    model = Vector(torch.tensor([theta], dtype=torch.float64))
    return Objective.from_batch_loss(model, lambda m, b: (function(m(b)[0]), 1), data)


def test_steps_along_the_gradient_that_cannot_rise_as_asked_say_so():
    # Slope 1, curvature -10: the quadratic model rises by 0.05 at most.
    bent = gradient_direction(of_vector(lambda t: t - 5 * (t - 3) ** 2, 3.0), rise=0.1)
    assert bent.step == pytest.approx(0.1)  # the linear model's
    assert "a quadratic rise of 0.05)" in bent.label
    flat = gradient_direction(of_vector(lambda t: 1e-3 * t, 2.0), rise=0.1)
    assert flat.step == pytest.approx(2.0)  # ||theta||, not 100
    assert "a quadratic rise of 0.002)" in flat.label


def test_geodesics_start_orthogonal_and_at_unit_speed():
    objective, _ = objectives()
    section = GeodesicSection(objective, ["gradient", "random"])
    Z = torch.stack(section._zetas)
    assert torch.allclose(Z @ Z.T, torch.eye(2).double(), atol=1e-10)


def test_a_geodesic_s_unit_has_a_length_in_theta():
    objective, _ = objectives()
    section = GeodesicSection(objective, ["gradient", "random"])
    for axis, at in zip(section.axes, [(1.0, 0.0), (0.0, 1.0)], strict=True):
        moved = section.point(at) - section.point((0.0, 0.0))
        assert axis.step == pytest.approx(float(moved.norm()))


def test_a_direction_s_cut_region_and_errors_of_gaps():
    objective, _ = objectives()
    direction = Direction(plane(objective).directions[0].vector, "tensor", "d", step=2.0)
    found = compute_slice(
        StraightSection(objective.theta, [direction]), objective, "-1:1:21", loss_max=-1.0, refine=0.1
    )  # fmt: skip
    assert set(np.unique(found.status)) <= {Status.CUT, Status.SKIPPED}
    assert np.isnan(found.loss).all()
    assert not found.errors


def test_attention_is_fused_in_slices_only_and_says_the_same():
    torch.manual_seed(0)
    seen = []

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 3)

        def forward(self, x):
            seen.append(torch.backends.cuda.flash_sdp_enabled())
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))

    x, y = torch.randn(20, 5, 6).double(), torch.arange(20) % 3
    objective = Objective(Attention().double(), nn.CrossEntropyLoss(), (x, y))
    assert not any(seen)
    section = StraightSection(objective.theta, [random_direction(objective)])
    seen.clear()
    found = compute_slice(section, objective, [-0.5, 0.0, 0.5])
    assert all(seen)
    there = [float(objective.at(section.point([t])).value()) for t in (-0.5, 0.0, 0.5)]
    np.testing.assert_allclose(found.loss, there, rtol=1e-12)
    assert objective.hvp(torch.ones_like(objective.theta)).isfinite().all()
