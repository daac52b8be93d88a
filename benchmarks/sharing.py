"""What all numbers of the spectrum cost together, beside each alone.

    python benchmarks/sharing.py [--models mlp,cnn,vit,minilm] [--repeats 3]

Trained networks of benchmarks/spectrum.py, one thread, float32, process CPU time, with the
building of the objective and its graphs on the clock. The numbers: five eigenvalues at both
ends, trace, density, Frobenius norm, effective rank, all by default settings.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from trained import CE, RECIPES, Case, load

import sharpkit as sk

ALONE: dict[str, Callable[[sk.Objective], object]] = {
    "top-5, both ends": lambda o: sk.score(o, "top_eigenvalues"),
    "trace": lambda o: sk.score(o, "hessian_trace"),
    "Frobenius norm": lambda o: sk.score(o, "frobenius_norm"),
    "effective rank": lambda o: sk.score(o, "effective_rank"),
    "all, with the density": lambda o: sk.spectrum(o),
}


def run(case: Case, work: Callable[[sk.Objective], object]) -> tuple[float, int]:
    """Return seconds and products."""
    start = time.process_time()
    objective = sk.Objective(case.model, CE, (case.x, case.y))
    work(objective)
    return time.process_time() - start, objective.cost.hvps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(RECIPES))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in options.models.split(","):
        case = load(name)
        seconds: dict[str, list[float]] = {what: [] for what in ALONE}
        products = {}
        for _ in range(options.repeats):  # in turn
            for what, work in ALONE.items():
                spent, products[what] = run(case, work)
                seconds[what].append(spent)
        *single, everything = ALONE
        dearest = max(single, key=lambda what: statistics.median(seconds[what]))
        print(f"\n## {name}")
        for what in ALONE:
            print(f"{what}: {products[what]} products, {statistics.median(seconds[what]):.1f} s")
        ratios = [a / b for a, b in zip(seconds[everything], seconds[dearest], strict=True)]
        print(
            f"all over {dearest}: {statistics.median(ratios):.2f} ({min(ratios):.2f}-"
            f"{max(ratios):.2f}), products {products[everything] / products[dearest]:.2f}"
        )


if __name__ == "__main__":
    main()
