"""What a few Lanczos steps leave open of a function with a kink at zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sharpkit.estimators.quadrature import Place, Quadrature

__all__ = ["Resolution", "resolve"]

Function = Callable[[np.ndarray], np.ndarray]

SPREAD = 0.3  # see resolve
UNKNOWN = 1 / math.sqrt(12)  # of a number anywhere between two
SURE = 0.02  # no share is closer to an end than this
SHRINKS = 0.05  # of the range, at least, for its change to tell the share


@dataclass(frozen=True)
class Resolution:
    """Sums of functions, and how far off a number made of them may be.

    Attributes:
        samples: Each probe's estimates of the functions' traces, ``[m, c]``.
        error: One standard error of the number, from what the steps have not resolved.
        share: Where between the least and the largest value the estimate lies.
        width: How far apart these are, in the number's units.
    """

    samples: np.ndarray
    error: float
    share: float
    width: float


def resolve(
    quadrature: Quadrature,
    functions: Sequence[Function],
    combine: Callable[[np.ndarray], float],
) -> Resolution:
    r"""Return sums of functions with a kink at zero, and what is not resolved of them.

    After k steps the moments of the spectrum (as a probe sees it) are known to order 2k, and
    no more. Of all spectra with these moments, one with an eigenvalue at zero has the
    smallest sum of magnitudes, one with zero amidst a gap the largest: a polynomial of
    degree 2k that meets the magnitude at zero, and elsewhere touches it in the nodes of the
    rule, is nowhere above it. The truth is a share t of the way,

    .. math:: g = g_0 + t\,(g_1 - g_0).

    What t is depends on how eigenvalues crowd at zero, little on k, so the change since half
    the steps tells it: :math:`g_0(k) + t\,w(k) = g_0(k/2) + t\,w(k/2)` with the widths
    :math:`w = g_1 - g_0`. The error is :math:`0.3\,w\sqrt{t(1-t)}`: over 13 spectra (networks,
    power laws, exponential, Laplace, Cauchy; with and without negative eigenvalues), 12 to
    72 steps, traces, entropies and determinants, the rule left
    :math:`0.2\,w\sqrt{t(1-t)}` root mean square, and 0.8 at most.

    Args:
        quadrature: Of the matrix.
        functions: Each of its eigenvalues; smooth but for a kink at zero.
        combine: Makes the number of the functions' traces ``[c]``.
    """

    def sums(steps: int, place: Place) -> np.ndarray:
        columns = [quadrature.sums(f, steps, place=place) for f in functions]
        return np.stack(columns, axis=1)

    steps = max(quadrature.num_steps, 1)
    near = sums(steps, "zero")
    if quadrature.ended:
        return Resolution(near, 0.0, 0.0, 0.0)
    far, fewer = sums(steps, "apart"), max(steps // 2, 1)
    low, high = (combine(s.mean(axis=0)) for s in (near, far))
    places: tuple[Place, Place] = ("zero", "apart")
    low_before, high_before = (combine(sums(fewer, p).mean(axis=0)) for p in places)
    width = high - low
    shrunk = (high_before - low_before) - width
    if abs(shrunk) > SHRINKS * abs(width):
        share = min(max((low - low_before) / shrunk, 0.0), 1.0)
        certain = min(max(share, SURE), 1 - SURE)
        error = SPREAD * math.sqrt(certain * (1 - certain))
    else:
        share, error = 0.5, UNKNOWN
    return Resolution(near + share * (far - near), error * abs(width), share, width)
