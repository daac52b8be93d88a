"""Exact values of the perturbation measures, by other means than sharpkit's own."""

import math

import torch


def rises(objective):
    theta, base = objective.theta, objective.value().item()
    return lambda delta: objective.at(theta + delta).value().item() - base


def parameters(objective):
    return objective.space.unflatten(objective.theta)


def asam_diagonal(objective, eta=0.01, weights_only=True):
    """|w| + eta for what is called a weight, 1 for the rest."""
    return torch.cat([
        (torch.ones_like(w) if weights_only and "weight" not in name else w.abs() + eta).reshape(-1)
        for name, w in parameters(objective).items()
    ])  # fmt: skip


def scales(objective, scaling):
    """The scale of each entry, by loops."""
    parts = []
    for w in parameters(objective).values():
        c = torch.empty_like(w)
        if scaling == "layer":
            c[...] = math.sqrt(sum(x**2 for x in w.reshape(-1).tolist()))
        elif scaling == "filter":
            for row, values in zip(c, w, strict=True):
                row[...] = math.sqrt(sum(x**2 for x in values.reshape(-1).tolist()))
        else:
            c = w.abs()
        parts.append(c.reshape(-1))
    return torch.cat(parts)


def example_squares(objective):
    """The mean square of the examples' gradients, each by an objective of its own."""
    rows = [shard.gradient() for shard in objective.shards(1)]
    return torch.stack(rows).square().mean(dim=0)


def climb(objective, chart, rho, cut, start, steps=400):
    """Plain projected gradient ascent with a falling step, from a start."""
    theta, base = objective.theta, objective.value().item()
    z, best = cut(start), 0.0
    for k in range(steps):
        point = (theta + chart(z)).requires_grad_()
        value, gradient = objective.at(point.detach()).value_and_gradient()
        best = max(best, value.item() - base)
        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(torch.dot(chart(z), gradient), z)
        heading = slope.sign() if cut.box else slope / slope.norm()
        z = cut(z.detach() + 0.5 * rho * 0.97**k * heading)
    return best


class Box:
    box = True

    def __init__(self, rho):
        self.rho = rho

    def __call__(self, z):
        return z.clamp(-self.rho, self.rho)


class Ball:
    box = False

    def __init__(self, rho):
        self.rho = rho

    def __call__(self, z):
        return z * min(1.0, self.rho / max(z.norm().item(), 1e-300))


def climbed(objective, diagonal, rho, box=False):
    """The maximum over ``|delta / diagonal| <= rho`` uphill from theta."""
    cut = Box(rho) if box else Ball(rho)
    slope = diagonal * objective.gradient()
    start = 2 * rho * (slope.sign() if box else slope / slope.norm())
    return climb(objective, lambda z: diagonal * z, rho, cut, start)


def asam(objective):
    return climbed(objective, asam_diagonal(objective), 0.5)


def fisher_sam(objective):
    diagonal = (1 + objective.gradient() ** 2).rsqrt()
    return climbed(objective, diagonal, 0.05)


def keskar(objective):
    top = climbed(objective, objective.theta.abs() + 1, 1e-3, box=True)
    return 100 * top / (1 + objective.value().item())


def m_sharpness(objective, m=128):
    """One shard holds all of the small networks' data."""
    assert objective.num_examples <= m
    return climbed(objective, torch.ones_like(objective.theta), 0.05)


def smoothed(objective, sigma=0.01, draws=2000):
    g = torch.Generator().manual_seed(11)
    rise, total = rises(objective), 0.0
    for _ in range(draws):
        z = sigma * torch.randn(objective.space.dim, generator=g, dtype=torch.float64)
        total += (rise(z) + rise(-z)) / 2
    return total / draws


def published(loss, slope, w, rho, norm, steps):
    """The published ascent of arXiv:2302.07011, from its description, with no bisection.

    Returns the rows (step length, projected point, perturbation, loss) and the highest rise.
    """
    marks, share, gap = [math.ceil(0.22 * steps)], 0.22, 0.22
    while marks[-1] < steps:
        gap = max(gap - 0.03, 0.06)
        share += gap
        if math.ceil(share * steps) == marks[-1]:
            break
        marks.append(math.ceil(share * steps))
    c, d, d_before = w.abs(), torch.zeros_like(w), torch.zeros_like(w)
    place, best, best_place = w, loss(w).item(), w
    base, eta, eta_seen, best_seen, mark, ups, rows = best, 2 * rho, 2 * rho, best, 0, 0, []
    for k in range(steps):
        g = slope(place)
        z = d + eta * c * (g.sign() if norm == "linf" else g / g.norm())
        z = z.clamp(-rho * c, rho * c) if norm == "linf" else nearest_on_ellipsoid(z, c, rho)
        d, d_before = 0.75 * z + 0.25 * d_before, d
        place = w + d
        now = loss(place).item()
        rows.append((eta, z, d, now))
        if now > best:
            best, best_place, ups = now, place, ups + 1
        if k in marks:
            halve = ups < 0.75 * (k - mark) or (eta == eta_seen and best == best_seen)
            eta_seen, best_seen, mark, ups = eta, best, k, 0
            if halve:
                eta, place = eta / 2, best_place
    return rows, best - base


def nearest_on_ellipsoid(z, c, rho):
    """The nearest point with ``|z / c| <= rho``, by the root of its multiplier."""
    if (z / c).norm() <= rho:
        return z
    low, high = 0.0, 1.0

    def size(x):
        return (z * c / (c**2 + x)).norm().item()

    while size(high) > rho:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) > rho else (low, middle)
    return z * c**2 / (c**2 + high)
