"""How often a measure orders two models wrongly that differ in one hyperparameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
import scipy.sparse.csgraph
import scipy.stats

from sharpkit.errors import SettingsError
from sharpkit.study.correlation.ranks import Floats, text_table
from sharpkit.study.correlation.resampling import FEWEST, LEVEL, RESAMPLES

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Environment", "EnvironmentKind", "SignError", "hoeffding_weights", "sign_error"]

EnvironmentKind: TypeAlias = Literal["axis", "step", "settings"]


@dataclass(frozen=True)
class Environment:
    r"""The sign-error in one environment.

    Attributes:
        name: The hyperparameter, with its two values or the two settings.
        axis: The hyperparameter.
        error: Weighted mean sign-error, from 0 to 1; a coin has 0.5.
        low: Lower end of the 95% bootstrap interval; NaN if there is none.
        high: Upper end.
        pairs: Pairs of models with a weight above 0.
        effective: Effective number of pairs, :math:`(\sum w)^2 / \sum w^2`.
    """

    name: str
    axis: str
    error: float
    low: float
    high: float
    pairs: int
    effective: float


@dataclass(frozen=True)
class SignError:
    """Sign-errors over environments.

    Attributes:
        mean: Mean over the environments; NaN if there is none.
        robust: The largest over the environments.
        low: Lower end of the 95% interval of ``robust``; NaN if there is none.
        high: Upper end.
        worst: Name of the environment with the largest error.
        environments: All that have enough weight.
        dropped: How many have too little.
        zero_weight: Pairs whose gaps do not differ enough, as the weights say.
        pairs: Pairs that differ in exactly one hyperparameter.
    """

    mean: float
    robust: float
    low: float
    high: float
    worst: str
    environments: tuple[Environment, ...]
    dropped: int
    zero_weight: int
    pairs: int


def hoeffding_weights(differences: Floats, num_test: int | None) -> Floats:
    r"""Return the weights of pairs whose gaps differ by so much on n test points.

    .. math:: w = \left(\max\{0, 1 - 2 e^{-2 n (\Delta / 2)^2}\}^2 - \tfrac12\right)_+

    The square is a bound on the probability that both gaps are within half their difference
    of the truth, so that their order is right. Pairs below one half get no weight at all.

    Args:
        differences: Absolute differences of the gaps, which must be of a loss in [0, 1], such
            as the error rate: Hoeffding's inequality needs the range.
        num_test: Test points n; ``None``: all weights are 1.

    Example:
        >>> hoeffding_weights(np.array([0.0, 0.02, 0.05, 1.0]), 10000).round(4).tolist()
        [0.0, 0.0319, 0.5, 0.5]

    Source: Dziugaite et al. 2020, arXiv:2010.11924; formula as in their code.
    """
    gaps = np.abs(np.asarray(differences, dtype=float))
    if num_test is None:
        return np.ones_like(gaps)
    if num_test < 1:
        raise SettingsError(f"Expected `num_test` of at least 1. Got {num_test}.")
    sure = np.maximum(0.0, 1 - 2 * np.exp(-2 * num_test * (gaps / 2) ** 2)) ** 2
    weights: Floats = np.maximum(sure - 0.5, 0.0)
    return weights


def sign_error(
    x: Sequence[float],
    y: Sequence[float],
    hyperparameters: pd.DataFrame,
    *,
    num_test: int | None = None,
    environments: EnvironmentKind = "axis",
    min_effective: float = 1.0,
    seed: int = 0,
) -> SignError:
    r"""Return the sign-errors of a measure over environments, and the largest of them.

    Over the pairs (i, j) of an environment, which differ in exactly one hyperparameter,

    .. math::

        \mathrm{SE} = \frac{\sum w_{ij}\, \tfrac12 (1 - \mathrm{sign}(x_i - x_j)\,
            \mathrm{sign}(y_i - y_j))}{\sum w_{ij}}, \qquad
        \text{robust} = \max_e \mathrm{SE}_e,

    with :func:`hoeffding_weights`. Pairs of no weight count nowhere; an environment whose
    pairs have less than ``min_effective`` effective weight is dropped and counted, as in the
    paper's code (there 12).

    The bootstrap draws settings (all seeds of one combination of hyperparameters) with
    replacement; where settings have several models the quantiles are taken further out, as
    Student's t for their number is wider than the normal distribution, and an environment has
    an interval only if its pairs make 5 independent differences of settings (5 fixings of the
    other hyperparameters, for an axis of two levels).

    The interval of ``robust`` takes each environment's at the level :math:`1 - 0.05 / E` and then
    the largest of the lower and of the upper ends: the largest error of E noisy ones is too
    large, and this lower end allows for it. Errors of the values are not carried.

    Args:
        x: [n] one value a model.
        y: [n] the gap of each model.
        hyperparameters: n rows; a column a hyperparameter. The seed is none.
        num_test: Test points by which the gap was measured; ``None``: pairs weigh the same.
        environments: ``"axis"``: all pairs that differ in one hyperparameter make one
            environment. ``"step"``: those that differ in it by the same two values.
            ``"settings"``: each two settings, with all pairs of their seeds, as in the paper;
            it needs many seeds and has no intervals.
        min_effective: Least effective number of pairs.
        seed: Of the bootstrap.

    Raises:
        SettingsError: If the lengths differ, there is no hyperparameter, or the kind is unknown.

    Misleads: with ``"settings"`` and one seed each environment is one pair, and ``robust`` is
    1 for every measure that errs once. Weights for a gap of the cross-entropy are not valid.

    Example:
        >>> import pandas as pd
        >>> grid = pd.DataFrame({"depth": [1, 1, 2, 2], "width": [8, 16, 8, 16]})
        >>> s = sign_error([1, 2, 3, 4], [1, 2, 4, 3], grid)
        >>> s.mean, s.robust, s.worst
        (0.25, 0.5, 'width')

    Source: Dziugaite et al. 2020, arXiv:2010.11924; the intervals are ours.
    """
    if environments not in get_args(EnvironmentKind):
        raise SettingsError(
            f"Expected `environments` among {', '.join(get_args(EnvironmentKind))}."
            f" Got {environments!r}."
        )
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if not len(a) == len(b) == len(hyperparameters) or hyperparameters.shape[1] == 0:
        raise SettingsError(
            f"Expected one x, one y and one row of hyperparameters a model, and a hyperparameter."
            f" Got {len(a)}, {len(b)} and {hyperparameters.shape}."
        )
    fine = np.isfinite(a) & np.isfinite(b)
    a, b, table = a[fine], b[fine], text_table(hyperparameters[fine])
    i, j = np.triu_indices(len(a), 1)
    values = table.to_numpy()
    differ = values[i] != values[j]
    one = differ.sum(axis=1) == 1
    i, j, axis = i[one], j[one], differ[one].argmax(axis=1)
    weights = hoeffding_weights(b[i] - b[j], num_test)
    errors = 0.5 * (1 - np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]))
    settings = ["; ".join(row) for row in values]
    unit = np.unique(settings, return_inverse=True)[1].reshape(-1) if len(a) else np.arange(0)
    names = [str(c) for c in table.columns]
    keys: dict[str, list[int]] = {}
    for pair, (p, q, c) in enumerate(zip(i, j, axis, strict=True)):
        name = names[c]
        if environments == "step":
            name += ": " + " | ".join(sorted((values[p, c], values[q, c])))
        elif environments == "settings":
            name += ": " + " | ".join(sorted((settings[p], settings[q])))
        keys.setdefault(name, []).append(pair)
    kept: list[tuple[str, np.ndarray, float]] = []
    for name in sorted(keys):
        index = np.array(keys[name])
        w = weights[index]
        effective = float(w.sum() ** 2 / (w**2).sum()) if w.any() else 0.0
        if effective >= min_effective - 1e-9 and w.any():
            kept.append((name, index, effective))
    clustered = len(np.unique(unit)) < len(unit)
    ends = _ends(kept, unit[i], unit[j], weights, errors, environments, clustered, seed)
    found = []
    for (name, index, effective), (low, high, _, _) in zip(kept, ends, strict=True):
        w = weights[index]
        error = float((w * errors[index]).sum() / w.sum())
        part = names[axis[index[0]]]
        found.append(Environment(name, part, error, low, high, int((w > 0).sum()), effective))
    worst = max(found, key=lambda e: e.error, default=None)
    return SignError(
        mean=float(np.mean([e.error for e in found])) if found else math.nan,
        robust=worst.error if worst else math.nan,
        low=_largest([e[2] for e in ends]),
        high=_largest([e[3] for e in ends]),
        worst=worst.name if worst else "",
        environments=tuple(found),
        dropped=len(keys) - len(found),
        zero_weight=int((weights == 0).sum()),
        pairs=len(i),
    )


def _largest(ends: list[float]) -> float:
    # Without an interval in each environment there is none for the largest.
    return math.nan if not ends or any(math.isnan(e) for e in ends) else max(ends)


def _ends(
    kept: list[tuple[str, np.ndarray, float]],
    first: np.ndarray,
    second: np.ndarray,
    weights: Floats,
    errors: Floats,
    kind: EnvironmentKind,
    clustered: bool,
    seed: int,
) -> list[tuple[float, float, float, float]]:
    # Ends at the level and at the level for all environments together.
    num = int(max(first.max(), second.max())) + 1 if len(first) else 0
    if kind == "settings" or num < FEWEST:
        return [(math.nan,) * 4 for _ in kept]
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num, np.full(num, 1 / num), RESAMPLES).astype(float)
    tail = (1 - LEVEL) / 2
    result = []
    for _, index, _ in kept:
        units = np.union1d(first[index], second[index])
        if len(units) < FEWEST or (clustered and _free(first[index], second[index]) < FEWEST):
            result.append((math.nan,) * 4)
            continue
        # Pairs of one pair of settings share a count: quadratic forms, as for tau.
        total, wrong = (
            np.einsum("bk,bk->b", counts @ _table(num, first[index], second[index], w), counts)
            for w in (weights[index], weights[index] * errors[index])
        )
        value = float((weights[index] * errors[index]).sum() / weights[index].sum())
        if value in (0.0, 1.0):
            # All draws are alike. Disjoint pairs, about half as many as settings, are
            # independent: so many right in a row bound the probability of a wrong one.
            room = [1 - t ** (2 / len(units)) for t in (tail, tail / len(kept))]
            ends = [(0.0, r) if value == 0 else (1 - r, 1.0) for r in room]
            result.append((*ends[0], *ends[1]))
            continue
        fine = total > 0
        draws = wrong[fine] / total[fine]
        tails = [tail, tail / len(kept)]
        if clustered:  # as for tau: Student's t for so many settings
            tails = [_wider(t, len(units) - 1) for t in tails]
        levels = [tails[0], 1 - tails[0], tails[1], 1 - tails[1]]
        q = [float(v) for v in np.quantile(draws, levels)]
        result.append((q[0], q[1], q[2], q[3]))
    return result


def _free(first: np.ndarray, second: np.ndarray) -> int:
    # Settings less sets of settings that pairs connect: how many differences are independent.
    units, ends = np.unique(np.stack([first, second]), return_inverse=True)
    a, b = ends.reshape(2, -1)
    links = scipy.sparse.coo_array((np.ones(len(a)), (a, b)), shape=(len(units),) * 2)
    return int(len(units) - scipy.sparse.csgraph.connected_components(links, directed=False)[0])


def _wider(tail: float, freedom: int) -> float:
    return float(scipy.stats.norm.cdf(scipy.stats.t.ppf(tail, freedom)))


def _table(num: int, first: np.ndarray, second: np.ndarray, weights: Floats) -> Floats:
    table = np.zeros((num, num))
    np.add.at(table, (first, second), weights)
    return table
