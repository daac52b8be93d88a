"""The published code of arXiv:2302.07011, step by step: what it computes, its slips included.

Written from a description of github.com/tml-epfl/sharpness-vs-generalization at 4a953d39.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.errors import MeasureError, SettingsError
from sharpkit.estimators import perturbation
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures._groups import mean_over_shards
from sharpkit.results import Cost, Estimate

__all__ = ["RHO_GRIDS", "PublishedNorm", "published_average", "published_worst"]

PublishedNorm: TypeAlias = Literal["l2", "linf"]

RHO_GRIDS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "resnet18-cifar10": {
        "average_l2": (0.05, 0.1, 0.2, 0.4),
        "average_linf": (0.1, 0.2, 0.4, 0.8),
        "worst_l2": (0.25, 0.5, 1.0, 2.0),
        "worst_linf": (0.001, 0.002, 0.004, 0.008),
    },
    "vit-cifar10": {
        "average_l2": (0.1, 0.2, 0.4, 0.8),
        "average_linf": (0.1, 0.2, 0.4, 0.8),
        "worst_l2": (0.5, 1.0, 2.0, 4.0),
        "worst_linf": (0.0005, 0.001, 0.002, 0.004),
    },
}
"""The radii of the adaptive measures in the paper's scripts, with and without normalised
logits: 1024 training examples in batches of 128, 20 steps or draws, l2 and linf."""

LARGEST_MULTIPLIER = 10.0
TOLERANCE = 1e-5  # absolute, whatever rho
MOST_HALVINGS = 200  # the published loop has no end where rounding keeps it from its tolerance
MOMENTUM = 0.75


def check_published(scaling: str, restarts: int = 0) -> None:
    """Raise SettingsError for what the published code does not do."""
    if scaling != "elementwise" or restarts:
        raise SettingsError(
            "Expected scaling='elementwise' and restarts=0 with"
            f" compat='andriushchenko2023'. Got {scaling!r} and {restarts}. Leave compat out."
        )


def published_worst(
    analysis: Analysis,
    *,
    rho: float,
    norm: PublishedNorm,
    steps: int,
    shard_size: int | None,
    purpose: str,
) -> Estimate:
    """Return the mean over batches of the highest rise that the published ascent meets."""
    check_positive("rho", rho)
    check_positive("steps", steps, minimum=1)

    def of_batch(part: Analysis, _: str) -> Estimate:
        return _ascent(part, rho=rho, norm=norm, steps=steps)

    return mean_over_shards(
        analysis, of_batch, shard_size=shard_size, purpose=purpose, by_terms=False
    )


def published_average(
    analysis: Analysis,
    *,
    rho: float,
    norm: PublishedNorm,
    draws: int,
    shard_size: int | None,
    purpose: str,
) -> Estimate:
    """Return the mean over batches and single draws of the rise, as the published code does."""
    check_positive("rho", rho)
    check_positive("num_draws", draws, minimum=2)

    def of_batch(part: Analysis, own_purpose: str) -> Estimate:
        generator, scale = part.generator(own_purpose), part.theta.abs()
        base = float(part.objective.value())
        rises = [
            part.loss_at(rho * scale * perturbation(scale, norm, generator)) - base
            for _ in range(draws)
        ]
        x = torch.tensor(rises, dtype=torch.float64, device="cpu")
        if not bool(x.isfinite().all()):
            raise MeasureError(
                "Expected finite losses around the minimum. Some are not at"
                f" rho={rho:g}, so their mean is not either. Use a smaller rho."
            )
        return Estimate(
            float(x.mean()), float(x.var() / draws), "stderr", cost=Cost(forwards=draws + 1)
        )

    mean = mean_over_shards(
        analysis, of_batch, shard_size=shard_size, purpose=purpose, by_terms=False
    )
    # The losses at theta are in every rise, so their rounding does not average out.
    return _with_stderr(mean, analysis.rounding(analysis.value, analysis.value + mean.value))


def _with_stderr(mean: Estimate, rounding: float) -> Estimate:
    # Batches have draws of their own: their variances, not their errors, add up.
    count = mean.details["num_shards"]
    return Estimate(
        value=mean.value,
        probe_error=math.hypot(math.sqrt((mean.probe_error or 0.0) / count), rounding),
        error_kind="stderr",
        data_error=mean.data_error,
        cost=mean.cost,
        details={**mean.details},
        notes=mean.notes,
        data_draws=mean.data_draws,
    )


def published_marks(steps: int) -> set[int]:
    """Return the steps, counted from 0, after which the published ascent looks back."""
    parts, marks = [0.0, 0.22], [0, math.ceil(0.22 * steps)]
    while marks[-1] < steps and marks[-1] != marks[-2]:
        parts.append(parts[-1] + max(parts[-1] - parts[-2] - 0.03, 0.06))
        marks.append(math.ceil(parts[-1] * steps))
    return set(marks[1:])


def published_projection(delta: Tensor, size: Tensor, rho: float, norm: PublishedNorm) -> Tensor:
    """Return the perturbation cut to the ball ``|delta / size| <= rho`` as published.

    For l2 it is the nearest point of the ellipsoid to within an absolute 1e-5 of the radius.
    With a weight of exactly zero its norm is 0/0, and nothing is cut at all.
    """
    if norm == "linf":
        return torch.minimum(torch.maximum(delta, -rho * size), rho * size)

    def length(d: Tensor) -> float:
        return float((d / size).square().sum().sqrt())

    now = length(delta)
    if not now > rho:  # so too if it is not a number
        return delta
    cut, multiplier = delta, 0.1
    low, high, limit = 0.0, LARGEST_MULTIPLIER, LARGEST_MULTIPLIER
    for _ in range(MOST_HALVINGS):
        if abs(now - rho) <= TOLERANCE:
            break
        cut = delta / (1 + 2 * multiplier / size.square())
        now = length(cut)
        if now > rho:
            multiplier, low = (multiplier + high) / 2, multiplier
        else:
            multiplier, high = (low + multiplier) / 2, multiplier
        if limit - high < 1e-2:
            limit, high = 2 * limit, 2 * high
    return cut


def _ascent(analysis: Analysis, *, rho: float, norm: PublishedNorm, steps: int) -> Estimate:
    size = analysis.theta.abs()
    base, gradient = analysis.value, analysis.gradient
    best = (base, torch.zeros_like(size), gradient)
    eta = before_eta = 2 * rho
    best_before, last_mark, rises, non_finite = base, 0, 0, 0
    marks = published_marks(steps)
    delta = previous = torch.zeros_like(size)
    for step in range(steps):
        if norm == "l2":  # by the length of g, not of g |w|, as published
            moved = delta + eta / (gradient.norm() + 1e-12) * gradient * size
        else:
            moved = delta + eta * gradient.sign() * size
        moved = published_projection(moved, size, rho, norm)
        # As published: the average with the last-but-one point, not a step beyond the last.
        moved = MOMENTUM * moved + (1 - MOMENTUM) * previous
        previous, delta = delta, moved
        if step == steps - 1:
            loss = analysis.loss_at(delta)
        else:
            loss, gradient = analysis.loss_and_gradient_at(delta)
        non_finite += not math.isfinite(loss)
        if loss > best[0] and math.isfinite(loss):
            best, rises = (loss, delta, gradient), rises + 1
        if step in marks:
            few = rises < 0.75 * (step - last_mark)
            stuck = before_eta == eta and best_before == best[0]
            before_eta, best_before, last_mark, rises = eta, best[0], step, 0
            if few or stuck:  # the weights go back to the best, delta and previous do not
                eta /= 2
                gradient = best[2]
    notes = []
    if norm == "l2" and bool((size == 0).any()):
        notes.append(
            "Some parameters are exactly zero, where the published code does not project: the"
            " perturbation may be far longer than rho. Measure without compat."
        )
    if non_finite:
        notes.append(
            f"The loss was not finite at {non_finite} of {steps} steps; the value is the"
            " largest finite rise."
        )
    value = best[0] - base
    return Estimate(
        value=value,
        probe_error=analysis.rounding(best[0], base),
        error_kind="rounding",
        cost=Cost(gradients=steps),
        details={"perturbation_norm": float(best[1].norm())},
        notes=tuple(notes),
    )
