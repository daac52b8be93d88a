"""Self-check of an objective: are its derivatives right, and what will measuring cost?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from sharpkit.errors import SharpkitError
from sharpkit.objective import Objective
from sharpkit.operators import hessian

__all__ = ["Finding", "examine", "shown_bytes", "shown_duration", "timed"]

T = TypeVar("T")

USUAL_HVPS, USUAL_GRADIENTS, USUAL_FORWARDS = 880, 125, 465  # the usual measures, MLP and CNN
SLOPE_TOLERANCE = 0.05


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at.
        passed: True, False, or None where there is nothing to pass.
        text: What was found, and what to do if it failed.
    """

    name: str
    passed: bool | None
    text: str


def examine(objective: Objective, *, seed: int = 0) -> list[Finding]:
    """Check an objective that could be built (so loss and data are the same twice).

    Looks at the gradient and the Hessian by directional differences of the loss and of the
    gradient, at symmetry, and forecasts time and memory of all measures.

    Args:
        objective: What is examined.
        seed: Of the random directions.
    """
    loss, forward = timed(lambda: float(objective.value()))
    findings = [
        Finding(
            "objective",
            True,
            f"{objective.num_examples} examples, {objective.num_terms:g} loss terms,"
            f" P = {objective.space.dim}, {str(objective.model_dtype).removeprefix('torch.')}"
            f" on {objective.space.device}; same loss and data twice",
        ),
        Finding("loss", True, f"{loss:.6g}"),
    ]
    gradient, backward = timed(objective.gradient)
    size = float(gradient.norm())
    findings.append(Finding("gradient", bool(torch.isfinite(gradient).all()), f"norm {size:.4g}"))
    findings.append(_gradient_by_differences(objective, gradient))
    operator = hessian(objective)
    generator = torch.Generator(objective.space.device).manual_seed(seed)
    try:
        tolerance = max(1e-6, 1e4 * torch.finfo(objective.model_dtype).eps)
        gap = operator.check_symmetric(generator, tolerance=min(tolerance, 0.1))
        findings.append(Finding("Hessian symmetric", True, f"to {gap:.1e}"))
    except SharpkitError as error:
        findings.append(Finding("Hessian symmetric", False, str(error)))
        return findings
    findings.append(Finding("Hessian products", None, f"mode: {objective.hvp_mode}"))
    findings.append(_hessian_by_differences(objective, gradient))
    v = torch.randn(objective.space.dim, generator=generator, device=objective.space.device)
    _, product = timed(lambda: objective.hvp(v))
    seconds = USUAL_HVPS * product + USUAL_GRADIENTS * backward + USUAL_FORWARDS * forward
    findings.append(
        Finding(
            "time",
            None,
            f"forward {forward:.3g} s, gradient {backward:.3g} s, HVP {product:.3g} s"
            f" ({product / backward:.1f} gradients); all measures about {shown_duration(seconds)}",
        )
    )
    basis = 150 * objective.space.dim * objective.space.dtype.itemsize
    findings.append(
        Finding("memory", None, f"a Lanczos basis of 150 vectors takes {shown_bytes(basis)}")
    )
    return findings


def _gradient_by_differences(objective: Objective, gradient: torch.Tensor) -> Finding:
    size = float(gradient.norm())
    if size == 0:
        return Finding("gradient by differences", None, "the gradient is zero")
    direction = gradient / size
    theta, best = objective.theta, float("inf")
    scale = max(float(theta.norm()), 1e-3)
    for step in (1e-2 * scale, 1e-3 * scale, 1e-4 * scale):
        ends = [float(objective.at(theta + s * step * direction).value()) for s in (1, -1)]
        best = min(best, abs((ends[0] - ends[1]) / (2 * step) - size) / size)
    return Finding(
        "gradient by differences",
        best <= SLOPE_TOLERANCE,
        f"agrees to {best:.1e}"
        + ("" if best <= SLOPE_TOLERANCE else ": is a part of the loss detached from theta?"),
    )


def _hessian_by_differences(objective: Objective, gradient: torch.Tensor) -> Finding:
    size = float(gradient.norm())
    direction = gradient / size if size > 0 else torch.ones_like(gradient)
    product = objective.hvp(direction)
    length = float(product.norm())
    if length == 0:
        return Finding("Hessian by differences", None, "H g is zero: is the loss linear?")
    theta, best = objective.theta, float("inf")
    scale = max(float(theta.norm()), 1e-3)
    for step in (1e-2 * scale, 1e-3 * scale, 1e-4 * scale):
        ahead = objective.at(theta + step * direction).gradient()
        behind = objective.at(theta - step * direction).gradient()
        best = min(best, float(((ahead - behind) / (2 * step) - product).norm()) / length)
    if best <= SLOPE_TOLERANCE:
        return Finding("Hessian by differences", True, f"agrees to {best:.1e}")
    # Kinks of ReLU networks put curvature between the points that no derivative sees.
    return Finding(
        "Hessian by differences",
        None,
        f"differs by {best:.0%} at every step: expected for ReLU networks (kinks) and low"
        " precision, otherwise a sign of a wrong second derivative; compare with --dtype"
        " float64",
    )


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Return what a function returns, and how many seconds it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def shown_duration(seconds: float) -> str:
    """Return a time for a person, such as ``12 min``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def shown_bytes(count: float) -> str:
    """Return a size for a person, such as ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    return ""
