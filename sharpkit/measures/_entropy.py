"""What the measures of the spectrum's shape share."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np

from sharpkit.estimators import Quadrature
from sharpkit.estimators.protocol import check_positive
from sharpkit.results import Estimate
from sharpkit.spectral import Spectral

__all__ = ["MAX_STEPS", "Spectrum", "check_quadrature", "with_error"]

Spectrum: TypeAlias = Literal["abs", "clipped", "ggn", "signed"]


MAX_STEPS = 96  # of each run: eight times the first ones


def check_quadrature(num_probes: int, num_steps: int, max_steps: int) -> None:
    """Raise SettingsError unless there are two probes and a step."""
    check_positive("num_probes", num_probes, minimum=2)
    check_positive("num_steps", num_steps, minimum=1)
    check_positive("max_steps", max_steps, minimum=1)


def with_error(
    spectral: Spectral,
    quadrature: Quadrature,
    first: Quadrature,
    estimate: Estimate,
    alpha: float,
    part: str,
    factor: float = 1.0,
) -> Estimate:
    r"""Return an entropy (times a factor) with its error from the data, by the first steps.

    The first-order change of :math:`H_\alpha` is that of :math:`\operatorname{tr}\varphi`
    with :math:`\varphi = \partial_{S_\alpha} H\,|x|^\alpha + \partial_{S_1} H\,|x|`.
    """

    def size(x: np.ndarray) -> np.ndarray:
        return abs(x) if part == "abs" else np.maximum(x, 0.0)

    total = float(quadrature.sums(size, place="zero").mean()) or 1.0
    low, high = quadrature.extremes()
    largest = max(size(np.array([low, high])).max(), 1e-300)

    def none(values: np.ndarray) -> np.ndarray:
        return np.zeros_like(values)

    if math.isinf(alpha):

        def of_the_largest(values: np.ndarray) -> np.ndarray:
            slopes = np.zeros_like(values)
            if len(values) and size(values).max() > 0:
                at = int(np.argmax(size(values)))
                slopes[at] = -factor / values[at]
            return slopes

        return spectral.with_shape_data_error(
            estimate, first, lambda x: factor * size(x) / total, of_the_largest
        )
    if alpha == 1:
        shannon = float(quadrature.sums(lambda x: _x_log_x(size(x) / total), place="zero").mean())

        def phi(x: np.ndarray) -> np.ndarray:
            p = size(x) / total
            return -factor * (_x_log_x(p) - (1 + shannon) * p)

        return spectral.with_shape_data_error(estimate, first, phi, none)
    sums = quadrature.sums(lambda x: (size(x) / largest) ** alpha, place="zero")
    powers = float(sums.mean()) or 1.0

    def both(x: np.ndarray) -> np.ndarray:
        power = (size(x) / largest) ** alpha / powers
        result: np.ndarray = factor * (power - alpha * size(x) / total) / (1 - alpha)
        return result

    return spectral.with_shape_data_error(estimate, first, both, none)


def _x_log_x(p: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0)
    return result
