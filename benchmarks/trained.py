"""Trained networks on real data: scikit-learn's digits, upscaled or read as tokens.

Weights are trained once and kept in the folder for temporary files.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from models import Transformer, cnn, mlp, vit
from sklearn.datasets import load_digits
from torch import Tensor, nn

CACHE = Path(tempfile.gettempdir()) / "sharpkit-benchmarks"
CE = nn.CrossEntropyLoss()


@dataclass
class Case:
    """A trained network and the batch on which its Hessian is taken."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    loss: float

    @property
    def dim(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.model.parameters())


@dataclass
class Recipe:
    """How a network is built and trained; `examples` are measured, the first of `train`."""

    build: Callable[[], nn.Module]
    inputs: Callable[[Tensor], Tensor]
    examples: int
    train: int = 1500
    batch: int = 50
    lr: float = 1e-3
    loss: float = 0.05
    seconds: float = 90.0


def _upscaled(size: int) -> Callable[[Tensor], Tensor]:
    def inputs(images: Tensor) -> Tensor:
        large = F.interpolate(images[:, None] / 16, size=size, mode="bilinear")
        return (large - 0.3) / 0.35

    return inputs


def _coloured(images: Tensor) -> Tensor:
    return _upscaled(32)(images) * torch.tensor([1.0, 0.7, 0.4])[:, None, None]


def _tokens(images: Tensor) -> Tensor:
    return images.flatten(1).long()  # 64 tokens of 17 levels


def minilm() -> nn.Module:
    """Return an encoder of the size of MiniLM-L6: 6 layers, width 384, 12 heads."""
    return Transformer(nn.Embedding(17, 384), 384, 6, 64, 12)


RECIPES = {
    "mlp": Recipe(lambda: mlp()[0], _upscaled(28), examples=512),
    "cnn": Recipe(lambda: cnn()[0], _coloured, examples=64),
    "vit": Recipe(lambda: vit()[0], _coloured, examples=16, train=600, batch=30, lr=5e-4),
    "minilm": Recipe(minilm, _tokens, examples=4, train=48, batch=8, lr=2e-4, loss=0.1),
}


def load(name: str) -> Case:
    """Return a trained network in evaluation mode; train it if its weights are not kept."""
    recipe = RECIPES[name]
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order][: recipe.train]
    x, y = recipe.inputs(images), torch.tensor(digits.target)[order][: recipe.train]
    torch.manual_seed(0)
    model = recipe.build()
    path = CACHE / f"{name}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        _train(name, model, x, y, recipe)
        path.parent.mkdir(exist_ok=True)
        torch.save(model.state_dict(), path)
    model.eval()
    x, y = x[: recipe.examples].clone(), y[: recipe.examples].clone()
    with torch.no_grad():
        loss = float(CE(model(x), y))
    return Case(name, model, x, y, loss)


def _train(name: str, model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe) -> None:
    # Adam to the recipe's loss, or until its time is over.
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    start, epoch, mean = time.process_time(), 0, float("inf")
    while mean > recipe.loss and time.process_time() - start < recipe.seconds:
        total, epoch = 0.0, epoch + 1
        for part in torch.randperm(len(x)).split(recipe.batch):
            optimizer.zero_grad()
            loss = CE(model(x[part]), y[part])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(part)
        mean = total / len(x)
    seconds = time.process_time() - start
    print(f"{name}: trained {epoch} epochs, {seconds:.0f} s, mean loss {mean:.3f}", flush=True)
