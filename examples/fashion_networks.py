"""Networks on Fashion-MNIST: the zoo's specifications, its training, and the recipe.

Three families (MLP, CNN, vision transformer). In each a base setting, and settings that differ
from it in one thing: width, depth, learning rate, batch size, weight decay, or the optimizer
(SGD with momentum, Adam, SAM, micro-batch SAM), and for two families some that differ in two;
two seeds each. As a recipe it serves the command line too:

    sharpkit score zoo-fashion/models -r examples/fashion_networks.py -o zoo-fashion/study.db

The data are Debian's package dataset-fashion-mnist (the original split, MIT licence), averaged
to 16x16 pixels; the first 1,000 training images, and all 10,000 test images.
"""

from __future__ import annotations

import gzip
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpkit.optim import SAM, MicroBatchSAM

PACKAGE = "dataset-fashion-mnist"
PLACE = Path("usr/share/datasets/fashion-mnist")
WHERE = "SHARPKIT_FASHION_MNIST"  # names a folder with the four files
NUM_TRAIN = 1000
TARGET_LOSS = 0.05  # training stops here: models are compared at the same train loss
MAX_EPOCHS = 200
RHO = 0.1
MICRO_BATCHES = 4

loss = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Spec:
    """All that the training of one model depends on."""

    family: str
    width: int
    depth: int
    optimizer: str
    lr: float
    batch_size: int
    weight_decay: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the checkpoint's file, without its ending."""
        return (
            f"{self.family}-w{self.width}d{self.depth}-{self.optimizer}-lr{self.lr:g}"
            f"-b{self.batch_size}-wd{self.weight_decay:g}-s{self.seed}"
        )


BASE = {
    "mlp": Spec("mlp", 64, 1, "sgd", 0.05, 50, 0.0, 0),
    "cnn": Spec("cnn", 8, 2, "sgd", 0.05, 50, 0.0, 0),
    "vit": Spec("vit", 16, 1, "sgd", 0.05, 50, 0.0, 0),
}
ONE_CHANGE: tuple[dict[str, Any], ...] = (
    {},
    {"width": 2.0},
    {"depth": 1},
    {"lr": 0.02},
    {"batch_size": 200},
    {"weight_decay": 1e-3},
    {"optimizer": "adam"},
    {"optimizer": "sam"},
    {"optimizer": "msam"},
)
TWO_CHANGES: tuple[dict[str, Any], ...] = (
    {"width": 2.0, "optimizer": "sam"},
    {"depth": 1, "optimizer": "sam"},
    {"lr": 0.02, "optimizer": "msam"},
)
SEEDS = (0, 1)


def changed(spec: Spec, changes: Mapping[str, Any]) -> Spec:
    """Return a spec with another width (a factor), depth (layers more) and so on."""
    given = dict(changes)
    if "width" in given:
        given["width"] = int(spec.width * given["width"])
    if "depth" in given:
        given["depth"] = spec.depth + given["depth"]
    if given.get("optimizer") == "adam":
        given["lr"] = 0.002  # a learning rate of its own: no axis of SGD's
    return replace(spec, **given)


def specs(*, quick: bool = False) -> list[Spec]:
    """Return the zoo of 66 models; quick: 8 of one family."""
    found = []
    for family, base in BASE.items():
        changes = ONE_CHANGE if family == "vit" else (*ONE_CHANGE, *TWO_CHANGES)
        found += [replace(changed(base, c), seed=s) for c in changes for s in SEEDS]
    if quick:
        found = [s for s in found if s.family == "mlp" and s.width == 64 and s.depth == 1][:8]
    return found


# -- data --------------------------------------------------------------------------------


def fetch(folder: Path) -> Path:
    """Return the folder of the four files, downloading Debian's package if need be.

    A folder that the environment names, or the package where it is installed, comes first.

    Args:
        folder: Where a download is kept; no rights are needed.

    Raises:
        SystemExit: If there is no way to get the data.
    """
    for place in (os.environ.get(WHERE), Path("/") / PLACE, folder / PLACE):
        if place and (Path(place) / "train-images-idx3-ubyte.gz").is_file():
            return Path(place)
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise SystemExit(
            f"Expected Fashion-MNIST. Set {WHERE} to a folder with train-images-idx3-ubyte.gz and"
            " its three neighbours, or run this on Debian."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        done = subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=work, check=False)
        packages = list(Path(work).glob("*.deb"))
        if done.returncode or not packages:
            raise SystemExit(f"Expected `apt-get download {PACKAGE}` to work. Run apt-get update?")
        subprocess.run(["dpkg", "-x", str(packages[0]), str(folder.resolve())], check=True)
    return folder / PLACE


def _read(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        content = file.read()
    axes = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


@cache
def images(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return 1,000 training and 10,000 test images ``[n, 1, 16, 16]`` with their labels."""
    found = []
    for part, count in (("train", NUM_TRAIN), ("t10k", None)):
        x = _read(folder / f"{part}-images-idx3-ubyte.gz")[:count]
        y = _read(folder / f"{part}-labels-idx1-ubyte.gz")[:count]
        pixels = torch.as_tensor(x.copy(), dtype=torch.float32)[:, None] / 255
        pixels = F.interpolate(F.pad(pixels, (2, 2, 2, 2)), scale_factor=0.5, mode="area")
        found.append(((pixels - 0.25) / 0.3, torch.as_tensor(y.copy(), dtype=torch.int64)))
    return found[0], found[1]


# -- networks ----------------------------------------------------------------------------


class Transformer(nn.Module):
    """Sixteen patches of 4x4 pixels, a learned position each, pre-norm encoder layers."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 4, 4)
        self.position = nn.Parameter(0.1 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, 10)
        for p in self.layers.parameters():  # the encoder's layers start as copies of one
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.layers(patches + self.position).mean(dim=1))


def untrained(spec: Spec) -> nn.Module:
    """Return the network before training."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(spec.seed)
        if spec.family == "vit":
            return Transformer(spec.width, spec.depth)
        layers: list[nn.Module] = []
        if spec.family == "mlp":
            sizes = [256, *[spec.width] * spec.depth]
            layers.append(nn.Flatten())
            for a, b in itertools.pairwise(sizes):
                layers += [nn.Linear(a, b), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))
        channels = [1, spec.width, *[2 * spec.width] * (spec.depth - 1)]
        for i, (a, b) in enumerate(itertools.pairwise(channels)):
            layers += [nn.Conv2d(a, b, 3, 2 if i < 2 else 1, 1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels[-1], 10))


def make_optimizer(spec: Spec, network: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a spec: SAM's are wrapped around SGD with momentum."""
    parameters = network.parameters()
    if spec.optimizer == "adam":
        return torch.optim.Adam(parameters, spec.lr, weight_decay=spec.weight_decay)
    base = torch.optim.SGD(parameters, spec.lr, momentum=0.9, weight_decay=spec.weight_decay)
    if spec.optimizer == "sam":
        return SAM(base, rho=RHO)
    if spec.optimizer == "msam":
        return MicroBatchSAM(base, rho=RHO, num_micro_batches=MICRO_BATCHES)
    return base


@torch.no_grad()
def evaluate(network: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return loss and accuracy."""
    logits = torch.cat([network(x) for x in data[0].split(1000)])
    right = (logits.argmax(dim=1) == data[1]).double().mean()
    return float(F.cross_entropy(logits, data[1])), float(right)


def train(spec: Spec, folder: Path) -> dict[str, Any]:
    """Train one model, and return what its checkpoint holds."""
    train_set, test_set = images(folder)
    x, y = train_set
    network = untrained(spec)
    initial = {k: v.clone() for k, v in network.state_dict().items()}
    optimizer = make_optimizer(spec, network)
    order = torch.Generator().manual_seed(spec.seed)

    def backward(rows: Tensor) -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(network(x[rows]), y[rows])
        value.backward()
        return value

    epochs = 0
    while epochs < MAX_EPOCHS:
        for rows in torch.randperm(len(x), generator=order).split(spec.batch_size):
            if isinstance(optimizer, MicroBatchSAM):
                parts = optimizer.shards(rows)
                optimizer.step(lambda i, p=parts: backward(p[i][0]))
            else:
                optimizer.step(lambda rows=rows: backward(rows))
        epochs += 1
        if evaluate(network, train_set)[0] <= TARGET_LOSS:
            break
    (train_loss, train_accuracy), (test_loss, test_accuracy) = (
        evaluate(network, d) for d in (train_set, test_set)
    )
    facts = {
        **asdict(spec),
        "setting": replace(spec, seed=0).name.removesuffix("-s0"),
        "epochs": epochs,
        "reached_target": train_loss <= TARGET_LOSS,
        "train_loss": train_loss,
        "test_loss": test_loss,
        "gap": test_loss - train_loss,
        "train_accuracy": train_accuracy,
        "test_accuracy": test_accuracy,
        "accuracy_gap": train_accuracy - test_accuracy,
    }
    return {"state_dict": network.state_dict(), "initial": initial, "facts": facts}


# -- the recipe --------------------------------------------------------------------------


@cache
def _saved(checkpoint: Path) -> dict[str, Any]:
    held: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    return held


def model(checkpoint: Path) -> nn.Module:
    """Return the network that the checkpoint belongs to; sharpkit loads the weights."""
    names = Spec.__dataclass_fields__
    return untrained(Spec(**{k: v for k, v in _saved(checkpoint)["facts"].items() if k in names}))


def data() -> list[tuple[Tensor, Tensor]]:
    """Return the training images in batches of 250."""
    x, y = images(fetch(Path(os.environ.get("SHARPKIT_ZOO", "zoo-fashion")) / "data"))[0]
    return list(zip(x.split(250), y.split(250), strict=True))


def initial(checkpoint: Path) -> dict[str, Tensor]:
    """Return the parameters before training."""
    start: dict[str, Tensor] = _saved(checkpoint)["initial"]
    return start


def metadata(checkpoint: Path) -> dict[str, Any]:
    """Return the specification, losses and gaps."""
    facts: dict[str, Any] = _saved(checkpoint)["facts"]
    return facts
