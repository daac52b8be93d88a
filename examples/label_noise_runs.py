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
Log = dict[str, Tensor]


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


MATRICES = (Matrix(15, 1), Matrix(20, 2, ((2, (0.005, 0.01)), (5, (0.0025, 0.005)))))
ADAM_RATES = (1e-3, 3e-3)


def settled(old: float, new: float, scale: float = 0.0) -> bool:
    """Whether a number changed by less than a share of itself, or of ``scale``."""
    return abs(new - old) < SETTLED * max(abs(old), scale)


def converged(row: Record, before: float, bound: float) -> bool:
    """Whether the end of a run is one; ``before`` is its test loss in the fifth before.

    The test loss of a run that has recovered is small and noisy: there the mean weights must
    have less than half of it, so that what is left is noise.
    """
    return (
        abs(row["drift"]) < SETTLED
        and row["over the floor"] < FLOOR
        and (
            row["test loss of the mean"] < row["test loss"] / 2
            if row["recovered"]
            else settled(before, row["test loss"], bound)
        )
    )


def sparse_part(part: Sparse, tell: Callable[[str], None]) -> Record:
    """Train and measure on all sizes; one record a run."""
    data = nets.diagonal_data(part.seeds, max(part.sizes), part.d, part.kappa)
    runs: list[Record] = []
    measured: list[Record] = []
    least: list[Record] = []
    for n in part.sizes:
        few = nets.Data(data.inputs[:, :n].contiguous(), data.targets[:, :n], data.teacher)
        groups = nets.groups(torch.full((part.seeds, 2 * part.d), START), part.settings)
        logs: list[list[Log]] = [[] for _ in groups]

        def look(step: int, groups: list[nets.Descent], few=few, logs=logs) -> None:
            if step <= part.steps * (1 - 2 / 5):
                return
            for group, log in zip(groups, logs, strict=True):
                numbers = nets.diagonal_numbers(group.theta, few.inputs, few.teacher)
                numbers["own"] = nets.diagonal_power(group.theta, 1 - group.power)
                numbers["w"] = nets.predictor(group.theta.double())
                log.append(numbers)

        nets.train(
            groups, few, nets.diagonal_gradient, look,
            steps=part.steps, batch=part.batch, noise=part.noise, every=part.steps // LOOKS,
        )  # fmt: skip
        for group, log in zip(groups, logs, strict=True):
            runs += sparse_records(part, n, group, log, few.teacher)
            for k, setting in enumerate(group.settings):
                if bool(torch.isfinite(group.theta[0, k]).all()):
                    measured.append(measure_diagonal(group.theta[0, k], few, n, setting, part))
        least += least_norms(part, few, n, least)
        strict(part, runs, least)
        tell(f"d = {part.d}, n = {n}")
    return {"runs": runs, "least": least, "measured": measured}


def strict(part: Sparse, runs: list[Record], least: list[Record]) -> None:
    """Take back that SGD has converged where it has not recovered and its regularizer would.

    The least l1 norm minimizes tr H; where that is the teacher, SGD is still on its way, however
    slowly.
    """
    plain = {s.name for s in part.settings if s.power == 0}
    known = {(r["n"], r["seed"]) for r in least if r["recovered"]}
    for row in runs:
        if row["name"] in plain and (row["n"], row["seed"]) in known and not row["recovered"]:
            row["converged"] = False


def sparse_records(
    part: Sparse, n: int, group: nets.Descent, log: list[Log], teacher: Tensor
) -> list[Record]:
    """Return a record for each seed and setting from the looks at the last two fifths."""
    before, end = (
        {name: torch.stack([numbers[name] for numbers in half]).mean(0) for name in log[0]}
        for half in (log[: LOOKS // 5], log[LOOKS // 5 :])
    )
    mean = end.pop("w")
    end["test loss of the mean"] = (mean - teacher[:, None]).square().sum(-1) / 2
    bound = RECOVERED * part.kappa / 2
    rows = []
    for k, setting in enumerate(group.settings):
        floors = nets.noise_floor(setting, end["own"][:, k], part.noise, part.batch)
        for seed in range(part.seeds):
            row: Record = {name: float(v[seed, k]) for name, v in end.items()}
            own, loss = (float(before[name][seed, k]) for name in ("own", "test loss"))
            row |= {
                "n": n, "seed": seed, "name": setting.name,
                "over the floor": row["train loss"] / float(floors[seed]),
                "drift": row["own"] / own - 1,
                "recovered": row["test loss"] < bound,
            }  # fmt: skip
            row["converged"] = converged(row, loss, bound)
            rows.append(row)
    return rows


def least_norms(part: Sparse, data: nets.Data, n: int, before: list[Record]) -> list[Record]:
    """Return the least l1 norm of each seed.

    A teacher that is the minimizer for some examples is so for more: fewer are the first.
    """
    rows = []
    for seed in range(part.seeds):
        if any(r["seed"] == seed and r["test loss"] == 0 for r in before):
            w = data.teacher[seed].double()
        else:
            w = nets.least_l1(data.inputs[seed], data.targets[seed])
            if (w - data.teacher[seed]).abs().max() < 1e-3:  # found, up to the solver's accuracy
                w = data.teacher[seed].double()
        loss = float((w - data.teacher[seed]).square().sum() / 2)
        rows.append({
            "n": n, "seed": seed, "test loss": loss, "l1": float(w.abs().sum()),
            "l0.5": float(w.abs().sqrt().sum() ** 2),
            "recovered": loss < RECOVERED * part.kappa / 2,
        })  # fmt: skip
    return rows


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
    row: Record = {"n": n, "name": setting.name}
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
                if not bool(torch.isfinite(factors).all()):
                    continue  # diverged: nothing to measure
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
