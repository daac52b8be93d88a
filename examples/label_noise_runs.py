"""The two experiments on label noise: what is trained, and what is kept of each run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import label_noise_nets as nets
import numpy as np
import torch
from label_noise_nets import Setting
from torch import Tensor

import sharpkit as sk

START = 0.1  # every initial weight of the diagonal network
LOOKS = 100  # evenly spaced looks at a training; the last fifth of them is the end
SETTLED = 0.05  # what a number may change from the last but one fifth to the last
FLOOR = 2.0  # how many times the noise floor the train loss may be
RECOVERED = 1 / 25  # of the test loss of predicting 0: a test loss of 1 in the paper's setting
Record = dict[str, Any]


def adam(lr: float, c: float) -> Setting:
    """Return Adam with 1 - beta2 = c lr^2."""
    return Setting(lr, 0.5, 1 - c * lr**2)


@dataclass(frozen=True)
class Sparse:
    """One experiment on diagonal networks."""

    d: int
    kappa: int
    sizes: tuple[int, ...]
    seeds: int
    batch: int
    steps: int
    settings: tuple[Setting, ...]
    noise: float = 1.0


RATES, SGD_RATES = (0.004, 0.008, 0.016), (0.02, 0.04, 0.08)
SCALED = Sparse(
    400, 8, (24, 32, 40, 48, 56, 64, 80), 9, 8, 60_000,
    (
        *(Setting(lr) for lr in SGD_RATES),
        *(adam(lr, c) for c in (10, 100) for lr in RATES),
        Setting(0.016, 0.25), Setting(0.002, 0.75),
    ),
)  # fmt: skip
LARGE = Sparse(
    10_000, 50, (300, 400, 420, 500, 1000), 2, 16, 60_000,
    (Setting(0.04), adam(0.008, 10), adam(0.008, 100)),
)  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """One experiment on matrix factorization."""

    d: int
    rank: int
    rates: tuple[tuple[int, tuple[float, ...]], ...] = ((2, (0.01, 0.02)), (5, (0.005, 0.01)))
    n: int = 100
    seeds: int = 6
    batch: int = 10
    steps: int = 60_000
    noise: float = 0.5


MATRICES = (Matrix(15, 1), Matrix(20, 2))
ADAM_RATES = (1e-3, 3e-3)


def settled(old: float, new: float, scale: float = 0.0) -> bool:
    """Whether a number changed by less than a share of itself, or of ``scale``."""
    return abs(new - old) < SETTLED * max(abs(old), scale)


def sparse_part(part: Sparse, tell: Callable[[str], None]) -> Record:
    """Train and measure on all sizes; one record a run."""
    data = nets.diagonal_data(part.seeds, max(part.sizes), part.d, part.kappa)
    blank = part.kappa / 2  # the test loss of 0
    runs: list[Record] = []
    least: list[Record] = []
    measured: list[Record] = []
    done = [False] * part.seeds
    for n in part.sizes:
        few = nets.Data(data.inputs[:, :n].contiguous(), data.targets[:, :n], data.teacher)
        groups = nets.groups(torch.full((part.seeds, 2 * part.d), START), part.settings)
        logs: list[list[dict[str, Tensor]]] = [[] for _ in groups]
        means = [torch.zeros(part.seeds, len(g.settings), part.d).double() for g in groups]

        def look(step, groups, few=few, logs=logs, means=means):
            if step < part.steps * 0.6 + 1:
                return
            for group, log, mean in zip(groups, logs, means, strict=True):
                numbers = nets.diagonal_numbers(group.theta, few.inputs, few.teacher)
                power = 1 - group.power
                numbers["own"] = nets.diagonal_power(group.theta, power)
                log.append(numbers)
                if step > part.steps * 0.8:
                    mean += nets.predictor(group.theta.double()) / (LOOKS // 5)

        nets.train(
            groups, few, nets.diagonal_gradient, look,
            steps=part.steps, batch=part.batch, noise=part.noise, every=part.steps // LOOKS,
        )  # fmt: skip
        for group, log, mean in zip(groups, logs, means, strict=True):
            averaged = (mean - few.teacher[:, None]).square().sum(-1) / 2
            before, end = (
                {k: torch.stack([look[k] for look in half]).mean(0) for k in log[0]}
                for half in (log[: LOOKS // 5], log[LOOKS // 5 :])
            )
            for k, setting in enumerate(group.settings):
                floor = nets.noise_floor(setting, end["own"][:, k], part.noise, part.batch)
                for seed in range(part.seeds):
                    row = {name: float(v[seed, k]) for name, v in end.items()}
                    old = {name: float(v[seed, k]) for name, v in before.items()}
                    row |= {
                        "n": n, "seed": seed, "name": setting.name,
                        "test loss of the mean": float(averaged[seed, k]),
                        "over the floor": row["train loss"] / float(floor[seed]),
                        "drift": row["own"] / old["own"] - 1,
                        "recovered": row["test loss"] < RECOVERED * blank,
                    }  # fmt: skip
                    row["converged"] = bool(
                        settled(old["own"], row["own"])
                        and settled(old["test loss"], row["test loss"], RECOVERED * blank)
                        and row["over the floor"] < FLOOR
                    )
                    runs.append(row)
                measured.append(measure_diagonal(group.theta[0, k], few, n, setting, part))
        for seed in range(part.seeds):
            if not done[seed]:
                w = nets.least_l1(few.inputs[seed], few.targets[seed])
                loss = float((w - few.teacher[seed]).square().sum() / 2)
                done[seed] = loss < 1e-6 * blank  # then it is so with more examples too
                l1 = float(w.abs().sum())
                half = float(w.abs().sqrt().sum() ** 2)
            least.append({"n": n, "seed": seed, "test loss": loss if not done[seed] else 0.0,
                          "l1": l1 if not done[seed] else float(part.kappa),
                          "l0.5": half if not done[seed] else float(part.kappa**2),
                          "recovered": done[seed] or loss < RECOVERED * blank})  # fmt: skip
        tell(f"d = {part.d}, n = {n}")
    return {"runs": runs, "least": least, "measured": measured}


def measure_diagonal(
    theta: Tensor, data: nets.Data, n: int, setting: Setting, part: Sparse
) -> Record:
    """Measure the end point of the first seed with sharpkit, beside the closed forms."""
    theta = theta.double()
    pairs = (data.inputs[0].double(), data.targets[0].double())
    objective = sk.Objective(nets.Diagonal(theta), nets.half_square, pairs)
    small = part.d <= 1000
    probes = 2 * part.d if small else 64
    specs = [f"hessian_trace:num_probes={probes}", "adam_sharpness:method=ggn"]
    specs += ["adam_sharpness:method=exact"] if small else []
    row: Record = {"n": n, "name": setting.name, "small": small}
    for spec, score in zip(specs, sk.score(objective, specs, num_groups=0), strict=True):
        assert score.estimate is not None, score.error
        row[spec.split("=")[-1] if "adam" in spec else "trace"] = score.estimate.value
        if "trace" in spec:
            row["trace error"] = score.estimate.probe_error
    closed = nets.diagonal_numbers(theta[None, None], data.inputs[:1], data.teacher[:1])
    return row | {"closed " + k: float(closed[k]) for k in ("tr H", "tr diag(H)^1/2")}


def matrix_part(part: Matrix, tell: Callable[[str], None]) -> Record:
    """Train factorizations of two depths; curves along the training, and the ends."""
    data = nets.factored_data(part.seeds, part.n, part.d, part.rank)
    found: Record = {}
    for depth, rates in part.rates:
        shape = (depth, part.d, part.d)
        starts = torch.empty(part.seeds, *shape)
        for seed in range(part.seeds):
            generator = torch.Generator().manual_seed(2000 + seed)
            starts[seed] = torch.randn(shape, generator=generator) / part.d**0.5
        settings = [Setting(lr) for lr in rates] + [Setting(lr, 0.5) for lr in ADAM_RATES]
        groups = nets.groups(starts.flatten(1), settings)
        curves: dict[str, list[dict[str, list[float]]]] = {s.name: [] for s in settings}

        def gradient(theta, inputs, targets, shape=shape):
            return nets.factored_gradient(theta.unflatten(-1, shape), inputs, targets).flatten(2)

        def look(_, groups, shape=shape, curves=curves):
            for group in groups:
                factors = group.theta.unflatten(-1, shape)
                numbers = nets.factored_numbers(factors, data.inputs, data.teacher)
                for k, setting in enumerate(group.settings):
                    curves[setting.name].append({a: b[:, k].tolist() for a, b in numbers.items()})

        nets.train(
            groups, data, gradient, look,
            steps=part.steps, batch=part.batch, noise=part.noise, every=part.steps // LOOKS,
        )  # fmt: skip
        measured = []
        for group in groups:
            for k, setting in enumerate(group.settings):
                factors = group.theta[0, k].unflatten(-1, shape).double()
                pairs = (data.inputs[0].double(), data.targets[0].double())
                objective = sk.Objective(nets.Factored(factors), torch.nn.MSELoss(), pairs)
                p = factors.numel()
                specs = [f"hessian_trace:num_probes={p}", "adam_sharpness:method=ggn"]
                values = [float(s.estimate) for s in sk.score(objective, specs, num_groups=0)]
                diagonal = nets.factored_diagonal(factors, pairs[0])
                measured.append({
                    "name": setting.name, "trace": values[0], "ggn": values[1],
                    "closed tr H": float(diagonal.sum()),
                    "closed tr diag(H)^1/2": float(diagonal.sqrt().sum()),
                })  # fmt: skip
        found[str(depth)] = {"curves": curves, "measured": measured}
        tell(f"{part.d} x {part.d} of rank {part.rank}, depth {depth}")
    return found


def ends(curve: list[dict[str, list[float]]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return means over the last but one fifth of the looks and over the last, one a seed."""
    values = np.array([look[name] for look in curve])
    fifth = LOOKS // 5
    return values[-2 * fifth : -fifth].mean(axis=0), values[-fifth:].mean(axis=0)


def quick(part: str) -> list[Sparse | Matrix]:
    """Return small versions of the parts."""
    pair = (Setting(0.04), adam(0.016, 10), Setting(0.016, 0.25), Setting(0.002, 0.75))
    return {
        "scaled": [Sparse(40, 2, (8, 24), 6, 4, 1000, pair)],
        "large": [Sparse(60, 2, (10, 30), 2, 4, 1000, pair[:2])],
        "matrix": [Matrix(4, 1, ((2, (0.02,)), (5, (0.01,))), n=12, seeds=6, steps=600)],
    }[part]  # type: ignore[return-value]
