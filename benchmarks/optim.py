"""What a step of every optimizer costs, in gradients of the same batch.

    python benchmarks/optim.py [--repeats N] [--models mlp,cnn,bert] [--only "NAME;..."]

One thread, float32, process CPU time. The base is SGD with momentum 0.9 and weight decay. A
gradient is ``zero_grad``, forward and backward. In every repeat every optimizer makes one step
(LookSAM one cycle of 5) between two gradients, and its cost is its
time over theirs; the table has medians over the repeats, lowest and highest in brackets.
EigenSAM's two kinds of steps are timed apart and added up for one look in 100. "by hand" is the
loop that most implementations of SAM share, written here: clone, norm of norms, add, restore,
step. Those of pytorch_optimizer, with its defaults, run beside them where it is installed
(``benchmarks/install_peers.sh``); without it each is left out with a line.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from models import MODELS
from torch import Tensor, nn

import sharpkit as sk
from sharpkit import optim
from sharpkit.errors import SettingsError
from sharpkit.geometry.layouts import find_pairs

CE = nn.CrossEntropyLoss()
Step = Callable[[], Any]
SHARDS, LOOK = 8, 5
BASE = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}


def base_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **BASE)


def closure_of(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    def closure() -> Tensor:
        loss = CE(model(x), y)
        loss.backward()
        return loss

    return closure


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    opt, closure = base_of(model), closure_of(model, x, y)

    def step() -> None:
        opt.zero_grad()
        closure()
        opt.step()

    return step


def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    opt, closure, rho = base_of(model), closure_of(model, x, y), 0.05
    parameters = list(model.parameters())

    def step() -> None:
        closure()
        length = torch.stack([p.grad.norm() for p in parameters]).norm()  # type: ignore[union-attr]
        old = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad * (rho / (length + 1e-12)))  # type: ignore[operator]
        opt.zero_grad()
        closure()
        with torch.no_grad():
            for p, value in zip(parameters, old, strict=True):
                p.copy_(value)
        opt.step()
        opt.zero_grad()

    return step


def peer_sam(adaptive: bool = False) -> Callable[..., Step]:
    def build(model: nn.Module, x: Tensor, y: Tensor) -> Step:
        from pytorch_optimizer import SAM  # type: ignore[import-not-found]

        opt = SAM(model.parameters(), torch.optim.SGD, adaptive=adaptive, **BASE)
        closure = closure_of(model, x, y)

        def step() -> None:
            closure()
            opt.first_step(zero_grad=True)
            closure()
            opt.second_step(zero_grad=True)

        return step

    return build


def peer_gsam(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    from pytorch_optimizer import GSAM

    class Fixed:
        def step(self) -> float:
            return 0.05

    opt = GSAM(model.parameters(), base_of(model), model, Fixed())
    opt.set_closure(CE, x, y)
    return opt.step


def peer_wsam(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    from pytorch_optimizer import WSAM

    opt = WSAM(model, model.parameters(), torch.optim.SGD, **BASE)
    closure = closure_of(model, x, y)

    def cleared() -> Tensor:
        opt.zero_grad()
        return closure()  # type: ignore[no-any-return]

    return lambda: opt.step(cleared)


def peer_look(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """By hand: its ``step(closure)`` makes two passes in every step."""
    from pytorch_optimizer import LookSAM

    opt = LookSAM(model.parameters(), torch.optim.SGD, k=LOOK, **BASE)
    closure = closure_of(model, x, y)

    def cycle() -> None:
        for _ in range(LOOK):
            closure()
            if opt.get_step() % LOOK == 0:
                opt.first_step(zero_grad=True)
                closure()
            opt.second_step(zero_grad=True)

    return cycle


def wrapped(make: Callable[..., Any], **settings: Any) -> Callable[..., Step]:
    def build(model: nn.Module, x: Tensor, y: Tensor) -> Step:
        opt = make(base_of(model), model=model, **settings)
        closure = closure_of(model, x, y)
        return lambda: opt.step(closure)

    return build


def micro(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    opt = optim.MicroBatchSAM(base_of(model), num_micro_batches=SHARDS, model=model)
    parts = opt.shards(x, y)
    closures = [closure_of(model, a, b) for a, b in parts]
    return lambda: opt.step(lambda i: closures[i]())


def accumulated(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Gradients of as many micro-batches, added up, and one step of SGD: half of what mSAM does."""
    opt = base_of(model)
    closures = [
        closure_of(model, a, b) for a, b in zip(x.chunk(SHARDS), y.chunk(SHARDS), strict=True)
    ]

    def step() -> None:
        opt.zero_grad()
        for closure in closures:
            closure()
        opt.step()

    return step


def look(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    opt = optim.LookSAM(base_of(model), every=LOOK, model=model)
    closure = closure_of(model, x, y)

    def cycle() -> None:
        for _ in range(LOOK):
            opt.step(closure)

    return cycle


def esam(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    opt = optim.ESAM(base_of(model), model=model)

    def losses(rows: Tensor | None) -> Tensor:
        a, b = (x, y) if rows is None else (x[rows], y[rows])
        return nn.functional.cross_entropy(model(a), b, reduction="none")

    return lambda: opt.step(losses)


def norm_only(model: nn.Module, x: Tensor, y: Tensor) -> Step | None:
    try:
        opt = optim.NormOnlySAM(base_of(model), model=model)
    except SettingsError:
        return None  # no norm layers
    closure = closure_of(model, x, y)
    return lambda: opt.step(closure)


def fisher_sparse(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    opt = optim.FisherSparseSAM(base_of(model), model=model, sparsity=0.5)
    opt._set_mask(torch.rand(sum(p.numel() for p in model.parameters())) < 0.5)
    closure = closure_of(model, x, y)
    return lambda: opt.step(closure)


def geodesic(model: nn.Module, x: Tensor, y: Tensor) -> Step | None:
    model.eval()
    pairs = find_pairs(sk.Objective(model, CE, (x[:4], y[:4]))).pairs
    model.train()
    if not pairs:
        return None
    return wrapped(optim.GeodesicSAM, pairs=pairs)(model, x, y)


def saf(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    opt, term = base_of(model), optim.SAFLoss(10 * len(x), 10, epochs_back=1, start_epoch=1)
    rows = torch.randperm(10 * len(x))[: len(x)]
    with torch.no_grad():
        term(model(x), rows)
    term.set_epoch(1)

    def step() -> None:
        opt.zero_grad()
        z = model(x)
        (CE(z, y) + term(z, rows)).backward()
        opt.step()

    return step


def mesa(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    opt, term = base_of(model), optim.MESALoss(model, start_epoch=0)

    def step() -> None:
        opt.zero_grad()
        z = model(x)
        (CE(z, y) + term(z, x)).backward()
        opt.step()
        term.update()

    return step


METHODS: dict[str, tuple[Callable[..., Step | None], int]] = {
    "SGD": (plain, 1),
    "SGD, 8 micro-batches": (accumulated, 1),
    "SAM by hand": (by_hand, 1),
    "SAM": (wrapped(optim.SAM), 1),
    "ASAM": (wrapped(optim.ASAM), 1),
    "FisherSAM": (wrapped(optim.FisherSAM), 1),
    "MongeSAM": (wrapped(optim.MongeSAM), 1),
    "MicroBatchSAM, 8": (micro, 1),
    "NormOnlySAM": (norm_only, 1),
    "LookSAM, every 5": (look, LOOK),
    "GSAM": (wrapped(optim.GSAM), 1),
    "WSAM": (wrapped(optim.WSAM), 1),
    "FriendlySAM": (wrapped(optim.FriendlySAM), 1),
    "MomentumSAM": (wrapped(optim.MomentumSAM), 1),
    "ESAM": (esam, 1),
    "FisherSparseSAM, mask known": (fisher_sparse, 1),
    "RSAM": (wrapped(optim.RSAM), 1),
    "EigenSAM, other steps": (wrapped(optim.EigenSAM, every=10**9), 1),
    "EigenSAM, looking": (wrapped(optim.EigenSAM, every=1), 1),
    "GeodesicSAM": (geodesic, 1),
    "SAFLoss": (saf, 1),
    "MESALoss": (mesa, 1),
    "pytorch_optimizer: SAM": (peer_sam(), 1),
    "pytorch_optimizer: adaptive SAM": (peer_sam(adaptive=True), 1),
    "pytorch_optimizer: LookSAM, every 5": (peer_look, LOOK),
    "pytorch_optimizer: GSAM": (peer_gsam, 1),
    "pytorch_optimizer: WSAM": (peer_wsam, 1),
}


def timed(run: Step) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def costs(name: str, repeats: int, methods: list[str]) -> dict[str, list[float]]:
    """The ratios of every repeat, by method."""
    torch.manual_seed(0)
    _, x = MODELS[name]()
    y = torch.randint(10, (len(x),))
    steps: dict[str, Step] = {}
    for method in methods:
        torch.manual_seed(1)
        model = MODELS[name]()[0].train()
        try:
            built = METHODS[method][0](model, x, y)
        except ImportError as missing:
            print(f"{method} is left out: {missing}", file=sys.stderr)
            continue
        if built is not None:
            steps[method] = built
    own = MODELS[name]()[0].train()
    closure = closure_of(own, x, y)

    def gradient() -> None:
        own.zero_grad()
        closure()

    ratios: dict[str, list[float]] = {method: [] for method in steps}
    for repeat in range(repeats + 2):
        for method, step in steps.items():
            count = METHODS[method][1]
            before = timed(gradient)
            taken = timed(step)
            after = timed(gradient)
            if repeat > 1:  # the first two warm up
                ratios[method].append(2 * taken / (count * (before + after)))
    looking, other = ratios.get("EigenSAM, looking"), ratios.get("EigenSAM, other steps")
    if looking and other:
        pairs = zip(looking, other, strict=True)
        ratios["EigenSAM, one look in 100"] = [(a + 99 * b) / 100 for a, b in pairs]
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--models", default="mlp,cnn,bert")
    parser.add_argument("--only", default=";".join(METHODS), help="separated by semicolons")
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods = options.only.split(";")
    table = {name: costs(name, options.repeats, methods) for name in options.models.split(",")}
    print("| | " + " | ".join(table) + " |")
    print("|---" * (len(table) + 1) + "|")
    rows = dict.fromkeys(method for column in table.values() for method in column)
    for method in rows:
        cells = []
        for column in table.values():
            values = column.get(method)
            cells.append(
                "-"
                if not values
                else f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
            )
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
