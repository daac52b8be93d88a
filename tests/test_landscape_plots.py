"""Figures of slices: what is drawn is what the slice holds, and gaps stay gaps."""

import ast
import pathlib
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from matplotlib import colormaps
from matplotlib._pylab_helpers import Gcf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm, to_hex
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import imread
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from slice_cases import DETAILS, axis, bowl, holes, line, path, plane, saddle

import sharpkit.landscape
from sharpkit import plots
from sharpkit.errors import SettingsError
from sharpkit.landscape import Axis, Marker, Slice, Status
from sharpkit.plots import figure as figures
from sharpkit.plots.scale import Scale, scale_of, tick_text
from sharpkit.plots.surface import height_at

NAN = float("nan")


def texts(axes):
    return [t.get_text() for t in axes.get_legend().get_texts()]


def series(axes):
    """The lines with a name of their own, by name."""
    return {h.get_label(): h for h in axes.lines if not h.get_label().startswith("_")}


def bands(axes):
    return [c for c in axes.collections if c.get_gid() == "band"]


def ends_of(band):
    """Lower and upper end of a band by x."""
    points = np.concatenate([p.vertices for p in band.get_paths()])
    return {x: (points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max())
            for x in np.unique(points[:, 0])}  # fmt: skip


# -- lines -----------------------------------------------------------------------------------


def test_lines_hold_the_values_and_their_gaps():
    s = line()
    axes = plots.plot_line(s)
    (right,) = [a for a in axes.figure.axes if a is not axes]
    for side, names in ((axes, ("train loss", "test loss")), (right, ("test accuracy (right)",))):
        for name in names:
            drawn = series(side)[name]
            key = name.removesuffix(" (right)").replace(" ", "/")
            np.testing.assert_array_equal(drawn.get_xdata(), s.grid[0])
            np.testing.assert_array_equal(drawn.get_ydata(), s[key])
            assert np.isnan(drawn.get_ydata()).sum() == 4
    assert (axes.get_ylabel(), right.get_ylabel()) == ("loss", "accuracy")
    assert axes.get_xlabel() == "multiples of the filter norm"
    assert axes.get_title() == "runs/net.pt"


def test_a_gap_is_in_no_part_of_the_band():
    s = line(sets=("train",), accuracy=False)
    (band,) = bands(plots.plot_line(s))
    assert len(band.get_paths()) == 2  # before and after the point that is not finite
    drawn = set(ends_of(band))
    assert drawn == set(s.grid[0][np.isfinite(s["train/loss"])])


@pytest.mark.parametrize(
    ("kind", "level", "groups"),
    [(True, 0.95, 16), ("rise", 0.8, 4), ("value", 0.95, 16), ("rise", 0.95, None)],
)
def test_a_band_is_the_quantile_times_the_error(kind, level, groups):
    s = line(gaps=False, sets=("train",), accuracy=False)
    s = replace(s, details={**s.details, "num_groups": groups})
    axes = plots.plot_line(s, band=kind, level=level)
    (band,) = bands(axes)
    upper = (1 + level) / 2
    q = scipy.stats.t.ppf(upper, groups - 1) if groups else scipy.stats.norm.ppf(upper)
    errors = s.errors if kind == "value" else s.rise_errors
    half = q * errors["train/loss"]
    low, high = np.array([ends_of(band)[x] for x in s.grid[0]]).T
    np.testing.assert_allclose(low, s["train/loss"] - half, rtol=1e-12)
    np.testing.assert_allclose(high, s["train/loss"] + half, rtol=1e-12)
    if kind != "value":
        assert low[10] == high[10] == s["train/loss"][10]  # the centre
    words = "value" if kind == "value" else "rise"
    assert f"{100 * level:g}% band of the {words}" in texts(axes)


def test_groups_of_a_data_set_give_its_degrees_of_freedom():
    s = line(gaps=False, accuracy=False)
    s = replace(s, details={**s.details, "num_groups": {"train": 4, "test": 30}})
    train, test = bands(plots.plot_line(s))
    for band, name, dof in ((train, "train/loss", 3), (test, "test/loss", 29)):
        low, high = ends_of(band)[-1.0]
        assert high - low == pytest.approx(
            2 * scipy.stats.t.ppf(0.975, dof) * s.rise_errors[name][0], rel=1e-12
        )


def test_bands_that_are_not_there():
    s = line(accuracy=False)
    assert not bands(plots.plot_line(s, band=False))
    bare = replace(s, rise_errors={})
    axes = plots.plot_line(bare)  # falls back, and says so
    assert "95% band of the value" in texts(axes)
    with pytest.raises(SettingsError, match="errors of the rise from the centre"):
        plots.plot_line(bare, band="rise")
    with pytest.raises(SettingsError, match="True, False, 'rise' or 'value'"):
        plots.plot_line(s, band="both")
    none = plots.plot_line(replace(bare, errors={}))
    assert not bands(none)
    assert not any("band" in t for t in texts(none))


def test_interpolated_points_are_hollow_and_measured_ones_filled():
    s = line(sets=("train",), accuracy=False)
    dots = [h for h in plots.plot_line(s).lines if h.get_marker() == "o"]
    x = {h.get_markerfacecolor(): h.get_xdata() for h in dots}
    known = np.isfinite(s["train/loss"])
    np.testing.assert_array_equal(x["white"], s.grid[0][known & (s.status == 1)])
    np.testing.assert_array_equal(x["#0072B2"], s.grid[0][known & (s.status == 0)])


def test_a_point_between_two_gaps_is_seen():
    x = np.arange(5.0)
    y = np.array([1.0, NAN, 2.0, NAN, 3.0])
    status = np.array([0, 3, 0, 3, 0], np.int8)
    s = Slice((axis(),), (x,), {"loss": y}, status)
    dots = [h for h in plots.plot_line(s).lines if h.get_marker() == "o"]
    assert [list(d.get_xdata()) for d in dots] == [[0.0, 2.0, 4.0]]
    whole = replace(s, values={"loss": x}, status=0 * status)
    assert not [h for h in plots.plot_line(whole).lines if h.get_marker() == "o"]


def test_the_quadratic_model_is_whole_and_does_not_move_the_range():
    s = line(sets=("train",), accuracy=False)
    axes = plots.plot_line(s)
    model = series(axes)["quadratic model"]
    np.testing.assert_array_equal(model.get_ydata(), s.quadratic)
    assert model.get_linestyle() == "--"
    assert s.quadratic.max() > 2 * np.nanmax(s["train/loss"])
    assert axes.get_ylim() == plots.plot_line(s, quadratic=False).get_ylim()
    assert axes.get_ylim()[1] < s.quadratic.max()
    assert "quadratic model" in texts(axes)
    # A second call still fits the range to the values.
    plots.plot_line(line(scale=3.0, sets=("train",), accuracy=False), ax=axes)
    assert axes.get_ylim()[1] > 2 * np.nanmax(s["train/loss"])


def test_the_quadratic_model_is_that_of_the_loss_alone():
    s = line()
    axes = plots.plot_line(s, ["test/accuracy", "train/loss"])
    (right,) = [a for a in axes.figure.axes if a is not axes]
    assert axes.get_ylabel() == "accuracy"
    model = [h for h in right.lines if h.get_linestyle() == "--"]
    assert len(model) == 1
    assert not [h for h in axes.lines if h.get_linestyle() == "--"]
    assert not [h for h in plots.plot_line(s, ["test/accuracy"]).lines if h.get_linestyle() == "--"]


def test_cut_points_stand_at_the_edge_with_their_reason():
    s = line()
    axes = plots.plot_line(s)
    edge = series(axes)
    for name, kind in (("above loss_max = 5", Status.CUT), ("not finite", Status.NOT_FINITE)):
        np.testing.assert_array_equal(edge[name].get_xdata(), s.grid[0][s.status == kind])
        assert name in texts(axes)
        assert (edge[name].get_ydata() == 0.985).all()  # a share of the axes, not a value
    assert axes.get_ylim()[1] < 5


def test_several_checkpoints_on_one_scale():
    held = [line(title="SGD"), line(scale=0.5, title="SAM $\\rho$")]
    axes = plots.plot_line(held)
    names = ["SGD", "SAM \\$\\rho\\$"]
    assert [n for n in texts(axes) if n in names] == names
    lines = [series(axes)[n] for n in names]
    for drawn, s in zip(lines, held, strict=True):
        np.testing.assert_array_equal(drawn.get_ydata(), s["train/loss"])  # the loss alone
    assert len({h.get_color() for h in lines}) == 2
    models = [h for h in axes.lines if h.get_linestyle() == "--"]
    assert [m.get_color() for m in models] == [h.get_color() for h in lines]
    both = plots.plot_line(held, ["train/loss", "test/loss"])
    assert "SGD, train loss" in texts(both)
    assert len(series(both)) >= 4


def test_what_is_no_line_is_refused():
    with pytest.raises(SettingsError, match="plot_contour"):
        plots.plot_line(bowl())
    with pytest.raises(SettingsError, match="Got 'speed'"):
        plots.plot_line(line(), ["speed"])
    s = line()
    many = replace(s, values={**s.values, "margin": s.grid[0]})
    with pytest.raises(SettingsError, match=r"quantities\. Got loss, accuracy, margin"):
        plots.plot_line(many)


def test_the_centre_is_marked():
    axes = plots.plot_line(line(accuracy=False))
    assert "theta" in [t.get_text() for t in axes.texts]
    assert [0.0, 0.0] in [list(h.get_xdata()) for h in axes.lines]


# -- contours --------------------------------------------------------------------------------


def contours(axes, filled=True):
    return next(c for c in axes.collections if isinstance(c, QuadContourSet) and c.filled == filled)


def covering(shown, point):
    """Which levels' areas hold a point."""
    inside = [
        sum(Path(ring).contains_point(point) for ring in p.to_polygons()) for p in shown.get_paths()
    ]
    return [k for k, count in enumerate(inside) if count % 2]  # a ring in a ring is a hole


@pytest.mark.parametrize("make", [bowl, saddle, holes])
def test_each_point_lies_in_the_area_of_its_value(make):
    s = make()
    axes = plots.plot_contour(s)
    shown = contours(axes)
    levels = shown.levels
    x, y = s.grid
    checked = 0
    for i in range(1, len(x) - 1, 2):
        for j in range(1, len(y) - 1):
            value = s.loss[i, j]
            around = s.loss[i - 1 : i + 2, j - 1 : j + 2]
            if np.isnan(value):
                assert covering(shown, (x[i], y[j])) == []  # a gap stays a gap
            elif np.isfinite(around).all() and abs(np.log(levels / value)).min() > 0.02:
                (k,) = covering(shown, (x[i], y[j]))
                assert levels[k] <= value <= levels[k + 1]
                checked += 1
    assert checked > 40


def test_levels_are_logarithmic_and_the_bar_says_losses():
    s = saddle()
    axes = plots.plot_contour(s)
    shown = contours(axes)
    ratios = shown.levels[1:] / shown.levels[:-1]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)
    assert shown.levels[0] == s.loss.min()
    assert shown.levels[-1] == s.loss.max()
    assert isinstance(shown.norm, LogNorm)
    assert shown.get_cmap().name == "viridis"
    (bar,) = axes.child_axes
    assert bar.get_ylabel() == "loss"
    ticks = [float(t.get_text()) for t in bar.get_yticklabels()]
    assert ticks == [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30][: len(ticks)] or set(ticks) <= {
        m * 10.0**k for m in (1, 2, 3, 5) for k in range(-4, 3)
    }
    assert len(ticks) >= 4


def test_levels_can_be_chosen():
    assert list(contours(plots.plot_contour(bowl(), levels=[0.1, 1, 5])).levels) == [0.1, 1, 5]
    shown = contours(plots.plot_contour(bowl(), levels=[0.1, 1, 5]))
    assert shown.extend == "both"
    linear = contours(plots.plot_contour(bowl(), log=False, levels=6))
    np.testing.assert_allclose(np.diff(linear.levels), np.ptp(bowl().loss) / 5)
    lines = contours(plots.plot_contour(bowl(), filled=False), filled=False)
    np.testing.assert_allclose(lines.levels, scale_of([bowl()], None).levels)
    for wrong, words in (([1.0, 0.5], "ascending, positive"), ([0.0, 1.0], "positive"), (1, "two")):
        with pytest.raises(SettingsError, match=words):
            plots.plot_contour(bowl(), levels=wrong)


def test_zero_and_negative_values():
    zero = plane(lambda x, y: x**2 + y.round(9) ** 2, ny=11)  # zero at one point
    assert zero.loss.min() == 0
    axes = plots.plot_contour(zero)
    assert contours(axes).extend == "min"
    i, j = np.unravel_index(zero.loss.argmin(), zero.loss.shape)
    assert covering(contours(axes), (zero.grid[0][i], zero.grid[1][j])) == [0]  # drawn, no hole
    negative = contours(plots.plot_contour(plane(lambda x, y: x + y)))
    assert not isinstance(negative.norm, LogNorm)
    np.testing.assert_allclose(np.diff(negative.levels), np.diff(negative.levels)[0])
    flat = contours(plots.plot_contour(plane(lambda x, y: 0.5)))
    assert flat.levels[0] < 0.5 < flat.levels[-1]


def test_what_is_not_known_has_its_own_look_and_a_name():
    s = holes()
    axes = plots.plot_contour(s)
    regions = {c.get_label(): c for c in axes.collections if type(c) is PolyCollection}
    names = {
        "not finite": Status.NOT_FINITE,
        "above loss_max = 5": Status.CUT,
        "not measured: above it by its neighbours": Status.SKIPPED,
        "not measured yet": Status.MISSING,
    }
    assert set(regions) == set(names) <= set(texts(axes))
    assert regions["not finite"].get_hatch()
    assert to_hex(regions["above loss_max = 5"].get_facecolor()[0]) == "#b8b8b8"
    x, y = s.grid
    expected = {name: set() for name in names}
    for i in range(len(x) - 1):
        for j in range(len(y) - 1):
            reasons = {int(k) for k in s.status[i : i + 2, j : j + 2].ravel()}
            first = next((n for n, k in names.items() if k in reasons), None)
            if first:
                expected[first].add((x[i], y[j], x[i + 1], y[j + 1]))
    for name, cells in expected.items():
        boxes = [p.get_extents().extents for p in regions[name].get_paths()]
        assert {tuple(b) for b in boxes} == cells
        assert len(boxes) == len(cells) > 0
    assert not any(type(c) is PolyCollection for c in plots.plot_contour(bowl()).collections)


def test_a_trajectory_is_joined_in_its_order():
    s = path()
    axes = plots.plot_contour(s)
    points = np.array([m.coordinates for m in s.markers[1:]])
    np.testing.assert_array_equal(np.array(series(axes)["trajectory"].get_data()).T, points)
    hollow, full = series(axes)["off the plane"], series(axes)["on the plane"]
    np.testing.assert_array_equal(hollow.get_xdata(), points[:6, 0])
    np.testing.assert_array_equal(full.get_xdata(), points[6:, 0])
    assert hollow.get_markerfacecolor() == "white"
    star = series(axes)["theta"]
    assert (star.get_marker(), star.get_xdata()[0], star.get_ydata()[0]) == ("*", 0.2, 0.02)
    arrows = [t for t in axes.texts if getattr(t, "arrow_patch", None)]
    assert len(arrows) == 1
    np.testing.assert_allclose(arrows[0].xy, points[6] + 0.75 * (points[7] - points[6]))
    written = [t.get_text() for t in axes.texts if t.get_text()]
    assert {"epoch 0", "epoch 70"} <= set(written)
    assert "trajectory" not in series(plots.plot_contour(s, trajectory=False))
    assert "trajectory" not in series(plots.plot_contour(replace(s, axes=(axis(), axis(1)))))
    far = replace(s, markers=(*s.markers, Marker("late", (3.0, 0.0))))
    assert "trajectory (1 of 9 points beyond the grid)" in texts(plots.plot_contour(far))


def test_names_of_markers_do_not_lie_on_one_another():
    s = replace(
        path(), markers=tuple(Marker(f"point {k}", (0.1 + 0.02 * k, 0.1)) for k in range(9))
    )
    axes = plots.plot_contour(s)
    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in axes.texts if t.get_text()]
    assert 1 <= len(boxes) < 9
    for k, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[k + 1 :])


def test_axes_of_one_unit_have_one_scale():
    assert plots.plot_contour(bowl()).get_aspect() == 1
    assert plots.plot_contour(path()).get_aspect() == 1
    assert plots.plot_contour(saddle()).get_aspect() == "auto"
    labels = plots.plot_contour(bowl())
    assert labels.get_xlabel() == "direction 1: multiples of the filter norm"
    assert "multiples of the" in labels.get_ylabel()


def test_a_plane_without_a_value_is_refused():
    nothing = plane(lambda x, y: x, status=lambda x, y, v: np.full(x.shape, Status.CUT))
    for draw in (plots.plot_contour, plots.plot_surface):
        with pytest.raises(SettingsError, match="at least one finite value"):
            draw(nothing)
        with pytest.raises(SettingsError, match="slice of a plane"):
            draw(line())
        with pytest.raises(SettingsError, match="Got 'accuracy'"):
            draw(bowl(), "accuracy")


def test_ticks_are_round_and_inside():
    rng = np.random.default_rng(0)
    for _ in range(200):
        low = 10 ** rng.uniform(-8, 3)
        high = low * 10 ** rng.uniform(0.02, 6)
        values = np.array([[low, high], [low, high]])
        found = scale_of([plane(lambda x, y: values, 2, 2)], None)  # noqa: B023
        assert found.log
        assert 2 <= len(found.ticks) <= 10
        assert all(low * (1 - 1e-6) <= t <= high * (1 + 1e-6) for t in found.ticks)
        assert len(set(found.labels)) == len(found.labels)
    assert tick_text(1e-5) == "$10^{-5}$"
    assert tick_text(3e6) == "$3\\times10^{6}$"
    assert (tick_text(0.02), tick_text(-0.5)) == ("0.02", "\N{MINUS SIGN}0.5")


# -- surfaces --------------------------------------------------------------------------------


def faces(axes):
    (found,) = [c for c in axes.collections if isinstance(c, Poly3DCollection)]
    return found


def corners(collection):
    """``[cells, 4, 3]``."""
    return np.asarray(collection._faces)[..., :3]


@pytest.mark.parametrize("log", [False, True])
def test_a_surface_has_the_cells_that_are_known_at_their_heights(log):
    s = holes()
    axes = plots.plot_surface(s, log=log, elevation=50, azimuth=20)
    drawn = corners(faces(axes))
    known = np.isfinite(s.loss)
    whole = known[:-1, :-1] & known[1:, :-1] & known[1:, 1:] & known[:-1, 1:]
    assert len(drawn) == whole.sum() < whole.size
    assert np.isfinite(drawn).all()
    height = {
        (round(a, 9), round(b, 9)): s.loss[i, j]
        for i, a in enumerate(s.grid[0])
        for j, b in enumerate(s.grid[1])
    }
    for a, b, z in drawn.reshape(-1, 3):
        assert (10**z if log else z) == pytest.approx(height[round(a, 9), round(b, 9)], rel=1e-9)
    for (i, j), cell in zip(np.argwhere(whole), drawn, strict=True):
        assert set(cell[:, 0]) == set(s.grid[0][i : i + 2])
        assert set(cell[:, 1]) == set(s.grid[1][j : j + 2])
    low, high = axes.get_zlim()
    assert low <= drawn[..., 2].min()
    assert drawn[..., 2].max() <= high
    assert (axes.elev, axes.azim) == (50, 20)
    assert any(t.startswith("holes: not finite; above loss_max = 5") for t in texts(axes))


def test_colours_of_a_surface_are_those_of_its_heights():
    s = bowl()
    shown = faces(plots.plot_surface(s, log=True))
    scale = scale_of([s], None)
    middle = 10 ** corners(shown)[..., 2].mean(axis=1)
    expected = colormaps["viridis"](scale.norm(middle))
    np.testing.assert_allclose(shown._facecolor3d, expected)
    axes = plots.plot_surface(s, log=True)
    marks = [float(t.get_text()) for t in axes.get_zticklabels()]
    np.testing.assert_allclose(axes.get_zticks(), np.log10(marks))


def test_markers_stand_on_the_surface():
    s = path()
    axes = plots.plot_surface(s)
    (line_,) = [h for h in axes.lines if h.get_label() == "trajectory"]
    x, y, z = line_.get_data_3d()
    exact = 0.01 + 3 * (x - 0.2) ** 2 + 8 * (y - 0.1 * x) ** 2
    np.testing.assert_allclose(z, exact, atol=0.06)  # between points of the grid
    ramp = plane(lambda a, b: 2 + 3 * a - 5 * b)  # bilinear: exact
    for point in ((0.123, 0.456), (-1.0, -0.8), (1.0, 1.2)):
        assert height_at(ramp, ramp.loss, point) == pytest.approx(2 + 3 * point[0] - 5 * point[1])
    assert np.isnan(height_at(ramp, ramp.loss, (1.01, 0.0)))
    lost = ramp.loss.copy()
    lost[10, 5] = NAN
    x, y = ramp.grid
    assert np.isnan(height_at(ramp, lost, (x[10] + 0.01, y[5])))
    assert height_at(ramp, lost, (x[9], y[5])) == pytest.approx(ramp.loss[9, 5])


def test_a_flat_pair_of_axes_is_refused():
    with pytest.raises(SettingsError, match="three-dimensional"):
        plots.plot_surface(bowl(), ax=plots.new_axes())


# -- side by side ----------------------------------------------------------------------------


def test_planes_side_by_side_share_their_scales():
    small = plane(lambda x, y: 0.001 + x**2 + y**2, 9, 9, details={"title": "SAM"})
    held = [bowl(), holes(), small, path()]
    drawn = plots.plot_slices(held, columns=2)
    assert len(drawn) == 4
    sets = [contours(a) for a in drawn]
    everything = np.concatenate([s.loss.ravel() for s in held])
    for shown in sets:
        np.testing.assert_array_equal(shown.levels, sets[0].levels)
        assert (shown.norm.vmin, shown.norm.vmax) == (
            np.nanmin(everything),
            np.nanmax(everything),
        )
    assert {a.get_xlim() for a in drawn} == {(-1.0, 1.0)}
    assert {a.get_ylim() for a in drawn} == {(-0.8, 1.2)}
    assert [a.get_title() for a in drawn] == ["runs/net.pt", "runs/net.pt", "SAM", "runs/net.pt"]
    (legend,) = drawn[0].figure.legends
    names = [t.get_text() for t in legend.get_texts()]
    assert names.count("theta") == 1
    assert "above loss_max = 5" in names
    bars = [a for a in drawn[0].figure.axes if a not in drawn]
    assert [b.get_ylabel() for b in bars] == ["loss"]


def test_lines_side_by_side_share_their_scales():
    held = [line(title="SGD"), line(scale=0.2, title="SAM", gaps=False)]
    drawn = plots.plot_slices(held)
    assert drawn[0].get_ylim() == drawn[1].get_ylim()
    assert drawn[0].get_ylim()[1] > np.nanmax(held[0]["test/loss"])
    right = [a for a in drawn[0].figure.axes if a.get_ylabel() == "accuracy" or a not in drawn]
    assert len(right) == 2
    assert right[0].get_ylim() == right[1].get_ylim()
    for axes, s in zip(drawn, held, strict=True):
        np.testing.assert_array_equal(series(axes)["train loss"].get_ydata(), s["train/loss"])


def test_surfaces_side_by_side_share_their_scales():
    held = [bowl(), plane(lambda x, y: 0.5 + 0.1 * x * y)]
    drawn = plots.plot_slices(held, kind="surface")
    assert {a.get_zlim() for a in drawn} == {(min(s.loss.min() for s in held), bowl().loss.max())}
    colours = [faces(a)._facecolor3d for a in drawn]
    scale = scale_of(held, None, None, False)
    for shown, axes in zip(colours, drawn, strict=True):
        middle = corners(faces(axes))[..., 2].mean(axis=1)
        np.testing.assert_allclose(shown, colormaps["viridis"](scale.norm(middle)))


def test_slices_that_do_not_fit_together_are_refused():
    with pytest.raises(SettingsError, match="all lines or all planes"):
        plots.plot_slices([line(), bowl()])
    with pytest.raises(SettingsError, match="0 slices"):
        plots.plot_slices([])
    with pytest.raises(SettingsError, match="'contour' or 'surface'"):
        plots.plot_slices([bowl()], kind="map")


# -- figures as files ------------------------------------------------------------------------

LONG = (
    "a label that goes on for much longer than any column of any paper is wide, in units of theta"
)


def every_text_is_inside(figure):
    """All texts that are drawn lie in the figure (ticks out of view are not drawn)."""
    drawn = []
    draw = Text.draw

    def noting(self, renderer):
        if self.get_visible() and self.get_text().strip():
            drawn.append((self.get_text(), self.get_window_extent(renderer)))
        draw(self, renderer)

    canvas = FigureCanvasAgg(figure)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", noting)
        canvas.draw()
    width, height = figure.get_size_inches() * figure.dpi
    assert len(drawn) > 5
    for text, box in drawn:
        inside = box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1
        assert inside, (text, box.extents, (width, height))


def long_labels(s):
    axes = tuple(Axis("filter", LONG, 1.0, k) for k in range(s.dim))
    return replace(s, axes=axes, details={**s.details, "title": "runs/" + 12 * "long-name-"})


@pytest.mark.parametrize(
    ("width", "label"), [(3.3, False), (3.3, True), pytest.param(4.6, True, marks=pytest.mark.slow)]
)
def test_no_text_is_cut(width, label):
    change = long_labels if label else (lambda s: s)
    for draw, s, solid in (
        (plots.plot_line, line(), False),
        (plots.plot_contour, holes(), False),
        (plots.plot_contour, path(), False),
        (plots.plot_surface, holes(), True),
    ):
        figure = Figure(figsize=(width, 3.4), layout="constrained")
        axes = figure.add_subplot(projection="3d" if solid else None)
        draw(change(s), ax=axes)
        every_text_is_inside(figure)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.plot_line(line(), caption=True),
        lambda: plots.plot_line([line(title=f"checkpoint {k}") for k in range(7)], caption=True),
        lambda: plots.plot_contour(holes(), caption=True),
        lambda: plots.plot_contour(saddle(), filled=False, caption=True),
        lambda: plots.plot_surface(holes(), log=True, caption=True),
        pytest.param(lambda: plots.plot_surface(bowl(), colorbar=True), marks=pytest.mark.slow),
        lambda: plots.plot_slices([bowl(), holes(), path(), saddle()], caption=True)[0],
        lambda: plots.plot_slices([line(title="SGD"), line()], caption=True)[0],
        pytest.param(
            lambda: plots.plot_slices([bowl(), holes()], kind="surface", caption=True)[0],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_whole_figures_hold_all_their_text(draw):
    axes = draw()
    figure = axes.get_figure(root=True)
    every_text_is_inside(figure)


def test_a_caption_is_below_all_else():
    axes = plots.plot_contour(bowl(), caption=True)
    figure = axes.figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    caption = figure._supxlabel.get_window_extent(canvas.get_renderer())
    assert caption.y1 <= axes.get_tightbbox(canvas.get_renderer()).y0
    plain = plots.plot_contour(bowl()).figure
    assert figure.get_size_inches()[1] > plain.get_size_inches()[1] + 0.3


def test_figures_are_written_without_a_window(tmp_path):
    name = "$\\frac{$ and \\alpha_<b>"
    hostile = replace(
        path(),
        axes=(axis(label=name), axis(label="y")),
        markers=(Marker(name, (0.0, 0.0)), Marker("b$", (0.5, 0.5))),
        details={**DETAILS, "title": name, "checkpoint": name},
        values={f"{name}/loss": path().loss},
    )
    axes = plots.plot_contour(hostile, caption=True)
    for ending in ("png", "pdf", "svg"):
        assert plots.save_figure(axes, tmp_path / f"a.{ending}").stat().st_size > 2000
    plots.save_figure(plots.plot_surface(hostile), tmp_path / "s.png")
    flat = Slice(hostile.axes[:1], hostile.grid[:1], {f"{name}/loss": hostile.loss[:, 3]},
                 hostile.status[:, 3], details=hostile.details)  # fmt: skip
    plots.save_figure(plots.plot_line(flat, caption=True), tmp_path / "l.png")
    image = imread(tmp_path / "a.png")
    assert image[..., :3].std() > 0.1
    assert not Gcf.figs


def test_the_landscape_needs_no_figures():
    files = list(pathlib.Path(sharpkit.landscape.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        found = ast.walk(ast.parse(file.read_text()))
        names = {a.name for n in found if isinstance(n, ast.Import) for a in n.names}
        found = ast.walk(ast.parse(file.read_text()))
        names |= {n.module for n in found if isinstance(n, ast.ImportFrom)}
        assert not [n for n in names if n.startswith(("matplotlib", "sharpkit.plots", "plotly"))]


def test_wrapping_keeps_every_letter():
    text = "some words and " + 8 * "an-endless-name/" + " of \\$5"
    for width in (0.5, 1.0, 3.0):
        lines = figures.wrapped(text, width, 9).split("\n")
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(figures.width_of(x, 9) <= width or len(x) == 1 for x in lines)
    exact = text_to_path.get_text_width_height_descent(text, FontProperties(size=9), False)[0]
    assert exact / 72 == pytest.approx(figures.width_of(text, 9) / figures.HINTED, rel=0.03)
    assert isinstance(scale_of([bowl()], None), Scale)
