"""The noise that a function bears: where its mean rise under noise meets a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharpkit.errors import MeasureError, SettingsError
from sharpkit.estimators.protocol import check_positive

__all__ = ["NoiseLevel", "noise_level"]

SMALLEST = 1e-6  # of the largest sigma: the bracket's lower end
FEW = 2  # pairs that narrow the bracket down
COARSE = 1.5  # ratio of the bracket's ends when all pairs join in
NEAREST, FARTHEST = 0.02, 0.6  # log-distance of the points that the curve is drawn through
APART = 4  # standard errors of log sigma between them, so that the slope is well known
ROUNDS = 4  # times that the middle point is set
CENTERING = 12  # points at most that look for the middle


@dataclass(frozen=True)
class NoiseLevel:
    r"""The standard deviation sigma of the noise under which the mean drop is the target.

    Attributes:
        sigma: The root for the mean over all pairs of draws; the largest sigma tried if no
            root was met.
        without: The root without each pair in turn, to first order; empty if none was met.
        reached: Whether the drop reaches the target.
        bracket: Between which sigmas it was sought.
        evaluations: Values of the function.
    """

    sigma: float
    without: tuple[float, ...]
    reached: bool
    bracket: tuple[float, float]
    evaluations: int

    def of(self, g: Callable[[float], float]) -> tuple[float, float, tuple[float, ...]]:
        """Return ``g(sigma)``, its standard error, and one value a pair with this scatter.

        The error is the change of g over one standard error of log sigma, up or down,
        whichever is larger: steep functions such as ``1 / sigma^2`` are lopsided.
        """
        count, whole = len(self.without), g(self.sigma)
        if not count:
            return whole, math.inf, ()
        logs = math.log(self.sigma) - np.log(self.without)
        width = math.sqrt((count - 1) / count * float(np.square(logs - logs.mean()).sum()))
        ends = [g(self.sigma * math.exp(sign * width)) for sign in (1, -1)]
        error = max(abs(end - whole) for end in ends)
        off = np.array([whole - g(s) for s in self.without])
        off -= off.mean()
        scatter = float(off.std(ddof=1) / math.sqrt(count))
        draws = whole + off * (error / scatter if scatter > 0 else 0.0)
        return whole, error, tuple(float(x) for x in draws)


def noise_level(
    drop: Callable[[float, Tensor], float],
    *,
    target: float,
    like: Tensor,
    largest: float,
    num_pairs: int,
    generator: torch.Generator,
) -> NoiseLevel:
    r"""Return sigma with ``E_z drop(sigma, z) = target`` for standard normal z.

    The same draws, in pairs z and -z, serve every sigma (common random numbers): the mean of
    the drops is then nearly monotone, and bisection of :math:`\log\sigma` finds its root. Two
    pairs narrow the bracket, all of them find the root, on the parabola through three points as
    far apart as the noise asks for, so that a drop in steps (an error rate) does no harm.

    Args:
        drop: Maps sigma and ``z [P]`` to a number; not finite counts as far above.
        target: Mean drop to meet.
        like: A vector with the shape, dtype and device of z.
        largest: Upper end of the bracket; the lower is a millionth of it.
        num_pairs: Pairs of draws, at least 4.
        generator: Source of z. The draws are made again for every sigma, not stored.

    Raises:
        SettingsError: If a setting is out of range.
        MeasureError: If the drop exceeds the target at the lower end already.

    Example:
        >>> level = noise_level(
        ...     lambda sigma, z: sigma**2 * float(z @ z), target=0.5, like=torch.zeros(50),
        ...     largest=10.0, num_pairs=16, generator=torch.Generator().manual_seed(0))
        >>> value, error, _ = level.of(lambda sigma: sigma)
        >>> abs(value - 0.1) < 4 * error < 0.02
        True
    """
    check_positive("target", target)
    check_positive("largest", largest)
    if num_pairs < 4:
        raise SettingsError(
            f"Expected `num_pairs` to be at least 4, to give an error. Got {num_pairs}."
        )
    curve = _Curve(drop, like, num_pairs, generator)
    smallest = SMALLEST * largest
    bracket = _narrowed(curve, target, smallest, largest)
    if bracket is None:
        return NoiseLevel(largest, (), False, (smallest, largest), curve.evaluations)
    low, high = bracket
    points, slope, x = _points(curve, target, low, high)
    middle, width = points.middle, points.width
    here = _parabola(points.values, width, x)  # the drop of each pair at the root
    count = len(here)
    # One slope for all: those of the means without a pair would scatter on their own.
    without = middle + x + (here - here.mean()) / ((count - 1) * slope)
    return NoiseLevel(
        sigma=math.exp(middle + x),
        without=tuple(math.exp(y) for y in without),
        reached=True,
        bracket=(smallest, largest),
        evaluations=curve.evaluations,
    )


class _Curve:
    # The drop of each pair as a function of sigma, computed once for each pair and sigma.
    def __init__(
        self,
        drop: Callable[[float, Tensor], float],
        like: Tensor,
        num_pairs: int,
        generator: torch.Generator,
    ):
        self._drop, self._like, self.num_pairs = drop, like, num_pairs
        self._generator, self._state = generator, generator.get_state()
        self._known: dict[float, list[float]] = {}
        self.evaluations = 0

    def rows(self, sigma: float, count: int | None = None) -> np.ndarray:
        count = self.num_pairs if count is None else count
        known = self._known.setdefault(sigma, [])
        if len(known) < count:
            self._generator.set_state(self._state)
            for j in range(count):
                z = torch.randn(
                    self._like.shape,
                    generator=self._generator,
                    dtype=self._like.dtype,
                    device=self._like.device,
                )
                if j >= len(known):
                    drops = [self._drop(sigma, z), self._drop(sigma, -z)]
                    self.evaluations += 2
                    known.append(sum(d if math.isfinite(d) else math.inf for d in drops) / 2)
        return np.array(known[:count])

    def mean(self, sigma: float, count: int | None = None) -> float:
        return float(self.rows(sigma, count).mean())


def _narrowed(
    curve: _Curve, target: float, smallest: float, largest: float
) -> tuple[float, float] | None:
    # A bracket of ratio COARSE in which the mean over all pairs crosses the target.
    few = min(FEW, curve.num_pairs)
    low, high = smallest, largest
    if not curve.mean(high, few) > target and not curve.mean(high) > target:
        # A drop that falls again (an error rate past its worst) has its crossing further down.
        lower = [largest / 2**k for k in range(1, 11)]
        first = next((s for s in lower if curve.mean(s, few) > target), None)
        if first is None:
            return None
        high = first
    while high / low > COARSE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if curve.mean(middle, few) > target else (middle, high)
    while not curve.mean(high) > target:
        if high >= largest:
            return None
        low, high = high, min(high * COARSE, largest)
    while curve.mean(low) > target:
        low, high = low / COARSE, low
        if low < smallest:
            raise MeasureError(
                f"Expected a drop below {target:g} under the smallest noise tried,"
                f" {smallest:.1e}. It is {curve.mean(high):.3g} at {high:.1e}. Give a smaller"
                " `largest`, or a larger target."
            )
    return low, high


@dataclass(frozen=True)
class _Points:
    middle: float  # log sigma
    width: float
    values: np.ndarray  # [3, num_pairs]: at middle - width, middle and middle + width


def _points(curve: _Curve, target: float, low: float, high: float) -> tuple[_Points, float, float]:
    # Three points around the root, as far apart as the standard error of log sigma asks for;
    # the slope there, and how far the root is from the middle.
    middle, slope, (left, right) = _centered(curve, target, low, high)
    for _ in range(ROUNDS):
        here = curve.rows(math.exp(middle))
        scatter = _scatter(here)
        width = min(max(APART * scatter / slope, NEAREST), FARTHEST)
        values = np.stack(
            [curve.rows(math.exp(middle - width)), here, curve.rows(math.exp(middle + width))]
        )
        if not np.isfinite(values).all():
            raise MeasureError(
                "Expected finite values under the noise that meets the target. Some are NaN or"
                " inf, and their mean is then not finite either. Give a smaller target."
            )
        steep = float((values[2] - values[0]).mean()) / (2 * width)
        slope = steep if steep > 0 else slope
        x = _root(values.mean(axis=1), width, target, slope)
        too_far = APART * scatter / slope < width / 4 and width > NEAREST
        if abs(x) <= width and not too_far:
            break
        left, right = (left, middle) if here.mean() > target else (middle, right)
        x = min(max(x, left - middle), right - middle)  # the root is between them
        last = middle
        middle = last + (0.0 if too_far else max(-2 * width, min(2 * width, x)))
    else:
        middle = last  # of which the values are
    return _Points(middle, width, values), slope, x


def _scatter(rows: np.ndarray) -> float:
    return float(rows.std(ddof=1)) / math.sqrt(len(rows)) if np.isfinite(rows).all() else 0.0


def _centered(
    curve: _Curve, target: float, low: float, high: float
) -> tuple[float, float, tuple[float, float]]:
    # Where the mean is the target but for its scatter, the slope there, and the bracket, all
    # by log sigma: the curve may be far from straight between the ends.
    left, right = math.log(low), math.log(high)
    below, above = curve.mean(low), curve.mean(high)
    for round_ in range(CENTERING):
        length, straight = right - left, math.isfinite(above - below)
        slope = (above - below) / length if straight else target / length
        middle = left + length / 2  # overflows above, or the interpolation has not done
        if straight and round_ % 2 == 0:
            middle = left + (target - below) / slope
        rows = curve.rows(math.exp(middle))
        mean = float(rows.mean())
        if abs(mean - target) <= APART * _scatter(rows) or length <= NEAREST:
            break
        if mean > target:
            right, above = middle, mean
        else:
            left, below = middle, mean
    return middle, slope, (left, right)


def _parabola(values: np.ndarray, width: float, x: float) -> np.ndarray:
    # Through the columns of values at (-width, 0, width), at x.
    below, here, above = values
    slope, bend = (above - below) / (2 * width), (above - 2 * here + below) / (2 * width**2)
    result: np.ndarray = here + x * (slope + x * bend)
    return result


def _root(means: Sequence[float] | np.ndarray, width: float, target: float, slope: float) -> float:
    # Where the parabola through (-width, 0, width) meets the target, near 0.
    below, here, above = (float(m) for m in means)
    a, b = here - target, (above - below) / (2 * width)
    c = (above - 2 * here + below) / (2 * width**2)
    room = b * b - 4 * a * c
    if b > 0 and room > 0:
        return -2 * a / (b + math.sqrt(room))
    return -a / (b if b > 0 else slope)
