"""A zoo of small networks on scikit-learn digits: MLPs, CNNs and attention models."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpkit.errors import SharpkitError

__all__ = ["Digits", "ModelSpec", "TrainedModel", "build", "digits", "read_spec", "specs", "train"]

Family: TypeAlias = Literal["mlp", "cnn", "attention"]

NUM_TRAIN = 900
SPLIT_SEED = 20100
TARGET_LOSS = 0.05  # training stops here, so that models are compared at equal train loss


@dataclass(frozen=True)
class Digits:
    """The 1,797 images of 8x8 (pixels in [0, 1]), split once and for all 900 / 897."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """Return the digits; they come with scikit-learn and need no network.

    Raises:
        SharpkitError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SharpkitError(
            "The demo needs scikit-learn for its data. Install it with: pip install"
            ' "sharpkit[demo]"'
        ) from None
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    x = torch.as_tensor(images / 16, dtype=torch.float32)[order]
    y = torch.as_tensor(labels, dtype=torch.int64)[order]
    return Digits(x[:NUM_TRAIN], y[:NUM_TRAIN], x[NUM_TRAIN:], y[NUM_TRAIN:])


@dataclass(frozen=True)
class ModelSpec:
    """One model of the zoo: everything that its training depends on."""

    family: Family
    width: int
    depth: int
    lr: float
    batch_size: int
    weight_decay: float
    seed: int
    max_epochs: int = 150

    @property
    def name(self) -> str:
        """A file name that tells the settings."""
        lr, decay = (f"{x:g}".removeprefix("0") for x in (self.lr, self.weight_decay))
        text = f"{self.family}-{self.width}x{self.depth}-lr{lr}-b{self.batch_size}"
        return text + (f"-wd{decay}" if self.weight_decay else "") + f"-s{self.seed}"


def specs(*, quick: bool = False) -> list[ModelSpec]:
    """Return the zoo: three families, four settings each, several seeds a setting."""
    settings: list[tuple[Family, int, int, float, int, float]] = [
        ("mlp", 32, 1, 3e-3, 32, 0.0),
        ("mlp", 64, 1, 1e-3, 16, 1e-2),
        ("mlp", 32, 3, 3e-3, 32, 0.0),
        ("mlp", 64, 2, 1e-3, 128, 0.0),
        ("cnn", 8, 1, 3e-3, 32, 0.0),
        ("cnn", 16, 1, 2e-3, 64, 1e-2),
        ("cnn", 8, 2, 3e-3, 16, 0.0),
        ("attention", 16, 1, 5e-3, 32, 0.0),
        ("attention", 16, 2, 3e-3, 32, 0.0),
        ("attention", 24, 1, 3e-3, 32, 1e-2),
    ]
    if quick:
        settings = [settings[0], settings[2], settings[4], settings[7]]
        return [ModelSpec(*s, seed=seed) for s in settings for seed in range(2)]
    return [ModelSpec(*s, seed=seed) for s in settings for seed in range(3)]


class _Attention(nn.Module):
    """Sixteen patches of 2x2 pixels, a learned position each, pre-norm encoder layers."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.1 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        hidden = self.layers(self.embed(patches) + self.position)
        return self.head(hidden.mean(dim=1))  # type: ignore[no-any-return]


def build(spec: ModelSpec) -> nn.Module:
    """Return the network of a spec, with fresh weights from the global random state."""
    width = spec.width
    if spec.family == "mlp":
        sizes = [64] + [width] * spec.depth
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(width, 10))
    if spec.family == "cnn":
        convs: list[nn.Module] = [
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, width, 3, 2, 1),
            nn.ReLU(),
        ]
        for _ in range(spec.depth):
            convs += [nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()]
        return nn.Sequential(*convs, nn.Flatten(), nn.Linear(16 * width, 10))
    return _Attention(width, spec.depth)


@dataclass(frozen=True)
class TrainedModel:
    """A trained network and what its training ended with."""

    spec: ModelSpec
    model: nn.Module
    metadata: dict[str, Any]

    def save(self, folder: Path) -> Path:
        """Write ``NAME.safetensors`` and ``NAME.json``; return the former."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.spec.name}.safetensors"
        safetensors.torch.save_file(self.model.state_dict(), path)
        path.with_suffix(".json").write_text(json.dumps(self.metadata, indent=2) + "\n")
        return path


def read_spec(checkpoint: Path) -> tuple[ModelSpec, dict[str, Any]]:
    """Return the spec and the metadata that were saved beside a checkpoint."""
    metadata = json.loads(checkpoint.with_suffix(".json").read_text())
    return ModelSpec(**metadata["spec"]), metadata


def train(spec: ModelSpec, data: Digits) -> TrainedModel:
    """Train with AdamW until the train loss is at most 0.05, or the epochs end.

    Everything follows from ``spec.seed``; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(spec.seed)
        model = build(spec)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=spec.lr, weight_decay=spec.weight_decay
        )
        loss, epoch = float("inf"), 0
        while epoch < spec.max_epochs and loss > TARGET_LOSS:
            epoch += 1
            for index in torch.split(torch.randperm(len(data.train_labels)), spec.batch_size):
                optimizer.zero_grad()
                outputs = model(data.train_images[index])
                error = F.cross_entropy(outputs, data.train_labels[index])
                error.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if epoch % 2 == 0 or epoch == spec.max_epochs:
                loss = _evaluate(model, data.train_images, data.train_labels)[0]
    model.eval()
    train_loss, train_accuracy = _evaluate(model, data.train_images, data.train_labels)
    test_loss, test_accuracy = _evaluate(model, data.test_images, data.test_labels)
    metadata = {
        "spec": asdict(spec),
        "family": spec.family,
        "epochs": epoch,
        "train_loss": train_loss,
        "test_loss": test_loss,
        "train_accuracy": train_accuracy,
        "test_accuracy": test_accuracy,
        "gap": test_loss - train_loss,
        "accuracy_gap": train_accuracy - test_accuracy,
        "reached_target": train_loss <= TARGET_LOSS,
    }
    return TrainedModel(spec, model, metadata)


@torch.no_grad()
def _evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    logits = model(x)
    accuracy = (logits.argmax(dim=1) == y).double().mean()
    return float(F.cross_entropy(logits, y)), float(accuracy)
