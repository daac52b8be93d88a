"""What a large study costs to show: 100,000 rows are opened, filtered and reported.

    python benchmarks/report.py [--models 2500] [--measures 40] [--browser]

The store is synthetic: real settings and documents of the size that real scores have, values
drawn at random. Times are wall clock, in seconds. With --browser the page is opened in
headless Chromium (Debian: chromium, chromium-driver), sorted and filtered there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sharpkit import measures
from sharpkit.results import Cost, Estimate, Part, Score
from sharpkit.study.identity import Options, settings_text
from sharpkit.study.report import collect, write_page
from sharpkit.study.store import Store
from sharpkit.study.tables import scores_table

FAMILIES = ("resnet", "vit", "mlp", "mixer")
LAYERED = ("relative_flatness", "spectral_norms")
LAYERS = 12


@contextlib.contextmanager
def timed(name: str, times: dict[str, float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    times[name] = time.perf_counter() - started


def make(path: Path, num_models: int, num_measures: int) -> None:
    """Write a study of so many models and measures in one transaction."""
    rng = np.random.default_rng(0)
    names = measures.names()[:num_measures]
    settings = {n: dict(measures.get(n).settings) for n in names}
    texts = {n: settings_text(settings[n]) for n in names}
    options = Options().text()
    Store(path).close()
    entries, subjects, scores = [], [], []
    for i in range(num_models):
        key, family = f"{i:032x}", FAMILIES[i % len(FAMILIES)]
        metadata = {"gap": float(rng.normal()), "family": family, "width": int(rng.integers(9))}
        file = f"runs/{family}/width{metadata['width']}/seed{i}.safetensors"
        origin = {
            "checkpoint": file, "loss": float(rng.random()), "num_parameters": 10**6,
            "theta_sha256": key * 2, "data_fingerprint": "d" * 64, "dtype": "float32",
            "device": "cpu", "sharpkit": "0.1.0", "torch": "2.13.0", "python": "3.11.2",
        }  # fmt: skip
        entries.append(
            (file, "recipe.py", options, 0, key, json.dumps(metadata), None, "[]", "all", 0.0)
        )
        subjects.append((key, key, "r" * 64, "d" * 64, "", options, "0.1.0", "{}", 0.0))
        for name in names:
            value = float(np.exp(rng.normal() + 0.3 * metadata["gap"]))
            done = bool(rng.random() > 0.02)
            count = 10 if name == "top_eigenvalues" else LAYERS if name in LAYERED else 0
            label = "lambda_{}" if name == "top_eigenvalues" else "layers.{}.weight"
            parts = tuple(Part(label.format(k + 1), value / (k + 1), 0.01) for k in range(count))
            notes = () if done else ("The largest eigenvalue did not converge.",)
            e = Estimate(
                value, 0.01 * value, "stderr", 0.1 * value, done, Cost(30, 2, 1, 0.5), parts,
                {"num_probes": 24, "num_steps": 40, "locked_share": 0.5}, notes, 23.0,
            )  # fmt: skip
            score = Score(name, e, settings[name], 0, origin)
            scores.append(
                (
                    key, name, texts[name], 0, e.value, e.probe_error, e.error_kind, e.data_error,
                    e.dof, int(done), 30, 2, 1, 0.5, None,
                    json.dumps(score.to_dict(), sort_keys=True), float(i),
                )
            )  # fmt: skip
    with contextlib.closing(sqlite3.connect(path)) as c, c:
        for table, rows in (("entry", entries), ("subject", subjects), ("score", scores)):
            c.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(rows[0]))})", rows)


def in_browser(page: Path, times: dict[str, float]) -> None:
    """Open the page, sort by value, and filter by text and measure."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from browser import Browser, missing

    if missing():
        print(f"no browser: {missing()}")
        return
    click = "document.querySelectorAll('#scores thead button')[{}].click();"
    filtered = (
        "const box = document.querySelector('#table input[type=search]'); box.value = 'vit';"
        " box.dispatchEvent(new Event('input'));"
    )
    timing = "const t = performance.now(); {} document.body.offsetHeight;"
    with Browser() as browser:
        browser.size(1200, 900)
        with timed("page opened in Chromium", times):
            browser.open(page)
        for name, script in (("sorted by value", click.format(3)), ("by name", click.format(0))):
            times[f"  {name}"] = (
                browser.run(timing.format(script) + " return performance.now() - t") / 1e3
            )
        with timed("  filtered by text (waits 0.12 s for more keys)", times):
            browser.run(filtered)
            while "filtered" not in browser.run(
                "return document.querySelector('#table .pager').textContent"
            ):
                time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=2500)
    parser.add_argument("--measures", type=int, default=40)
    parser.add_argument("--browser", action="store_true")
    parser.add_argument("--keep", type=Path, help="Folder for the study and the page.")
    given = parser.parse_args()
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        study, page = folder / "study.db", folder / "report.html"
        study.unlink(missing_ok=True)
        with timed("made (not of the study's cost)", times):
            make(study, given.models, given.measures)
        with timed("opened and looked through for damage", times):
            store = Store(study, read_only=True)
        with contextlib.closing(store):
            with timed("filtered: one measure", times):
                some = scores_table(store, measure="hessian_trace")
            with timed("filtered: one checkpoint", times):
                scores_table(store, checkpoint=str(some["checkpoint"].iloc[0]))
            with timed("report: collected", times):
                data = collect(store, group="family")
        with timed("report: page written", times):
            write_page(data, page)
        total = sum(t for n, t in times.items() if not n.startswith("made"))
        if given.browser:
            in_browser(page, times)
        sizes = [f.stat().st_size / 2**20 for f in (study, page)]
        print(f"{len(data.rows)} rows, study {sizes[0]:.0f} MiB, page {sizes[1]:.1f} MiB")
    for name, seconds in times.items():
        print(f"{name:48s} {seconds:7.2f}")
    print(f"{'opened, filtered and reported':48s} {total:7.2f}")


if __name__ == "__main__":
    main()
