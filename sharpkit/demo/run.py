"""The demo: train a zoo, score it, correlate, draw; all of it kept in one folder."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import joblib
import numpy as np
import torch

from sharpkit import plots
from sharpkit.demo import recipe as demo_recipe
from sharpkit.demo.zoo import ModelSpec, digits, specs, train
from sharpkit.errors import SharpkitError
from sharpkit.landscape import filter_normalized, quadratic_model, slice_1d
from sharpkit.objective import Objective
from sharpkit.overview import spectrum as measure_spectrum
from sharpkit.results import format_value
from sharpkit.scoring import MeasureRequest
from sharpkit.study.correlation import correlate
from sharpkit.study.recipe import load_recipe
from sharpkit.study.runner import CheckpointScores, score_checkpoints

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DemoReport", "run_demo"]

Progress = Callable[[str, int, int], None]
T = TypeVar("T")

# One or two of each family, those that cost little: see `sharpkit measures` for the others.
MEASURES: dict[str, dict[str, Any]] = {
    "adam_sharpness": {"method": "ggn"},  # exact; 24 probes would not do
    "adaptive_sharpness_average": {"num_pairs": 30},
    "adaptive_sharpness_worst": {},
    "fisher_rao_norm": {},
    "frobenius_norm": {},
    "gradient_norm": {},
    "hessian_trace": {},
    "margin": {},
    "monge_sharpness": {},
    "monge_sharpness_first_order": {},
    "parameter_norm": {},
    "relative_flatness": {},
    "renyi_sharpness": {},
    "sam_sharpness": {},
    "sam_sharpness_one_step": {},
    "spectral_norms": {},
    "stable_rank": {},
    "top_eigenvalues": {"k": 1, "which": "largest"},
}
SLICE_POINTS = 41
MOST_WORKERS = 8


@dataclass(frozen=True)
class DemoReport:
    """What the demo found and where it wrote it."""

    num_models: int
    table: pd.DataFrame
    taus: pd.DataFrame
    remarks: list[str]
    files: list[Path]
    failures: list[str]


def run_demo(folder: Path, *, quick: bool, seed: int, progress: Progress) -> DemoReport:
    """Train, score, correlate and draw.

    Args:
        folder: Written to: ``checkpoints/``, ``recipe.py``, ``scores.json``, ``scores.csv``,
            ``correlation.csv``, ``spectrum.{png,json}``, ``slice.{png,json}``, ``gap.png``.
        quick: Eight models instead of thirty.
        seed: Of the measurements; each model's training has its own.
        progress: Told what is done, how much of it, and of how much.

    Raises:
        SharpkitError: If the folder cannot be written or scikit-learn is missing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SharpkitError(
            f"Expected a folder that can be written. {folder}: {error.strerror}. Use --output."
        ) from error
    with _one_thread():
        return _run(folder, quick, seed, progress)


@contextmanager
def _one_thread() -> Iterator[None]:
    # The networks are so small that a second thread costs more than it brings.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(folder: Path, quick: bool, seed: int, progress: Progress) -> DemoReport:
    checkpoints = _train(folder / "checkpoints", quick, progress)
    recipe_path = folder / "recipe.py"
    shutil.copyfile(str(demo_recipe.__file__), recipe_path)
    results = _score(checkpoints, recipe_path, seed, progress)
    files = [folder / "scores.json"]
    files[0].write_text(json.dumps([r.to_dict() for r in results], indent=1, allow_nan=False))
    frame = _frame(results)
    files.append(folder / "scores.csv")
    frame.to_csv(files[-1], index=False)
    good = frame[frame["reached_target"]]
    taus = correlate(good, list(MEASURES), gap="gap", group="family", seed=seed)
    files.append(folder / "correlation.csv")
    taus.to_csv(files[-1], index=False)
    progress("figures", 0, 3)
    files.append(_gap_figure(folder, good, taus))
    objective, _ = load_recipe(recipe_path).objective(checkpoints[0])
    files += _spectrum_figure(folder, objective, checkpoints[0].stem, seed)
    progress("figures", 2, 3)
    files += _slice_figure(folder, objective, checkpoints[0].stem, seed)
    progress("figures", 3, 3)
    failures = [f"{r.checkpoint.name}: {r.error}" for r in results if r.failed]
    return DemoReport(
        num_models=len(checkpoints),
        table=_shown(results),
        taus=_shown_taus(taus),
        remarks=_remarks(frame, taus, results),
        files=[*files, recipe_path, folder / "checkpoints"],
        failures=failures,
    )


def _train(folder: Path, quick: bool, progress: Progress) -> list[Path]:
    data, zoo = digits(), specs(quick=quick)
    paths = []
    for spec, path in zip(zoo, _each(_trained, [(s, data, folder) for s in zoo]), strict=True):
        paths.append(path)
        progress(f"training {spec.family}", len(paths), len(zoo))
    return paths


def _trained(spec: ModelSpec, data: Any, folder: Path) -> Path:
    with _one_thread():
        return train(spec, data).save(folder)


def _score(
    checkpoints: list[Path], recipe_path: Path, seed: int, progress: Progress
) -> list[CheckpointScores]:
    results = []
    for found in _each(_scored, [(path, recipe_path, seed) for path in checkpoints]):
        results.append(found)
        progress(f"scored {found.checkpoint.stem}", len(results), len(checkpoints))
    return results


def _scored(path: Path, recipe_path: Path, seed: int) -> CheckpointScores:
    requests: list[MeasureRequest] = list(MEASURES.items())
    with _one_thread():
        return score_checkpoints(
            [path], load_recipe(recipe_path), requests, seed=seed, num_groups=0
        )[0]


def _each(function: Callable[..., T], tasks: list[tuple[Any, ...]]) -> Iterator[T]:
    # In as many processes as there are cores; the results are the same, in the order of the tasks.
    workers = min(os.cpu_count() or 1, MOST_WORKERS, len(tasks))
    if workers == 1:
        yield from (function(*task) for task in tasks)
        return
    with joblib.parallel_config("loky", n_jobs=workers, inner_max_num_threads=1):
        run = joblib.Parallel(return_as="generator", batch_size=1)
        yield from run(joblib.delayed(function)(*task) for task in tasks)


def _frame(results: list[CheckpointScores]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for r in results:
        spec = r.metadata["spec"]
        row = {"checkpoint": r.checkpoint.stem, **spec}
        row |= {k: v for k, v in r.metadata.items() if k not in ("spec", "family")}
        for s in r.scores:
            e = s.estimate
            row[s.measure] = e.value if e else math.nan
            row[f"{s.measure}_error"] = e.probe_error if e else math.nan
            row[f"{s.measure}_converged"] = bool(e and e.converged)
        rows.append(row)
    return pd.DataFrame(rows)


def _shown(results: list[CheckpointScores]) -> pd.DataFrame:
    import pandas as pd

    shown = ["top_eigenvalues", "hessian_trace", "adaptive_sharpness_worst"]
    rows = []
    for r in results:
        row: dict[str, str] = {"model": r.checkpoint.stem, "gap": f"{r.metadata['gap']:.3f}"}
        for name in shown:
            e = r.scores[name].estimate if r.scores else None
            text = "failed"
            if e is not None:
                if e.error_kind == "stderr":
                    text = format_value(e.value, e.probe_error)
                else:
                    text = f"{'>= ' * (e.error_kind == 'lower_bound')}{e.value:.3g}"
                text += "" if e.converged else " (!)"
            short = {"top_eigenvalues": "lambda_max", "hessian_trace": "trace"}
            row[short.get(name, "adaptive")] = text
        rows.append(row)
    return pd.DataFrame(rows)


def _shown_taus(taus: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {
            "measure": taus["measure"],
            "pooled": [
                _interval(t, a, b) for t, a, b in zip(taus.tau, taus.low, taus.high, strict=True)
            ],
            "within family": [
                _interval(t, a, b)
                for t, a, b in zip(taus.tau_within, taus.low_within, taus.high_within, strict=True)
            ],
        }
    )


def _interval(tau: float, low: float, high: float) -> str:
    if not math.isfinite(tau):
        return "-"
    if not math.isfinite(low):
        return f"{tau:+.2f}"
    return f"{tau:+.2f} [{low:+.2f}, {high:+.2f}]"


def _remarks(frame: pd.DataFrame, taus: pd.DataFrame, results: list[CheckpointScores]) -> list[str]:
    reached = int(frame["reached_target"].sum())
    remarks = [
        f"{reached} of {len(frame)} models reached the target train loss; only these are"
        " correlated. Intervals are 95% bootstrap intervals over models."
    ]
    split = [str(m) for m in taus["measure"][taus["disagree"]]]
    if split:
        remarks.append(
            "Pooled and within-family values disagree for " + ", ".join(split) + ": the pooled"
            " ones are then an effect of the architecture."
        )
    loose: dict[str, int] = {}
    for r in results:
        for s in r.scores:
            if s.estimate and not s.estimate.converged:
                loose[s.measure] = loose.get(s.measure, 0) + 1
    for name, count in sorted(loose.items()):
        remarks.append(f"{name}: not converged on {count} of {len(results)} models (!).")
    return remarks


def _gap_figure(folder: Path, frame: pd.DataFrame, taus: pd.DataFrame) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    grid = figure.subplots(2, 3)
    chosen = [
        "top_eigenvalues",
        "hessian_trace",
        "adam_sharpness",
        "sam_sharpness",
        "adaptive_sharpness_worst",
        "adaptive_sharpness_average",
    ]
    rows = taus.set_index("measure")
    for i, (name, axes) in enumerate(zip(chosen, grid.flat, strict=True)):
        plots.tidy(axes)
        title = f"tau {rows.tau[name]:+.2f} pooled, {rows.tau_within[name]:+.2f} within family"
        plots.plot_against_gap(
            frame, name, gap="gap", group="family", error=f"{name}_error", ax=axes, title=title,
            legend=i == 0,
        )  # fmt: skip
        if i % 3:
            axes.set_ylabel("")
    path = folder / "gap.png"
    figure.savefig(path, dpi=160)
    return path


def _spectrum_figure(folder: Path, objective: Objective, name: str, seed: int) -> list[Path]:
    summary = measure_spectrum(objective, k=1, num_steps=40, seed=seed, num_groups=0)
    spectrum = summary.density
    data = folder / "spectrum.json"
    data.write_text(json.dumps({"checkpoint": name, "seed": seed, **spectrum.to_dict()}))
    title = (
        f"{name}, P = {spectrum.dim}\n{len(spectrum.known)} outliers exact, the rest by 4 probes"
        f" x 40 steps, seed {seed}"
    )
    found = {part.label: part.value for part in summary["top_eigenvalues"].parts}
    ends = (found["lambda_-1"], found["lambda_1"])
    axes = plots.plot_spectrum(spectrum, title=title, ends=ends)
    return [plots.save_figure(axes, folder / "spectrum.png"), data]


def _slice_figure(folder: Path, objective: Objective, name: str, seed: int) -> list[Path]:
    x = [float(v) for v in np.linspace(-1, 1, SLICE_POINTS)]
    direction = filter_normalized(objective, seed=seed)
    curve = slice_1d(objective, direction, x, details={"direction": "filter", "seed": seed})
    model = quadratic_model(objective, direction, x)
    data = folder / "slice.json"
    content = {"checkpoint": name, "loss": curve.to_dict(), "quadratic": model.to_dict()}
    data.write_text(json.dumps(content, allow_nan=False))
    title = f"{name}\nrandom filter-normalized direction, seed {seed}"
    axes = plots.plot_slice(curve, quadratic=model, title=title)
    axes.set_xlabel("step, in multiples of the filters' norms")
    return [plots.save_figure(axes, folder / "slice.png"), data]
