"""Checks that every measure, operator and symmetry has to pass; for third parties too.

A registered measure makes claims: what leaves it unchanged, how it scales with the loss,
whether it can be negative. :func:`check_measure` proves each claim on random networks and
shows that every symmetry it does not claim changes it.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sharpkit import measures
from sharpkit.errors import SettingsError
from sharpkit.objective import Objective
from sharpkit.operators import SymmetricOperator
from sharpkit.results import Estimate
from sharpkit.scoring import score

__all__ = [
    "check_measure",
    "check_operator",
    "check_symmetry",
    "symmetric_pair",
    "trained_with_adam",
]

EXACT = 1e-6  # relative, in float64, for what is not drawn at random
DEVIATIONS = 6  # combined errors that two estimates of one number may lie apart
CHANGED = 1e-3  # relative: what is not claimed must move at least so much
EFFORT = 20  # times the usual number of draws, to tell a change from noise
SEEDS = (0, 1, 2)

Pair = tuple[Objective, Objective]


class _Rotated(nn.Module):
    """A smooth function of a parameter vector w, seen through ``w = Q^T theta``."""

    def __init__(self, theta: Tensor, rotation: Tensor):
        super().__init__()
        half = len(theta) // 2  # two layers, which the rotation mixes
        self.first, self.second = nn.Parameter(theta[:half]), nn.Parameter(theta[half:])
        self.register_buffer("rotation", rotation)

    def forward(self, x: Tensor) -> Tensor:
        w = self.rotation.T @ torch.cat([self.first, self.second])  # type: ignore[operator]
        return torch.tanh(x @ w[: x.shape[1]]) + 0.3 * (x @ w[x.shape[1] :]) ** 2


class _Product(nn.Module):
    """A diagonal linear network ``x . (u * v)``."""

    def __init__(self, u: Tensor, v: Tensor):
        super().__init__()
        self.u, self.v = nn.Parameter(u), nn.Parameter(v)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.u * self.v)


def _relu_network(generator: torch.Generator) -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def _scaled(model: nn.Sequential, scales: Mapping[int, Tensor]) -> nn.Sequential:
    # Multiply the outputs of linear layer i by scales, and divide the next layer's inputs.
    other = copy.deepcopy(model)
    with torch.no_grad():
        for i, c in scales.items():
            here: Any = other[i]
            following: Any = other[i + 2]
            here.weight.mul_(c[:, None])
            here.bias.mul_(c)
            following.weight.div_(c)
    return other


def _permuted(model: nn.Sequential, generator: torch.Generator) -> nn.Sequential:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for i in (0, 2):
            here: Any = other[i]
            following: Any = other[i + 2]
            order = torch.randperm(len(here.bias), generator=generator)
            here.weight.copy_(here.weight[order])
            here.bias.copy_(here.bias[order])
            following.weight.copy_(following.weight[:, order])
    return other


def symmetric_pair(name: str, seed: int) -> Pair:
    """Return two objectives in float64 that a random element of a symmetry relates.

    Args:
        name: A key of ``sharpkit.measures.SYMMETRIES``.
        seed: Of the network, the data and the group element.

    Raises:
        SettingsError: If there is no test of this symmetry.
    """
    g = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def log_uniform(*shape: int) -> Tensor:
        return torch.exp(2 * torch.rand(shape, generator=g, dtype=torch.float64) - 1)

    x = normal(12, 4)
    if name in ("permutation", "layer_scale", "node_scale"):
        model = _relu_network(g)
        targets = torch.randint(3, (12,), generator=g)
        if name == "permutation":
            other = _permuted(model, g)
        elif name == "layer_scale":
            c, d = 1.5 + log_uniform(1), 1 / (1.5 + log_uniform(1))
            other = _scaled(model, {0: c.expand(6), 2: d.expand(5)})
        else:
            other = _scaled(model, {0: log_uniform(6), 2: log_uniform(5)})
        loss: nn.Module = nn.CrossEntropyLoss()
        return Objective(model, loss, (x, targets)), Objective(other, loss, (x, targets))
    y = normal(12)
    if name == "orthogonal":
        w = 0.8 * normal(8)
        rotation = torch.linalg.qr(normal(8, 8))[0]
        plain, turned = _Rotated(w, torch.eye(8).double()), _Rotated(rotation @ w, rotation)
        mse = nn.MSELoss()
        return Objective(plain, mse, (x, y)), Objective(turned, mse, (x, y))
    if name == "pair_scale":
        u, v, c = normal(4), normal(4), log_uniform(4)
        mse = nn.MSELoss()
        return (
            Objective(_Product(u, v), mse, (x, y)),
            Objective(_Product(c * u, v / c), mse, (x, y)),
        )
    raise SettingsError(
        f"Expected a symmetry among {', '.join(measures.SYMMETRIES)}. Got {name!r}."
    )


def check_symmetry(name: str) -> None:
    """Assert that a symmetry leaves the loss unchanged and moves the parameters.

    Raises:
        AssertionError: If it does not.
    """
    for seed in SEEDS:
        before, after = symmetric_pair(name, seed)
        a, b = float(before.value()), float(after.value())
        assert abs(a - b) <= 1e-12 * max(abs(a), 1), f"{name}: the loss moved from {a} to {b}"
        assert not torch.allclose(before.theta, after.theta), f"{name}: nothing moved"


def check_operator(operator: SymmetricOperator, dense: Tensor, *, tolerance: float = 1e-9) -> None:
    """Assert that an operator is the dense matrix, symmetric, linear, and counts products.

    Args:
        operator: In float64 for the default tolerance.
        dense: The matrix ``[P, P]`` that it should be.
        tolerance: Relative to the size of the products.

    Raises:
        AssertionError: If it is not.
    """
    g = torch.Generator().manual_seed(0)
    V = torch.randn(operator.dim, 3, generator=g, dtype=torch.float64).to(operator.dtype)
    before = operator.num_matvecs
    AV = operator @ V
    assert operator.num_matvecs == before + 3, "the counter does not count columns"
    scale = float((dense.abs() @ V.abs().to(dense.dtype)).max()) or 1.0

    def same(a: Tensor, b: Tensor, what: str) -> None:
        gap = float((a - b).abs().max()) / scale
        assert gap <= tolerance, f"{what}: off by {gap:.1e} of the products' size"

    same(AV, dense.to(AV.dtype) @ V, "the products are not those of the dense matrix")
    same(operator @ V[:, 0], AV[:, 0], "a vector and a column differ")
    assert operator.num_matvecs == before + 4, "the counter does not count vectors"
    a, b = V[:, 0], V[:, 1]
    same(operator @ (2 * a - 3 * b), 2 * AV[:, 0] - 3 * AV[:, 1], "not linear")
    assert abs(float(a @ AV[:, 1]) - float(b @ AV[:, 0])) <= tolerance * scale * operator.dim, (
        "not symmetric"
    )
    if operator.device.type == "cpu":
        through_scipy = torch.as_tensor(operator.to_scipy() @ V.numpy())
        same(through_scipy, AV, "SciPy sees another matrix")


def check_measure(
    name: str,
    *,
    objectives: Sequence[Objective] | None = None,
    exact: Callable[[Objective], float] | None = None,
) -> None:
    """Assert that a registered measure keeps its claims, whatever it measures.

    The same seed gives the same bits, whatever else is measured; nothing of the user's is
    touched; results are strict JSON; bad settings are refused; claimed symmetries leave it
    unchanged and others do not; it scales with the loss as it says.

    Args:
        name: Of the measure.
        objectives: What to compare with the exact value and to look for negative values
            on, in float64; default six small networks.
        exact: Its exact value, by other means; it must agree within the stated error.

    Raises:
        AssertionError: Naming the claim that does not hold.
    """
    measure = measures.get(name)
    _check_hygiene(measure)
    _check_degree(measure)
    for symmetry in measures.SYMMETRIES:
        _check_symmetry_claim(measure, symmetry)
    if objectives is None:
        kinds = ("node_scale", "orthogonal")
        objectives = [symmetric_pair(kind, seed)[0] for kind in kinds for seed in SEEDS]
    for objective in objectives:
        estimate = _measure(name, objective)
        if measure.nonnegative:
            slack = estimate.probe_error or 0.0
            assert estimate.value >= -slack, f"{name}: negative value {estimate.value}"
        if exact is not None:
            _check_exact(name, estimate, exact(objective))


def trained_with_adam(objective: Objective) -> dict[str, Any]:
    """Return the state of an Adam that measures and their oracles may need.

    After one step of a copy, along the gradient divided by its length: its moments are as
    the parameters' symmetries have them, whatever the loss is multiplied by.
    """
    gradient = objective.gradient()
    parts = objective.space.unflatten(gradient / gradient.norm())
    copied = copy.deepcopy(objective.model)
    named = {n: p for n, p in copied.named_parameters() if n in parts}
    optimizer = torch.optim.Adam(named.items(), lr=0.1, eps=1e-3)
    for name, p in named.items():
        p.grad = parts[name].to(p).clone()
    optimizer.step()
    return optimizer.state_dict()


def _measure(name: str, objective: Objective, seed: int = 0, effort: int = 1) -> Estimate:
    settings = measures.get(name).settings
    draws = ("num_probes", "num_pairs")
    more = {k: effort * v for k, v in settings.items() if k in draws}
    optimizer = trained_with_adam(objective)
    result = score(objective, [(name, more)], seed=seed, num_groups=0, optimizer=optimizer)[0]
    assert result.estimate is not None, f"{name} failed: {result.error}"
    estimate: Estimate = result.estimate
    return estimate


def _check_exact(name: str, estimate: Estimate, truth: float) -> None:
    error = estimate.probe_error
    assert error is not None, f"{name}: no error is stated"
    gap, rounding = estimate.value - truth, 1e-9 * max(abs(truth), 1e-6)
    if estimate.error_kind == "stderr":
        assert abs(gap) <= DEVIATIONS * error + rounding, f"{name}: {estimate} for {truth}"
    elif estimate.error_kind == "lower_bound":
        assert gap <= rounding, f"{name}: {estimate.value} exceeds the maximum {truth}"
        if estimate.converged:
            assert gap >= -error - 0.02 * abs(truth), f"{name}: {estimate} for {truth}"
    else:
        assert abs(gap) <= error + rounding, f"{name}: {estimate} for {truth}"


def _check_hygiene(measure: measures.Measure) -> None:
    name = measure.name
    objective = symmetric_pair("node_scale", 0)[0]
    model = objective._evaluator.model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    states = _random_states()
    first, again = _measure(name, objective, 3), _measure(name, objective, 3)
    others = [n for n in measures.names() if n != name]
    optimizer = trained_with_adam(objective)
    everything = score(objective, [*others, name], seed=3, num_groups=0, optimizer=optimizer)
    beside = everything[name].estimate
    for other in (again, beside):
        same = (other.value, other.probe_error) == (first.value, first.probe_error)
        assert same, f"{name}: the same seed gave {first} and {other}"
    assert states == _random_states(), f"{name}: a global random state moved"
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()), (
        f"{name}: the model was changed"
    )
    assert all(p.grad is None for p in model.parameters()), f"{name}: .grad was written"
    assert type(first.value) is float, f"{name}: the value is a {type(first.value).__name__}"
    assert math.isfinite(first.value), f"{name}: the value is {first.value}"
    assert first.probe_error is not None, f"{name}: no error is stated"
    assert first.probe_error >= 0, f"{name}: the error is {first.probe_error}"
    scores = score(objective, [name], seed=3, optimizer=optimizer)
    (read,) = json.loads(scores.to_json(), parse_constant=_refuse_constant)
    assert read["estimate"]["value"] == first.value, f"{name}: JSON changes the value"
    assert read["settings"] == dict(measure.settings), f"{name}: JSON changes the settings"
    wrong: list[dict[str, Any]] = [{key: object()} for key in measure.settings]
    for bad in [{"no_such_setting": 1}, *wrong]:
        try:
            measure.complete(bad)
        except SettingsError:
            continue
        raise AssertionError(f"{name}: the settings {bad} were accepted")


def _random_states() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist()


def _refuse_constant(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


def _check_degree(measure: measures.Measure) -> None:
    c, name = 3.0, measure.name
    ratios = []
    for seed in SEEDS:
        plain, scaled = (_scaled_loss(seed, factor) for factor in (1.0, c))
        a, b = _measure(name, plain), _measure(name, scaled)
        ratios.append(b.value / a.value)
        if measure.degree is not None:
            expected = c**measure.degree
            assert abs(ratios[-1] - expected) <= EXACT * expected, (
                f"{name}: L -> {c:g} L multiplies it by {ratios[-1]}, not by {expected}"
            )
    if measure.degree is None:
        degrees = [math.log(abs(r)) / math.log(c) for r in ratios]
        spread = max(degrees) - min(degrees)
        assert spread > CHANGED, f"{name}: scales as c^{degrees[0]:.3f}; claim this degree"


def _scaled_loss(seed: int, factor: float) -> Objective:
    # Another scale of the network for each seed, so that no homogeneity is by chance.
    g = torch.Generator().manual_seed(seed)
    model = _relu_network(g)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.3 * seed)
    x = torch.randn(12, 4, generator=g, dtype=torch.float64)
    y = torch.randint(3, (12,), generator=g)

    def batch_loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        inputs, targets = batch
        total = nn.functional.cross_entropy(module(inputs), targets, reduction="sum")
        return factor * total, len(targets)

    return Objective.from_batch_loss(model, batch_loss, (x, y))


def _check_symmetry_claim(measure: measures.Measure, symmetry: str) -> None:
    name, moved = measure.name, 0.0
    for seed in SEEDS:
        before, after = symmetric_pair(symmetry, seed)
        effort = 1 if symmetry in measure.invariant_to else EFFORT  # to see a small change
        a, b = (_measure(name, objective, effort=effort) for objective in (before, after))
        size = max(abs(a.value), abs(b.value))
        errors = [e.probe_error or 0.0 for e in (a, b)]
        allowed = EXACT * size
        if a.error_kind == "stderr":
            allowed += DEVIATIONS * math.hypot(*errors)
        elif a.error_kind == "bound":
            allowed += sum(errors)
        gap = abs(a.value - b.value)
        if symmetry in measure.invariant_to:
            assert gap <= allowed, f"{name} claims {symmetry}, but moved from {a} to {b}"
        else:
            moved = max(moved, (gap - allowed) / size if size else 0.0)
    if symmetry not in measure.invariant_to:
        assert moved > CHANGED, f"{name} does not claim {symmetry}, but does not move under it"
