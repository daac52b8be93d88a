"""Two towers trained to agree on pairs, and how far their neighbourhoods agree."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from emoji_pairs import Pairs
from torch import Tensor, nn

from sharpkit.optim import SAM, MongeSAM

BATCH, NEIGHBOURS, SHIFT, EVERY = 128, 8, 2, 5
TEMPERATURE, MOMENTUM, AT_CHANCE = 0.1, 0.9, 0.95
State = dict[str, Tensor]


class Towers(nn.Module):
    """A CNN for images and a linear map for features of texts, into the space of these features.

    The map of texts starts as the identity. Outputs are cosines over a fixed temperature,
    ``[n, n]``: images in rows, texts in columns.
    """

    def __init__(self, features: int, side: int, width: int = 16):
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GELU()]
            side = (side + 1) // 2
        last = nn.Linear(4 * width * side * side, features)
        self.image = nn.Sequential(*layers, nn.Flatten(), last)
        self.text = nn.Linear(features, features)
        nn.init.eye_(self.text.weight)
        nn.init.zeros_(self.text.bias)

    def embed(self, images: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings of norm 1."""
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(features), dim=1)

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        a, b = self.embed(images, features)
        logits: Tensor = a @ b.T / TEMPERATURE
        return logits


def clip_loss(logits: Tensor) -> Tensor:
    """Return the symmetric InfoNCE loss of a batch: the mean of both directions' cross-entropy."""
    right = torch.arange(len(logits))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def neighbours(points: Tensor, k: int) -> Tensor:
    """Return the k nearest other points by cosine, ``[n, k]``."""
    if not 1 <= k < len(points):
        raise ValueError(f"Expected 1 <= k < {len(points)} points. Got k = {k}.")
    unit = F.normalize(points, dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-math.inf)
    return cosines.topk(k, dim=1).indices


def mutual_knn(a: Tensor, b: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Return for each point which part of its k neighbours is the same in both embeddings.

    The mean is the alignment of Huh et al. (arXiv 2405.07987); k / (n - 1) is chance.
    """
    same = neighbours(a, k)[:, :, None] == neighbours(b, k)[:, None, :]
    return same.sum(dim=(1, 2)) / k


def recall(logits: Tensor, k: int) -> float:
    """Return how often the partner is among the best k, the mean of both directions.

    A partner behind as many equals as there are places does not count.
    """
    own = logits.diagonal()
    hits = [
        ((scores >= own[:, None]).sum(dim=1) <= k).double().mean() for scores in (logits, logits.T)
    ]
    return float(sum(hits)) / 2


def without_each(a: Tensor, b: Tensor, k: int = NEIGHBOURS) -> np.ndarray:
    """Return the alignment of all pairs but one, for each, ``[n]``."""
    n, near = len(a), [neighbours(x, k + 1) for x in (a, b)]
    found = np.empty(n)
    for i in range(n):
        sets = []
        for rows in near:
            kept = rows != i
            kept[:, k] &= ~kept.all(dim=1)  # the one beyond k comes in where i has gone
            sets.append(rows[kept].reshape(n, k))
        same = (sets[0][:, :, None] == sets[1][:, None, :]).sum(dim=(1, 2))
        found[i] = int(same.sum() - same[i]) / (k * (n - 1))
    return found


@dataclass(frozen=True)
class Scores:
    """Of held-out pairs: the alignment, the same without each of them, and recalls."""

    alignment: float
    without: np.ndarray
    recall_1: float
    recall_5: float


@torch.no_grad()
def evaluate(model: Towers, pairs: Pairs) -> Scores:
    """Return alignment and retrieval among these pairs."""
    a, b = model.embed(pairs.images, pairs.features)
    logits = a @ b.T
    return Scores(
        float(mutual_knn(a, b).mean()), without_each(a, b), recall(logits, 1), recall(logits, 5)
    )


@torch.no_grad()
def aligned(model: Towers, pairs: Pairs) -> float:
    """Return the alignment alone."""
    return float(mutual_knn(*model.embed(pairs.images, pairs.features)).mean())


def batches(pairs: Pairs, size: int = BATCH) -> list[dict[str, Tensor]]:
    """Return fixed batches of one size in the given order; a ragged rest is left out.

    The loss of a pair depends on what else is in its batch: the batch is the unit.
    """
    return [
        {"images": pairs.images[i : i + size], "features": pairs.features[i : i + size]}
        for i in range(0, len(pairs) - size + 1, size)
    ]


def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Return the loss of a batch as one loss term, for `Objective.from_batch_loss`."""
    return clip_loss(model(batch["images"], batch["features"])), 1


@torch.no_grad()
def train_loss(model: nn.Module, pairs: Pairs, size: int = BATCH) -> float:
    """Return the mean loss of the fixed batches."""
    return float(np.mean([batch_loss(model, b)[0] for b in batches(pairs, size)]))


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images each moved by up to SHIFT pixels either way, edges repeated."""
    n, _, height, width = images.shape
    by = torch.randint(-SHIFT, SHIFT + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(height) + by[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + by[1]).clamp(0, width - 1)
    which = torch.arange(n)[:, None, None]
    moved = images[which, :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Setting:
    """An optimizer; Adam and SGD have no radius."""

    method: str
    lr: float
    rho: float = 0.0

    def __str__(self) -> str:
        return f"{self.method}\nlr {self.lr:g}" + (f"\nρ {self.rho:g}" if self.rho else "")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return it; SAM and Monge SAM step by the same SGD with momentum."""
        if self.method == "Adam":
            return torch.optim.Adam(model.parameters(), self.lr)
        base = torch.optim.SGD(model.parameters(), self.lr, momentum=MOMENTUM)
        if self.method == "SAM":
            return SAM(base, rho=self.rho, model=model)
        if self.method == "Monge SAM":
            return MongeSAM(base, rho=self.rho, model=model)
        return base

    def radius(self, norm: float) -> float:
        """Return the length of the perturbation at a gradient of this norm."""
        return self.rho / math.hypot(1, norm) if self.method == "Monge SAM" else self.rho


@dataclass
class Run:
    """A training: alignment at moments, weights at the best of them and at the end."""

    setting: Setting
    seed: int
    alignments: list[float] = field(default_factory=list)
    kept: State = field(default_factory=dict)
    last: State = field(default_factory=dict)
    loss: float = math.nan
    radius: float = 0.0
    seconds: float = 0.0

    @property
    def alignment(self) -> float:
        """The highest on the validation pairs."""
        return max(self.alignments)

    @property
    def epoch(self) -> int:
        """When that was; 0 is before the first step."""
        return EVERY * self.alignments.index(self.alignment)

    def at_chance(self, size: int) -> bool:
        """Tell whether it ended no better than guessing among a batch, or not finite."""
        return not self.loss < AT_CHANCE * math.log(size)


def fresh(train: Pairs, seed: int) -> Towers:
    """Return towers with weights drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Towers(train.features.shape[1], train.images.shape[-1])


def fit(
    setting: Setting, train: Pairs, held_out: Pairs, seed: int, epochs: int, size: int = BATCH
) -> Run:
    """Train, and keep the weights with the highest alignment on held-out pairs.

    Weights, the order of pairs and the shifts are those of the seed, whatever the optimizer.
    A training whose loss is not finite stops there.
    """
    model, run = fresh(train, seed), Run(setting, seed)
    optimizer = setting.optimizer(model)
    generator = torch.Generator().manual_seed(seed)
    began, radii = time.process_time(), []

    def look() -> None:
        run.alignments.append(aligned(model, held_out))
        if run.alignments[-1] > max(run.alignments[:-1], default=-1.0):
            run.kept = {k: v.clone() for k, v in model.state_dict().items()}

    look()
    finite = True
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=generator)
        for rows in order.split(size)[: len(train) // size]:
            images, features = shifted(train.images[rows], generator), train.features[rows]
            norms: list[float] = []

            def closure(x: Tensor = images, t: Tensor = features, n: list[float] = norms) -> Tensor:
                optimizer.zero_grad()
                loss = clip_loss(model(x, t))
                loss.backward()
                n.append(length(model))
                return loss

            finite = math.isfinite(optimizer.step(closure).item())
            if not finite:
                break
            radii.append(setting.radius(norms[0]))
        if not finite:
            break
        if (epoch + 1) % EVERY == 0:
            look()
    run.radius = float(np.mean(radii)) if radii else math.nan
    run.seconds = time.process_time() - began
    run.last = model.state_dict()
    run.loss = train_loss(model, train, size) if finite else math.nan
    return run


def length(model: nn.Module) -> float:
    """Return the norm of the gradient over all parameters."""
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(norms).norm())


def over_points(new: Sequence[Scores], old: Sequence[Scores]) -> tuple[float, float]:
    """Return the mean difference of alignment, and the half width of a 95% interval over pairs.

    The pairs held out are taken as a sample, the trainings as given. The jackknife: the spread of
    the difference, the mean over seeds, without each pair. A pair is also a neighbour of others,
    so that the plain spread of the overlaps would be too small by a third.
    """
    value = float(np.mean([n.alignment - o.alignment for n, o in zip(new, old, strict=True)]))
    rows = np.mean([n.without - o.without for n, o in zip(new, old, strict=True)], axis=0)
    n = len(rows)
    return value, 1.96 * ((n - 1) ** 2 / n * float(rows.var(ddof=1))) ** 0.5
