"""Numbers of a whole spectrum: entropies, ranks, negative mass, log-determinant, density."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np

from sharpkit.errors import MeasureError, SettingsError
from sharpkit.estimators.deflation import Probes
from sharpkit.estimators.jackknife import jackknife
from sharpkit.estimators.protocol import check_positive
from sharpkit.estimators.quadrature import Quadrature
from sharpkit.estimators.resolution import resolve, sampling_error
from sharpkit.results import Estimate, Spectrum

__all__ = [
    "SpectrumPart",
    "check_alpha",
    "density_of",
    "effective_rank",
    "log_det",
    "negative_mass",
    "renyi_entropy",
    "renyi_entropy_of_probes",
]

SpectrumPart: TypeAlias = Literal["abs", "clipped"]

NEGLIGIBLE = 1e-3  # of a number: no more steps for what is below it
ROUNDING = 1e-6  # nats: sums of float32 products are no better
SMALL_SHIFT = 0.01  # nats that eigenvalues below rounding may hide without a word


def check_alpha(alpha: float) -> float:
    """Return alpha; raises SettingsError unless it is positive (inf is allowed)."""
    if not alpha > 0:
        raise SettingsError(f"Expected `alpha` greater than 0 (inf is allowed). Got {alpha!r}.")
    return float(alpha)


def _spectrum(part: SpectrumPart, floor: float) -> Callable[[np.ndarray], np.ndarray]:
    if part not in ("abs", "clipped"):
        raise SettingsError(f"Expected `spectrum` to be 'abs' or 'clipped'. Got {part!r}.")

    def positive(x: np.ndarray) -> np.ndarray:
        size = abs(x) if part == "abs" else np.maximum(x, 0.0)
        result: np.ndarray = np.where(size > floor, size, 0.0)
        return result

    return positive


def _power(alpha: float) -> Callable[[np.ndarray], np.ndarray]:
    # x^alpha for x >= 0 with 0^alpha = 0; x log x for alpha = 1.
    def power(x: np.ndarray) -> np.ndarray:
        safe = np.where(x > 0, x, 1.0)
        values = x * np.log(safe) if alpha == 1 else safe**alpha
        result: np.ndarray = np.where(x > 0, values, 0.0)
        return result

    return power


def renyi_entropy(
    quadrature: Quadrature, *, alpha: float, spectrum: SpectrumPart = "abs"
) -> Estimate:
    r"""Estimate the Renyi entropy of the spectrum, in nats.

    .. math::
        H_\alpha = \frac{1}{1-\alpha}\log\frac{\operatorname{tr} |A|^\alpha}
        {(\operatorname{tr} |A|)^\alpha}, \quad
        H_1 = -\sum_i p_i \log p_i, \quad H_\infty = -\log \max_i p_i,
        \quad p_i = |\lambda_i| / \operatorname{tr}|A|

    Both traces come from the same probes; the bias of the ratio's logarithm is removed by
    the jackknife. Almost all eigenvalues of a network are near zero, where the magnitude has
    its kink, and few Lanczos steps see too little of them: :func:`resolve` says how much is
    open, which counts as error beside that of the probes (``details["unresolved"]`` and
    ``details["sampling"]``). Where it is the larger one, the estimate has not converged:
    take more steps. Eigenvalues below the rounding level count as zero: for alpha < 1 very
    many of them could matter, and ``details["floor_shift"]`` says by how many nats at most.

    Args:
        quadrature: Of the matrix.
        alpha: Order, greater than 0; inf is allowed.
        spectrum: ``"abs"`` takes magnitudes, ``"clipped"`` leaves out negative eigenvalues.

    Raises:
        SettingsError: If alpha is not positive or the spectrum's name is unknown.
        MeasureError: If the matrix is zero, which has no entropy.
    """
    alpha = check_alpha(alpha)
    floor = quadrature.floor
    sizes = _spectrum(spectrum, floor)
    power = _power(alpha)
    low, high = quadrature.extremes()
    largest = float(sizes(np.array([low, high])).max())
    if largest == 0:
        raise MeasureError(
            "Expected a matrix with eigenvalues above the rounding level"
            f" ({floor:.1e}). All are below it, and zero has no entropy."
        )

    def scaled(x: np.ndarray) -> np.ndarray:
        return sizes(x) / largest  # powers neither overflow nor vanish

    def entropy(means: np.ndarray) -> float:
        total, powers = (max(float(m), 1e-300) for m in means)
        if alpha == 1:
            return math.log(total) - float(means[1]) / total
        if math.isinf(alpha):
            return math.log(total)
        return (math.log(powers) - alpha * math.log(total)) / (1 - alpha)

    def powers(x: np.ndarray) -> np.ndarray:
        return scaled(x) if math.isinf(alpha) else power(scaled(x))

    details = {"alpha": alpha, "spectrum": spectrum, "floor": floor}
    notes: tuple[str, ...] = ()
    if alpha < 1:
        below = quadrature.sums(lambda x: (sizes(x) == 0).astype(float), place="zero").mean()
        hidden = below * (floor / largest) ** alpha
        total = float(quadrature.sums(powers, place="zero").mean())
        shift = math.log1p(hidden / max(total, 1e-300)) / (1 - alpha)
        details["floor_shift"] = shift
        if shift > SMALL_SHIFT:
            notes = (
                f"Eigenvalues below the rounding level {floor:.1e} count as zero; if they were"
                f" at it, the entropy would be {shift:.2g} higher. Measure with"
                " dtype=torch.float64, or use alpha > 1.",
            )
    return _estimate(
        quadrature,
        [scaled, powers],
        entropy,
        details=details,
        notes=notes,
        unit=1.0,
    )


def _estimate(
    quadrature: Quadrature,
    functions: Sequence[Callable[[np.ndarray], np.ndarray]],
    combine: Callable[[np.ndarray], float],
    *,
    details: dict[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    unit: float | None = None,
) -> Estimate:
    # What a smooth function makes of traces of functions with a kink at zero. The unit is
    # what small errors are small against: None, the number itself.
    found = resolve(quadrature, functions, combine)
    result = jackknife(found.samples, combine)
    unit = abs(result.value) if unit is None else unit
    converged = found.error <= max(found.sampling, NEGLIGIBLE * unit)
    if not converged:
        notes = (*notes, _unresolved(quadrature, found.error, found.sampling))
    return Estimate(
        value=result.value,
        probe_error=math.hypot(found.sampling, found.error, ROUNDING * unit),
        error_kind="stderr",
        converged=converged,
        cost=quadrature.cost,
        details={
            **(details or {}),
            "sampling": found.sampling,
            "unresolved": found.error,
            "num_probes": len(found.samples),
            "num_steps": quadrature.num_steps,
            "num_locked": quadrature.locked.size,
        },
        notes=notes,
        dof=found.dof,
        draws=result.draws,
    )


def _unresolved(quadrature: Quadrature, error: float, sampling: float) -> str:
    return (
        f"What {quadrature.num_steps} Lanczos steps leave open of eigenvalues near zero,"
        f" {error:.2g}, is more than the {len(quadrature.masses)} probes' error,"
        f" {sampling:.2g}. Give a larger `max_steps`."
    )


def renyi_entropy_of_probes(probes: Probes) -> Estimate:
    r"""Estimate the Renyi entropy of order 2 from single products, in nats.

    .. math:: H_2 = -\log \frac{\|A\|_F^2}{(\operatorname{tr} A)^2}

    from the lengths and the traces of the same products. With the signed trace: it is the
    entropy for matrices without negative eigenvalues, and more than that with them.

    Raises:
        MeasureError: If the trace is not positive, or not told from zero.
    """
    locked = probes.locked
    known = float(locked.values.sum())
    squares = float((locked.values**2).sum() + 2 * (locked.residuals**2).sum())
    samples = np.stack([known + probes.traces, squares + probes.squares], axis=1)
    error = math.sqrt(probes.variance / len(samples))
    if samples[:, 0].mean() <= max(2 * error, probes.rounding):
        raise MeasureError(
            f"Expected a matrix with a positive trace. It is {samples[:, 0].mean():.3g} +-"
            f" {error:.2g}. Use spectrum='abs'."
        )

    def entropy(means: np.ndarray) -> float:
        trace = max(float(means[0]), 1e-300)
        return 2 * math.log(trace) - math.log(max(float(means[1]), 1e-300))

    result = jackknife(samples, entropy)
    return Estimate(
        value=result.value,
        probe_error=math.hypot(result.error, ROUNDING),
        error_kind="stderr",
        cost=probes.cost,
        details={"alpha": 2.0, "spectrum": "signed", "num_probes": len(samples)},
        dof=len(samples) - 1,
        draws=result.draws,
    )


def effective_rank(quadrature: Quadrature) -> Estimate:
    r"""Estimate the effective rank :math:`e^{H_1}`, between 1 and P.

    Roy and Vetterli 2007 (doi:10.5281/zenodo.40328): the number of equal eigenvalues that
    have the same Shannon entropy.

    Raises:
        MeasureError: If the matrix is zero.
    """
    entropy = renyi_entropy(quadrature, alpha=1.0)
    rank, error = math.exp(entropy.value), entropy.probe_error or 0.0
    return replace(
        entropy,
        value=rank,
        probe_error=rank * math.expm1(error),  # the larger side: an exponential is lopsided
        details={
            **entropy.details,
            **{name: rank * entropy.details[name] for name in ("sampling", "unresolved")},
        },
        draws=tuple(rank * (1 + d - entropy.value) for d in entropy.draws),
    )


def negative_mass(quadrature: Quadrature) -> Estimate:
    r"""Estimate the share of negative curvature, :math:`\sum_{\lambda<0}|\lambda| / \sum|\lambda|`.

    Raises:
        MeasureError: If the matrix is zero.
    """
    floor = quadrature.floor

    if quadrature.sums(abs, place="zero").mean() <= floor:
        raise MeasureError("Expected a matrix that is not zero. Its eigenvalues are all zero.")

    def below(x: np.ndarray) -> np.ndarray:
        return np.where(x < -floor, -x, 0.0)

    def share(means: np.ndarray) -> float:
        return float(means[0] / means[1])

    estimate = _estimate(quadrature, [below, np.abs], share, unit=1.0)
    return replace(estimate, value=min(max(estimate.value, 0.0), 1.0))


def log_det(
    quadrature: Quadrature, *, tau: float, spectrum: Literal["abs", "signed"] = "signed"
) -> Estimate:
    r"""Estimate :math:`\log\det(A + \tau I) = \sum_i \log(\lambda_i + \tau)`.

    Args:
        quadrature: Of the matrix.
        tau: Shift.
        spectrum: ``"signed"``: eigenvalues as they are; ``"abs"``: their magnitudes.

    Raises:
        SettingsError: If tau is not positive.
        MeasureError: If an eigenvalue of at most ``-tau`` was met, with ``"signed"``.
    """
    check_positive("tau", tau)
    low, _ = quadrature.extremes()
    if spectrum == "signed" and low <= -tau:
        raise MeasureError(
            f"Expected eigenvalues greater than -tau = {-tau:g}. There is one of {low:.4g}, so"
            " the determinant has no real logarithm. Use a larger `tau`, or spectrum='abs'."
        )

    def logarithms(x: np.ndarray) -> np.ndarray:
        result: np.ndarray = np.log1p((abs(x) if spectrum == "abs" else x) / tau)
        return result

    shift = quadrature.dim * math.log(tau)
    rounding = quadrature.floor / tau
    if spectrum == "abs":
        estimate = _estimate(
            quadrature, [logarithms], lambda m: float(m[0]) + shift, details={"tau": tau}
        )
        return replace(estimate, probe_error=math.hypot(estimate.probe_error or 0.0, rounding))
    # A smooth logarithm: Gauss rules of half the steps tell what is left.
    samples = quadrature.sums(logarithms) + shift
    fewer = max(quadrature.num_steps // 2, 1)
    change = float((samples - shift - quadrature.sums(logarithms, fewer)).mean())
    error, dof = sampling_error(quadrature, logarithms, {"gauss": 1.0})
    value, unresolved = float(samples.mean()), abs(change) / 2
    converged = unresolved <= max(error, NEGLIGIBLE * abs(value))
    return Estimate(
        value=value,
        probe_error=math.hypot(error, unresolved, rounding),
        error_kind="stderr",
        converged=converged,
        cost=quadrature.cost,
        details={
            "tau": tau,
            "sampling": error,
            "unresolved": unresolved,
            "num_probes": len(samples),
            "num_steps": quadrature.num_steps,
        },
        notes=() if converged else (_unresolved(quadrature, unresolved, error),),
        dof=dof,
        draws=tuple(samples.tolist()),
    )


def density_of(quadrature: Quadrature) -> Spectrum:
    """Return the spectral density: the known eigenvalues exactly, the rest by quadrature."""
    locked = quadrature.locked
    known = tuple(sorted(float(x) for x in locked.values))
    dim = quadrature.dim
    nodes, weights = [], []
    for x, w in quadrature.rules():
        rest = (dim - locked.size) / dim
        pairs = sorted(
            [*((k, 1 / dim) for k in known), *zip(x.tolist(), (rest * w).tolist(), strict=True)]
        )
        nodes.append(tuple(p[0] for p in pairs))
        weights.append(tuple(p[1] for p in pairs))
    return Spectrum(tuple(nodes), tuple(weights), dim, quadrature.cost, known)
