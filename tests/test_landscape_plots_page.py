"""The interactive page: complete, offline, honest about gaps, and it runs nothing of the user's."""

import base64
import builtins
import hashlib
import json
import re
import time
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from browser import Browser, missing
from report_cases import HOSTILE
from slice_cases import DETAILS, FILTER, axis, bowl, holes, line, path

from sharpkit.errors import SettingsError
from sharpkit.landscape import Marker, Status, caption
from sharpkit.plots import interactive, interactive_page

pytest.importorskip("plotly", reason="plotly is not installed: pip install sharpkit[plots]")

needs_browser = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")
SOFTWARE = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # WebGL without a GPU


def held(page):
    """The data in a page, as JSON."""
    text = page.read_text("utf-8")
    return json.loads(text.split('id="data">', 1)[1].split("</script>", 1)[0])


# -- without a browser -----------------------------------------------------------------------


def test_the_page_holds_the_values_and_their_gaps(tmp_path):
    s = replace(holes(), errors={"loss": holes().loss / 7}, notes=("A note.",))
    data = held(interactive_page(s, tmp_path / "s.html"))
    (one,) = data["slices"]
    assert one["x"] == list(s.grid[0])
    assert one["y"] == list(s.grid[1])
    found = np.array(one["values"][0]["values"], dtype=float).T  # rows are y
    np.testing.assert_array_equal(found, s.loss)
    errors = np.array(one["values"][0]["errors"], dtype=float).T
    np.testing.assert_array_equal(errors, s.loss / 7)
    np.testing.assert_array_equal(np.array(one["status"]).T, s.status)
    assert one["caption"] == caption(s)
    assert one["notes"] == ["A note."]
    assert f"{(s.status == Status.CUT).sum()} above loss_max = 5" in one["gaps"]
    assert len(data["words"]) == len(Status)
    assert data["words"][Status.CUT] == "above loss_max"
    (marker,) = one["markers"]
    assert marker["heights"][0] == pytest.approx(0.05, abs=0.3)


def test_the_policy_allows_two_scripts_and_no_connection(tmp_path):
    text = interactive_page(bowl(), tmp_path / "s.html").read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "http" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert '<html lang="en">' in text
    assert "<title>runs/net.pt</title>" in text
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", text)


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "s.html"
    for slices in ([], [bowl(), line()], [bowl(), replace(bowl(), values={"error": bowl().loss})]):
        with pytest.raises(SettingsError, match="same dimension and with the same values"):
            interactive_page(slices, file)
    lost = replace(bowl(), values={"loss": np.full_like(bowl().loss, np.nan)})
    with pytest.raises(SettingsError, match="finite values of loss"):
        interactive_page(lost, file)
    real = interactive.importlib.import_module

    def absent(name, *rest):
        if name.startswith("plotly"):
            raise builtins.ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(interactive.importlib, "import_module", absent)
    with pytest.raises(SettingsError, match=r"pip install sharpkit\[plots\]"):
        interactive_page(bowl(), file)
    assert not file.exists()


# -- in a browser ----------------------------------------------------------------------------


def hostile():
    """Names that would act if a page read them as more than text."""
    markers = tuple(Marker(name, (0.1 * k, 0.1 * k)) for k, name in enumerate(HOSTILE))
    title = HOSTILE[2]
    return replace(
        bowl(),
        axes=(axis(label=HOSTILE[0]), axis(label="<a href='https://a.invalid'>b</a>")),
        values={f"{HOSTILE[2]}/loss": bowl().loss},
        markers=markers,
        details={**DETAILS, "checkpoint": HOSTILE[3], "title": title},
        notes=HOSTILE,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    two = [replace(holes(), details={**DETAILS, "title": "SGD"}), path()]
    return {
        "planes": interactive_page(two, folder / "planes.html", log=True),
        "lines": interactive_page(
            [line(title="SGD"), line(scale=0.5, title="SAM")], folder / "lines.html"
        ),
        "hostile": interactive_page(hostile(), folder / "hostile.html"),
    }


@pytest.fixture(scope="module")
def flat():
    """A browser without WebGL."""
    with Browser(["--disable-3d-apis"]) as started:
        yield started


@pytest.fixture(scope="module")
def solid():
    """A browser in which software stands in for a GPU."""
    with Browser(SOFTWARE) as started:
        yield started


def opened(browser, file):
    browser.size(1100, 850)
    browser.scheme("light")
    browser.open(file)
    for _ in range(600):
        if browser.run("return Boolean(document.querySelector('#plot .main-svg'))"):
            return
        time.sleep(0.05)
    raise TimeoutError(browser.log())


def quiet(browser):
    """Nothing failed, and nothing that the policy had to stop."""
    return [m for m in browser.log() if m["level"] == "SEVERE" or "Policy" in m["message"]] == []


def choose(browser, name, value):
    browser.run(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
        " s.dispatchEvent(new Event('change'))",
        name, value,
    )  # fmt: skip


TRACE = "const t = document.getElementById('plot').data[0]; return {type: t.type, z: t.z, text: t.text, gaps: t.connectgaps}"


def rows(z):
    """Rows as an array; plotly may hold them as typed arrays, which come as objects."""
    plain = [list(r.values()) if isinstance(r, dict) else r for r in z]
    return np.array(plain, dtype=float)


@needs_browser
@pytest.mark.parametrize("kind", ["flat", "solid"])
def test_planes_in_a_browser(kind, files, request):
    browser, surfaces = request.getfixturevalue(kind), kind == "solid"
    opened(browser, files["planes"])
    s = holes()
    shown = browser.run(TRACE)
    message = browser.run("return document.getElementById('message').innerText")
    assert shown["type"] == ("surface" if surfaces else "contour")
    assert bool(message) is not surfaces
    if not surfaces:
        assert "WebGL" in message
        assert browser.run("return document.querySelector('#view option').disabled")
    for log in (True, False):
        if not log:
            browser.click("#log")
        for view in ("surface", "contour") if surfaces else ("contour",):
            choose(browser, "view", view)
            shown = browser.run(TRACE)
            assert shown["type"] == view
            assert shown["gaps"] is False
            z = rows(shown["z"]).T
            np.testing.assert_array_equal(np.isnan(z), np.isnan(s.loss))
            np.testing.assert_allclose(10**z if log else z, s.loss, rtol=1e-9)
    assert shown["text"][7][14].endswith("not finite")
    i, j = np.argwhere(s.status == Status.CUT)[0]
    assert shown["text"][j][i].endswith("above loss_max")
    i, j = 9, 3
    lines = shown["text"][j][i].split("<br>")
    assert lines[0] == f"direction 1: {FILTER}: {float(f'{s.grid[0][i]:.5g}'):g}"
    assert lines[2] == f"loss: {float(f'{s.loss[i, j]:.5g}'):g}"
    assert lines[3] == "interpolated"
    assert "not finite" in browser.run("return document.getElementById('gaps').innerText")
    choose(browser, "slice", "1")
    assert browser.run("return document.getElementById('caption').innerText") == caption(path())
    np.testing.assert_allclose(rows(browser.run(TRACE)["z"]).T, path().loss)
    joined = browser.run(
        "return document.getElementById('plot').data.filter(t => /lines/.test(t.mode)).map(t => t.x)"
    )
    assert joined == [[m.coordinates[0] for m in path().markers[1:]]]
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert quiet(browser)


@needs_browser
def test_light_dark_and_a_phone(flat, files, tmp_path):
    browser = flat
    opened(browser, files["planes"])
    seen = {}
    for name in ("light", "dark"):
        browser.scheme(name)
        time.sleep(0.5)
        browser.screenshot(tmp_path / f"{name}.png", whole=True)
        seen[name] = float(np.median(matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3]))
        assert browser.run("return document.getElementById('plot').layout.paper_bgcolor") == (
            "#ffffff" if name == "light" else "#15181b"
        )
    assert seen["light"] > 0.9
    assert seen["dark"] < 0.2
    browser.size(390, 844, phone=True)
    time.sleep(0.6)
    assert browser.run("return [document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    right = "return document.querySelector('#plot .main-svg').getBoundingClientRect().right"
    assert browser.run(right) <= 390
    assert quiet(browser)


@needs_browser
def test_lines_in_a_browser(flat, files):
    browser = flat
    opened(browser, files["lines"])
    traces = browser.run(
        "return document.getElementById('plot').data.map(t => [t.name, Array.from(t.y), t.connectgaps])"
    )
    for (name, y, joined), s in zip(traces, (line(), line(scale=0.5)), strict=True):
        assert name in ("SGD", "SAM")
        np.testing.assert_allclose(np.array(y, dtype=float), s["train/loss"])
        assert joined is False
    choose(browser, "value", "2")
    assert "accuracy" in browser.run(
        "return document.getElementById('plot').layout.yaxis.title.text"
    )
    assert quiet(browser)


@needs_browser
@pytest.mark.parametrize("kind", ["flat", pytest.param("solid", marks=pytest.mark.slow)])
def test_hostile_names_are_shown_and_never_run(kind, files, request):
    browser = request.getfixturevalue(kind)
    opened(browser, files["hostile"])
    assert browser.run("return document.getElementById('view').value") == (
        "surface" if kind == "solid" else "contour"
    )
    time.sleep(0.3)
    assert browser.run("return window.marker === undefined")  # an open alert would refuse this
    for what in ("img", "script", "a"):
        # None in the page but the buttons of the figure, which lead nowhere.
        count = f"return document.querySelectorAll('main {what}:not(.modebar-btn)').length"
        assert browser.run(count) == 0
    choose(browser, "view", "contour")
    text = browser.run("return document.body.innerText")
    for name in HOSTILE:
        assert re.sub("[\u202e\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", name) in text
    axis_text = browser.run("return document.querySelector('#plot').textContent")
    assert "<img src=x onerror=alert(1)>" in axis_text
    assert browser.run("return document.title") == HOSTILE[2]
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert quiet(browser)
