"""Train 66 models on Fashion-MNIST, score them with every measure, and correlate with the gap.

    python examples/zoo_fashion_mnist.py [--folder zoo-fashion] [-o docs/zoo-fashion.md]

The data are downloaded as Debian's package (see fashion_networks.py for other ways). Models
and scores are kept in the folder: after an interrupt, or a kill, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from sharpkit import plots
from sharpkit.study.correlation import StudyCorrelation, correlate_study, null_deviation
from sharpkit.study.run import Progress, run_study
from sharpkit.study.store import Store
from sharpkit.study.tables import scores_table

sys.path.insert(0, str(Path(__file__).parent))
import fashion_networks as zoo

RECIPE = Path(zoo.__file__)
AXES = ("width", "depth", "optimizer", "lr", "batch_size", "weight_decay")
PANELS = ("top_eigenvalues", "hessian_trace", "sam_sharpness", "adaptive_sharpness_worst",
          "renyi_sharpness", "parameter_norm")  # fmt: skip
QUICK = ("top_eigenvalues", "gradient_norm", "parameter_norm", "sam_sharpness")


def _train(spec: zoo.Spec, data: Path, path: Path) -> float:
    torch.set_num_threads(1)
    started = time.process_time()
    held = zoo.train(spec, data)
    torch.save(held, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    return time.process_time() - started


def train(folder: Path, specs: Sequence[zoo.Spec], workers: int) -> list[Path]:
    """Train what is missing, and return all checkpoints."""
    data = zoo.fetch(folder / "data")
    (folder / "models").mkdir(parents=True, exist_ok=True)
    paths = [folder / "models" / f"{spec.name}.pt" for spec in specs]
    missing = [(s, p) for s, p in zip(specs, paths, strict=True) if not p.exists()]
    if missing:
        run = joblib.Parallel(workers, return_as="generator")
        spent = run(joblib.delayed(_train)(s, data, p) for s, p in missing)
        for (spec, _), seconds in zip(missing, spent, strict=True):
            print(f"{spec.name}: {seconds:.1f} s", flush=True)
    return paths


def score(folder: Path, paths: Sequence[Path], workers: int, quick: bool) -> pd.DataFrame:
    """Score what is missing, and return the long table."""
    told = 0.0

    def progress(at: Progress) -> None:
        nonlocal told
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(f"{at.checkpoints}/{len(paths)} models, {at.done}/{at.total} scores", flush=True)

    os.environ["SHARPKIT_ZOO"] = str(folder.resolve())
    study = folder / "study.db"
    run_study(study, paths, RECIPE, QUICK if quick else None, workers=workers, progress=progress)
    with Store(study, read_only=True) as store:
        table = scores_table(store)
    names = {p.name for p in paths}
    return table[[Path(c).name in names for c in table["checkpoint"]]]


def interval(row: pd.Series, ending: str = "") -> str:
    """Return a correlation with its interval, and an asterisk if it is told from 0."""
    value, low, high = (row[f"{n}{ending}"] for n in ("tau", "low", "high"))
    if not np.isfinite(low):
        return f"{value:+.2f}"
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]" + ("\\*" if told(row, ending) else "")


def told(row: pd.Series, ending: str = "") -> bool:
    """Return whether a correlation is told from 0, also by the exact values of the measure."""
    within = row[f"low{ending}"] <= 0 <= row[f"high{ending}"]
    return bool(row[f"p{ending}_adjusted"] < 0.05 and not within)


def draw(table: pd.DataFrame, found: StudyCorrelation, page: Path) -> Path:
    """Draw sharpness against gap for some measures, one colour a family."""
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    axes = figure.subplots(2, 3)
    rows = found.frame.set_index("measure")
    models = table.drop_duplicates("checkpoint").set_index("checkpoint")
    panels = [p for p in PANELS if p in rows.index]
    for i, (name, ax) in enumerate(zip(panels, axes.flat, strict=False)):
        mine = table[table["label"] == name].set_index("checkpoint")
        frame = pd.DataFrame(
            {
                name: mine["value"],
                "error": mine["probe_error"],
                "gap": models["meta.gap"],
                "family": models["meta.family"],
            }
        )
        frame = frame[models["meta.reached_target"].astype(bool)]
        plots.tidy(ax)
        title = f"tau {rows.tau[name]:+.2f} pooled, {rows.tau_within[name]:+.2f} within family"
        plots.plot_against_gap(
            frame, name, gap="gap", group="family", error="error", ax=ax, title=title, legend=i == 0
        )
        if i % 3:
            ax.set_ylabel("")
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_axis_off()
    path = page.with_name(f"{page.stem}-gap.png")
    figure.savefig(path, dpi=160)
    return path


def write(table: pd.DataFrame, found: StudyCorrelation, page: Path, figure: Path) -> None:
    """Write the page."""
    models = table.drop_duplicates("checkpoint")
    good = models[models["meta.reached_target"].astype(bool)]
    facts = good.groupby("meta.family").agg(
        models=("checkpoint", "size"),
        low=("meta.gap", "min"),
        high=("meta.gap", "max"),
        worst=("meta.test_accuracy", "min"),
        best=("meta.test_accuracy", "max"),
    )
    frame = found.frame.sort_values("tau_within", key=abs, ascending=False)
    counts = {e: sum(told(row, e) for _, row in frame.iterrows()) for e in ("", "_within")}
    lines = [
        f"# Sharpness and the generalization gap on Fashion-MNIST: {len(models)} models",
        "",
        "    python examples/zoo_fashion_mnist.py",
        "",
        f"{len(models)} models (MLP, CNN, vision transformer) on the first {zoo.NUM_TRAIN} training"
        " images, averaged to 16x16 pixels; in each family a base setting, settings that differ"
        " from it in one thing (width, depth, learning rate, batch size, weight decay, optimizer:"
        " SGD with momentum, Adam, SAM, micro-batch SAM), and for MLP and CNN three that differ in"
        f" two; two seeds each. Training stops at a train loss of {zoo.TARGET_LOSS} (at most"
        f" {zoo.MAX_EPOCHS} epochs). The gap is the cross-entropy on the 10,000 test images minus"
        " that on the training images. Every measure that is not dear, with its default settings,"
        " on all training images, in float32, seed 0.",
        "",
        f"**Filter.** {found.filter}",
        "",
        "| family | models | gap | test accuracy |",
        "|---|---|---|---|",
        *(
            f"| {family} | {r.models:.0f} | {r.low:.2f} to {r.high:.2f} |"
            f" {r.worst:.3f} to {r.best:.3f} |"
            for family, r in facts.iterrows()
        ),
        "",
        f"![Sharpness against gap]({figure.name})",
        "",
        "Kendall's tau with the gap: pooled, and within families; 95% intervals by bootstrap over"
        " settings (the seeds of one setting stay together), for the exact values where a measure"
        " has an error; an asterisk: p < 0.05 after Holm's correction for the number of measures,"
        " and 0 outside the interval (p speaks of the values as measured, the interval of the exact"
        " ones)."
        " psi: granulated tau, the mean over the axes of the tau of models that differ along it."
        " Robust sign-error: the worst axis's share of wrongly ordered pairs; 0.5 is a coin.",
        "",
        "| measure | n | pooled | within family | psi | robust sign-error |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r.measure} | {r.n} | {interval(r)} | {interval(r, '_within')} | {r.psi:+.2f} |"
            f" {r.robust_sign_error:.2f} ({r.worst_environment}) |"
            for _, r in frame.iterrows()
        ),
        "",
        "## What this says",
        "",
        f"- Within families {counts['_within']} of {len(frame)} measures are told from 0 after the"
        f" correction; {counts['']} are when the families are pooled. A pooled tau"
        " may come from the families alone: a family that is sharper and has the larger gap.",
        f"- With {len(good)} independent models tau scatters by {null_deviation(len(good)):.2f} if"
        " there is nothing; seeds of one setting are not independent, so by more here.",
        "- The models are few, of one data set with few training images, and all of one train loss;"
        " nothing follows for large networks.",
        "",
        "## Warnings of the analysis",
        "",
        *(f"- {w}" for w in found.warnings),
        "",
    ]
    page.write_text("\n".join(lines))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/zoo-fashion.md"))
    parser.add_argument("--folder", type=Path, default=Path("zoo-fashion"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="8 models and 4 measures")
    given = parser.parse_args(argv)
    specs = zoo.specs(quick=given.quick)
    paths = train(given.folder, specs, given.workers)
    table = score(given.folder, paths, given.workers, given.quick)
    found = correlate_study(
        table, gap="gap", group="family", cluster="setting", axes=AXES, num_test=10_000
    )
    write(table, found, given.output, draw(table, found, given.output))
    print(f"{given.output} written")


if __name__ == "__main__":
    main()
