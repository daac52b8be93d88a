"""Warm against cold starts along real training runs on scikit-learn's digits.

Along each run every n-th step is measured three times at the same tolerance: cold, as a single
measurement is; warm, from the last measurement's eigenvector; and by a cold run at 1e-4,
which is taken for the truth. A failure is an eigenvalue that is further from the truth than
the stated error. No network is needed.

    python benchmarks/tracking.py --seeds 5
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from sharpkit.tracking import Tracker


class Image(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(1)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        Image(), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(64, 10),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    network: str
    rate: float
    momentum: float
    batch: int | None
    every: int
    steps: int = 400


RUNS = {
    "MLP, batches of 64, every 25": Run("mlp", 0.05, 0.9, 64, 25, 300),
    "MLP, batches of 64, every 5": Run("mlp", 0.05, 0.9, 64, 5, 60),
    "MLP, full batch, every 25": Run("mlp", 0.5, 0.0, None, 25, 300),
    "CNN with BatchNorm and dropout, batches of 64, every 25": Run("cnn", 0.05, 0.9, 64, 25, 300),
}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order] / 16
    return images[:1500], torch.tensor(found.target)[order][:1500]


def measure(run: Run, seed: int, tol: float, examples: int, k: int) -> list[dict[str, float]]:
    x, y = digits()
    loss = nn.functional.cross_entropy
    torch.manual_seed(seed)
    net = {"mlp": mlp, "cnn": cnn}[run.network]().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=run.rate, momentum=run.momentum)
    data = (x[:examples], y[:examples])
    options = {"every": 1, "seed": seed, "eigenvalues": k}
    warm = Tracker(net, loss, data, tolerance=tol, **options)
    cold = Tracker(net, loss, data, tolerance=tol, warm=False, **options)
    truth = Tracker(net, loss, data, tolerance=1e-4, warm=False, **{**options, "seed": seed + 100})
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for step in range(run.steps + 1):
        if step % run.every == 0:
            a, b, c = (t.measure(step) for t in (warm, cold, truth))
            if step:
                names = ["lambda_max", *(f"lambda_{i}" for i in range(2, k + 1))]
                slack = {n: c[f"{n}_error"] for n in names}
                rows.append(
                    {
                        "warm": a["hvps"],
                        "cold": b["hvps"],
                        "warm_seconds": a["seconds"],
                        "cold_seconds": b["seconds"],
                        "warm_failed": any(
                            abs(a[n] - c[n]) > a[f"{n}_error"] + slack[n] for n in names
                        ),
                        "cold_failed": any(
                            abs(b[n] - c[n]) > b[f"{n}_error"] + slack[n] for n in names
                        ),
                        "warm_converged": a["converged"],
                        "cold_converged": b["converged"],
                        "warm_error": abs(a["lambda_max"] - c["lambda_max"]) / abs(c["lambda_max"]),
                    }
                )
        rows_of = slice(None)
        if run.batch is not None:
            rows_of = torch.randperm(len(y), generator=generator)[: run.batch]
        optimizer.zero_grad()
        loss(net(x[rows_of]), y[rows_of]).backward()
        optimizer.step()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tol", type=float, nargs="*", default=[1e-2, 1e-3])
    parser.add_argument("--runs", nargs="*", default=list(RUNS), help="some of the runs")
    parser.add_argument("--eigenvalues", type=int, default=1)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| run | tolerance | HVPs cold | HVPs warm | warm / cold | seconds warm / cold |"
          " failures warm | failures cold | largest true error, warm |")  # fmt: skip
    print("|" + "---|" * 9)
    found = {}
    start = time.perf_counter()
    for name in arguments.runs:
        run = RUNS[name]
        for tol in arguments.tol:
            rows = [
                row
                for seed in range(arguments.seeds)
                for row in measure(run, seed, tol, arguments.examples, arguments.eigenvalues)
            ]
            found[f"{name} {tol:g}"] = rows

            def mean(key: str, rows: list[dict[str, float]] = rows) -> float:
                return statistics.fmean(row[key] for row in rows)

            failures = [
                f"{sum(r[f'{w}_failed'] for r in rows)} of {len(rows)}"
                + ("" if all(r[f"{w}_converged"] for r in rows) else " (not all converged)")
                for w in ("warm", "cold")
            ]
            print(
                f"| {name} | {tol:g} | {mean('cold'):.1f} | {mean('warm'):.1f} |"
                f" {mean('warm') / mean('cold'):.2f} |"
                f" {mean('warm_seconds') / mean('cold_seconds'):.2f} | {failures[0]} |"
                f" {failures[1]} | {max(r['warm_error'] for r in rows):.1e} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(found))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
