"""The networks that the benchmarks measure, each with a batch of random inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, width: int, stride: int):
        super().__init__()
        out = width * stride
        self.body = nn.Sequential(
            nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.skip = nn.Conv2d(width, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class Transformer(nn.Module):
    """Pre-norm encoder over patches (ViT) or tokens (BERT-like), mean pooling."""

    def __init__(self, embed: nn.Module, width: int, depth: int, length: int, heads: int):
        super().__init__()
        self.embed = embed
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x) + self.position).mean(dim=1))


def mlp() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )  # fmt: skip
    return model, torch.randn(512, 784)


def cnn() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(a, b, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10)), torch.randn(64, 3, 32, 32)


def resnet() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), Residual(16, 1),
        Residual(16, 2), Residual(32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip
    return model, torch.randn(32, 3, 32, 32)


def vit() -> tuple[nn.Module, Tensor]:
    embed = nn.Sequential(nn.Conv2d(3, 96, 4, 4), nn.Flatten(2))

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = embed

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).transpose(1, 2)

    return Transformer(Patches(), 96, 4, 64, 4), torch.randn(16, 3, 32, 32)


def bert() -> tuple[nn.Module, Tensor]:
    return Transformer(nn.Embedding(1000, 128), 128, 4, 64, 4), torch.randint(1000, (16, 64))


MODELS = {"mlp": mlp, "cnn": cnn, "resnet": resnet, "vit": vit, "bert": bert}
