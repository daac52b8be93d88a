"""What perturbed losses and worst cases cost, in forward passes and gradients of the same data.

    python benchmarks/perturbed.py [--repeats N] [--models mlp,cnn]

One thread, float32, process CPU time, 512 examples in batches of 128. In every repeat each
runs once, in turn, with the plain forward pass (inference mode) and the plain gradient
(torch.autograd.grad) over the same batches, nothing of sharpkit, among them; a cost is the
median over repeats of its time over theirs in the same repeat. "ascent" is the ascent alone
for 20 steps by 20 gradients; "measure" is all that ``sam_sharpness`` does, with the gradient
at theta, that of the rounding level and the two forward passes of the data error, by the
same 20. "average" is a pair of draws of ``adaptive_sharpness_average`` by two forward passes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from models import MODELS
from torch import Tensor, nn

import sharpkit as sk
from sharpkit import measures
from sharpkit.estimators import maximize_in_ball

BATCH, BATCHES, STEPS, PAIRS = 128, 4, 20, 5
CE = nn.CrossEntropyLoss()


def data(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    xs = torch.randn(BATCH * BATCHES, *x.shape[1:])
    ys = torch.randint(10, (len(xs),))
    return list(zip(xs.split(BATCH), ys.split(BATCH), strict=True))


def timed(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def costs(name: str, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.eval()
    batches = data(x)
    parameters = list(model.parameters())
    objective = sk.Objective(model, CE, batches)

    def forward() -> None:
        with torch.inference_mode():
            sum(float(CE(model(a), b)) for a, b in batches)

    def gradient() -> None:
        total = [torch.zeros_like(p) for p in parameters]
        for a, b in batches:
            for t, g in zip(total, torch.autograd.grad(CE(model(a), b), parameters), strict=True):
                t += g

    analysis = sk.Analysis(objective)
    delta = 1e-3 * torch.randn_like(analysis.theta)
    value, slope = analysis.value, analysis.gradient

    def ascent() -> None:
        maximize_in_ball(
            analysis.loss_and_gradient_at, start_value=value, start_gradient=slope, rho=0.05,
            norm="l2", steps=STEPS, generator=torch.Generator(),
        )  # fmt: skip

    def measure() -> None:
        measures.get("sam_sharpness")(sk.Analysis(objective))

    def average() -> None:
        settings = {"num_pairs": PAIRS}
        once = sk.Analysis(objective, num_groups=0)
        once._memory.update(analysis._memory)  # the gradient and the rounding level
        measures.get("adaptive_sharpness_average")(once, **settings)

    analysis.noise  # noqa: B018
    runs: dict[str, tuple[Callable[[], None], str, int]] = {
        "perturbed loss": (lambda: analysis.loss_at(delta), "forward", 1),
        "average": (average, "forward", 2 * PAIRS),
        "perturbed gradient": (lambda: analysis.loss_and_gradient_at(delta), "gradient", 1),
        "ascent": (ascent, "gradient", STEPS),
        "measure": (measure, "gradient", STEPS),
    }
    ratios: dict[str, list[float]] = {what: [] for what in runs}
    for repeat in range(repeats + 1):
        plain = {
            "forward": statistics.median(timed(forward) for _ in range(3)),
            "gradient": statistics.median(timed(gradient) for _ in range(3)),
        }
        for what, (run, unit, count) in runs.items():
            ratio = timed(run) / (count * plain[unit])
            if repeat:  # the first warms up
                ratios[what].append(ratio)
    return {what: statistics.median(values) for what, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", default="mlp,cnn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = {name: costs(name, options.repeats) for name in options.models.split(",")}
    print("| | " + " | ".join(table) + " |")
    print("|---" * (len(table) + 1) + "|")
    for what in next(iter(table.values())):
        print(f"| {what} | " + " | ".join(f"{row[what]:.2f}" for row in table.values()) + " |")


if __name__ == "__main__":
    main()
