"""Directions that the loss itself singles out: eigenvectors, the gradient, worst perturbations."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.errors import MeasureError, SettingsError
from sharpkit.estimators.ascent import Norm, maximize_in_ball
from sharpkit.geometry.metrics import ElementwiseMetric, EuclideanMetric, Metric, scale_of
from sharpkit.landscape.section import Direction
from sharpkit.objective import Objective

__all__ = ["eigen_directions", "gradient_direction", "worst_direction"]

RISE = 0.1


def eigen_directions(
    objective: Objective,
    count: int = 2,
    *,
    which: Literal["largest", "smallest", "both"] = "largest",
    rise: float = RISE,
    tol: float = 1e-3,
    max_matvecs: int = 300,
    seed: int = 0,
) -> tuple[Direction, ...]:
    r"""Return eigenvectors of the Hessian, as they are, with steps of a stated rise.

    .. math:: Hv_i = \lambda_i v_i, \quad \|v_i\| = 1, \qquad
        s_i = \sqrt{2\,\Delta / |\lambda_i|}

    so that the quadratic model rises (falls, where the eigenvalue is negative) by
    :math:`\Delta` at x = 1 and -1. The vectors are never rescaled by filter or layer, which
    would make other directions of them. The sign, which is arbitrary, is that of the larger sum
    of cubes.

    Args:
        objective: Where.
        count: How many of an end; with ``"both"`` of each, largest first.
        which: ``"largest"`` (algebraic), ``"smallest"``: the most negative, or ``"both"``.
        rise: :math:`\Delta`, in units of the loss.
        tol: Relative tolerance of the eigenvalues.
        max_matvecs: Most Hessian-vector products.
        seed: Of Lanczos' start.

    Raises:
        SettingsError: If a setting makes no sense.
        MeasureError: If an eigenvalue is zero to rounding, so that no step gives the rise.

    When it misleads: where the gradient is not zero the loss at x = 1 is not L + Delta; draw the
    quadratic model beside it.

    Cost: the Hessian-vector products of a Lanczos run.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
        >>> objective = Objective(model, torch.nn.MSELoss(), data)
        >>> (d,) = eigen_directions(objective, 1, rise=0.5)
        >>> round(d.details["eigenvalue"], 4), round(d.step, 4)  # H = diag(4, 1)
        (4.0, 0.5)
    """
    if which not in ("largest", "smallest", "both"):
        raise SettingsError(
            f"Expected `which` to be 'largest', 'smallest' or 'both'. Got {which!r}."
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise SettingsError(f"Expected a count of at least 1. Got {count!r}.")
    _check_rise(rise)
    pairs = Analysis(objective, seed=seed).eigenpairs(
        k=count, which=which, tol=tol, max_matvecs=max_matvecs
    )
    found = []
    ends = (
        ("largest", pairs.largest, pairs.largest_vectors, pairs.largest_residuals,
         pairs.largest_converged),
        ("smallest", pairs.smallest, pairs.smallest_vectors, pairs.smallest_residuals,
         pairs.smallest_converged),
    )  # fmt: skip
    for end, values, vectors, errors, converged in ends:
        for i, value in enumerate(values):
            if not abs(value) > errors[i]:
                raise MeasureError(
                    "Expected an eigenvalue that is told from zero, to scale the step by. The"
                    f" {end} number {i + 1} is {value:.3g} +- {errors[i]:.2g}. Take another end,"
                    " or fewer."
                )
            vector = vectors[:, i].clone()
            if float(vector.double().pow(3).sum()) < 0:
                vector = -vector
            name = f"v{i + 1}" if end == "largest" else f"v-{i + 1}"
            notes: tuple[str, ...] = ()
            if not converged[i]:
                notes = (
                    f"The eigenvector {name} did not converge ({value:.4g} +- {errors[i]:.2g})."
                    " Give more max_matvecs.",
                )
            found.append(
                Direction(
                    vector,
                    kind="eigen",
                    label=_step_label(name, value, rise),
                    step=math.sqrt(2 * rise / abs(value)),
                    seed=seed,
                    details={
                        "eigenvalue": float(value),
                        "eigenvalue_error": float(errors[i]),
                        "end": end,
                        "rise": rise,
                        "converged": bool(converged[i]),
                    },
                    notes=notes,
                )
            )
    return tuple(found)


def _step_label(name: str, value: float, rise: float) -> str:
    word = "rise" if value > 0 else "fall"
    return f"{name} (lambda = {value:.3g}), steps of a quadratic {word} of {rise:g}"


def _check_rise(rise: float) -> None:
    if not (rise > 0 and math.isfinite(rise)):
        raise SettingsError(f"Expected a positive `rise`. Got {rise!r}.")


def gradient_direction(objective: Objective, *, rise: float = RISE) -> Direction:
    r"""Return the direction of the gradient, uphill, with a step of a stated rise.

    .. math:: v = g/\|g\|, \qquad
        s\,\|g\| + \tfrac12 s^2\,v^\top H v = \Delta

    the least positive s at which the quadratic model rises by :math:`\Delta`; where it never
    does (negative curvature), the linear model's :math:`\Delta/\|g\|`. It is at most
    :math:`\|\theta\|`. The label says how far the quadratic model really rises there.

    Args:
        objective: Where.
        rise: :math:`\Delta`, in units of the loss.

    Raises:
        SettingsError: If the rise is not positive.
        MeasureError: If the gradient is zero or not finite.

    Cost: a gradient and a Hessian-vector product.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> objective = Objective(model, torch.nn.MSELoss(), (torch.ones(1, 1), torch.zeros(1, 1)))
        >>> d = gradient_direction(objective, rise=3.0)  # L = w^2: from 1 to 4 at w = 2
        >>> d.vector.tolist(), round(d.step, 5)
        ([1.0], 1.0)
    """
    _check_rise(rise)
    gradient = objective.gradient()
    slope = float(gradient.norm())
    if not (slope > 0 and math.isfinite(slope)):
        raise MeasureError(
            f"Expected a gradient of positive, finite length. Got {slope:g}: theta is a stationary"
            " point. Take eigenvectors or random directions."
        )
    vector = gradient / slope
    bend = float(vector @ objective.hvp(vector))
    inside = slope**2 + 2 * bend * rise
    step = 2 * rise / (slope + math.sqrt(inside)) if inside >= 0 else rise / slope
    longest = float(objective.theta.norm())
    step = min(step, longest) if longest > 0 else step
    there = step * slope + step**2 * bend / 2
    return Direction(
        vector,
        kind="gradient",
        label=f"along the gradient, steps of {step:.3g} (a quadratic rise of {there:.3g})",
        step=step,
        details={"rise": there, "gradient_norm": slope, "curvature": bend},
    )


def worst_direction(
    objective: Objective,
    rho: float = 0.05,
    *,
    metric: Literal["euclidean", "adaptive"] | Metric = "euclidean",
    norm: Norm = "l2",
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
) -> Direction:
    r"""Return the perturbation of a ball at which an ascent found the largest loss.

    .. math:: \delta^\star \approx \arg\max_{\|M^{1/2}\delta\|_p \le \rho} L(\theta + \delta)

    Position 1 is the perturbation itself; the ascent is that of ``sam_sharpness`` and
    ``adaptive_sharpness_worst``.

    Args:
        objective: Where.
        rho: Radius of the ball, in its metric.
        metric: ``"euclidean"``, ``"adaptive"`` (relative to each weight), or a metric.
        norm: Of the ball: ``"l2"``, ``"linf"`` or ``"l1"``.
        steps: Gradients of an ascent.
        restarts: Ascents from random starts beside the one from theta.
        seed: Of the random starts.

    Raises:
        SettingsError: If a setting is unknown or rho is not positive.
        MeasureError: If the ascent met no higher loss.

    When it misleads: the maximum found is a lower bound, and the surface beside it is not the
    worst at other distances.

    Cost: (restarts + 1) * steps gradients.
    """
    chosen: Metric
    if isinstance(metric, str):
        if metric not in ("euclidean", "adaptive"):
            raise SettingsError(
                f"Expected a metric 'euclidean', 'adaptive' or an object. Got {metric!r}."
            )
        name, chosen = str(metric), _metric(objective, metric)
    else:
        name, chosen = type(metric).__name__, metric
    theta = objective.theta
    value, gradient = objective.value_and_gradient()

    def function(zeta: Tensor) -> tuple[float, Tensor]:
        there, slope = objective.at(theta + chosen.unwhiten(zeta)).value_and_gradient()
        return float(there), chosen.unwhiten(slope)

    generator = torch.Generator(theta.device).manual_seed(seed)
    ascent = maximize_in_ball(
        function,
        start_value=float(value),
        start_gradient=chosen.unwhiten(gradient),
        rho=rho,
        norm=norm,
        steps=steps,
        generator=generator,
        restarts=restarts,
        frozen=chosen.frozen,
    )
    if not ascent.value > float(value):
        raise MeasureError(
            f"Expected a higher loss inside the ball. The ascent found none within rho = {rho:g}"
            f" in {ascent.evaluations} steps. Give more `steps`, or a larger `rho`."
        )
    notes: tuple[str, ...] = ()
    if not ascent.converged:
        notes = ("The worst perturbation is where the ascent was stopped: give more `steps`.",)
    return Direction(
        chosen.unwhiten(ascent.point),
        kind="worst-case",
        label=f"multiples of the worst perturbation found (rho = {rho:g}, {name} {norm})",
        seed=seed,
        details={
            "rho": rho,
            "metric": name,
            "norm": norm,
            "rise": ascent.value - float(value),
            "converged": ascent.converged,
        },
        notes=notes,
    )


def _metric(objective: Objective, name: str) -> Metric:
    if name == "euclidean":
        return EuclideanMetric()
    return ElementwiseMetric(scale_of(objective.space, objective.theta, "elementwise"))
