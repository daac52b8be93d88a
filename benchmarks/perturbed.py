"""What perturbed losses and worst cases cost, in forward passes and gradients of the same data.

    python benchmarks/perturbed.py [--repeats N] [--models mlp,cnn]

One thread, float32, process CPU time, 1024 examples in batches of 512 for the MLP, 256 in
batches of 64 for the others. In every repeat each is timed between as many plain forward
passes (inference mode) or gradients (torch.autograd.grad) over the same batches, nothing of
sharpkit; a cost is the median over repeats of its time over theirs. "ascent" is the ascent
alone for 20 steps by 20 gradients; "worst case" is ``sam_sharpness`` where the gradient at
theta and the rounding level, which measures share, are known already: the ascent and the two
forward passes of the data error, by 20 gradients; "alone" computes those two as well.
"average" is the mean cost of a draw of ``adaptive_sharpness_average``, by a forward pass.
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

EXAMPLES, STEPS, PAIRS = {"mlp": 1024}, 20, 2
OTHERS = 256  # examples of the other models, whose passes are longer
CE = nn.CrossEntropyLoss()


def data(name: str, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    xs = torch.randn(EXAMPLES.get(name, OTHERS), *x.shape[1:])
    ys = torch.randint(10, (len(xs),))
    return list(zip(xs.split(len(x)), ys.split(len(x)), strict=True))


def timed(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def costs(name: str, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.eval()
    batches = data(name, x)
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

    def worst_case() -> None:
        measures.get("sam_sharpness")(analysis)

    def alone() -> None:
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
        "worst case": (worst_case, "gradient", STEPS),
        "worst case alone": (alone, "gradient", STEPS),
    }
    ratios: dict[str, list[float]] = {what: [] for what in runs}
    plain = {"forward": forward, "gradient": gradient}
    for repeat in range(repeats + 1):
        for what, (run, unit, count) in runs.items():
            # Plain passes before and after: the machine changes speed.
            around = max(count // 2, 1)
            times = [timed(plain[unit]) for _ in range(around)]
            taken = timed(run)
            times += [timed(plain[unit]) for _ in range(around)]
            if repeat:  # the first warms up
                ratios[what].append(taken / (count * statistics.fmean(times)))
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
