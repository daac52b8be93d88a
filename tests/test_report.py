"""Reports: what is in the page, that nothing in it can act, and the figures beside it."""

import base64
import contextlib
import hashlib
import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from report_cases import HOSTILE, add, numbers, study

from sharpkit.cli import run as cli
from sharpkit.errors import SettingsError, StoreError
from sharpkit.results import Estimate, Part, Score, format_value
from sharpkit.study.correlation import correlate_study
from sharpkit.study.identity import Options
from sharpkit.study.report import build, collect, data, page, parts, taus, write_page
from sharpkit.study.store import Store
from sharpkit.study.tables import scores_table


def report(path, **named):
    with Store(path, read_only=True) as store:
        return collect(store, **named)


class Elements(html.parser.HTMLParser):
    """The elements of a page, as a browser would see them without running anything."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found, self.inside, self.text = [], None, {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.inside = f"{tag}#{dict(attrs).get('id', '')}"

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside:
            self.text[self.inside] = self.text.get(self.inside, "") + text

    @property
    def data(self):
        return json.loads(self.text["script#data"])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return study(tmp_path_factory.mktemp("report") / "study.db")


def test_the_page_holds_every_score_with_its_digits(path):
    plain = Elements(page(report(path, group="family"))).data
    rows = plain["rows"]
    assert len(rows["value"]) == 8 * 5 + 1
    seen = set()
    for r, label in enumerate(rows["label"]):
        if label < 0 or rows["failed"][r] >= 0:
            continue
        name = plain["models"]["name"][rows["model"][r]]
        i = int(re.search(r"net(\d)", name).group(1))
        e = numbers(i)[plain["labels"][label]]
        expected = {"value": e.value, "error": e.probe_error, "data": e.data_error}
        for key, value in expected.items():
            if value is None or np.isnan(value):
                assert rows[key][r] is None
            elif np.isinf(value):
                assert rows[key][r] == "inf"
            else:
                assert rows[key][r] == value
        assert rows["shown"][r] == format_value(e.value, e.probe_error, e.error_kind)
        kinds = ("stderr", "bound", "lower_bound", "rounding")
        assert kinds[rows["kind"][r]] == e.error_kind
        assert rows["ok"][r] == e.converged
        assert plain["models"]["gap"][rows["model"][r]] == pytest.approx(0.1 * i)
        assert plain["groups"][plain["models"]["group"][rows["model"][r]]] == ("mlp", "cnn")[i % 2]
        seen.add((i, plain["labels"][label]))
    assert len(seen) == 39
    failed = [r for r in range(len(rows["value"])) if rows["failed"][r] >= 0]
    texts = {plain["errors"][rows["failed"][r]] for r in failed}
    assert len(failed) == 2
    assert texts == {
        "Expected weights. The file holds none.",
        "Expected <b>memory</b>. There was none.",
    }


def test_layers_and_eigenvalues_are_told_apart(path):
    found = report(path)
    layers = found.layers.frame
    assert set(layers["part"]) == {f"block.{k}.weight" for k in range(4)}
    assert len(layers) == 32
    assert layers["converged"].sum() == 31
    ends = found.eigenvalues.frame.set_index(["checkpoint", "part"])
    assert ends["value"]["runs/net2.pt", "lambda_-1"] == -1.5
    assert set(ends["error_kind"]) == {"bound"}
    plain = Elements(page(found)).data
    assert len(plain["layers"]["value"]) == 32
    assert plain["layers"]["shown"][0] == format_value(0.1, 0.01)


def test_a_file_under_two_recipes_has_the_gap_of_each(tmp_path):
    with contextlib.closing(Store(tmp_path / "study.db")) as store:
        for k, recipe in enumerate(("train.py", "test.py")):
            add(store, "net.pt", k, recipe=recipe, code=recipe, metadata={"gap": 0.25 + k})
        rows = (plain := Elements(page(collect(store))).data)["rows"]
    seen = {
        (plain["labels"][rows["label"][r]], plain["models"]["gap"][rows["model"][r]])
        for r in range(len(rows["value"]))
        if plain["labels"][rows["label"][r]].startswith("hessian_trace")
    }
    assert seen == {
        ("hessian_trace(recipe=train.py)", 0.25),
        ("hessian_trace(recipe=test.py)", 1.25),
    }


def test_orders_of_an_entropy_and_smoothed_losses_are_no_layers(tmp_path):
    with contextlib.closing(Store(tmp_path / "study.db")) as store:
        add(store, "net0.pt", 0)
        (key,) = store.query("SELECT subject FROM entry")[0]
        others = (Part("alpha=2", 1.0, 0.1), Part("smoothed loss", 1.0, 0.1))
        store.record(
            key, Score("renyi_sharpness", Estimate(1.0, 0.1, "stderr", parts=others), {}, 0)
        )
        found = collect(store)
    assert set(found.layers.frame["label"]) == {"hessian_trace"}


def test_a_page_holds_whole_checkpoints_and_says_what_is_left_out(path, monkeypatch):
    monkeypatch.setattr(parts, "MOST", 10)
    layers = report(path).layers
    assert layers.left_out == 6
    assert list(layers.frame["checkpoint"].unique()) == ["runs/net0.pt", "runs/net1.pt"]


# -- correlation -------------------------------------------------------------------------


def test_correlations_are_those_of_the_command(path, capsys):
    found = report(path, group="family")
    with Store(path, read_only=True) as store:
        expected = correlate_study(scores_table(store), gap="gap", group="family")
    pd.testing.assert_frame_equal(found.taus, expected.frame)
    assert found.filter == expected.filter
    assert found.remarks == expected.warnings
    assert cli(["correlate", str(path), "--gap", "gap", "--group", "family", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected.to_dict()


def test_without_a_gap_nothing_is_correlated_and_the_page_says_how(tmp_path):
    with contextlib.closing(Store(tmp_path / "study.db")) as store:
        for i in range(3):
            add(store, f"net{i}.pt", i, metadata={"spec": {"hole": 0.1 * i}, "name": f"n{i}"})
        without = collect(store)
        assert without.gap is None
        assert len(without.taus) == 0
        assert "--gap" in without.filter
        assert collect(store, gap="hole").gap == "spec.hole"
        for wrong in ({"gap": "gap"}, {"group": "family"}, {"cluster": "x"}):
            with pytest.raises(SettingsError, match="among the metadata"):
                collect(store, **wrong)


def test_the_usual_gap_is_found_by_its_name_alone():
    assert data._usual_gap(["a.gap", "gap", "b.gap"]) == "gap"
    assert data._usual_gap(["spec.gap", "loss"]) == "spec.gap"
    assert data._usual_gap(["a.gap", "b.gap"]) is None


def test_large_studies_get_tau_alone_unless_intervals_are_asked_for(path, monkeypatch):
    full = report(path, group="family").taus
    monkeypatch.setattr(data, "PATIENCE", 0.0)
    quick = report(path, group="family")
    assert "--intervals" in " ".join(quick.remarks)
    assert quick.taus["low"].isna().all()
    for name in ("measure", "n", "unconverged", "tau", "tau_within"):
        assert list(quick.taus[name]) == pytest.approx(list(full[name]), nan_ok=True)
    asked = report(path, group="family", intervals=True)
    pd.testing.assert_frame_equal(asked.taus, full)


def test_tau_within_groups_weighs_pairs_and_leaves_out_constants():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=12), rng.normal(size=12)
    groups = np.array(list("aaaabbbbbbcd"))
    x[4:10] += 5
    a, b = (scipy.stats.kendalltau(x[s], y[s]).statistic for s in (slice(0, 4), slice(4, 10)))
    assert taus._within(x, y, groups) == pytest.approx((6 * a + 15 * b) / 21)
    x[:4] = 1.0
    assert taus._within(x, y, groups) == pytest.approx(b)
    assert np.isnan(taus._within(x[:1], y[:1], groups[:1]))


def test_disagreement_of_large_studies_needs_taus_that_are_not_zero():
    # Normal pairs: twice the bound on the deviation holds tau at least 95 times in 100.
    rng = np.random.default_rng(1)
    for r in (0.0, 0.6):
        bound = []
        for _ in range(200):
            x = rng.normal(size=60)
            y = r * x + np.sqrt(1 - r**2) * rng.normal(size=60)
            tau = taus._tau(x, y)
            bound.append(abs(tau - 2 / np.pi * np.arcsin(r)) < 2 * np.sqrt(2 * (1 - tau**2) / 60))
        assert np.mean(bound) > 0.95
    assert taus._disagree(0.3, -0.01, 2500)
    assert taus._disagree(0.3, 0.01, 2500)
    assert taus._disagree(0.01, -0.3, 2500)
    assert not taus._disagree(0.01, -0.01, 2500)
    assert not taus._disagree(0.3, 0.2, 2500)
    assert not taus._disagree(0.01, 0.3, 2500)
    assert not taus._disagree(np.nan, 0.3, 2500)


# -- nothing in it can act ---------------------------------------------------------------


def hostile_study(folder):
    path = folder / "study.db"
    with contextlib.closing(Store(path)) as store:
        for i, name in enumerate(HOSTILE):
            metadata = {
                "gap": 0.1 * i,
                name: name,
                "family": name,
                "nested": {"</title>": "<svg onload=alert(3)>"},
            }
            add(
                store,
                name,
                i,
                metadata=metadata,
                fail=("margin", "parameter_norm", "sam_sharpness"),
                notes=(f"About {name}.",),
            )
    return path


def test_hostile_names_and_metadata_stay_text(tmp_path):
    found = report(hostile_study(tmp_path), group="family", title="<b>\u202e & </title><script>x")
    text = page(found)
    elements = Elements(text)
    assert elements.data["models"]["name"] == sorted(HOSTILE)
    assert set(elements.data["groups"]) == set(HOSTILE)
    assert {tag for tag, _ in elements.found} <= {
        "html", "head", "meta", "title", "style", "body", "a", "header", "h1", "p", "div", "nav",
        "label", "select", "option", "main", "noscript", "code", "footer", "script",
    }  # fmt: skip
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert not any(key.startswith("on") for _, attrs in elements.found for key in attrs)
    assert elements.text["title#"] == "<b>\\u202e & </title><script>x"
    embedded = text.split('id="data">', 1)[1].split("</script>", 1)[0]
    assert not set("<>&\u2028\u2029\u202e") & set(embedded)
    assert embedded.isascii()


def test_the_policy_allows_the_page_s_own_script_and_style_alone(path):
    text = page(report(path))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy

    def digest(body):
        return f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"

    assert rules["script-src"] == digest(re.findall(r"<script>(.*?)</script>", text, re.S)[0])
    assert rules["style-src"] == digest(re.findall(r"<style>(.*?)</style>", text, re.S)[0])
    outside = set(re.findall(r"https?://[^\"'\s)]+", text))
    assert outside <= {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert "innerHTML" not in text
    assert "eval(" not in text


def test_colours_are_readable():
    css = (Path(build.__file__).parent / "page" / "report.css").read_text()
    themes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for block in re.findall(r"\{([^{}]*--page:[^{}]*)\}", css)
    ]
    assert len(themes) == 3
    assert themes[1] == themes[2]

    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(a, b):
        high, low = sorted((light(a), light(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for theme in themes[:2]:
        for text, ground in (
            ("ink", "page"),
            ("dim", "page"),
            ("accent", "page"),
            ("ink", "soft"),
            ("warn-ink", "warn"),
            ("page", "ink"),
            ("dim", "soft"),
        ):
            assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        for k in range(7):
            assert contrast(theme[f"group-{k}"], theme["page"]) >= 3


# -- settings, origin, failures ----------------------------------------------------------


def test_several_data_sets_codes_and_versions_are_warned_of(tmp_path):
    with contextlib.closing(Store(tmp_path / "study.db")) as store:
        for i in range(4):
            add(store, f"net{i}.pt", i)
        assert collect(store).warnings == ()
        add(store, "other.pt", 5, data="e")
        (warning,) = collect(store).warnings
        assert warning.startswith("recipe.py gave 2 different data sets (d, e).")
        add(store, "later.pt", 6, code="s", version="0.2.0")
        texts = collect(store).warnings
        add(store, "apart.pt", 7, recipe="second.py", data="f")
        assert collect(store).warnings == texts
    assert "2 versions of its code" in texts[1]
    assert "0.1.0, 0.2.0" in texts[2]


def test_tables_beside_the_numbers(path):
    found = report(path)
    tables = {f.title: f for f in found.facts}
    measures = {row[0]: row for row in tables["Measures and settings"].rows}
    assert measures["hessian_trace"][3:7] == (8, 1, 0, 8 * 24)
    assert measures["sam_sharpness"][3:6] == (8, 0, 1)
    assert json.loads(measures["hessian_trace"][2])
    (run,) = tables["Runs"].rows
    assert run == ("recipe.py", Options().text(), 0, 9, 1)
    assert tables["Code and data"].rows == (("recipe.py", "r", "d", "0.1.0", 8),)
    origin = dict(tables["Origin of the scores"].rows)
    assert origin == {"dtype": "float32", "torch": "2.13", "theta_sha256": "8 different values"}
    assert set(found.failures["checkpoint"]) == {"runs/broken.pt", "runs/net3.pt"}
    notes = found.notes.set_index("note")
    assert notes.loc["Few probes.", ["measure", "count", "first"]].tolist() == [
        "hessian_trace",
        1,
        "runs/net2.pt",
    ]
    assert notes.loc["Weights are shared.", "measure"] == ""


def test_an_empty_study_and_one_without_scores_have_pages(tmp_path):
    with contextlib.closing(Store(tmp_path / "study.db")) as store:
        assert Elements(page(collect(store))).data["rows"]["value"] == []
        add(store, "net0.pt", 0, fail=tuple(numbers(0)))
        plain = Elements(page(collect(store))).data
    assert plain["rows"]["value"] == [None] * 5
    assert plain["layers"]["value"] == []


def test_the_page_is_written_whole_or_not_at_all(path, tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("before")

    def broken(_):
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(build.os, "replace", lambda *_: broken(_))
        with pytest.raises(RuntimeError):
            write_page(report(path), target)
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(StoreError, match="Name another file"):
        write_page(report(path), tmp_path / "no" / "report.html")


# -- commands ----------------------------------------------------------------------------


def test_the_report_command_writes_page_and_figures(path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["report", str(path), "-o", "r.html", "--group", "family", "--figures", "figures"]
    assert cli(arguments) == 0
    out, err = capsys.readouterr()
    assert "r.html: 41 rows" in out
    assert "models are correlated" in " ".join(err.split())
    names = {p.stem for p in (tmp_path / "figures").iterdir()}
    drawn = ("hessian_trace", "top_eigenvalues", "sam_sharpness", "parameter_norm", "margin")
    assert names == {
        *(f"gap_{n}" for n in drawn),
        "tau",
        "layers_hessian_trace",
        "spectra_top_eigenvalues",
    }
    for name in names:
        for ending in ("png", "svg", "csv"):
            assert (tmp_path / "figures" / f"{name}.{ending}").stat().st_size > 100
    table = pd.read_csv(tmp_path / "figures" / "gap_margin.csv")
    assert len(table) == 6  # the infinite and the missing one are not drawn
    for wrong in (["-o", "r.pdf"], ["--gap", "nothing"], ["--group", "nothing"]):
        assert cli(["report", str(path), *wrong]) == 2
    assert cli(["report", str(tmp_path / "no.db")]) == 2


def test_hostile_names_are_no_names_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(hostile_study(tmp_path))
    assert cli(["report", path, "--group", "family", "--figures", "figures"]) == 0
    for file in (tmp_path / "figures").iterdir():
        assert re.fullmatch(r"[A-Za-z0-9_.=-]+", file.name)


def test_the_correlate_command_prints_within_80_columns(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    base = ["correlate", str(path), "--gap", "gap"]
    assert cli([*base, "--group", "family", "--partial", "parameter_norm", "-o", "t.csv"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for text in ("pooled", "within family", "partial", "8 of 9 models are correlated", "note: "):
        assert text in out
    row = next(line for line in out.splitlines() if line.startswith("top_eigenvalues"))
    table = pd.read_csv("t.csv").set_index("measure").loc["top_eigenvalues"]
    assert f"{table.tau:+.2f} [{table.low:+.2f}, {table.high:+.2f}]" in row
    assert cli([*base, "--statistic", "pearson", "--axes", "family"]) == 0
    out = capsys.readouterr().out
    assert "r with gap" in out
    assert "Granulated tau" in out
    for wrong in (["--statistic", "x"], ["--correction", "x"], ["-o", "t.xls"], ["--group", "x"]):
        assert cli([*base, *wrong]) == 2
