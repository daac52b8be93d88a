"""The study in one call: filters, tables, warnings, the page."""

import json
import math
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from oracles_correlation import long_table

from sharpkit import plots
from sharpkit.errors import SettingsError
from sharpkit.study.correlation import Filter, correlate_study, granulated_tau, kendall, sign_error


def zoo(seed=0, n_seeds=3):
    """Depth moves both: pooled correlation without any within a depth."""
    rng = np.random.default_rng(seed)
    rows = [
        {"spec.depth": d, "spec.width": w, "spec.lr": lr}
        for d in (1, 2, 3)
        for w in (8, 16)
        for lr in (0.01, 0.1)
        for _ in range(n_seeds)
    ]
    meta = pd.DataFrame(rows)
    n = len(meta)
    meta["gap"] = 0.3 * meta["spec.depth"] + 0.05 * rng.normal(size=n)
    meta["train_loss"] = rng.uniform(0.01, 0.02, n)
    meta["reached_target"] = True
    depth = 3 * meta["spec.depth"].to_numpy() + rng.normal(size=n)
    values = {"deep": depth, "good": meta["gap"].to_numpy() + 0.01, "noise": rng.normal(size=n)}
    return values, meta


def test_a_study_says_what_its_parts_say():
    values, meta = zoo()
    s = correlate_study(
        long_table(values, meta), gap="gap", group="depth", axes=["depth", "width", "lr"],
        partial=["train_loss", "lr"],
    )  # fmt: skip
    rows = s.frame.set_index("measure")
    assert list(rows.index) == ["deep", "good", "noise"]
    settings = meta[["spec.depth", "spec.width", "spec.lr"]].astype(str).agg("; ".join, axis=1)
    groups = meta["spec.depth"].astype(str).tolist()
    table = meta[["spec.depth", "spec.width", "spec.lr"]]
    clusters = (meta["spec.depth"].astype(str) + settings).tolist()
    for name, x in values.items():
        inner = kendall(x, meta["gap"], groups=groups, clusters=clusters)
        assert rows.tau_within[name] == pytest.approx(inner.tau)
        assert rows.low_within[name] == pytest.approx(inner.low)
        assert rows.p_within[name] == pytest.approx(inner.p_value, abs=0.05)
        assert rows.tau[name] == pytest.approx(scipy.stats.kendalltau(x, meta["gap"]).statistic)
        assert rows.psi[name] == pytest.approx(granulated_tau(x, meta["gap"], table).psi)
        error = sign_error(x, meta["gap"], table)
        assert rows.robust_sign_error[name] == error.robust
        assert rows.tau_exact[name] == rows.tau[name]
        assert rows.reliability[name] == 1.0
    assert rows.disagree.to_dict() == {"deep": True, "good": False, "noise": False}
    assert any(w.startswith("Simpson: ") and " deep" in w for w in s.warnings)
    assert any("drawn and permuted together" in w for w in s.warnings)
    assert rows.tau["good"] == pytest.approx(1)
    assert rows.low["good"] == pytest.approx(1 - 20 / 12**2)
    assert rows.robust_sign_error["good"] == 0
    adjusted = rows.p_within_adjusted
    order = rows.p_within.sort_values().index
    want = np.maximum.accumulate(rows.p_within[order] * [3, 2, 1]).clip(upper=1)
    assert adjusted[order].tolist() == pytest.approx(want.tolist())
    assert len(s.axes) == 9
    assert set(s.environments["axis"]) == {"depth", "width", "lr"}


def test_every_table_states_the_filter():
    values, meta = zoo()
    meta["train_loss"] = meta["train_loss"].astype(float)
    meta.loc[0, "reached_target"] = False
    meta.loc[[1, 2], "gap"] = math.nan
    meta.loc[3, "train_loss"] = 2.0
    frame = long_table(values, meta)
    failed = {"checkpoint": "broken", "label": None, "error": "no such file", "meta.gap": 0.5}
    frame = pd.concat([frame, pd.DataFrame([failed])], ignore_index=True)
    s = correlate_study(
        frame, gap="gap", axes=["depth", "width"], converged=Filter(max_train_loss=1.0)
    )
    assert s.filter.startswith("32 of 37 models are correlated; left out: ")
    for part in (
        "1 without a score",
        "1 that did not converge (`reached_target` is false)",
        "1 with `train_loss` above 1 or not finite",
        "2 with `gap` missing or not finite",
    ):
        assert part in s.filter
    assert (s.frame["n"] == 32).all()
    plain = json.loads(json.dumps(s.to_dict(), allow_nan=False))
    assert all(t["filter"] == s.filter for t in plain["tables"].values())
    assert all(f.attrs["filter"] == s.filter for f in (s.to_frame(), s.axes, s.environments))
    assert plain["settings"]["max_train_loss"] == 1.0
    text = long_table(values, meta.assign(reached_target=["False"] + ["True"] * 35))
    assert "1 that did not converge" in correlate_study(text, gap="meta.gap").filter
    bare = correlate_study(long_table(values, meta.drop(columns="reached_target")), gap="gap")
    assert "Nothing says which models converged" in bare.filter


def test_values_that_did_not_converge_are_counted_or_dropped():
    values, meta = zoo()
    converged = np.array([False] * 4 + [True] * 32)
    frame = long_table(values, meta, converged=converged)
    kept = correlate_study(frame, gap="gap")
    assert kept.frame[["n", "unconverged"]].to_numpy().tolist() == [[36, 4]] * 3
    assert "deep: 4 of 36 values did not converge and are kept." in kept.warnings
    dropped = correlate_study(frame, gap="gap", converged=Filter(unconverged="drop"))
    assert (dropped.frame["n"] == 32).all()
    assert dropped.frame["tau"][0] == pytest.approx(
        scipy.stats.kendalltau(values["deep"][4:], meta["gap"][4:]).statistic
    )


def test_errors_of_the_values_widen_the_interval_and_are_said():
    rng = np.random.default_rng(1)
    _, meta = zoo()
    x = meta["gap"].to_numpy() + 0.2 * rng.normal(size=36)
    exact = correlate_study(long_table({"a": x}, meta), gap="gap")
    assert not any("noise" in w or "order of models" in w for w in exact.warnings)

    def one(kind, error):
        found = correlate_study(
            long_table({"a": x}, meta, error_kind=kind, probe_error=error), gap="gap"
        )
        return found.frame.iloc[0], " ".join(found.warnings)

    base = exact.frame.iloc[0]
    row, text = one("stderr", 0.15)
    assert row.tau == base.tau
    assert row.tau_exact > row.tau + 0.05
    assert row.reliability < 0.9
    assert row.high - row.low > base.high - base.low
    assert "of the variance between models is measurement noise" in text
    row, text = one("bound", 0.02)
    assert row.low < base.low
    assert row.high > base.high
    assert "leave the order of models open" in text
    row, text = one("lower_bound", 0.02)
    assert row.low < base.low
    assert "36 of 36 values are lower bounds" in text
    row, text = one("stderr", 3.0)
    assert (row.low, row.high) == (-1, 1)
    assert math.isnan(row.tau_exact)
    assert "swamps" in text
    row, text = one("stderr", None)
    assert (row.low, row.high) == (base.low, base.high)
    assert "36 of 36 values have no known error" in text


def test_partial_takes_out_what_is_shared():
    values, meta = zoo()
    s = correlate_study(long_table(values, meta), gap="gap", partial=["depth"])
    rows = s.frame.set_index("measure")
    assert rows.p["deep"] < 0.01
    assert abs(rows.tau_partial["deep"]) < 0.35
    assert rows.p_partial["deep"] > 0.01
    by_label = correlate_study(long_table(values, meta), gap="gap", partial=["good"])
    assert math.isnan(by_label.frame.set_index("measure").tau_partial["good"])
    assert math.isnan(by_label.frame.set_index("measure").p_partial["good"])


@pytest.mark.parametrize("statistic", ["spearman", "pearson"])
def test_other_statistics(statistic):
    values, meta = zoo()
    s = correlate_study(long_table(values, meta), gap="gap", statistic=statistic, correction="bh")
    want = getattr(scipy.stats, f"{statistic}r")(values["deep"], meta["gap"])
    row = s.frame.iloc[0]
    assert row.tau == pytest.approx(want.statistic)
    assert row.low < row.tau < row.high
    assert s.frame["p_adjusted"].tolist() == pytest.approx(
        scipy.stats.false_discovery_control(s.frame["p"]).tolist()
    )


def test_small_studies_say_so():
    values, meta = zoo()
    few = {k: v[:4] for k, v in values.items()}
    s = correlate_study(long_table(few, meta.iloc[:4]), gap="gap", axes=["depth", "width"])
    assert s.frame["low"].isna().all()
    assert s.frame["p"].isna().all()
    text = " ".join(s.warnings)
    assert "No interval for deep, good, noise: fewer than 5 models or clusters" in text
    assert "Axis depth has one level" in text
    s = correlate_study(
        long_table(values, meta), gap="gap", group="depth", axes=["depth", "width"], num_test=900
    )
    assert any("can be ordered in" in w for w in s.warnings)  # two settings in each depth
    wide = correlate_study(
        long_table(values, meta.assign(gap=meta["gap"] * 9)), gap="gap", axes=["width"], num_test=9
    )
    assert any("a loss in [0, 1]" in w for w in wide.warnings)
    nothing = long_table(values, meta.assign(reached_target=False))
    empty = correlate_study(nothing, gap="gap", group="depth", axes=["depth"], partial=["lr"])
    assert empty.filter.startswith("0 of 36")
    assert (empty.frame["n"] == 0).all()


def test_the_same_seed_gives_the_same_bits():
    values, meta = zoo()
    frame = long_table(values, meta, error_kind="stderr", probe_error=0.1)
    kwargs = {"gap": "gap", "group": "depth", "axes": ["depth", "lr"], "partial": ["width"]}
    first, second = (correlate_study(frame, **kwargs).to_dict() for _ in range(2))
    assert first == second
    third = correlate_study(frame, **kwargs, seed=1).to_dict()
    assert third["tables"]["measures"] != first["tables"]["measures"]
    shuffled = correlate_study(frame[::-1], **kwargs)
    assert [r["tau"] for r in shuffled.to_dict()["tables"]["measures"]["rows"]] == [
        r["tau"] for r in first["tables"]["measures"]["rows"]
    ]


def test_of_several_seeds_the_lowest_is_taken():
    values, meta = zoo()
    frame = long_table(values, meta)
    other = frame.assign(seed=1, value=-frame["value"])
    s = correlate_study(pd.concat([other, frame]), gap="gap")
    assert s.frame["tau"].tolist() == correlate_study(frame, gap="gap").frame["tau"].tolist()
    assert any("108 scores are repetitions" in w for w in s.warnings)


def test_copies_of_a_checkpoint_are_counted_once():
    values, meta = zoo()
    frame = long_table(values, meta)
    frame["subject"] = frame["checkpoint"] + "'s weights"
    moved = frame.assign(checkpoint="moved/" + frame["checkpoint"])
    twice = correlate_study(pd.concat([frame, moved]), gap="gap")
    once = correlate_study(frame, gap="gap")
    assert (once.frame["n"] == 36).all()
    pd.testing.assert_frame_equal(twice.frame, once.frame)
    assert "36 with the weights of another one" in twice.filter
    # Without knowing the weights nothing is left out.
    unknown = pd.concat([frame, moved]).drop(columns="subject")
    assert (correlate_study(unknown, gap="gap").frame["n"] == 72).all()


def test_what_granulated_tau_does_not_carry_is_said():
    values, meta = zoo()
    values["exact"] = values["good"] + 1
    frame = long_table(values, meta, error_kind="stderr", probe_error=0.2)
    frame.loc[frame["label"] == "exact", "probe_error"] = 0.0
    text = [w for w in correlate_study(frame, gap="gap", axes=["depth"]).warnings if "carry" in w]
    assert len(text) == 1
    assert "good" in text[0]
    assert "exact" not in text[0]
    assert not any("carry" in w for w in correlate_study(frame, gap="gap").warnings)


def test_models_without_a_group_or_an_axis_are_told():
    values, meta = zoo()
    meta["spec.lr"] = meta["spec.lr"].where(meta.index > 1)
    meta["family"] = [None] + ["mlp"] * 35
    s = correlate_study(long_table(values, meta), gap="gap", group="family", axes=["depth", "lr"])
    assert "1 of 36 models have no `family`; they are taken as alike in it." in s.warnings
    assert "2 of 36 models have no `lr`; they are taken as alike in it." in s.warnings
    assert not any("no `depth`" in w for w in s.warnings)


def test_measures_without_a_p_value_do_not_count_as_tried():
    values, meta = zoo()
    values["constant"] = np.ones(36)
    s = correlate_study(long_table(values, meta), gap="gap")
    assert "`p_adjusted` is for 3 measures, by Holm's correction." in s.warnings
    smallest = s.frame.sort_values("p").iloc[0]
    assert smallest.p_adjusted == pytest.approx(3 * smallest.p)


def test_wrong_use_is_said():
    values, meta = zoo()
    frame = long_table(values, meta)
    for kwargs, words in (
        ({"gap": "gup"}, "the gap 'gup'"),
        ({"gap": "gap", "group": "family"}, "'family'"),
        ({"gap": "gap", "measures": ["shape"]}, "'shape'"),
        ({"gap": "gap", "statistic": "tau"}, "statistic"),
        ({"gap": "gap", "correction": "bonferroni"}, "correction"),
        ({"gap": "gap", "converged": Filter(unconverged="flag")}, "unconverged"),
        ({"gap": "gap", "converged": Filter(train_loss="ce", max_train_loss=1)}, "train loss 'ce'"),
    ):
        with pytest.raises(SettingsError, match=words):
            correlate_study(frame, **kwargs)
    with pytest.raises(SettingsError, match="Missing: label"):
        correlate_study(frame.drop(columns="label"), gap="gap")
    words = frame.assign(**{"meta.family": "mlp", "meta.other.depth": 1})
    with pytest.raises(SettingsError, match="numbers in the covariate 'family'"):
        correlate_study(words, gap="gap", partial=["family"])
    with pytest.raises(SettingsError, match=r"spec\.depth, other\.depth"):
        correlate_study(words, gap="gap", group="depth")
    one = correlate_study(frame, gap="gap", measures=["noise"])
    assert one.frame["measure"].tolist() == ["noise"]


def test_the_forest_takes_the_table():
    values, meta = zoo()
    s = correlate_study(long_table(values, meta), gap="gap", group="depth")
    axes = plots.plot_taus(s.frame, within="within depth")
    assert axes.containers[0].lines[0].get_xdata().tolist() == s.frame["tau"].tolist()
    pooled = correlate_study(long_table(values, meta), gap="gap")
    alone = plots.plot_taus(pooled.frame)
    assert len(alone.containers) == 1
    plt.close("all")


PAGE = (Path(__file__).parents[1] / "docs" / "correlation.md").read_text()


def test_the_page_gives_the_numbers_that_its_code_gives():
    blocks = re.findall(r"^```python\n(.*?)^```\n+```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    namespace = {"__name__": "page"}
    for code, output in blocks:
        lines = []
        namespace["print"] = lambda *a, to=lines: to.append(" ".join(map(str, a)))
        exec(compile(code, "docs/correlation.md", "exec"), namespace)
        assert "\n".join(lines).split() == output.split()
