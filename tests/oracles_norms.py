"""Exact values of the norms, margins and PAC-Bayes measures, written another way."""

import itertools
import math

import torch
from torch.func import functional_call, jacrev, vmap

from sharpkit.testing import initial_of

DRAWS = 20000


def data_of(objective):
    (batch,) = list(objective._evaluator._data)
    return batch


def outputs_at(objective):
    x = data_of(objective)[0]
    return lambda theta: functional_call(objective.model, objective.space.unflatten(theta), (x,))


def example_gradients(objective):
    """Differentiate each example's loss by torch.func."""
    x, y = data_of(objective)
    criterion = objective.criterion

    def losses(theta):
        parts = objective.space.unflatten(theta)
        return torch.stack(
            [
                criterion(functional_call(objective.model, parts, (a[None],)), b[None])
                for a, b in zip(x, y, strict=True)
            ]
        )

    return jacrev(losses)(objective.theta).detach()


def fisher_rao(objective):
    return (example_gradients(objective) @ objective.theta).square().mean().item()


def noise_scale(objective):
    g = example_gradients(objective)
    trace = torch.cov(g.T).trace().item()
    return trace / (g.mean(0).square().sum().item() - trace / len(g))


def margins(objective):
    z, y = outputs_at(objective)(objective.theta), data_of(objective)[1]
    if z.ndim == 1:
        return (2 * y - 1) * z
    rows = []
    for row, label in zip(z.tolist(), y.tolist(), strict=True):
        rest = [v for j, v in enumerate(row) if j != label]
        rows.append(row[label] - max(rest))
    return torch.tensor(rows, dtype=torch.float64)


def tenth(objective):
    return torch.quantile(margins(objective).detach(), 0.1).item()


def path_norm(objective):
    """Multiply squared matrices of a ReLU network, biases as inputs of their own."""
    parts = objective.space.unflatten(objective.theta)
    total = None
    for i in (0, 2, 4):
        W, b = parts[f"{i}.weight"].square(), parts[f"{i}.bias"].square()
        total = W.sum(dim=1) + b if total is None else W @ total + b
    return math.sqrt(total.sum().item())


def log_spectral(objective):
    parts = objective.space.unflatten(objective.theta)
    weights = [parts[f"{i}.weight"] for i in (0, 2, 4)]
    return sum(math.log(torch.linalg.eigvalsh(W @ W.T)[-1].item()) for W in weights)


def error_rates(objective, thetas):
    y = data_of(objective)[1]
    z = vmap(outputs_at(objective))(thetas)
    right = z.argmax(dim=2) == y if z.ndim == 3 else (z > 0) == (y > 0.5)
    return 1 - right.double().mean(dim=1)


def sigma(objective, magnitude, target=0.1, draws=DRAWS, epsilon=0.0):
    """Bisect the mean drop in accuracy over very many draws."""
    g = torch.Generator().manual_seed(77)
    theta = objective.theta
    Z = torch.randn(draws // 2, len(theta), generator=g, dtype=torch.float64)
    base = error_rates(objective, theta[None]).item()

    def drop(s):
        variance = s**2 * theta**2 + epsilon**2 if magnitude else torch.full_like(theta, s**2)
        steps = variance.sqrt() * Z
        both = [error_rates(objective, theta + sign * steps).mean().item() for sign in (1, -1)]
        return sum(both) / 2 - base

    low, high = 1e-4, 2.0
    for _ in range(25):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if drop(middle) > target else (middle, high)
    return math.sqrt(low * high)


def bound(square, noise, count):
    return square / 4 / noise**2 + math.log(count / noise) + 10


def pac_bayes_bound(objective):
    moved = objective.theta - initial_of(objective)
    return bound(moved.square().sum().item(), sigma(objective, False), len(data_of(objective)[0]))


def magnitude_bound(objective, noise, epsilon=1e-3):
    d = (objective.theta - initial_of(objective)).tolist()
    mean = sum(v * v for v in d) / len(d)
    total = sum(
        math.log((epsilon**2 + (noise**2 + 1) * mean) / (epsilon**2 + noise**2 * v * v)) for v in d
    )
    return total / 4 + math.log(len(data_of(objective)[0]) / noise) + 10


def pac_bayes_magnitude_bound(objective):
    return magnitude_bound(objective, sigma(objective, True, epsilon=1e-3))


def alpha(objective, magnitude, target=0.1, schedules=((25, 0.8),)):
    """Search boxes of bisected size, once for every set of labels that would be enough.

    A schedule is a number of steps and what each is shortened by.
    """
    theta, y = objective.theta, data_of(objective)[1]
    scale = theta.abs() if magnitude else torch.ones_like(theta)
    needed = math.floor(target * len(y)) + 1  # the labels are the network's own
    sets = torch.zeros(math.comb(len(y), needed), len(y)).double()
    for row, chosen in zip(sets, itertools.combinations(range(len(y)), needed), strict=True):
        row[list(chosen)] = 1

    def loss(v, chosen):
        z = outputs_at(objective)(v)
        if z.ndim == 1:
            m = (2 * y - 1) * z
        else:
            other = z.masked_fill(torch.nn.functional.one_hot(y, z.shape[1]).bool(), -math.inf)
            m = z.gather(1, y[:, None])[:, 0] - other.amax(1)
        return -(chosen * m.clamp(min=0)).sum()

    slopes = vmap(torch.func.grad(loss))

    def found(radius):
        for steps, shortened in schedules:
            z = torch.zeros(len(sets), len(theta)).double()
            for k in range(steps):
                step = 2 * radius * shortened**k
                z = z + step * slopes(theta + scale * z, sets).sign()
                z = z.clamp(-radius, radius)
                if (error_rates(objective, theta + scale * z) > target).any():
                    return True
        return False

    low, high = 1e-4, 2.0
    for _ in range(14):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if found(middle) else (middle, high)
    return math.sqrt(low * high)


def in_the_box(radius, objective):
    """Return the sigma that keeps all entries in the box half of the time, by the union bound."""
    return radius / math.sqrt(2 * math.log(2 * objective.space.dim))


def sharpness_bound(objective):
    square = (objective.theta - initial_of(objective)).square().sum().item()
    noise = in_the_box(alpha(objective, False), objective)
    return bound(square, noise, len(data_of(objective)[0]))


def sharpness_magnitude_bound(objective):
    return magnitude_bound(objective, in_the_box(alpha(objective, True), objective))
