"""Pairs of small networks in float64 that compute the same function: one for each symmetry."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit import measures
from sharpkit.analysis import Analysis
from sharpkit.errors import SettingsError
from sharpkit.objective import Objective

__all__ = ["SEEDS", "Setting", "check_symmetry", "relu_network", "settings", "symmetric_pair"]

SEEDS = (0, 1, 2)
STEPS = 1000  # what the pretended optimizer has made

Element = Callable[[nn.Module], nn.Module]
"""A group element: changes the parameters and buffers of a model in place and returns it."""


class Draw:
    """Random numbers in float64 from one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def log_uniform(self, *shape: int) -> Tensor:
        """Return numbers between 1/e and e, uniform in the logarithm."""
        u = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return torch.exp(2 * u - 1)

    def order(self, n: int) -> Tensor:
        """Return a permutation that moves something."""
        while True:
            order = torch.randperm(n, generator=self.generator)
            if not torch.equal(order, torch.arange(n)):
                return order

    def fill(self, model: nn.Module, scale: float = 0.7) -> None:
        """Give a model normal parameters."""
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(scale * self.normal(*p.shape))


@dataclass(frozen=True)
class Case:
    """A model, a group element for it, inputs, and the number of classes (0: one real output)."""

    model: nn.Module
    element: Element
    inputs: Tensor
    classes: int


@dataclass(frozen=True, eq=False)
class Setting:
    """An objective, and what a measure may need beside it.

    Attributes:
        objective: What is measured.
        initial: Parameters before training, ``[P]``.
    """

    objective: Objective
    initial: Tensor
    _memory: dict[tuple[int, bool], Analysis] = field(default_factory=dict)

    def analysis(self, seed: int, needs: Set[str], *, fresh: bool = False) -> Analysis:
        """Return an analysis that meets needs, keys of ``sharpkit.measures.NEEDS``.

        Args:
            seed: Of its random draws.
            needs: What the measures need.
            fresh: Whether it is one of its own, or shared by all who ask.
        """
        key = seed, "optimizer" in needs
        if not fresh and key in self._memory:
            return self._memory[key]
        optimizer = self.optimizer() if "optimizer" in needs else None
        made = Analysis(
            self.objective, seed=seed, num_groups=0, initial=self.initial, optimizer=optimizer
        )
        return made if fresh else self._memory.setdefault(key, made)

    def optimizer(self) -> torch.optim.Optimizer:
        """Return an Adam that knows the mean squares of the examples' gradients here."""
        named = dict(self.objective.model.named_parameters())
        squares = self.objective.per_example_gradients().square().mean(dim=0)
        optimizer = torch.optim.Adam(list(named.values()), lr=1e-3)
        for name, v in self.objective.space.unflatten(squares).items():
            optimizer.state[named[name]] = {
                "step": torch.tensor(float(STEPS)),
                "exp_avg": torch.zeros_like(v),
                "exp_avg_sq": v * (1 - 0.999**STEPS),
            }
        return optimizer


# -- networks and elements ---------------------------------------------------------------


class _Rotated(nn.Module):
    """A smooth function of a parameter vector w, seen through ``w = Q^T theta``."""

    def __init__(self, theta: Tensor, rotation: Tensor):
        super().__init__()
        half = len(theta) // 2  # two layers, which the rotation mixes
        self.first, self.second = nn.Parameter(theta[:half]), nn.Parameter(theta[half:])
        self.register_buffer("rotation", rotation)

    def forward(self, x: Tensor) -> Tensor:
        w = self.rotation.T @ torch.cat([self.first, self.second])  # type: ignore[operator]
        output: Tensor = torch.tanh(x @ w[: x.shape[1]]) + 0.3 * (x @ w[x.shape[1] :]) ** 2
        return output


class _Product(nn.Module):
    """A diagonal linear network ``x . (u * v)``."""

    def __init__(self, u: Tensor, v: Tensor):
        super().__init__()
        self.u, self.v = nn.Parameter(u), nn.Parameter(v)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.u * self.v)


class _Normalized(nn.Module):
    """Logits without their mean and of length 1."""

    def forward(self, z: Tensor) -> Tensor:
        centred = z - z.mean(dim=1, keepdim=True)
        normalized: Tensor = centred / centred.norm(dim=1, keepdim=True)
        return normalized


class _Attention(nn.Module):
    """Self-attention, then the mean over tokens as logits."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return mixed.mean(dim=1)


def relu_network(draw: Draw) -> nn.Sequential:
    """Return a random ReLU network of three layers, 4 inputs and 3 classes."""
    model = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    ).double()
    draw.fill(model)
    return model


def _permutation(draw: Draw) -> Case:
    orders = {i: draw.order(n) for i, n in ((0, 5), (2, 4))}

    def element(model: Any) -> nn.Module:
        for i, order in orders.items():
            for p in model[i].parameters():
                p.copy_(p[order])
            model[i + 2].weight.copy_(model[i + 2].weight[:, order])
        return model  # type: ignore[no-any-return]

    return Case(relu_network(draw), element, draw.normal(12, 4), 3)


def _scaling(draw: Draw, scales: Mapping[int, Tensor]) -> Case:
    # The outputs of linear layer i are multiplied, the next layer's inputs divided.
    def element(model: Any) -> nn.Module:
        for i, c in scales.items():
            model[i].weight.mul_(c[:, None])
            model[i].bias.mul_(c)
            model[i + 2].weight.div_(c)
        return model  # type: ignore[no-any-return]

    return Case(relu_network(draw), element, draw.normal(12, 4), 3)


def _layer_scale(draw: Draw) -> Case:
    c, d = 1.5 + draw.log_uniform(1), 1 / (1.5 + draw.log_uniform(1))
    return _scaling(draw, {0: c.expand(5), 2: d.expand(4)})


def _node_scale(draw: Draw) -> Case:
    return _scaling(draw, {0: draw.log_uniform(5), 2: draw.log_uniform(4)})


def _orthogonal(draw: Draw) -> Case:
    rotation = torch.linalg.qr(draw.normal(8, 8))[0]

    def element(model: Any) -> nn.Module:
        theta = rotation @ torch.cat([model.first, model.second])
        model.first.copy_(theta[:4])
        model.second.copy_(theta[4:])
        model.rotation.copy_(rotation)
        return model  # type: ignore[no-any-return]

    model = _Rotated(0.8 * draw.normal(8), torch.eye(8, dtype=torch.float64))
    return Case(model, element, draw.normal(12, 4), 0)


def _pair_scale(draw: Draw) -> Case:
    c = draw.log_uniform(4)

    def element(model: Any) -> nn.Module:
        model.u.mul_(c)
        model.v.div_(c)
        return model  # type: ignore[no-any-return]

    return Case(_Product(draw.normal(4), draw.normal(4)), element, draw.normal(12, 4), 0)


def _batch_norm_scale(draw: Draw) -> Case:
    c = draw.log_uniform(3)
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(2, 3), norm, nn.Tanh(), nn.Linear(3, 2)).double().eval()
    draw.fill(model)
    norm.running_mean = 0.5 * draw.normal(3)
    norm.running_var = draw.log_uniform(3)

    def element(model: Any) -> nn.Module:
        model[0].weight.mul_(c[:, None])
        model[0].bias.mul_(c)
        model[1].running_mean.mul_(c)
        model[1].running_var.add_(norm.eps).mul_(c.square()).sub_(norm.eps)
        return model  # type: ignore[no-any-return]

    return Case(model, element, draw.normal(12, 2), 2)


def _logit_scale(draw: Draw) -> Case:
    c = float(1.5 + draw.log_uniform(1))
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), _Normalized()).double()
    draw.fill(model)

    def element(model: Any) -> nn.Module:
        model[2].weight.mul_(c)
        model[2].bias.mul_(c)
        return model  # type: ignore[no-any-return]

    return Case(model, element, draw.normal(12, 2), 3)


def _attention(draw: Draw) -> nn.Module:
    model = _Attention(2, 1).double()
    draw.fill(model)
    return model


def _attention_gl(draw: Draw) -> Case:
    # W_q, W_k -> A W_q, A^-T W_k and W_v, W_o -> B W_v, W_o B^-1, biases included.
    A, B = (
        torch.linalg.qr(draw.normal(2, 2))[0] @ torch.diag(draw.log_uniform(2) ** 3)
        for _ in range(2)
    )

    def element(model: Any) -> nn.Module:
        inner = model.attention
        for p in (inner.in_proj_weight, inner.in_proj_bias):
            for i, M in enumerate((A, torch.linalg.inv(A).T, B)):
                p[2 * i : 2 * i + 2] = M @ p[2 * i : 2 * i + 2]
        inner.out_proj.weight.copy_(inner.out_proj.weight @ torch.linalg.inv(B))
        return model  # type: ignore[no-any-return]

    return Case(_attention(draw), element, draw.normal(6, 3, 2), 2)


def _key_bias_shift(draw: Draw) -> Case:
    shift = draw.normal(2)

    def element(model: Any) -> nn.Module:
        model.attention.in_proj_bias[2:4] += shift
        return model  # type: ignore[no-any-return]

    return Case(_attention(draw), element, draw.normal(6, 3, 2), 2)


CASES: Mapping[str, Callable[[Draw], Case]] = {
    "permutation": _permutation,
    "orthogonal": _orthogonal,
    "layer_scale": _layer_scale,
    "node_scale": _node_scale,
    "pair_scale": _pair_scale,
    "batch_norm_scale": _batch_norm_scale,
    "logit_scale": _logit_scale,
    "attention_gl": _attention_gl,
    "key_bias_shift": _key_bias_shift,
}


# -- pairs -------------------------------------------------------------------------------


@cache
def settings(name: str, seed: int, *, labels: bool = False) -> tuple[Setting, Setting]:
    """Return a random network and the same function after a random group element.

    Both are made once and shared, so that measures do not each build them anew. Where the
    network has initial parameters, the same element has moved them too.

    Args:
        name: A key of ``sharpkit.measures.SYMMETRIES``.
        seed: Of the network, the data and the element.
        labels: Whether the criterion must be one of class labels.

    Raises:
        SettingsError: If there is no test of this symmetry.
    """
    if name not in CASES:
        raise SettingsError(
            f"Expected a symmetry among {', '.join(measures.SYMMETRIES)}. Got {name!r}."
        )
    draw = Draw(1000 + seed)
    case = CASES[name](draw)
    count = len(case.inputs)
    loss: nn.Module = nn.CrossEntropyLoss()
    if case.classes:
        targets = torch.randint(case.classes, (count,), generator=draw.generator)
    else:
        targets = draw.normal(count)
        loss = nn.MSELoss()
        if labels:
            targets, loss = (targets > 0).double(), nn.BCEWithLogitsLoss()
    initial = copy.deepcopy(case.model)
    draw.fill(initial, 0.5)
    pair = []
    for moved in (False, True):
        model, start = copy.deepcopy(case.model), copy.deepcopy(initial)
        if moved:
            with torch.no_grad():
                model, start = case.element(model), case.element(start)
        objective = Objective(model, loss, (case.inputs, targets))
        state = {n: p.detach() for n, p in start.named_parameters()}
        pair.append(Setting(objective, objective.space.flatten(state)))
    return pair[0], pair[1]


def symmetric_pair(name: str, seed: int) -> tuple[Objective, Objective]:
    """Return two objectives in float64 that a random element of a symmetry relates.

    Args:
        name: A key of ``sharpkit.measures.SYMMETRIES``.
        seed: Of the network, the data and the group element.

    Raises:
        SettingsError: If there is no test of this symmetry.
    """
    before, after = settings(name, seed)
    return before.objective, after.objective


def check_symmetry(name: str) -> None:
    """Assert that a symmetry leaves the loss unchanged and moves the parameters.

    It must do so at the trained and at the initial parameters.

    Raises:
        AssertionError: If it does not.
    """
    for seed in SEEDS:
        before, after = settings(name, seed)
        theta = before.objective.theta, after.objective.theta
        for first, second in (theta, (before.initial, after.initial)):
            a = float(before.objective.at(first).value())
            b = float(after.objective.at(second).value())
            assert abs(a - b) <= 1e-12 * max(abs(a), 1), f"{name}: the loss moved from {a} to {b}"
            assert not torch.allclose(first, second), f"{name}: nothing moved"
