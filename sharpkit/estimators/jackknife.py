"""The jackknife: bias and error of a function of means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["Jackknife", "jackknife"]


@dataclass(frozen=True)
class Jackknife:
    """A function of means with its bias removed.

    Attributes:
        value: The corrected value: the mean of the pseudo-values.
        error: One standard error; its square is estimated with ``len(draws) - 1`` degrees
            of freedom.
        draws: The pseudo-values, one a sample.
    """

    value: float
    error: float
    draws: tuple[float, ...]


def jackknife(samples: np.ndarray, function: Callable[[np.ndarray], float]) -> Jackknife:
    r"""Return ``function`` of the mean of samples, corrected for bias (Quenouille 1956).

    The logarithm or the ratio of noisy means is off by :math:`O(1/m)`; leaving out one
    sample at a time shows by how much, and how far the value scatters:
    :math:`\tilde g_i = m\,g(\bar x) - (m-1)\,g(\bar x_{-i})`.

    Args:
        samples: ``[m, c]``: c quantities from each of m independent probes.
        function: Maps the mean ``[c]`` to a number.

    Example:
        >>> result = jackknife(np.array([[1.0], [3.0]]), lambda mean: float(mean[0] ** 2))
        >>> result.value  # 4 - 1: the variance of a mean of two, which E[mean]^2 lacks
        3.0
    """
    count = len(samples)
    mean = samples.mean(axis=0)
    whole = function(mean)
    if count < 2:
        return Jackknife(whole, math.inf, (whole,))
    others = (count * mean - samples) / (count - 1)
    draws = np.array([count * whole - (count - 1) * function(other) for other in others])
    error = float(draws.std(ddof=1) / math.sqrt(count))
    return Jackknife(float(draws.mean()), error, tuple(float(x) for x in draws))
