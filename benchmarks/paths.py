"""Barriers between two trainings: straight, after alignment, along trained curves.

    python benchmarks/paths.py [--networks mlp,cnn,bn,transformer] [--pairs N]

scikit-learn's digits (1200 to train on, 597 others), pairs of seeds, SGD with momentum 0.9 and a
cosine schedule, batches of 60, no weight decay. For each way: the mean barrier over the pairs and
its standard error, in the loss, the loss on the other data and their error rate.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sharpkit as sk
from sharpkit.landscape.paths import SegmentPath, align, barrier, connect
from sharpkit.objective.states import state_of, with_state

CE = nn.CrossEntropyLoss()
ALIGNED = (("permutation",), ("permutation", "scale"))
WITH_GL = (("permutation",), ("gl",), ("permutation", "gl"), ("permutation", "scale", "gl"))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    X, y = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(X, dtype=torch.float32) / 16, torch.tensor(y)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return inputs[train], labels[train], inputs[test], labels[test]


class Images(nn.Module):
    def __init__(self, norm: bool, width: int = 24):
        super().__init__()

        def layer(before: int, after: int) -> list[nn.Module]:
            conv = nn.Conv2d(before, after, 3, padding=1, bias=not norm)
            between = [nn.BatchNorm2d(after)] if norm else []
            return [conv, *between, nn.ReLU(), nn.MaxPool2d(2)]

        self.body = nn.Sequential(*layer(1, width), *layer(width, 2 * width))
        self.out = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x.view(-1, 1, 8, 8)).flatten(1))


class Rows(nn.Module):
    """A transformer block that reads an image as eight rows."""

    def __init__(self, d: int = 32):
        super().__init__()
        self.embed, self.places = nn.Linear(8, d), nn.Parameter(0.1 * torch.randn(8, d))
        settings = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layer = nn.TransformerEncoderLayer(d, 4, 64, **settings)
        self.norm, self.out = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.embed(x.view(-1, 8, 8)) + self.places)
        return self.out(self.norm(x).mean(1))


def mlp() -> nn.Module:
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(*layers)


# How it is built, epochs, learning rate (of the curve too).
NETWORKS = {
    "mlp": (mlp, 60, 0.1),
    "cnn": (lambda: Images(norm=False), 15, 0.03),
    "bn": (lambda: Images(norm=True), 15, 0.03),
    "transformer": (Rows, 40, 0.03),
}


def trained(name: str, seed: int, X: Tensor, y: Tensor) -> nn.Module:
    build, epochs, lr = NETWORKS[name]
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(X), generator=generator).split(60):
            optimizer.zero_grad()
            CE(model(X[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def estimated_on(X: Tensor):
    """Return what estimates running statistics anew, on all of some data at once."""

    def anew(objective: sk.Objective) -> sk.Objective:
        model, state = copy.deepcopy(objective.model), state_of(objective)
        model.load_state_dict({n: state[n].to(t.dtype) for n, t in model.state_dict().items()})
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        with torch.no_grad():
            model.train()(X)
        found = {n: b.double() for n, b in model.named_buffers() if b.is_floating_point()}
        return with_state(objective, {**state, **found})

    return anew


def measure(name: str, pairs: int) -> None:
    X, y, other, labels = digits()
    lr = NETWORKS[name][2]
    rows: dict[str, list[list[float]]] = defaultdict(list)
    statistics = estimated_on(X) if name == "bn" else "refuse"
    for pair in range(pairs):
        a, b = (
            sk.Objective(
                trained(name, s, X, y), CE, list(zip(X.split(60), y.split(60), strict=True))
            )
            for s in (2 * pair, 2 * pair + 1)
        )
        test = sk.Objective(a.model, CE, list(zip(other.split(60), labels.split(60), strict=True)))

        def note(way, path, a=a, test=test):
            found = barrier(a, path, 13, ("loss", "error"), test=test, statistics=statistics)
            names = ("loss", "test/loss", "test/error")
            rows[way].append([found[n].barrier for n in names])

        note("segment", SegmentPath(a.theta, b.theta))
        for how in WITH_GL if name == "transformer" else ALIGNED:
            aligned = align(a, b, how)
            note("+".join(how), SegmentPath(a.theta, aligned.theta))
        if name == "bn":
            continue
        for kind in ("bezier", "polychain"):
            curve = connect(a, a.theta, b.theta, kind=kind, epochs=40, lr=lr)
            note(kind, curve.path)
        note("aligned, bezier", connect(a, a.theta, aligned.theta, epochs=40, lr=lr).path)
    for way, found in rows.items():
        mean, error = np.mean(found, 0), np.std(found, 0, ddof=1) / np.sqrt(pairs)
        cells = "  ".join(f"{m:.4f} ± {e:.4f}" for m, e in zip(mean, error, strict=True))
        print(f"{name:12} {way:22} {cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.networks.split(","):
        measure(name, given.pairs)


if __name__ == "__main__":
    main()
