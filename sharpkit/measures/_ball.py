"""What the worst-case measures share: ascents over the ball of a metric."""

from __future__ import annotations

from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.errors import SettingsError
from sharpkit.estimators import maximize_in_ball, steepest
from sharpkit.estimators.ascent import Norm
from sharpkit.geometry import Metric
from sharpkit.results import Cost, Estimate


def one_step_rise(analysis: Analysis, metric: Metric, rho: float, norm: Norm) -> Estimate:
    """Return the rise of the loss at the first-order worst point of the ball."""
    if not rho > 0:
        raise SettingsError(f"Expected `rho` to be greater than 0. Got {rho!r}.")
    slope = metric.unwhiten(analysis.gradient)
    delta = metric.unwhiten(rho * steepest(slope, norm))
    value = analysis.loss_at(delta)
    notes: tuple[str, ...] = ()
    if not bool(slope.any()):
        notes = ("The gradient is exactly zero, so the first-order worst point is theta.",)
    return Estimate(
        value=value - analysis.value,
        probe_error=analysis.rounding(value, analysis.value),
        error_kind="rounding",
        cost=Cost(gradients=1, forwards=1),
        details={"perturbation_norm": float(delta.norm())},
        notes=notes,
    )


def worst_rise(
    analysis: Analysis, metric: Metric, *, rho: float, norm: Norm, steps: int, purpose: str
) -> Estimate:
    """Return the largest rise that an ascent in whitened coordinates met in the ball."""

    def function(zeta: Tensor) -> tuple[float, Tensor]:
        value, gradient = analysis.loss_and_gradient_at(metric.unwhiten(zeta))
        return value, metric.unwhiten(gradient)

    ascent = maximize_in_ball(
        function,
        start_value=analysis.value,
        start_gradient=metric.unwhiten(analysis.gradient),
        rho=rho,
        norm=norm,
        steps=steps,
        generator=analysis.generator(purpose),
    )
    notes = []
    if not ascent.converged:
        notes.append(
            f"The ascent still had {ascent.gap:.2g} of first-order room after {steps} steps:"
            " the true maximum may be larger. Give more `steps`."
        )
    if ascent.non_finite:
        notes.append(
            f"The loss was not finite at {ascent.non_finite} of {steps} steps inside the"
            " ball; the value is the largest finite rise."
        )
    delta = metric.unwhiten(ascent.point)
    return Estimate(
        value=ascent.value - analysis.value,
        probe_error=max(ascent.gap, analysis.rounding(ascent.value, analysis.value)),
        error_kind="lower_bound",
        converged=ascent.converged,
        cost=Cost(gradients=ascent.evaluations + 1),
        details={
            "perturbation_norm": float(delta.norm()),
            "non_finite_steps": ascent.non_finite,
        },
        notes=tuple(notes),
    )
