"""The zoo, the correlations and the figures of the demo."""

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

import sharpkit as sk
from sharpkit import plots
from sharpkit.demo.zoo import ModelSpec, build, digits, read_spec, specs, train
from sharpkit.errors import MeasureError, SettingsError
from sharpkit.landscape import filter_normalized, quadratic_model, slice_1d
from sharpkit.study.checkpoints import load_checkpoint
from sharpkit.study.correlation import correlate, kendall, null_deviation

SPEC = ModelSpec("mlp", 8, 1, 5e-3, 64, 0.0, seed=3, max_epochs=4)


def test_the_zoo_is_large_and_varied():
    zoo = specs()
    assert len(zoo) >= 18
    assert {s.family for s in zoo} == {"mlp", "cnn", "attention"}
    settings = {(s.family, s.width, s.depth, s.lr, s.batch_size, s.weight_decay) for s in zoo}
    assert len(zoo) >= 3 * len(settings)  # three seeds each
    assert len({s.name for s in zoo}) == len(zoo)
    assert len(specs(quick=True)) >= 6


def test_digits_are_split_once_and_for_all():
    a, b = digits(), digits()
    assert torch.equal(a.train_images, b.train_images)
    assert (len(a.train_labels), len(a.test_labels)) == (900, 897)
    assert a.train_images.max() == 1
    both = torch.cat([a.train_images, a.test_images])
    assert len(torch.unique(both, dim=0)) > 1790


@pytest.mark.parametrize("family", ["mlp", "cnn", "attention"])
def test_training_follows_from_the_seed_and_leaves_the_random_state(family, tmp_path):
    spec = ModelSpec(family, 8, 1, 5e-3, 64, 0.0, seed=3, max_epochs=2)
    data, state = digits(), torch.get_rng_state()
    first, second = train(spec, data), train(spec, data)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert first.metadata["gap"] == pytest.approx(
        first.metadata["test_loss"] - first.metadata["train_loss"]
    )
    path = first.save(tmp_path)
    again, metadata = read_spec(path)
    assert again == spec
    assert metadata == first.metadata
    model = build(again)
    load_checkpoint(path, model)
    assert torch.equal(model(data.test_images[:5]), first.model(data.test_images[:5]))


# -- correlation -------------------------------------------------------------------------


def brute_force(x, y):
    concordant = ties_x = ties_y = pairs = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        concordant += a * b
        ties_x += a == 0
        ties_y += b == 0
        pairs += 1
    return concordant / math.sqrt((pairs - ties_x) * (pairs - ties_y))


@pytest.mark.parametrize("seed", range(5))
def test_tau_is_tau_b(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, 15).astype(float), rng.normal(size=15)
    y[3] = y[4]
    tau = kendall(x, y).tau
    assert tau == pytest.approx(brute_force(x, y))
    assert tau == pytest.approx(scipy.stats.kendalltau(x, y).statistic)
    missing = [*x, math.nan], [*y, 1.0]
    assert kendall(*missing).tau == tau
    assert kendall(*missing).n == 15


def test_tau_of_nothing_is_nothing():
    for x, y in (([], []), ([1], [2]), ([1, 1, 1, 1, 1], [1, 2, 3, 4, 5])):
        c = kendall(x, y)
        assert math.isnan(c.tau)
        assert math.isnan(c.low)


@pytest.mark.slow
def test_intervals_cover():
    rng = np.random.default_rng(0)
    rho = 0.5
    truth = 2 / math.pi * math.asin(rho)
    covered = 0
    for i in range(100):
        z = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], 30)
        c = kendall(z[:, 0].tolist(), z[:, 1].tolist(), seed=i)
        covered += c.low <= truth <= c.high
    assert 88 <= covered <= 100


def test_simpsons_paradox_is_seen():
    rng = np.random.default_rng(1)
    rows = []
    for shift in range(3):  # within a group the gap falls with sharpness; groups rise together
        s = rng.normal(size=12)
        gap = -0.5 * s + 0.1 * rng.normal(size=12)
        rows.append(
            pd.DataFrame({"s": s + 6 * shift, "gap": gap + 6 * shift, "family": f"f{shift}"})
        )
    frame = pd.concat(rows)
    row = correlate(frame, ["s"], gap="gap", group="family").iloc[0]
    assert row.tau > 0.3
    assert row.tau_within < -0.5
    assert row.p_within < 0.01
    assert bool(row.disagree)
    alone = correlate(frame[frame.family == "f0"], ["s"], gap="gap", group="family").iloc[0]
    assert alone.tau == pytest.approx(alone.tau_within)
    assert not bool(alone.disagree)


def test_null_deviation_is_that_of_all_orders():
    for n in (2, 4, 6):
        taus = [brute_force(range(n), order) for order in itertools.permutations(range(n))]
        assert null_deviation(n) == pytest.approx(np.std(taus))


def test_copies_of_a_model_are_no_evidence():
    rng = np.random.default_rng(3)
    z = rng.multivariate_normal([0, 0], [[1, 0.4], [0.4, 1]], 16)
    x, y = z.T[:, None] + 1e-6 * rng.normal(size=(2, 4, 16))
    settings = [f"s{i:02d}" for i in range(16)] * 4
    alone = kendall(z[:, 0].tolist(), z[:, 1].tolist())
    taken = kendall(x.ravel().tolist(), y.ravel().tolist())
    together = kendall(x.ravel().tolist(), y.ravel().tolist(), clusters=settings)
    assert together.tau == taken.tau
    width = [c.high - c.low for c in (alone, taken, together)]
    assert width[1] < 0.7 * width[0]
    assert 0.88 * width[0] < width[2] <= 1.1 * width[0]  # 16 settings: Student's t widens by 9%
    assert taken.p_value < 0.2 * together.p_value
    assert together.p_value == pytest.approx(alone.p_value, abs=0.03)
    each = kendall(x[0].tolist(), y[0].tolist(), clusters=settings[:16])
    plain = kendall(x[0].tolist(), y[0].tolist())
    assert (each.tau, each.low, each.high) == (plain.tau, plain.low, plain.high)


@pytest.mark.slow
def test_intervals_of_clusters_cover():
    rng = np.random.default_rng(5)
    truth = 2 / math.pi * math.asin(0.5)
    covered = [0, 0]
    settings = [f"s{i:02d}" for i in range(16) for _ in range(3)]
    for i in range(40):  # three seeds of a setting differ by a tenth of the variance
        z = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 16).repeat(3, axis=0)
        z = math.sqrt(0.9) * z + math.sqrt(0.1) * rng.multivariate_normal(
            [0, 0], [[1, 0.5], [0.5, 1]], 48
        )
        for k, clusters in enumerate((None, settings)):
            c = kendall(z[:, 0].tolist(), z[:, 1].tolist(), seed=i, clusters=clusters)
            covered[k] += c.low <= truth <= c.high
    assert covered[0] < 34  # 38 nominal; over 120 trials 75% and 93%
    assert covered[1] >= 34


def test_clusters_lie_in_groups():
    with pytest.raises(SettingsError, match="within one group"):
        kendall(range(6), range(6), groups=list("aaabbb"), clusters=list("xyzzuv"))
    c = kendall(range(6), [0, 2, 1, 5, 4, 3], groups=list("aaabbb"), clusters=list("xxyzuu"))
    assert c.tau == pytest.approx((1 / 3 - 1) / 2)


# -- slices and figures ------------------------------------------------------------------


@pytest.fixture(scope="module")
def objective():
    data = digits()
    model = train(SPEC, data).model
    return sk.Objective(model, torch.nn.CrossEntropyLoss(), (data.train_images, data.train_labels))


def test_slices_are_the_loss_and_its_quadratic_model(objective):
    d = filter_normalized(objective, seed=1)
    assert torch.equal(d, filter_normalized(objective, seed=1))
    parts, weights = objective.space.unflatten(d), objective.space.unflatten(objective.theta)
    for name, part in parts.items():
        if part.ndim > 1:
            rows, expected = part.flatten(1).norm(dim=1), weights[name].flatten(1).norm(dim=1)
            assert torch.allclose(rows, expected, rtol=1e-5)
        else:
            assert not bool(part.any())
    x = [-0.01, 0.0, 0.01]
    curve, model = slice_1d(objective, d, x), quadratic_model(objective, d, x)
    assert curve.y[1] == pytest.approx(float(objective.value()))
    assert curve.y == pytest.approx(model.y, rel=1e-3)
    huge = slice_1d(objective, 1e30 * d, [-1.0, 0.0])
    assert math.isnan(huge.y[0])
    assert huge.to_dict()["y"][0] is None
    with pytest.raises(MeasureError, match="parameter that moves"):
        filter_normalized(objective.restrict("*.bias"))
    with pytest.raises(sk.SharpkitError, match="Expected a vector"):
        slice_1d(objective, d[:-1], x)


def test_slice_figure_holds_the_curve_and_its_gaps(tmp_path):
    curve = sk.Curve((0.0, 1.0, 2.0), (1.0, math.nan, 3.0), "x", "loss")
    before = plt.get_fignums()
    axes = plots.plot_slice(curve, quadratic=sk.Curve((0.0, 1.0, 2.0), (1.0, 2.0, 9.0)))
    loss, model = axes.get_lines()
    assert np.array_equal(loss.get_ydata(), curve.y, equal_nan=True)
    assert np.isnan(model.get_ydata()[2])  # above the range of the loss
    path = plots.save_figure(axes, tmp_path / "slice.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == before  # none is left open


def test_density_integrates_to_one_and_marks_both_ends():
    spectrum = sk.Spectrum(((-1.0, 0.0, 4.0), (-0.5, 5.0)), ((0.1, 0.7, 0.2), (0.9, 0.1)), dim=100)
    grid = np.linspace(-3, 8, 20001)
    density = plots.density_on(grid, spectrum, 0.05)
    assert np.trapezoid(density, grid) == pytest.approx(1, rel=1e-6)
    assert np.trapezoid(grid * density, grid) == pytest.approx((0.7 + 0.05) / 2, abs=1e-6)
    axes = plots.plot_spectrum(spectrum)
    texts = [t.get_text() for t in axes.texts]
    assert texts == ["smallest Ritz value = -1", "largest Ritz value = 5"]
    named = plots.plot_spectrum(spectrum, ends=(-1.25, 5.5))
    texts = [t.get_text() for t in named.texts]
    assert texts == [r"$\lambda_{\min}$ = -1.25", r"$\lambda_{\max}$ = 5.5"]


def test_scatter_holds_the_points(tmp_path):
    frame = pd.DataFrame(
        {
            "s": [1.0, 10.0, 100.0],
            "e": [0.1, math.nan, 1.0],
            "gap": [0.1, 0.2, 0.3],
            "f": list("aab"),
        }
    )
    axes = plots.plot_against_gap(frame, "s", gap="gap", group="f", error="e", title="tau")
    assert axes.get_xscale() == "log"
    points = np.concatenate([c.lines[0].get_xydata() for c in axes.containers])
    assert points.tolist() == [[1, 0.1], [10, 0.2], [100, 0.3]]
    plots.save_figure(axes, tmp_path / "gap.svg")


def test_saved_results_say_what_they_are():
    e = sk.Estimate(float("nan"), float("inf"), "bound")
    assert sk.Scores((sk.Score("m", e, {}, 0),)).to_json().count("null") >= 1


def test_log_axis_and_cumulative_plot_show_what_the_spectrum_holds():
    spectrum = sk.Spectrum(((-1e-3, 1e-5, 2.0),) * 2, ((0.05, 0.94, 0.01),) * 2, 100, known=(2.0,))
    axes = plots.plot_spectrum(spectrum, x_scale="log")
    labels = [t.get_text() for t in axes.get_xticklabels()]
    assert "0" in labels
    assert any("-10^" in label for label in labels)
    x, density = axes.lines[0].get_data()
    assert 1 <= np.trapezoid(density, x) <= 1.11  # peaks keep their area, beside the floor
    shares = plots.plot_cumulative(spectrum)
    grid, positive = shares.lines[0].get_data()
    assert positive[0] == pytest.approx(0.95)
    assert positive[np.searchsorted(grid, 1.0)] == pytest.approx(0.01)
    assert shares.lines[1].get_ydata()[0] == pytest.approx(0.05)


def test_taus_are_drawn_where_they_are():
    table = pd.DataFrame(
        {
            "measure": ["a_b", "c"],
            "n": [20, 20],
            "tau": [0.5, -0.2],
            "low": [0.3, math.nan],
            "high": [0.6, math.nan],
            "tau_within": [0.1, 0.0],
            "low_within": [-0.2, -0.1],
            "high_within": [0.4, 0.1],
        }
    )
    axes = plots.plot_taus(table, within="within shapes", null=0.1)
    pooled, inner = axes.containers
    assert pooled.lines[0].get_xdata().tolist() == [0.5, -0.2]
    assert inner.lines[0].get_xdata().tolist() == [0.1, 0.0]
    ends = [segment[:, 0].tolist() for segment in pooled.lines[2][0].get_segments()]
    assert np.allclose(ends, [[0.3, 0.6], [-0.2, -0.2]])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a b", "c"]
    assert axes.get_legend_handles_labels()[1] == ["pooled", "within shapes"]
    assert axes.yaxis_inverted()
    assert np.allclose(
        axes.patches[0].get_extents().get_points()[:, 0],
        axes.transData.transform([(-0.2, 0), (0.2, 0)])[:, 0],
    )
