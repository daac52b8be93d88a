"""Granulated tau: correlation along one hyperparameter at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sharpkit.errors import SettingsError
from sharpkit.study.correlation.ranks import Floats, text_table
from sharpkit.study.correlation.resampling import FEWEST
from sharpkit.study.correlation.simple import null_deviation

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AxisTau", "GranulatedTau", "granulated_tau"]

NORMAL = 1.959963984540054


@dataclass(frozen=True)
class AxisTau:
    """Tau along one hyperparameter.

    Attributes:
        axis: Name of the hyperparameter.
        psi: Mean of tau over the fixings of the others; NaN if there is none.
        low: Lower end of the 95% interval; NaN below 5 fixings.
        high: Upper end.
        fixings: How many fixings have a tau.
        skipped: How many have none: one level only, or a constant measure or gap.
        levels: Values that the hyperparameter takes.
    """

    axis: str
    psi: float
    low: float
    high: float
    fixings: int
    skipped: int
    levels: int


@dataclass(frozen=True)
class GranulatedTau:
    """Psi, the mean over axes, with its parts.

    Attributes:
        psi: Mean of the axes' values; NaN if no axis has one.
        low: Lower end of the 95% interval; NaN if an axis has none.
        high: Upper end.
        axes: One entry an axis.
        n: Models.
    """

    psi: float
    low: float
    high: float
    axes: tuple[AxisTau, ...]
    n: int


def granulated_tau(
    x: Sequence[float], y: Sequence[float], hyperparameters: pd.DataFrame
) -> GranulatedTau:
    r"""Return the granulated Kendall coefficient and its per-axis parts.

    .. math::

        \Psi = \frac{1}{A} \sum_{a=1}^{A} \psi_a, \qquad
        \psi_a = \frac{1}{|F_a|} \sum_{f \in F_a} \tau_f

    A fixing f gives every hyperparameter but a a value; :math:`\tau_f` is Kendall's tau-b of the
    models that have these values, over the pairs that differ in a. Models with all
    hyperparameters alike are replicates (seeds): they make no pairs with each other.

    The interval of an axis is over its fixings, after Agresti and Coull: four shadow fixings
    are added, two at v and two at -v, where v is the standard deviation of tau for as many
    levels if it meant nothing (1 for two levels), and the normal interval of their mean is
    taken. That of Psi is the mean of the axes' intervals, as if their errors were the same:
    the axes share models, and no interval of a mean needs to be wider.

    Args:
        x: [n] one value a model.
        y: [n] likewise.
        hyperparameters: n rows; a column an axis.

    Raises:
        SettingsError: If the lengths differ or there is no axis.

    Misleads: with two levels and one seed each :math:`\tau_f` is 1 or -1. An axis with few
    fixings weighs in Psi as much as one with many. Fixings are taken as independent. Errors of
    the values are not carried: noise makes Psi smaller.

    Example:
        >>> import pandas as pd
        >>> grid = pd.DataFrame({"depth": [1, 1, 2, 2], "width": [8, 16, 8, 16]})
        >>> g = granulated_tau([1, 2, 3, 4], [1, 2, 4, 3], grid)
        >>> g.psi, [(a.axis, a.psi) for a in g.axes]
        (0.5, [('depth', 1.0), ('width', 0.0)])

    Source: Jiang et al. 2020, arXiv:1912.02178; pairs over seeds and the intervals are ours.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if not len(a) == len(b) == len(hyperparameters) or hyperparameters.shape[1] == 0:
        raise SettingsError(
            f"Expected one x, one y and one row of hyperparameters a model, and an axis. Got"
            f" {len(a)}, {len(b)} and {hyperparameters.shape}. Name axes that the models have."
        )
    fine = np.isfinite(a) & np.isfinite(b)
    a, b = a[fine], b[fine]
    table = text_table(hyperparameters[fine])
    axes = tuple(_axis(a, b, table, str(name)) for name in table.columns)
    defined = [s for s in axes if s.fixings]
    if not defined:
        return GranulatedTau(math.nan, math.nan, math.nan, axes, len(a))
    psi, low, high = (
        float(np.mean([getattr(s, name) for s in defined])) for name in ("psi", "low", "high")
    )
    return GranulatedTau(psi, low, high, axes, len(a))


def _axis(x: Floats, y: Floats, table: pd.DataFrame, axis: str) -> AxisTau:
    others = [c for c in table.columns if c != axis]
    level = table[axis].to_numpy()
    cells = table.groupby(others, sort=True).indices.values() if others else [np.arange(len(x))]
    taus, sizes, skipped = [], [], 0
    for index in cells:
        apart = level[index][:, None] != level[index]
        sx = np.sign(x[index][:, None] - x[index]) * apart
        sy = np.sign(y[index][:, None] - y[index]) * apart
        squares = float((sx * sx).sum() * (sy * sy).sum())
        if squares == 0:
            skipped += 1
            continue
        taus.append(float((sx * sy).sum()) / math.sqrt(squares))
        sizes.append(len(np.unique(level[index])))
    low, high = _interval(np.array(taus), np.array(sizes))
    psi = float(np.mean(taus)) if taus else math.nan
    return AxisTau(axis, psi, low, high, len(taus), skipped, len(np.unique(level)))


def _interval(taus: Floats, sizes: np.ndarray) -> tuple[float, float]:
    if len(taus) < FEWEST:
        return math.nan, math.nan
    v = null_deviation(max(round(float(np.mean(sizes))), 2))
    more = np.concatenate([taus, [v, v, -v, -v]])
    half = NORMAL * float(np.std(more)) / math.sqrt(len(more))
    centre = float(np.mean(more))
    psi = float(np.mean(taus))
    return max(min(centre - half, psi), -1.0), min(max(centre + half, psi), 1.0)
