"""Coarse to fine: which points of a grid to measure, and what the others are taken to be.

A grid is filled level by level, halving the distance of its nodes. A point of the next level is
predicted from the nodes of the last by cubic interpolation; it is measured unless the misses of
earlier predictions around it, a quarter of which the next ones should have at most (cubic
interpolation of a smooth surface: a sixteenth), are within the tolerance. Points between cut
ones only are left out, and points beside a gap are always measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

__all__ = ["Filled", "fill_grid", "levels"]

SHRINK = 4.0  # by which a prediction's miss is taken to fall from level to level
COARSEST = 4  # intervals of the first level, at least
STENCIL = 4

Index = tuple[int, ...]
Measure = Callable[[Sequence[Index]], Mapping[Index, np.ndarray]]


class Filled:
    """A grid under way.

    Attributes:
        values: ``[..., M + C]``, NaN where nothing is known: what is judged, then what is carried
            along.
        measured: ``[...]`` whether a point was measured.
        predicted: Whether it is interpolated.
        skipped: Whether all nodes that it would be predicted from are cut.
        worst: The largest miss at held-out points, relative to what was allowed; NaN without.
        worst_miss: The same in the units of each value, ``[M]``.
        num_checked: Held-out points.
    """

    def __init__(self, shape: Sequence[int], num_values: int, carried: int = 0):
        self.values = np.full((*shape, num_values + carried), np.nan)
        self.measured = np.zeros(tuple(shape), dtype=bool)
        self.predicted = np.zeros(tuple(shape), dtype=bool)
        self.skipped = np.zeros(tuple(shape), dtype=bool)
        self.worst = np.nan
        self.worst_miss = np.full(num_values, np.nan)
        self.num_checked = 0


def levels(count: int, centre: int) -> list[list[int]]:
    """Return the nodes of each level along one axis, coarse first, ending with all of them.

    Args:
        count: Points along the axis.
        centre: A point that is in every level, as are both ends.

    Example:
        >>> levels(9, 4)
        [[0, 2, 4, 6, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
    """
    stride = 1
    while (count - 1) // (2 * stride) >= COARSEST:
        stride *= 2
    found = []
    while stride >= 1:
        nodes = {0, count - 1, *range(centre, -1, -stride), *range(centre, count, stride)}
        found.append(sorted(nodes))
        stride //= 2
    return found


def _weights(x: np.ndarray, nodes: Sequence[int]) -> np.ndarray:
    # [len(x), len(nodes)]: local cubic interpolation from the nearest nodes (fewer at the ends).
    at = np.asarray(nodes)
    result = np.zeros((len(x), len(nodes)))
    for i, target in enumerate(x):
        right = int(np.searchsorted(x[at], target))
        if right < len(at) and x[at[right]] == target:
            result[i, right] = 1.0
            continue
        first = min(max(right - STENCIL // 2, 0), max(len(at) - STENCIL, 0))
        chosen = range(first, min(first + STENCIL, len(at)))
        for j in chosen:
            others = [x[at[k]] for k in chosen if k != j]
            result[i, j] = np.prod([(target - o) / (x[at[j]] - o) for o in others])
    return result


def _apply(weights: Sequence[np.ndarray], nodes: np.ndarray) -> np.ndarray:
    result = nodes
    for axis, W in enumerate(weights):
        result = np.moveaxis(np.tensordot(W, result, axes=(1, axis)), 0, axis)
    return result


class _Grid:
    def __init__(
        self,
        grid: Sequence[np.ndarray],
        filled: Filled,
        tolerance: float,
        floor: float,
        relative: Sequence[bool],
    ):
        self.grid, self.filled, self.relative = grid, filled, relative
        self.tolerance, self.floor = tolerance, floor
        self.cut = np.zeros(filled.measured.shape, dtype=bool)
        self.miss = np.zeros(filled.measured.shape)  # relative to what is allowed

    def take(self, found: Mapping[Index, np.ndarray], is_cut: Callable[[Index], bool]) -> None:
        for index, values in found.items():
            self.filled.values[index] = values
            self.filled.measured[index] = True
            self.filled.predicted[index] = self.filled.skipped[index] = False
            self.cut[index] = is_cut(index)

    def allowed(self, values: np.ndarray) -> np.ndarray:
        count = len(self.relative)
        known, values = self.filled.values[self.filled.measured][:, :count], values[..., :count]
        finite = np.where(np.isfinite(known), known, np.nan)
        ranges = np.zeros(values.shape[-1])
        for m in range(values.shape[-1]):
            column = finite[:, m][~np.isnan(finite[:, m])]
            ranges[m] = np.ptp(column) if len(column) else 0.0
            if len(column) and column.min() > 0 and self.relative[m]:
                ranges[m] = 0.0
        least = np.maximum(self.floor * ranges, np.finfo(float).tiny)
        result: np.ndarray = np.maximum(self.tolerance * np.abs(values), least)
        return result

    def predictions(self, nodes: Sequence[Sequence[int]]) -> tuple[np.ndarray, ...]:
        """Return predicted values, the largest miss near by, and where all nodes are cut."""
        W = [_weights(x, n) for x, n in zip(self.grid, nodes, strict=True)]
        spread = [(w != 0).astype(float) for w in W]
        at = np.ix_(*nodes)
        values = self.filled.values[at]
        unknown = np.isnan(values)
        predicted = _apply(W, np.where(unknown, 0.0, values))
        predicted[_apply(spread, unknown.astype(float)) > 0] = np.nan
        near = _largest(spread, self.miss[at])
        beyond = (self.cut | self.filled.skipped)[at].astype(float)
        total = _apply(spread, np.ones_like(beyond))
        return predicted, near, _apply(spread, beyond) == total


def _largest(spread: Sequence[np.ndarray], nodes: np.ndarray) -> np.ndarray:
    # Over the nodes that a point is predicted from.
    result = nodes
    for axis, S in enumerate(spread):
        moved = np.moveaxis(result, axis, 0)
        rows = [moved[row != 0].max(axis=0) for row in S]
        result = np.moveaxis(np.stack(rows), 0, axis)
    return result


def fill_grid(
    grid: Sequence[np.ndarray],
    centre: Index,
    measure: Measure,
    is_cut: Callable[[Index], bool],
    relative: Sequence[bool],
    *,
    tolerance: float,
    carried: int = 0,
    floor: float = 0.005,
    checks: float = 0.02,
    seed: int = 0,
) -> Filled:
    """Measure what is needed of a grid and interpolate the rest.

    Args:
        grid: Coordinates along each axis, ascending.
        centre: The point to start from.
        measure: Maps indices to ``[M + C]`` values each (NaN: not finite, cut, or outside).
        is_cut: Whether a measured point was cut for its height.
        relative: Of each of the M values, whether the tolerance is a share of the value alone
            where it is positive everywhere, as for a loss that is shown in logarithms.
        tolerance: Largest miss of an interpolated value, as a share of the value itself.
        carried: C values of each point that are interpolated too, without being judged.
        floor: Least miss allowed, as a share of the range of the values, for the others.
        checks: Share of the interpolated points that are measured all the same, to see.
        seed: Of the choice of these.
    """
    shape = tuple(len(x) for x in grid)
    filled = Filled(shape, len(relative), carried)
    state = _Grid(grid, filled, tolerance, floor, relative)
    steps = [levels(n, c) for n, c in zip(shape, centre, strict=True)]
    depth = max(len(s) for s in steps)
    steps = [[s[0]] * (depth - len(s)) + s for s in steps]
    state.take(measure(_product(s[0] for s in steps)), is_cut)
    trusted = False
    for before, now in itertools.pairwise(zip(*steps, strict=True)):
        predicted, near, beyond = state.predictions(before)
        allowed = state.allowed(predicted)
        known = set(_product(before))
        new = [i for i in _product(now) if i not in known]
        todo = []
        for index in new:
            if beyond[index]:
                filled.skipped[index] = True
            elif not trusted or near[index] > SHRINK or np.isnan(predicted[index]).any():
                todo.append(index)
            else:
                filled.values[index] = predicted[index]
                filled.predicted[index] = True
                state.miss[index] = near[index] / SHRINK
        state.take(measure(todo), is_cut)
        for index in todo:
            state.miss[index] = _relative(filled.values[index], predicted[index], allowed[index])
        trusted = True
    _check(state, measure, is_cut, checks, np.random.default_rng(seed))
    return filled


def _product(axes: Iterable[Sequence[int]]) -> list[Index]:
    return list(itertools.product(*axes))


def _relative(values: np.ndarray, predicted: np.ndarray, allowed: np.ndarray) -> float:
    # A gap where a number was predicted, or the other way round, is as far off as can be.
    values, predicted = values[: len(allowed)], predicted[: len(allowed)]
    gaps = np.isnan(values) != np.isnan(predicted)
    if gaps.any():
        return np.inf
    ratio = np.abs(values - predicted) / allowed
    return float(np.nanmax(ratio)) if np.isfinite(ratio).any() else 0.0


def _check(
    state: _Grid,
    measure: Measure,
    is_cut: Callable[[Index], bool],
    share: float,
    generator: np.random.Generator,
) -> None:
    # Held-out points say what interpolation really misses. Around one that misses too much
    # everything is measured, until those that are checked hold.
    filled = state.filled
    while True:
        rest = np.argwhere(filled.predicted)
        count = min(len(rest), max(8, round(share * len(rest)))) if len(rest) else 0
        if count == 0:
            return
        chosen = [tuple(map(int, i)) for i in generator.permutation(rest)[:count]]
        guesses = {i: filled.values[i].copy() for i in chosen}
        allowed = {i: state.allowed(guesses[i]) for i in chosen}
        state.take(measure(chosen), is_cut)
        misses = {i: _relative(filled.values[i], guesses[i], allowed[i]) for i in chosen}
        bad = [i for i, miss in misses.items() if miss > 1]
        if not bad:
            filled.num_checked = count
            filled.worst = max(misses.values())
            judged = len(state.relative)
            gaps = np.stack([np.abs(filled.values[i] - guesses[i])[:judged] for i in chosen])
            filled.worst_miss = np.where(
                np.isnan(gaps).all(axis=0), np.nan, np.nanmax(np.nan_to_num(gaps), axis=0)
            )
            return
        around = {
            j
            for i in bad
            for j in _product(
                range(max(0, k - 2), min(n, k + 3))
                for k, n in zip(i, filled.predicted.shape, strict=True)
            )
            if filled.predicted[j]
        }
        state.take(measure(sorted(around)), is_cut)
