"""The report in a real browser: it sorts, filters, draws, saves, and runs nothing of a study's."""

import io
import re
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from browser import Browser, missing
from report_cases import HOSTILE, add, numbers, study
from test_report import hostile_study, report

from sharpkit.study.report import write_page
from sharpkit.study.store import Store

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")

DOWN, END, ENTER, TAB = "\ue015", "\ue010", "\ue007", "\ue004"
COLUMN = "return Array.from(document.querySelectorAll('#scores tbody tr'), r => r.children[arguments[0]].textContent)"


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        started.devtools(
            "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(started.downloads)
        )
        yield started


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    path = study(folder / "study.db", 12)
    with Store(path) as store:
        add(store, "runs/other.pt", 13, data="e")  # a second data set: a warning
    return write_page(report(path, group="family"), folder / "report.html")


@pytest.fixture
def page(browser, html):
    browser.size(1200, 900)
    browser.scheme("light")
    browser.open(html)
    yield browser
    assert browser.log() == []  # no error, nothing that the page's policy had to stop


def choose(page, selector, text):
    page.run(
        "const s = document.querySelector(arguments[0]);"
        "s.value = Array.from(s.options).find(o => o.text === arguments[1]).value;"
        "s.dispatchEvent(new Event('change'))",
        selector, text,
    )  # fmt: skip


def header(name):
    names = ["checkpoint", "family", "measure", "value", "error", "data error", "gap", "converged"]
    return names.index(name), f"#scores thead th:nth-child({names.index(name) + 1}) button"


def test_nothing_is_fetched_and_nothing_fails(page):
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    text = page.run("return document.body.innerText")
    for part in (
        "14 checkpoints, 65 scores of 5 measures",
        "13 of 14 models are correlated; left out: 1 without a score",
        "recipe.py gave 2 different data sets",
        "Expected weights. The file holds none.",
        "Few probes.",
    ):
        assert part in text


def test_the_table_sorts_by_numbers_and_texts(page):
    choose(page, "#table label:nth-child(2) select", "hessian_trace")
    index, button = header("value")
    expected = sorted(12.345678 * 2**i for i in [*range(12), 13])
    page.click(button)
    values = [float(v) for v in page.run(COLUMN, index)]
    assert values == pytest.approx(expected, rel=0.01)
    state = "return document.querySelector(arguments[0]).parentNode.getAttribute('aria-sort')"
    assert page.run(state, button) == "ascending"
    page.click(button)
    assert [float(v) for v in page.run(COLUMN, index)] == values[::-1]
    assert page.run(state, button) == "descending"
    index, button = header("checkpoint")
    page.run("document.querySelector(arguments[0]).focus()", button)
    page.keys(ENTER)
    names = page.run(COLUMN, index)
    assert names == [*(f"runs/net{i}.pt" for i in range(12)), "runs/other.pt"]  # 2 before 10
    choose(page, "#table label:nth-child(2) select", "margin")
    index, button = header("value")
    for last in ("nan", "nan"):  # what is no number is last either way
        page.click(button)
        assert page.run(COLUMN, index)[-1] == last
    assert page.run(COLUMN, index)[0] == "inf"


def test_digits_are_those_that_the_error_leaves(page):
    choose(page, "#table label:nth-child(2) select", "hessian_trace")
    page.type("#table input[type=search]", "net0")
    time.sleep(0.4)
    (row,) = page.run("return [document.querySelector('#scores tbody tr').innerText]")
    assert row.split("\t") == [
        "runs/net0.pt",
        "mlp",
        "hessian_trace",
        "12.35",
        "0.25 1 se",
        "0.5",
        "0",
        "yes",
    ]
    choose(page, "#table label:nth-child(2) select", "sam_sharpness")
    cells = page.run("return document.querySelector('#scores tbody tr').innerText").split("\t")
    assert cells[3:5] == ["≥ 0.500", "+0.010 room"]


def test_the_table_filters_and_turns_pages(page):
    state = "return document.querySelector('#table .pager').innerText.replace(/\\s+/g, ' ')"
    rows = "return document.querySelectorAll('#scores tbody tr').length"
    assert "1 to 25 of 66 rows" in page.run(state)
    page.click("#table .pager button:nth-child(2)")
    assert "26 to 50 of 66 rows" in page.run(state)
    page.click("#table .tick input")
    # Not loaded, failed, late, infinite, missing.
    assert "1 to 5 of 5, filtered from 66" in page.run(state)
    assert page.run(rows) == 5
    page.type("#table input[type=search]", "memory")  # in the sentence of an error
    time.sleep(0.4)
    assert page.run(COLUMN, header("value")[0]) == ["failed"]
    page.click("#table .tick input")
    choose(page, "#table label:nth-child(3) select", "cnn")
    assert page.run(rows) == 1
    choose(page, "#table label:nth-child(3) select", "mlp")
    assert page.run(rows) == 0
    assert "none" in page.run(state)


def test_figures_are_reached_by_keys_and_tell_their_numbers(page):
    choose(page, "#gap select", "hessian_trace")
    page.run("document.querySelector('#gap svg').focus()")
    page.keys(DOWN)
    tip = page.run("return document.getElementById('tip').innerText")
    assert "runs/net0.pt" in tip
    assert "hessian_trace: 12.35, error 0.25 1 se" in tip
    assert page.run("return document.getElementById('spoken').textContent").startswith(
        "runs/net0.pt"
    )
    page.keys(END)
    assert "runs/other.pt" in page.run("return document.getElementById('tip').innerText")
    page.keys(TAB)
    assert page.run("return document.getElementById('tip').hidden")
    focus = "return document.activeElement.textContent"
    assert page.run(focus) == "SVG"


def test_points_lie_where_their_numbers_are(page):
    # Marks of the axes give the scale; points and bars are then read back as numbers.
    read = """
        const g = document.querySelector('#gap svg');
        const marks = Array.from(g.querySelectorAll('text[text-anchor=middle]'), t => [+t.getAttribute('x'), +t.textContent]).filter(m => m[1] === m[1]);
        const dots = Array.from(g.querySelectorAll('path[transform]'), p => [...p.getAttribute('transform').matchAll(/[-\\d.]+/g)].map(Number));
        const bars = Array.from(g.querySelectorAll('[clip-path] line'), l => [+l.getAttribute('x1'), +l.getAttribute('x2'), +l.getAttribute('y1')]);
        return [marks, dots, bars]"""
    for name, log in (("sam_sharpness", False), ("hessian_trace", True)):
        choose(page, "#gap select", name)
        assert page.run("return document.querySelector('#gap .tick input').checked") == log
        marks, dots, bars = page.run(read)
        place = np.array([m[0] for m in marks])
        value = np.array([m[1] for m in marks])
        slope, start = np.polyfit(place, np.log10(value) if log else value, 1)
        # Those of the key above the figure are higher up than any point.
        points = sorted(d for d in dots if d[1] > 40)
        found = np.array([start + slope * d[0] for d in points])
        found = 10**found if log else found
        models = [i for i in [*range(12), 13] if not (name == "sam_sharpness" and i == 3)]
        expected = sorted(numbers(i)[name].value for i in models)
        assert found == pytest.approx(expected, rel=5e-3)
        if name == "sam_sharpness":  # lower bounds: a bar above, none below
            assert len(bars) == len(models)
            for left, right, y in bars:
                (x,) = [d[0] for d in dots if abs(d[1] - y) < 0.06 and abs(d[0] - left) < 0.06]
                assert (right - x) * slope == pytest.approx(0.01, rel=0.03)


def saved(path):
    for _ in range(600):
        if path.exists() and path.stat().st_size:
            return path
        time.sleep(0.05)
    raise TimeoutError(f"{path.name} was not saved")


def test_figures_are_saved_without_a_network(page):
    choose(page, "#gap select", "hessian_trace")
    for k, ending in enumerate(("svg", "png", "csv")):
        page.click(f"#gap .buttons button:nth-of-type({k + 1})")
        saved(page.downloads / f"gap_hessian_trace.{ending}")
    svg = ElementTree.parse(page.downloads / "gap_hessian_trace.svg").getroot()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(svg.findall(".//{*}path[@transform]")) >= 13
    image = matplotlib.image.imread(page.downloads / "gap_hessian_trace.png")
    assert image.shape[1] == 2 * int(svg.get("width"))
    assert len(np.unique(image[::4, ::4, 0])) > 20
    table = pd.read_csv(page.downloads / "gap_hessian_trace.csv").set_index("checkpoint")
    for i in range(12):
        assert table["hessian_trace"][f"runs/net{i}.pt"] == numbers(i)["hessian_trace"].value
        assert table["probe_error"][f"runs/net{i}.pt"] == 0.25
    page.click("#table > .buttons button")
    assert len(pd.read_csv(saved(page.downloads / "scores.csv"))) == 66


def brightness(png):
    image = matplotlib.image.imread(io.BytesIO(Path(png).read_bytes()))
    return float(np.median(image[..., :3]))


def test_light_dark_and_the_switch(page, tmp_path):
    shots = {}
    for name in ("light", "dark"):
        page.scheme(name)
        page.screenshot(tmp_path / f"{name}.png", whole=True)
        shots[name] = brightness(tmp_path / f"{name}.png")
    assert shots["light"] > 0.9
    assert shots["dark"] < 0.15
    choose(page, "#theme", "light")
    page.screenshot(tmp_path / "switched.png")
    assert brightness(tmp_path / "switched.png") > 0.9
    choose(page, "#theme", "dark")
    page.scheme("light")
    page.screenshot(tmp_path / "switched.png")
    assert brightness(tmp_path / "switched.png") < 0.15


def test_a_phone_needs_no_sideways_scroll(page, tmp_path):
    page.size(390, 844, phone=True)
    time.sleep(0.3)
    assert page.run("return [document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    inside = (
        "const t = document.querySelector('#table .scroll'); return t.scrollWidth > t.clientWidth"
    )
    assert page.run(inside)  # the table scrolls in its own box
    widths = page.run(
        "return Array.from(document.querySelectorAll('.plot svg'), s => s.getBoundingClientRect().right)"
    )
    assert len(widths) == 4
    assert max(widths) <= 390
    page.screenshot(tmp_path / "phone.png", whole=True)
    assert matplotlib.image.imread(tmp_path / "phone.png").shape[1] == 390


def test_hostile_names_are_shown_and_never_run(browser, tmp_path):
    found = report(hostile_study(tmp_path), group="family", title=HOSTILE[2])
    browser.open(write_page(found, tmp_path / "hostile.html"))
    assert browser.run("return window.marker === undefined")  # an open alert would refuse this
    assert (
        browser.run("return document.querySelectorAll('img, main script, main [onload]').length")
        == 0
    )
    text = browser.run("return document.body.innerText")
    for name in HOSTILE:
        shown = re.sub("[\u202e\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", name)
        assert shown in text
    assert not {"\u202e", "\u2028"} & set(text)
    for selector in ("#gap svg", "#layers svg", "#spectra svg"):
        browser.run("document.querySelector(arguments[0]).focus()", selector)
        browser.keys(DOWN)
        assert "pt" in browser.run("return document.getElementById('tip').innerText")
    assert browser.run("return window.marker === undefined")
    assert browser.log() == []
    # The policy stops a script that would get into the page all the same.
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'window.marker = 1';"
        " document.body.append(s)"
    )
    assert browser.run("return window.marker === undefined")
    assert "Content Security Policy" in " ".join(m["message"] for m in browser.log())
