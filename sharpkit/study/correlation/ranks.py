"""Kendall's, Spearman's and Pearson's correlation, of a sample and of many resamples at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import scipy.stats

from sharpkit.errors import SettingsError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Floats",
    "Ints",
    "Sample",
    "Statistic",
    "check_statistic",
    "codes",
    "from_normal",
    "text_table",
    "texts",
    "to_normal",
]

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Statistic: TypeAlias = Literal["kendall", "spearman", "pearson"]

TINY = 1e-12  # a variance below it, of a standardized column, is rounding


def check_statistic(statistic: str) -> None:
    """Raise SettingsError unless the statistic is one of the three."""
    if statistic not in get_args(Statistic):
        raise SettingsError(
            f"Expected `statistic` among {', '.join(get_args(Statistic))}. Got {statistic!r}."
        )


def texts(values: Iterable[object]) -> list[str]:
    """Return each value as text; all that are missing have the same."""
    import pandas as pd

    found = list(values)
    missing = pd.isna(pd.Series(found, dtype=object))
    return ["missing" if m else str(v) for v, m in zip(found, missing, strict=True)]


def text_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of :func:`texts`, with rows numbered from 0."""
    import pandas as pd

    return pd.DataFrame({name: texts(table[name]) for name in table.columns}, dtype=object)


def codes(labels: Iterable[object] | None, n: int) -> Ints:
    """Return whole numbers from 0 for the labels of n models; all 0 if there are none."""
    if labels is None:
        return np.zeros(n, dtype=np.int64)
    found = np.unique(np.asarray(texts(labels), dtype=str), return_inverse=True)[1]
    return np.asarray(found, dtype=np.int64).reshape(-1)


class Sample:
    r"""Correlations among variables as functions of how often each cluster of models is drawn.

    Resample b draws cluster k :math:`c_{bk}` times. With :math:`s^x_{ij} = \mathrm{sign}(x_i -
    x_j)`, Kendall's tau-b of a resample is a quotient of quadratic forms in the counts,

    .. math::

        \tau_b = \frac{q(s^x s^y)}{\sqrt{q(s^x s^x)\, q(s^y s^y)}}, \qquad
        q(s) = \sum_{k \ne l} c_k c_l \sum_{i \in k, j \in l} s_{ij}
             + \sum_k c_k \sum_{i, j \in k} s_{ij},

    so that two copies of a cluster make no pairs with each other. Spearman's and Pearson's are
    those of the resample, with mean ranks where models tie. With groups each is the mean of the
    groups' values, weighted by the numbers of pairs of models; groups in which a variable is
    constant are left out.

    Args:
        columns: [n, v], finite: one row a model, one column a variable.
        groups: [n] whole numbers from 0.
        clusters: [n] whole numbers from 0 without gaps; each cluster in one group.
        statistic: Which correlation.
        errors: [n] standard errors of the first variable, or None.

    Raises:
        SettingsError: If a cluster has models of two groups.

    Cost: :math:`O(B K^2)` for B resamples and K clusters, one matrix product a pair of variables.
    """

    def __init__(
        self,
        columns: Floats,
        groups: Ints,
        clusters: Ints,
        statistic: Statistic = "kendall",
        errors: Floats | None = None,
    ) -> None:
        self.columns, self.clusters, self.statistic = columns, clusters, statistic
        self.num_clusters = int(clusters.max()) + 1 if len(clusters) else 0
        self.group_of_cluster = np.zeros(self.num_clusters, dtype=np.int64)
        self.group_of_cluster[clusters] = groups
        if np.any(self.group_of_cluster[clusters] != groups):
            raise SettingsError(
                "Expected each cluster within one group. Got one with models of two groups. Make"
                " clusters that also tell the groups apart."
            )
        self._parts = [
            _Part(columns, clusters, np.flatnonzero(groups == g), statistic, errors)
            for g in np.unique(groups)
        ]

    @property
    def num_groups(self) -> int:
        """How many groups there are."""
        return len(self._parts)

    @property
    def once(self) -> Floats:
        """The counts of the sample itself: [1, K] ones."""
        return np.ones((1, self.num_clusters))

    def matrix(self, counts: Floats) -> Floats:
        """Return the correlations [B, v, v] under counts [B, K]; NaN where there is none."""
        v = self.columns.shape[1]
        result = np.full((len(counts), v, v), np.nan)
        parts = [p.matrix(counts) for p in self._parts]
        for a in range(v):
            result[:, a, a] = 1.0
            for b in range(a + 1, v):
                value = self._mean([m[:, a, b] for m in parts], counts)
                result[:, a, b] = result[:, b, a] = value
        return result

    def echo(self, counts: Floats) -> Floats:
        """Return the correlation [B] of the first variable with itself under fresh noise.

        The noise has the variables' standard errors; the correlation is the expected tau
        for the rank statistics and Pearson's for Pearson's.
        """
        return self._mean([p.echo(counts) for p in self._parts], counts)

    def _mean(self, values: list[Floats], counts: Floats) -> Floats:
        total, weight = np.zeros(len(counts)), np.zeros(len(counts))
        for part, value in zip(self._parts, values, strict=True):
            n = part.sizes(counts)
            w = np.where(np.isfinite(value), n * (n - 1) / 2, 0.0)
            total += w * np.nan_to_num(value)
            weight += w
        return np.where(weight > 0, total / np.where(weight > 0, weight, 1), np.nan)


class _Part:
    # The models of one group.
    def __init__(
        self,
        columns: Floats,
        clusters: Ints,
        index: npt.NDArray[np.intp],
        statistic: Statistic,
        errors: Floats | None,
    ) -> None:
        self.names, self.place = np.unique(clusters[index], return_inverse=True)
        self.columns = columns[index]
        self.errors = None if errors is None else errors[index]
        self.statistic = statistic
        self.num = np.bincount(self.place)
        self._forms: dict[tuple[int, int], _Form] = {}
        self._signs: dict[int, Floats] = {}
        scale = np.where(np.ptp(self.columns, axis=0) > 0, self.columns.std(axis=0), 1.0)
        self.scale = np.where(scale > 0, scale, 1.0)
        self.standard = (self.columns - self.columns.mean(axis=0)) / self.scale

    def sizes(self, counts: Floats) -> Floats:
        sizes: Floats = counts[:, self.names] @ self.num
        return sizes

    def matrix(self, counts: Floats) -> Floats:
        mine, v = counts[:, self.names], self.columns.shape[1]
        result = np.ones((len(counts), v, v))
        if self.statistic == "kendall":
            squares = [self._form(a, a)(mine) for a in range(v)]
            for a in range(v):
                for b in range(a + 1, v):
                    result[:, a, b] = _ratio(self._form(a, b)(mine), squares[a] * squares[b])
            return result
        weights = mine[:, self.place]
        n = np.maximum(weights.sum(axis=1, keepdims=True), 1.0)
        values = []
        for k in range(v):
            x = self._values(k, weights) / n if self.statistic == "spearman" else self.standard.T[k]
            values.append(x - (weights * x).sum(axis=1, keepdims=True) / n)
        squares = [(weights * x * x).sum(axis=1) / n[:, 0] for x in values]
        squares = [np.where(q > TINY, q, 0.0) for q in squares]
        for a in range(v):
            for b in range(a + 1, v):
                shared = (weights * values[a] * values[b]).sum(axis=1) / n[:, 0]
                result[:, a, b] = _ratio(shared, squares[a] * squares[b])
        return result

    def _values(self, k: int, weights: Floats) -> Floats:
        # Mean ranks in each resample: copies of a model tie.
        x = self.columns[:, k]
        below = (x[None, :] < x[:, None]) + 0.5 * (x[None, :] == x[:, None])
        ranks: Floats = weights @ below.T
        return ranks

    def _sign(self, k: int) -> Floats:
        if k not in self._signs:
            x = self.columns[:, k]
            self._signs[k] = np.sign(x[:, None] - x)
        return self._signs[k]

    def _form(self, a: int, b: int) -> _Form:
        if (a, b) not in self._forms:
            self._forms[a, b] = _Form(self._sign(a) * self._sign(b), self.place)
        return self._forms[a, b]

    def echo(self, counts: Floats) -> Floats:
        if self.errors is None:
            return np.ones(len(counts))
        mine = counts[:, self.names]
        if self.statistic == "pearson":
            weights = mine[:, self.place]
            n = weights.sum(axis=1)
            x = self.standard[:, 0]
            mean = weights @ x / n
            variance = weights @ (x * x) / n - mean**2
            # The unbiased variance of the resample's models.
            variance = variance * n / np.maximum(n - 1, 1)
            noise = weights @ (self.errors / self.scale[0]) ** 2 / n
            fine = variance > TINY
            return np.where(fine, np.sqrt(1 / (1 + noise / np.where(fine, variance, 1.0))), np.nan)
        x, e = self.columns[:, 0], self.errors
        spread = np.sqrt(e[:, None] ** 2 + e**2)
        with np.errstate(divide="ignore", invalid="ignore"):
            soft = 2 * scipy.stats.norm.cdf((x[:, None] - x) / spread) - 1
        soft = np.where(spread > 0, soft, self._sign(0))
        np.fill_diagonal(soft, 0.0)
        here = np.where(spread > 0, 1.0, np.abs(self._sign(0)))
        np.fill_diagonal(here, 0.0)
        shared = _Form(soft * self._sign(0), self.place)(mine)
        squares = self._form(0, 0)(mine) * _Form(here, self.place)(mine)
        return _ratio(shared, squares)


class _Form:
    # q(s) of the class Sample for one symmetric s; a constant s needs no matrix product.
    def __init__(self, s: Floats, place: npt.NDArray[np.intp]) -> None:
        k = int(place.max()) + 1
        if k == len(place) and np.array_equal(place, np.arange(k)):
            table = s
        else:
            member = np.zeros((len(place), k))
            member[np.arange(len(place)), place] = 1.0
            table = member.T @ s @ member
        self.inside = np.diag(table).copy()
        self.across = table - np.diag(self.inside)
        num = np.bincount(place).astype(float)
        full = np.outer(num, num)
        np.fill_diagonal(full, 0.0)
        self.num = num if np.array_equal(self.across, full) else None

    def __call__(self, counts: Floats) -> Floats:
        inside = counts @ self.inside
        if self.num is not None:
            across = (counts @ self.num) ** 2 - (counts**2) @ (self.num**2)
        else:
            across = np.einsum("bk,bk->b", counts @ self.across, counts)
        total: Floats = across + inside
        return total


def _ratio(shared: Floats, squares: Floats) -> Floats:
    fine = squares > 0
    value = shared / np.sqrt(np.where(fine, squares, 1.0))
    return np.where(fine, np.clip(value, -1.0, 1.0), np.nan)


def to_normal(value: Floats, statistic: Statistic) -> Floats:
    r"""Return Pearson's correlation of the normal distribution that has this rank correlation.

    .. math:: r = \sin(\pi \tau / 2), \qquad r = 2 \sin(\pi \rho_S / 6)

    Source: Kruskal 1958, doi:10.1080/01621459.1958.10501481.
    """
    if statistic == "kendall":
        return np.asarray(np.sin(math.pi / 2 * value))
    return np.asarray(2 * np.sin(math.pi / 6 * value)) if statistic == "spearman" else value


def from_normal(r: Floats, statistic: Statistic) -> Floats:
    """Return the rank correlation of a normal distribution with Pearson's correlation r."""
    if statistic == "kendall":
        return np.asarray(2 / math.pi * np.arcsin(r))
    return np.asarray(6 / math.pi * np.arcsin(r / 2)) if statistic == "spearman" else r
