"""What the machinery of studies costs, and what a second worker brings.

    python benchmarks/study.py [--checkpoints 50] [--repeats 3]

Small networks on scikit-learn's digits (the demo's MLP of width 32, untrained, 900 images), each
scored with the default measures into a fresh study. Outside measures: the share of the run's wall
clock that is not spent in measures (loading, hashing, claims, writing, the forecast not counted).
Runs with one and with two workers are interleaved; starting processes is counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from sharpkit.demo.zoo import ModelSpec, build
from sharpkit.study import run_study

RECIPE = """
from torch import nn, split
from sharpkit.demo.zoo import ModelSpec, build, digits

loss = nn.CrossEntropyLoss()


def model():
    return build(ModelSpec("mlp", 32, 1, lr=0.0, batch_size=0, weight_decay=0.0, seed=0))


def data():
    images = digits()
    x, y = images.train_images, images.train_labels
    return list(zip(split(x, 300), split(y, 300), strict=True))
"""


def make(folder: Path, count: int) -> list[Path]:
    """Write so many checkpoints and the recipe."""
    (folder / "recipe.py").write_text(RECIPE)
    paths = []
    for seed in range(count):
        torch.manual_seed(seed)
        spec = ModelSpec("mlp", 32, 1, lr=0.0, batch_size=0, weight_decay=0.0, seed=seed)
        paths.append(folder / f"net{seed}.pt")
        torch.save(build(spec).state_dict(), paths[-1])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    outside, again = [], []
    for repeat in range(given.repeats):
        for workers in (1, 2):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                files = make(folder, given.checkpoints)
                study, recipe = folder / "study.db", folder / "recipe.py"
                report = run_study(study, files, recipe, workers=workers)
                assert not report.failed
                seconds[workers].append(report.seconds)
                if workers == 1:
                    inside = sum(o.measuring for o in report.outcomes)
                    outside.append(1 - inside / report.seconds)
                    started = time.perf_counter()
                    assert run_study(study, files, recipe).measured == 0
                    again.append(time.perf_counter() - started)
        pairs = zip(seconds[1], seconds[2], strict=True)
        ratios = [one / two for one, two in pairs]
        print(
            f"{repeat + 1} of {given.repeats}: {report.measured} scores; 1 worker"
            f" {statistics.median(seconds[1]):.1f} s, {statistics.median(outside):.1%} outside"
            f" measures; 2 workers {statistics.median(ratios):.2f} times as fast; nothing to do"
            f" {statistics.median(again):.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
