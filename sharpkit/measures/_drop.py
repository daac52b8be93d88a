"""What the measures of a drop share: how large a perturbation a network bears."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.estimators import NoiseLevel, WorstRadius, noise_level, worst_radius
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures._ball import lost_in_rounding
from sharpkit.results import ErrorKind, Estimate

Drop: TypeAlias = Literal["accuracy", "loss"]
Reference: TypeAlias = Literal["init", "origin"]

TOLERANCE = 0.02  # relative distance of the bounds of a worst-case radius
SLACK = 1e-9  # of one label, lost in rounding of a share
CONSTANT = 10.0  # that the published bounds add


def perturbation(analysis: Analysis, magnitude: bool, epsilon: float) -> Callable[..., Tensor]:
    """Return the map of sigma and z to the noise: of one size, or relative to the weights."""
    scale = analysis.theta.abs()
    if not magnitude:
        return lambda sigma, z: sigma * z
    if epsilon == 0:
        return lambda sigma, z: sigma * scale * z
    return lambda sigma, z: torch.hypot(sigma * scale, torch.full_like(scale, epsilon)) * z


def dropped(analysis: Analysis, drop: Drop) -> Callable[[Tensor], float]:
    """Return the map of a perturbation to what the accuracy loses, or the loss gains."""
    if drop == "loss":
        return lambda delta: analysis.loss_at(delta) - analysis.value
    before = analysis.error_rate
    return lambda delta: analysis.error_rate_at(delta) - before


def sigma_of(
    analysis: Analysis,
    *,
    magnitude: bool,
    drop: Drop,
    target: float,
    num_pairs: int,
    largest: float,
    epsilon: float = 0.0,
) -> NoiseLevel:
    """Return the standard deviation of the noise under which the mean drop is the target."""
    check_positive("epsilon", epsilon, minimum=0)
    fall, noise = dropped(analysis, drop), perturbation(analysis, magnitude, epsilon)
    return analysis.shared(
        ("noise_level", magnitude, drop, target, num_pairs, largest, epsilon),
        lambda: noise_level(
            lambda sigma, z: fall(noise(sigma, z)),
            target=target,
            like=analysis.theta,
            largest=largest,
            num_pairs=num_pairs,
            generator=analysis.generator("noise_level"),
        ),
    )


def of_sigma(
    analysis: Analysis,
    level: NoiseLevel,
    function: Callable[[float], float],
    *,
    drop: Drop,
    target: float,
    magnitude: bool,
    error_unreached: float,
) -> Estimate:
    """Return a function of sigma with the error from the draws."""
    details = {
        "sigma": level.sigma,
        "sigma_error": level.of(lambda s: s)[1] if level.reached else None,
        "bracket": list(level.bracket),
        "drop": drop,
        "target": target,
    }
    if not level.reached:
        return Estimate(
            value=function(level.sigma),
            probe_error=error_unreached,
            error_kind="bound",
            converged=False,
            details=details,
            notes=(unreached(drop, target, f"sigma = {level.sigma:g}"),),
        )
    value, error, draws = level.of(function)
    scale = analysis.theta.abs() if magnitude else torch.ones_like(analysis.theta)
    notes = lost_in_rounding(analysis, level.sigma * scale)
    return Estimate(
        value=value,
        probe_error=error,
        error_kind="stderr",
        converged=not notes,
        details=details,
        notes=notes,
        dof=len(draws) - 1,
        draws=draws,
    )


def unreached(drop: Drop, target: float, where: str) -> str:
    """Return the sentence for a drop that no perturbation up to the largest brings about."""
    what = "The accuracy does not drop" if drop == "accuracy" else "The loss does not rise"
    return (
        f"{what} by {target:g} up to {where}, the largest tried: the value is that at this"
        " largest one, a bound. Give a larger `largest` or a smaller `target`."
    )


def alpha_of(
    analysis: Analysis, *, magnitude: bool, drop: Drop, target: float, steps: int, largest: float
) -> WorstRadius:
    """Return the radius of the largest box in which no drop beyond the target was found.

    For the loss, the ascents climb the loss; for the accuracy, the margins of as many labels
    as must be missed for a drop beyond the target.
    """
    check_positive("target", target)
    fall = dropped(analysis, drop)
    theta = analysis.theta
    scale = theta.abs() if magnitude else torch.ones_like(theta)
    missing, allowed = 0, target
    if drop == "accuracy":
        labels, before = len(analysis.objective.margins()[0]), analysis.error_rate
        beyond = math.floor((target + before) * labels + SLACK) + 1
        missing = min(beyond, labels)
        # Half a label below, as differences of shares are rounded.
        allowed = (beyond - 0.5) / labels - before

    def function(z: Tensor) -> tuple[float, Tensor, float]:
        there = analysis.objective.at(theta + scale * z)
        if drop == "loss":
            loss, slope = there.value_and_gradient()
            return float(loss), scale * slope, float(loss) - analysis.value
        value, slope, errors = there.weakest_margins(missing)
        return value, scale * slope, errors - analysis.error_rate

    def compute() -> WorstRadius:
        value, gradient, _ = function(torch.zeros_like(theta))
        return worst_radius(
            function,
            lambda z: fall(scale * z),
            target=allowed,
            start_value=value,
            start_gradient=gradient,
            norm="linf",
            largest=largest,
            steps=steps,
            tolerance=TOLERANCE,
            generator=analysis.generator("worst_radius"),
        )

    return analysis.shared(("worst_radius", magnitude, drop, target, steps, largest), compute)


def of_alpha(
    analysis: Analysis,
    radius: WorstRadius,
    function: Callable[[float], float],
    *,
    drop: Drop,
    target: float,
    magnitude: bool,
    kind: ErrorKind = "lower_bound",
) -> Estimate:
    """Return a function of alpha, which the ascent bounds from above."""
    value = function(radius.upper)
    details = {"alpha": radius.upper, "alpha_not_found_below": radius.lower, "drop": drop,
               "target": target, "ascents": radius.ascents}  # fmt: skip
    if not radius.reached:
        return Estimate(
            value=value,
            probe_error=math.inf,
            error_kind="bound",
            converged=False,
            details=details,
            notes=(unreached(drop, target, f"alpha = {radius.upper:g}"),),
        )
    scale = analysis.theta.abs() if magnitude else torch.ones_like(analysis.theta)
    notes = lost_in_rounding(analysis, radius.upper * scale)
    room = abs(function(radius.lower) - value) if radius.lower > 0 else math.inf
    return Estimate(
        value=value,
        probe_error=room,
        error_kind=kind,
        converged=radius.lower > 0 and not notes,
        details=details,
        notes=notes,
    )


def sigma_of_alpha(alpha: float, dim: int) -> float:
    r"""Return the noise that stays in the box of size alpha with probability 1/2 at least.

    .. math:: P(\max_i |u_i| > \alpha) \le \omega e^{-\alpha^2 / 2\sigma^2} = 1/2
        \quad\text{at}\quad \sigma = \alpha / \sqrt{2 \log 2\omega}
    """
    return alpha / math.sqrt(2 * math.log(2 * dim))


def center(analysis: Analysis, reference: Reference) -> Tensor:
    """Return theta less the mean of the prior, in float64."""
    theta = analysis.theta.double()
    return theta - analysis.initial.double() if reference == "init" else theta


def sample_size(analysis: Analysis, num_examples: int | None) -> int:
    """Return m, the number of training examples."""
    if num_examples is None:
        return analysis.objective.num_examples
    check_positive("num_examples", num_examples, minimum=1)
    return num_examples


def bound_of(
    analysis: Analysis, reference: Reference, num_examples: int | None
) -> Callable[[float], float]:
    """Return the PAC-Bayes bound as a function of sigma."""
    square = float(center(analysis, reference).square().sum())
    m = sample_size(analysis, num_examples)
    return lambda sigma: square / (4 * sigma**2) + math.log(m / sigma) + CONSTANT


def magnitude_bound_of(
    analysis: Analysis, reference: Reference, num_examples: int | None, epsilon: float
) -> Callable[[float], float]:
    """Return the magnitude-aware PAC-Bayes bound as a function of sigma'."""
    check_positive("epsilon", epsilon)
    theta, moved = analysis.theta.double(), center(analysis, "init")
    mean = float((moved if reference == "init" else theta).square().mean())
    squares, m = moved.square(), sample_size(analysis, num_examples)

    def bound(sigma: float) -> float:
        top = epsilon**2 + (sigma**2 + 1) * mean
        spread = float((top / (epsilon**2 + sigma**2 * squares)).log().sum())
        return spread / 4 + math.log(m / sigma) + CONSTANT

    return bound
