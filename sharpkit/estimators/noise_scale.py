"""The ratio of a mean's noise to its size, from groups of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.stats

__all__ = ["NoiseScale", "noise_scale"]

LEVEL = 0.95


@dataclass(frozen=True)
class NoiseScale:
    """The noise scale ``tr Sigma / |G|^2`` of random vectors with mean G.

    Attributes:
        value: The ratio of the two unbiased estimates.
        trace: Of ``tr Sigma``.
        square: Of ``|G|^2``; it may be negative.
        defined: Whether it is positive.
        interval: Fieller's interval of the ratio, 95%; its end may be infinite.
        error: The jackknife's standard error of the ratio.
        draws: Values whose mean is ``value`` and whose scatter gives the error.
        amplified: By how much rounding grows in the difference that gives ``square``.
    """

    value: float
    trace: float
    square: float
    defined: bool
    interval: tuple[float, float]
    error: float
    draws: tuple[float, ...]
    amplified: float


def noise_scale(
    gram: np.ndarray, counts: np.ndarray, groups: np.ndarray, squares: np.ndarray
) -> NoiseScale:
    r"""Return the noise scale of vectors that were averaged in groups, and dealt into blocks.

    With group means h of b vectors each and their mean :math:`\bar g` over all N,
    :math:`S = \sum_k b_k |h_k - \bar g|^2 / (K - 1)` and :math:`|\bar g|^2 - S/N` are unbiased
    for the trace and the square. Blocks are left out in turn.

    Args:
        gram: Inner products of the blocks' sums of vectors, ``[B, B]``.
        counts: Vectors in each block.
        groups: Groups in each block.
        squares: Sums of ``b |h|^2`` in each block.

    Example:
        >>> x = np.array([[1.0], [3.0], [1.0], [3.0]])
        >>> one = np.ones(4)
        >>> scale = noise_scale(x @ x.T, one, one, (x**2).sum(axis=1))
        >>> round(scale.trace, 3), round(scale.square, 3)  # 4/3 and 4 - 1/3
        (1.333, 3.667)
    """

    def both(keep: np.ndarray) -> tuple[float, float]:
        n, k = counts @ keep, groups @ keep
        length = float(keep @ gram @ keep) / n**2
        trace = (float(squares @ keep) - n * length) / (k - 1)
        return float(trace), float(length - trace / n)

    blocks = len(counts)
    whole = np.ones(blocks)
    trace, square = both(whole)
    others = np.array([both(whole - unit) for unit in np.eye(blocks)])
    off = others - others.mean(axis=0)
    covariance = (blocks - 1) / blocks * off.T @ off
    interval = _fieller(trace, square, covariance, blocks - 1)
    length = square + trace / counts.sum()
    if square <= 0:
        return NoiseScale(math.inf, trace, square, False, interval, math.inf, (), math.inf)
    value = trace / square
    # The first-order change of the ratio: it stays finite where a block decides the sign.
    change = (off[:, 0] - value * off[:, 1]) / square
    error = math.sqrt((blocks - 1) / blocks * float(change @ change))
    draws = tuple((value - (blocks - 1) * change).tolist())
    return NoiseScale(value, trace, square, True, interval, error, draws, float(length / square))


def _fieller(top: float, bottom: float, covariance: np.ndarray, dof: int) -> tuple[float, float]:
    # The ratios R >= 0 with (top - R bottom)^2 <= t^2 var(top - R bottom).
    t2 = float(scipy.stats.t.ppf((1 + LEVEL) / 2, dof)) ** 2
    v11, v12, v22 = covariance[0, 0], covariance[0, 1], covariance[1, 1]
    a, b, c = bottom**2 - t2 * v22, top * bottom - t2 * v12, top**2 - t2 * v11
    room = b * b - a * c
    if a > 0 and bottom > 0:
        root = math.sqrt(max(room, 0.0))
        return max((b - root) / a, 0.0), max((b + root) / a, 0.0)
    # Zero is among the possible squares: the ratio may be as large as one likes.
    if c <= 0 or room < 0:
        return 0.0, math.inf
    # a <= 0 < c: the set is outside two roots of opposite signs; the positive one is its end.
    low = c / (b + math.sqrt(room)) if b + math.sqrt(room) > 0 else 0.0
    return max(low, 0.0), math.inf
