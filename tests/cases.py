"""The case matrix: small networks in float64, each with its loss on all data at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpkit as sk


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(n, *shape, seed=1):
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return build().double().eval()


class SelfAttention(nn.Module):
    """F.scaled_dot_product_attention, as hand-written transformers have it."""

    def __init__(self, d=4, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, 3)

    def forward(self, x):
        B, T, d = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(B, T, d).mean(dim=1))


class MultiheadAttention(nn.Module):
    """nn.MultiheadAttention."""

    def __init__(self):
        super().__init__()
        self.mixer, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.mixer(x, x, x, need_weights=False)[0].mean(dim=1))


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer, whose inference fast path has no derivatives."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.layer(x).mean(dim=1))


class TiedModel(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, tokens=7, d=4):
        super().__init__()
        self.embed, self.body = nn.Embedding(tokens, d), nn.Linear(d, d)
        self.head = nn.Linear(d, tokens, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embed(tokens)))).transpose(1, 2)


def mlp(activation=nn.Tanh, outputs=3):
    return nn.Sequential(
        nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, outputs)
    )


def batch_norm():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    model[1].running_mean.copy_(torch.linspace(-1, 1, 5))
    model[1].running_var.copy_(torch.linspace(0.5, 2, 5))
    return model


def masked_tokens():
    targets = classes(7, 11, 5)
    targets[::2, 2:] = -100
    targets[3] = -100  # an example without a single term
    return targets


@dataclass(frozen=True)
class Case:
    """A model, its loss and all its data; ``whole_loss`` is the oracle's L(outputs, targets)."""

    name: str
    build: Callable[[], nn.Module]
    criterion: Any
    inputs: Tensor
    targets: Tensor
    whole_loss: Callable[[Tensor, Tensor], Tensor]
    params: Any = "*"

    def model(self) -> nn.Module:
        return seeded(self.build)

    def batches(self, *sizes: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.inputs.split(sizes), self.targets.split(sizes), strict=True))

    def objective(self, *sizes: int, **options: Any) -> sk.Objective:
        sizes = sizes or (8, 3)  # ragged on purpose
        return sk.Objective(
            self.model(), self.criterion, self.batches(*sizes), self.params, **options
        )

    def loss(self, objective: sk.Objective) -> Callable[[Tensor], Tensor]:
        model = self.model()

        def whole(theta: Tensor) -> Tensor:
            parts = objective.space.unflatten(theta)
            outputs = functional_call(model, parts, (self.inputs,))
            return self.whole_loss(outputs, self.targets)

        return whole

    def dense(self, objective: sk.Objective) -> tuple[Tensor, Tensor, Tensor]:
        """Return L, g and H from torch.func alone."""
        loss, theta = self.loss(objective), objective.theta
        with oracle():
            # Not torch.func.hessian: its nested vmap is wrong by 10% for
            # nn.TransformerEncoderLayer in torch 2.13, as differences of the gradient show.
            H = torch.func.jacrev(torch.func.grad(loss))(theta)
            g = torch.func.grad(loss)(theta)
        return loss(theta).detach(), g.detach(), H.detach()

    def torch_hessian(self, objective: sk.Objective) -> Tensor:
        """Return H from torch.func.hessian."""
        with oracle():
            return torch.func.hessian(self.loss(objective))(objective.theta).detach()


@contextmanager
def oracle():
    """Let torch.func differentiate attention, and hear nothing of torch.jit."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # Forward-mode transforms call torch.jit.script, which warns of its own deprecation.
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


X, Y = normal(11, 4), classes(3, 11)
SEQUENCES = normal(11, 5, 4)
TOKENS = classes(7, 11, 5, seed=3)
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)

CASES = [
    Case("mlp, cross-entropy", mlp, nn.CrossEntropyLoss(), X, Y, F.cross_entropy),
    Case("mlp, functional loss", mlp, F.cross_entropy, X, Y, F.cross_entropy),
    Case("relu, mse", lambda: mlp(nn.ReLU, 2), nn.MSELoss(), X, normal(11, 2, seed=5), F.mse_loss),
    Case("batch norm in eval", batch_norm, nn.CrossEntropyLoss(), X, Y, F.cross_entropy),
    Case("attention, sdpa", SelfAttention, nn.CrossEntropyLoss(), SEQUENCES, Y, F.cross_entropy),
    Case("attention, nn", MultiheadAttention, nn.CrossEntropyLoss(), SEQUENCES, Y, F.cross_entropy),
    Case("attention, encoder", Encoder, nn.CrossEntropyLoss(), SEQUENCES, Y, F.cross_entropy),
    Case("tied embedding", TiedModel, nn.CrossEntropyLoss(), TOKENS, classes(7, 11, 5), F.cross_entropy),
    Case("masked tokens", TiedModel, nn.CrossEntropyLoss(), TOKENS, masked_tokens(), F.cross_entropy),
    Case("last layer", mlp, nn.CrossEntropyLoss(), X, Y, F.cross_entropy, params="4.*"),
    Case(
        "class weights",
        mlp,
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
        X,
        Y,
        lambda z, y: F.cross_entropy(z, y, weight=CLASS_WEIGHTS),
    ),
    Case(
        "label smoothing",
        mlp,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        X,
        Y,
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    ),
    Case(
        "class probabilities",
        mlp,
        nn.CrossEntropyLoss(),
        X,
        torch.softmax(normal(11, 3, seed=6), dim=1),
        F.cross_entropy,
    ),
    Case(
        "binary cross-entropy",
        lambda: mlp(outputs=2),
        nn.BCEWithLogitsLoss(),
        X,
        classes(2, 11, 2).double(),
        F.binary_cross_entropy_with_logits,
    ),
]  # fmt: skip


# -- what several test files share --------------------------------------------------------

CE = nn.CrossEntropyLoss()
RAGGED = [(X[:8], Y[:8]), (X[8:], Y[8:])]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def direction(objective):
    return torch.linspace(-1, 1, objective.space.dim, dtype=torch.float64)


def plain():
    return sk.Objective(seeded(mlp), CE, [(X, Y)])


def change_everything(model):
    model.train()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1.5).add_(0.1)


def dropout():
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
