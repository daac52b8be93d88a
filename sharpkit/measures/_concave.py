"""Sums of concave functions of noisy traces, such as the root of a diagonal, and their bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sharpkit.analysis import Analysis, DiagonalMethod
from sharpkit.estimators import Diagonal, SketchedDiagonal
from sharpkit.results import Cost, Estimate

BIAS_TOLERANCE = 0.1  # of the value: a larger bias means "not converged"
SAFETY = 1.5  # how much the extrapolated bias is widened to be a bound
DEVIATIONS = 2  # standard errors of the sum's own scatter that the bound holds beside
CLEAR = 4  # standard errors from zero: such a trace's bias follows from its derivatives
REPEATS = 8
NOISE_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # added variance, in units of the present one


@dataclass(frozen=True)
class Traces:
    """Entries or traces of blocks, with their errors.

    Attributes:
        values: ``[B]``, float64.
        errors: One standard error of each; zeros if exact.
        variances: A weighted sum has at most the variance ``sum w^2 variances``.
        rounding: How far off the products may put each.
        kind: ``"exact"``, ``"ggn"``, ``"hutchinson"`` or ``"xdiag"``.
        num_probes: Probes used; 0 if exact.
        cost: What it cost.
        diagonal: What the values are entries of, if that knows its own sums' errors.
    """

    values: Tensor
    errors: Tensor
    variances: Tensor
    rounding: Tensor
    kind: str
    num_probes: int
    cost: Cost
    diagonal: SketchedDiagonal | None = field(default=None, repr=False)

    @property
    def exact(self) -> bool:
        """Whether only rounding is left."""
        return self.num_probes == 0

    def to(self, device: torch.device) -> Traces:
        """Return the same on a device."""
        tensors = ("values", "errors", "variances", "rounding")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


@dataclass(frozen=True)
class Concave:
    """A number made of traces that are not negative, concave in them.

    Attributes:
        value: Of the traces ``[B]``, none negative.
        slope: Its derivatives ``[B]`` at positive traces.
        powers: How its bias grows with the noise s where traces are below it: ``s^power``.
        bend: Its second derivatives ``[B]``, without the sign, if it is a sum over traces; then the
            bias of clear ones is taken from these. None: all are extrapolated together.
    """

    value: Callable[[Tensor], float]
    slope: Callable[[Tensor], Tensor]
    powers: tuple[float, ...] = (0.5,)
    bend: Callable[[Tensor], Tensor] | None = None

    def clipped(self, values: Tensor) -> float:
        """Return the number of traces of which negative ones count as 0."""
        return self.value(values.clamp(min=0))


def entries(analysis: Analysis, *, method: DiagonalMethod, num_probes: int) -> Traces:
    """Return the diagonal of the Hessian, or of the GGN."""
    diagonal = analysis.diagonal(method=method, num_probes=num_probes)
    return of_diagonal(diagonal, method=method, product_error=analysis.product_error)


def of_diagonal(diagonal: Diagonal, *, method: str, product_error: float) -> Traces:
    """Return a diagonal's entries; ``product_error`` is the relative one of its products."""
    h, se = diagonal.values.double(), diagonal.errors.double()
    return Traces(
        values=h,
        errors=se,
        # The entries' covariances A_ij^2 / m are at most such that the variance of a
        # weighted sum is twice that of independent entries.
        variances=2 * se.square(),
        rounding=torch.full_like(h, product_error * float(h.abs().max())),
        kind=_kind(diagonal, method),
        num_probes=diagonal.num_probes,
        cost=_cost(diagonal, method, len(h)),
        diagonal=diagonal if isinstance(diagonal, SketchedDiagonal) else None,
    )


def _kind(diagonal: Diagonal, method: str) -> str:
    if diagonal.exact:
        return "ggn" if method == "ggn" else "exact"
    return "xdiag" if isinstance(diagonal, SketchedDiagonal) else "hutchinson"


def _cost(diagonal: Diagonal, method: str, dim: int) -> Cost:
    if method == "ggn":
        return Cost(gradients=diagonal.num_gradients)
    return Cost(hvps=dim if diagonal.exact else diagonal.num_probes)


def concave_estimate(
    analysis: Analysis, purpose: str, traces: Traces, function: Concave, *, what: str = "diagonal"
) -> Estimate:
    """Return the number of noisy traces with a bound of its error.

    Args:
        analysis: Source of random numbers, by the purpose.
        purpose: The measure's name.
        traces: The traces.
        function: The number.
        what: What the traces are, for the sentences.
    """
    t = traces.values
    value = function.clipped(t)
    negative = float((t < 0).double().mean())
    details: dict[str, object] = {
        "diagonal": traces.kind,
        "num_probes": traces.num_probes,
        "negative_share": negative,
    }
    notes = []
    if traces.exact:
        # What is below the rounding of the products is a root of noise.
        error = function.value(t.clamp(min=0) + traces.rounding) - value
        if negative:
            notes.append(
                f"{negative:.1%} of the {what} is negative and counts as 0: the measure is"
                " defined at minimisers."
            )
        return Estimate(
            value=value,
            probe_error=max(error, analysis.product_error * value),
            error_kind="bound",
            cost=traces.cost,
            details=details,
            notes=tuple(notes),
        )
    error, details["bias_corrected"] = _bound(traces, function, analysis.generator(purpose))
    error += analysis.product_error * value
    converged = error <= BIAS_TOLERANCE * value
    if not converged:
        notes.append(
            f"The estimate is dominated by the noise of the {what} ({negative:.0%} of the"
            " entries came out negative). Give more `num_probes`, or method='exact' if P"
            " products can be paid."
        )
    return Estimate(
        value=value,
        probe_error=error,
        error_kind="bound",
        converged=converged,
        cost=traces.cost,
        details=details,
        notes=tuple(notes),
    )


def _slopes(traces: Traces, function: Concave) -> Tensor:
    # Cut off at the noise: at zero a root has none.
    slopes = function.slope(torch.maximum(traces.values, traces.errors))
    return torch.where(traces.errors > 0, slopes, 0.0)


def _bound(traces: Traces, function: Concave, generator: torch.Generator) -> tuple[float, float]:
    # How far the sum may be off, and the sum without the bias that was found.
    value = function.clipped(traces.values)
    noisy, known = traces.errors, 0.0
    if function.bend is not None:
        # What stands clear of its noise is biased as its second derivative says.
        clear = traces.values > CLEAR * noisy
        near = torch.where(clear, traces.values - DEVIATIONS * noisy, 1.0)
        known = 0.5 * float(torch.where(clear, function.bend(near) * noisy.square(), 0.0).sum())
        noisy = torch.where(clear, 0.0, noisy)
    fits = _extrapolate(traces.values, noisy, function, generator)
    slopes = _slopes(traces, function)
    if traces.diagonal is None:
        variance = float((slopes.square() * traces.variances).sum())
    else:
        variance = (traces.diagonal.weighted(slopes).probe_error or 0.0) ** 2
    bias = max(abs(fit - value) for fit in fits) + known
    return SAFETY * bias + DEVIATIONS * variance**0.5, max(fits[0], 0.0)


def _extrapolate(
    t: Tensor, se: Tensor, function: Concave, generator: torch.Generator
) -> list[float]:
    # The sum at noise s (in units of the present noise) behaves like a + b s^2 for traces
    # above their noise and like a + c s^power for those below it; s = 0 is wanted.
    if not bool((se > 0).any()):
        return [function.clipped(t)]
    sums = []
    for level in NOISE_LEVELS:
        draws = [function.clipped(t)] if level == 0 else []
        while level > 0 and len(draws) < REPEATS:
            noise = torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device)
            draws.append(function.clipped(t + level**0.5 * se * noise))
        sums.append(sum(draws) / len(draws))
    s = [math.sqrt(1 + level) for level in NOISE_LEVELS]
    fits = []
    for power in function.powers:
        rising = [x**power for x in s]
        fits.append(_intercept(sums, [[x * x for x in s], rising]))
        fits.append(_intercept(sums, [rising]))
    return fits


def _intercept(y: list[float], columns: list[list[float]]) -> float:
    # The constant of a least-squares fit: along what of it the other columns lack. By plain
    # sums, as a library's last digits depend on where in memory the numbers lie.
    basis: list[list[float]] = []
    for vector in [*columns, [1.0] * len(y)]:
        for _ in range(2):
            for q in basis:
                along = _dot(q, vector)
                vector = [v - along * x for v, x in zip(vector, q, strict=True)]
        size = math.sqrt(_dot(vector, vector))
        basis.append([v / size for v in vector])
    return _dot(basis[-1], y) / math.fsum(basis[-1])


def _dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))
