"""What a point of a 51 x 51 slice costs, in forward passes of the same data.

    python benchmarks/landscape.py [--models mlp,cnn,vit] [--repeats N]

One thread, float32, process CPU time, networks trained on digits, their examples as one batch. A
forward pass is the model and the loss under ``torch.no_grad``. Each repeat times, one after the
other, forward passes, sharpkit's grid (with the loss alone, and with accuracy and errors too), its
grid with ``refine=0.02``, and the peers where they are installed: loss-landscapes' ``random_plane``
and landscaper's ``compute_loss_landscape``, both on 15 x 15 points. The table has medians, lowest
and highest in brackets. The miss of interpolation is that against the whole grid.

landscaper wants an older numpy, so the peers go into an environment of their own:

    python -m venv peers && . peers/bin/activate
    pip install -c constraints.txt -e ".[demo]" landscaper loss-landscapes
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from trained import Case, load

import sharpkit as sk
from sharpkit.landscape import Slice, Status, StraightSection, compute_slice, random_direction

CE = nn.CrossEntropyLoss()
RANGE, FEW = "-1:1:51", 15


def timed(work: Callable[[], object], points: int) -> float:
    start = time.process_time()
    work()
    return (time.process_time() - start) / points


def forwards(case: Case, count: int) -> None:
    with torch.no_grad():
        for _ in range(count):
            CE(case.model(case.x), case.y).item()


def loss_landscapes(case: Case) -> Callable[[], object] | None:
    try:
        from loss_landscapes import random_plane
        from loss_landscapes.metrics import Loss
    except ImportError:
        return None
    metric = Loss(CE, case.x, case.y)

    def work() -> object:
        return random_plane(case.model, metric, 1, FEW, "filter", deepcopy_model=True)

    return work


def landscaper(case: Case) -> Callable[[], object] | None:
    try:
        from landscaper.compute import compute_loss_landscape
    except ImportError:
        return None
    shapes = [p.shape for p in case.model.parameters()]
    directions = [[torch.randn(s) for s in shapes] for _ in range(2)]

    def loss(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> float:
        return CE(model(data[0]), data[1]).item()

    def work() -> object:
        return compute_loss_landscape(
            case.model, (case.x, case.y), directions, loss, FEW, 0.5, 2, "cpu"
        )

    return work


def picture(whole: Slice, few: Slice) -> str:
    between = few.status == Status.INTERPOLATED
    miss = np.abs(few.loss - whole.loss) / whole.loss
    checked = few.details["max_check_error"]["loss"]
    return (
        f"{(few.status == Status.MEASURED).mean():.0%} of the points measured; largest miss"
        f" {np.nanmax(np.where(between, miss, 0)):.1%} of the loss,"
        f" {np.nanmax(np.where(between, np.abs(few.loss - whole.loss), 0)):.2g} of a range of"
        f" {np.ptp(whole.loss):.3g}; at held-out points {checked:.2g}"
    )


def run(name: str, repeats: int) -> None:
    case = load(name)
    objective = sk.Objective(case.model, CE, (case.x, case.y))
    directions = [random_direction(objective, seed=s) for s in (0, 1)]
    section = StraightSection(objective.theta, directions)
    size, few = 51 * 51, FEW * FEW
    held: dict[str, Slice] = {}

    def grid(key: str, **options: object) -> Callable[[], None]:
        def work() -> None:
            held[key] = compute_slice(section, objective, RANGE, RANGE, **options)  # type: ignore[arg-type]

        return work

    rows: dict[str, tuple[Callable[[], object] | None, int]] = {
        "loss": (grid("whole", num_groups=1), size),
        "loss, accuracy, errors": (grid("all", metrics=["accuracy"]), size),
        "refine=0.02, loss": (grid("few", refine=0.02), size),
        "loss-landscapes": (loss_landscapes(case), few),
        "landscaper": (landscaper(case), few),
    }
    found: dict[str, list[float]] = {key: [] for key in rows}
    unit = []
    forwards(case, 20)
    for _ in range(repeats):
        one = timed(lambda: forwards(case, few), few)
        for key, (work, points) in rows.items():
            if work is not None:
                found[key].append(timed(work, points))
        one = (one + timed(lambda: forwards(case, few), few)) / 2
        unit.append(one)
        for key in found:
            if found[key]:
                found[key][-1] /= one
    print(f"\n{name}: {case.dim} parameters, {len(case.y)} examples,"
          f" a forward pass {1e3 * statistics.median(unit):.2f} ms")  # fmt: skip
    for key, ratios in found.items():
        if not ratios:
            print(f"| {key} | not installed |")
            continue
        middle = statistics.median(ratios)
        print(f"| {key} | {middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |")
    print(picture(held["whole"], held["few"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", default="mlp,cnn,vit")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.models.split(","):
        run(name, given.repeats)


if __name__ == "__main__":
    main()
