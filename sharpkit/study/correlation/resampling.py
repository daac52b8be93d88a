"""Bootstrap intervals and permutation p-values over models, clusters of models and groups."""

from __future__ import annotations

import math

import numpy as np
import scipy.stats

from sharpkit.study.correlation.ranks import Floats, Ints, Sample, Statistic

__all__ = [
    "FEWEST",
    "LEVEL",
    "PERMUTATIONS",
    "RESAMPLES",
    "arrangements",
    "draw_counts",
    "draw_orders",
    "features",
    "interval",
    "permutation_p",
    "pieces",
]

FEWEST = 5  # models, or clusters of models: fewer give no interval
RESAMPLES = 1000
PERMUTATIONS = 1999
LEVEL = 0.95
CHUNK = 2**22  # numbers held at once
EDGE = 1 - 1e-9


def _members(clusters: Ints, groups: Ints) -> list[list[np.ndarray]]:
    # The clusters of each group, each the indices of its models.
    return [
        [np.flatnonzero(clusters == c) for c in np.unique(clusters[groups == g])]
        for g in np.unique(groups)
    ]


def draw_counts(sample: Sample, seed: int, num: int = RESAMPLES) -> Floats:
    """Return how often each cluster is drawn in each resample: [num, K].

    Clusters are drawn with replacement within their group, as many as the group has.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros((num, sample.num_clusters))
    for g in np.unique(sample.group_of_cluster):
        mine = np.flatnonzero(sample.group_of_cluster == g)
        drawn = mine[rng.integers(0, len(mine), (num, len(mine)))]
        np.add.at(counts, (np.arange(num)[:, None], drawn), 1.0)
    return counts


def draw_orders(
    clusters: Ints, groups: Ints, seed: int | np.random.Generator, num: int = PERMUTATIONS
) -> Ints:
    """Return random orders [num, n] of the models that move clusters of one size in a group."""
    rng = np.random.default_rng(seed)
    orders = np.tile(np.arange(len(clusters)), (num, 1))
    for group in _members(clusters, groups):
        for size in sorted({len(c) for c in group}):
            same = np.stack([c for c in group if len(c) == size])
            moved = np.argsort(rng.random((num, len(same))), axis=1)
            orders[:, same] = same[moved]
    return orders


def arrangements(clusters: Ints, groups: Ints) -> float:
    """Return in how many ways :func:`draw_orders` can order the models: p is at least 1 by it."""
    log = 0.0
    for group in _members(clusters, groups):
        sizes = np.unique([len(c) for c in group], return_counts=True)[1]
        log += sum(math.lgamma(k + 1) for k in sizes)
    return math.exp(min(log, 700.0))


def interval(
    value: float,
    draws: Floats,
    *,
    units: int,
    groups: int = 1,
    clustered: bool = False,
    statistic: Statistic = "kendall",
    level: float = LEVEL,
) -> tuple[float, float]:
    r"""Return the ends of a bootstrap interval for a correlation.

    Rank correlations: quantiles of the draws. For Kendall's, copies of a model make no pairs
    with each other in a resample, which widens the draws by about as much as few models need.
    Where clusters have several models it does not, and the quantiles are taken as much further
    out as Student's t with ``units - 1`` degrees of freedom is wider than the normal
    distribution. Pearson's: on Fisher's scale,

    .. math:: \mathrm{artanh}\,r \pm t_{K - G}\, \mathrm{sd}(\mathrm{artanh}\,r^*).

    Where the models are in perfect order all draws are alike. Then the inner end is
    :math:`1 - 20/K^2` in absolute value for tau: normal variables with a smaller tau are in
    perfect order with probability below 0.025 (simulated for 5 to 60 models; a level other
    than 0.95 uses the same).

    Args:
        value: Of the sample.
        draws: Of the resamples; NaN is left out.
        units: Models, or clusters, that were drawn.
        groups: Within how many groups they were drawn.
        clustered: Whether some cluster has several models.
        statistic: Which correlation.
        level: Probability.

    Returns:
        Low and high; NaN with fewer than 5 units, or if half of the draws are NaN.

    Misleads: below 10 clusters of several models it is too wide (98% for 5 clusters), within
    groups of few models too (96-98%); Pearson's is a little too narrow below 30 models
    (92-93%). See ``docs/correlation.md``.

    Source: Efron 1979, doi:10.1214/aos/1176344552; coverage by our simulations.
    """
    fine = draws[np.isfinite(draws)]
    if units < FEWEST or not math.isfinite(value) or 2 * len(fine) < len(draws):
        return math.nan, math.nan
    tail = (1 - level) / 2
    if statistic == "pearson":
        factor = float(scipy.stats.t.ppf(1 - tail, max(units - groups, 1)))
        half = factor * float(np.std(np.arctanh(np.clip(fine, -EDGE, EDGE)), ddof=1))
        centre = math.atanh(min(max(value, -EDGE), EDGE))
        return math.tanh(centre - half), math.tanh(centre + half)
    if clustered:
        tail = float(scipy.stats.norm.cdf(scipy.stats.t.ppf(tail, units - 1)))
    low, high = (float(q) for q in np.quantile(fine, [tail, 1 - tail]))
    if abs(value) > EDGE:
        inner = 1 - 20 / units**2
        if statistic == "spearman":
            inner = 6 / math.pi * math.asin(math.sin(math.pi / 2 * inner) / 2)
        low, high = (min(low, inner), 1.0) if value > 0 else (-1.0, max(high, -inner))
    return low, high


def permutation_p(
    columns: Floats,
    response: Floats,
    groups: Ints,
    orders: Ints,
    statistic: Statistic = "kendall",
) -> Floats:
    r"""Return p-values of independence, one a column, by permuting the response.

    .. math:: p = \frac{1 + \#\{b : |T_b| \ge |T|\}}{1 + B}

    T is the correlation within groups of :class:`~sharpkit.study.correlation.ranks.Sample`.
    The orders are those of :func:`draw_orders`, so under the null hypothesis that clusters of
    one group are exchangeable p is uniform (up to ties of T, which make it larger).

    Args:
        columns: [n, m], finite.
        response: [n], finite.
        groups: [n].
        orders: [B, n].
        statistic: Which correlation.

    Cost: :math:`O(B n^2 m)` for Kendall's, as one matrix product; :math:`O(B n m)` otherwise.
    """
    left = features(columns, groups, statistic)
    observed = features(response[:, None], groups, statistic)[:, 0] @ left
    drawn = np.concatenate(
        [features(response[part].T, groups, statistic).T @ left for part in pieces(orders, left)]
    )
    extreme = np.sum(np.abs(drawn) >= np.abs(observed) - 1e-9, axis=0)
    defined = (left**2).sum(axis=0) > 0
    defined &= np.ptp(response) > 0
    return np.where(defined, (1 + extreme) / (1 + len(orders)), np.nan)


def pieces(orders: Ints, left: Floats) -> list[Ints]:
    """Cut orders into pieces whose features fit into memory."""
    step = max(1, CHUNK // max(len(left), 1))
    return [orders[start : start + step] for start in range(0, len(orders), step)]


def features(columns: Floats, groups: Ints, statistic: Statistic) -> Floats:
    """Return vectors whose inner products are the correlations within groups: [N, m].

    Signs of the differences of pairs (Kendall), standardized ranks (Spearman) or values
    (Pearson), normalized in each group and weighted by the root of its share of the pairs.
    """
    rows, weights = [], []
    for g in np.unique(groups):
        x = columns[groups == g]
        weights.append(len(x) * (len(x) - 1) / 2)
        if statistic == "kendall":
            i, j = np.triu_indices(len(x), 1)
            f = np.sign(x[i] - x[j])
        else:
            f = scipy.stats.rankdata(x, axis=0) if statistic == "spearman" else x
            f = np.where(np.ptp(x, axis=0) > 0, f - f.mean(axis=0), 0.0)
        norm = np.sqrt((f * f).sum(axis=0))
        rows.append(f * (math.sqrt(weights[-1]) / np.where(norm > 0, norm, 1.0)))
    return np.concatenate(rows) / math.sqrt(max(sum(weights), 1.0))
