"""Figures of tables: sharpness along training, and a measure layer by layer."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from test_landscape_plots import every_text_is_inside, texts

from sharpkit import Estimate, plots
from sharpkit.errors import SettingsError
from sharpkit.results import Part

NAN = float("nan")


def table():
    step = np.array([0, 100, 200, 300, 400, 500])
    return pd.DataFrame(
        {
            "step": step,
            "lambda_max": [10.0, 20.0, NAN, np.inf, 40.0, 41.0],
            "lambda_max_error": [1.0, 2.0, NAN, NAN, 3.0, 0.5],
            "trace": [100.0, 90.0, NAN, 80.0, 70.0, 60.0],
            "trace_error": 5.0,
            "two_over_eta": [38.0, 38.0, 38.0, 38.0, 76.0, 76.0],
            "loss": [2.0, 1.5, 1.2, NAN, 0.9, 0.8],
        }
    )


def named(axes):
    return {h.get_label(): h for h in axes.lines}


def shade(axes):
    (found,) = axes.collections
    points = np.concatenate([p.vertices for p in found.get_paths()])
    return {
        x: (points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max())
        for x in np.unique(points[:, 0])
    }


def test_each_panel_has_its_numbers():
    frame = table()
    top, middle, bottom = plots.plot_tracking(frame.sample(frac=1, random_state=0))
    first = top.lines[0]
    # Step 200 was no measurement; at 300 one of two numbers is missing: a gap.
    assert list(first.get_xdata()) == [0, 100, 300, 400, 500]
    np.testing.assert_array_equal(first.get_ydata(), [10, 20, NAN, 40, 41])
    np.testing.assert_array_equal(middle.lines[0].get_ydata(), [100, 90, 80, 70, 60])
    np.testing.assert_array_equal(bottom.lines[0].get_ydata(), [2, 1.5, 1.2, 0.9, 0.8])
    assert shade(top) == {0: (9, 11), 100: (18, 22), 400: (37, 43), 500: (40.5, 41.5)}
    assert shade(middle)[300] == (75, 85)
    assert [a.get_ylabel() for a in (middle, bottom)] == ["trace of the Hessian", "loss"]
    assert bottom.get_xlabel() == "step"
    assert top.get_shared_x_axes().joined(top, bottom)


def test_the_threshold_is_dashed_named_and_steps_with_the_rate():
    top, middle, _ = plots.plot_tracking(table())
    (edge,) = [h for h in top.lines if h.get_linestyle() == "--"]
    np.testing.assert_array_equal(edge.get_ydata(), table()["two_over_eta"])
    assert edge.get_drawstyle() == "steps-post"
    assert any("2/\\eta" in t for t in texts(top))
    assert not [h for h in middle.lines if h.get_linestyle() == "--"]
    bare = plots.plot_tracking(table().drop(columns="two_over_eta"))
    assert not [h for h in bare[0].lines if h.get_linestyle() == "--"]


def test_panels_are_those_of_the_table_or_those_asked_for():
    assert len(plots.plot_tracking(table()[["step", "loss"]])) == 1
    (axes,) = plots.plot_tracking(table(), panels=["trace"], ax=plots.new_axes(), log=True)
    assert axes.get_yscale() == "log"
    with pytest.raises(SettingsError, match="Expected 3 axes"):
        plots.plot_tracking(table(), ax=plots.new_axes())
    with pytest.raises(SettingsError, match="Got speed"):
        plots.plot_tracking(table(), panels=["speed"])
    with pytest.raises(SettingsError, match="column 'step'"):
        plots.plot_tracking(table().drop(columns="step"))
    with pytest.raises(SettingsError, match="numbers for \\(none\\)"):
        plots.plot_tracking(table()[["step"]])


# -- profiles --------------------------------------------------------------------------------

PARTS = (
    Part("conv1", 3.0, 0.5, dof=7),
    Part("block.attention", 100.0, 4.0, dof=7),
    Part("head", 0.5, 0.1, converged=False, dof=7),
    Part("exact", 7.0, None),
    Part("lost", NAN, 1.0),
)


def bars(axes):
    """By row: the place of the dot, and the ends of its bar."""
    found = {}
    for container in axes.containers:
        line, _, (segments,) = container.lines
        for (x, y), bar in zip(np.array(line.get_data()).T, segments.get_segments(), strict=True):
            found[round(y, 6)] = (x, *bar[:, 0])
    return found


@pytest.mark.parametrize("kind", ["stderr", "bound", "lower_bound", "rounding"])
def test_bars_are_what_the_errors_mean(kind):
    axes = plots.plot_profile(Estimate(1.0, 0.1, kind, parts=PARTS), level=0.9)
    found = bars(axes)
    assert sorted(found) == [0, 1, 2, 3]
    q = {"stderr": scipy.stats.t.ppf(0.95, 7)}.get(kind, 1.0)
    for row, part in enumerate(PARTS[:3]):
        below = 0.0 if kind == "lower_bound" else q * part.probe_error
        x, low, high = found[row]
        assert x == part.value
        assert (low, high) == pytest.approx((x - below, x + q * part.probe_error), rel=1e-9)
    assert found[3] == (7.0, 7.0, 7.0)  # no error known: a dot alone
    assert [t.get_text() for t in axes.get_yticklabels()] == [p.label for p in PARTS]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first layer is at the top
    assert axes.get_xscale() == "log"
    hollow = [c.lines[0] for c in axes.containers if c.lines[0].get_markerfacecolor() == "white"]
    assert [list(h.get_ydata()) for h in hollow] == [[2]]
    assert "not converged" in texts(axes)


def test_several_profiles_share_their_rows():
    other = (Part("head", -1.0, 0.1), Part("new", 2.0, 0.1))
    axes = plots.plot_profile({"SGD": PARTS, "SAM": other}, label="trace", title="a$b")
    assert [t.get_text() for t in axes.get_yticklabels()] == [*(p.label for p in PARTS), "new"]
    assert texts(axes) == ["SGD", "SAM", "not converged"]
    assert axes.get_xscale() == "linear"  # one value is negative
    rows = sorted(bars(axes))
    assert rows == pytest.approx([-0.15, 0.85, 1.85, 2.15, 2.85, 5.15])
    assert bars(axes)[2.15][0] == -1.0
    assert axes.get_xlabel() == "trace"
    every_text_is_inside(axes.figure)
    assert plots.plot_profile(PARTS, log=False).get_xscale() == "linear"
    with pytest.raises(SettingsError, match="parts"):
        plots.plot_profile(Estimate(1.0, 0.1, "stderr"))


def test_tables_make_figures_that_hold_their_text():
    every_text_is_inside(plots.plot_tracking(table(), title="a run")[0].figure)
    long = tuple(Part(f"layers.{i}.attention.self.query.weight", i + 1.0, 0.1) for i in range(30))
    axes = plots.plot_profile(long)
    every_text_is_inside(axes.figure)
    assert axes.figure.get_size_inches()[1] > 5
