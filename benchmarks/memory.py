"""Peak memory of the spectrum's numbers on a large network, beside what is accounted for.

    python benchmarks/memory.py [--millions 100] [--max-basis 16]

Random weights, float32, one thread. The peak is the process's largest resident set, the
account is what the process holds after the first product (the model, the objective's copy of
its parameters, kept graphs), and (max_basis + 8) vectors of P numbers.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import torch
from torch import nn

import sharpkit as sk

COLUMNS = 8


def network(millions: float) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a network of about so many million parameters, with sixteen examples."""
    torch.manual_seed(0)
    width = int((millions * 1e6 / 6) ** 0.5)
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10)).eval()
    for p in model.parameters():  # gain 2: a loss with curvature
        if p.ndim == 2:
            nn.init.normal_(p, std=(2 / p.shape[1]) ** 0.5)
    return model, torch.randn(16, width), torch.randint(10, (16,))


def peak() -> float:
    """Return the largest resident set so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def held() -> float:
    """Return the present resident set, in GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--max-basis", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = peak()
    model, x, y = network(options.millions)
    vector = sum(p.numel() for p in model.parameters()) * 4 / 2**30
    loaded = peak()
    objective = sk.Objective(model, nn.CrossEntropyLoss(), [(x, y)])
    objective.hvp(torch.randn(objective.space.dim))
    ready, trial = held(), peak()
    print(f"{objective.space.dim:,} parameters: a vector is {vector:.2f} GB")
    print(
        f"peak: {base:.2f} GB imports, {loaded:.2f} with the model, {trial:.2f} in the trial of"
        " products"
    )
    print(f"held: {ready:.2f} GB after the first product")
    requests = [
        "top_eigenvalues:k=1,which=largest",
        "hessian_trace",
        "renyi_sharpness:spectrum=signed",
    ]
    account = ready + (options.max_basis + COLUMNS) * vector
    start = time.perf_counter()
    for score in sk.score(
        objective,
        requests,
        max_basis=options.max_basis,
        num_groups=0,
        on_score=lambda s: print(
            f"{s.measure}: {s.estimate}, {time.perf_counter() - start:.0f} s, peak {peak():.2f} GB",
            flush=True,
        ),
    ):
        assert score.error is None, score.error
    print(f"peak {peak():.2f} GB; accounted for {account:.2f} GB")


if __name__ == "__main__":
    main()
