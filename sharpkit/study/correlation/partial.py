"""Correlation given covariates, and how likely it is if nothing but them is shared."""

from __future__ import annotations

import numpy as np
import scipy.stats

from sharpkit.study.correlation.ranks import Floats, Ints, Statistic
from sharpkit.study.correlation.resampling import features, pieces

__all__ = ["conditional_p", "partial_correlation"]

SINGULAR = 1e-9


def partial_correlation(matrix: Floats) -> Floats:
    r"""Return the correlation of the first two variables given all others: [B].

    With one covariate, for Kendall's tau as for Pearson's and Spearman's correlation,

    .. math::

        \tau_{xy \cdot z} = \frac{\tau_{xy} - \tau_{xz} \tau_{yz}}
            {\sqrt{(1 - \tau_{xz}^2)(1 - \tau_{yz}^2)}},

    and with several the same of the residual matrix :math:`S = T_{aa} - T_{az} T_{zz}^+
    T_{za}` with :math:`a = (x, y)`: :math:`S_{xy} / \sqrt{S_{xx} S_{yy}}`, which is
    :math:`-P_{xy} / \sqrt{P_{xx} P_{yy}}` of the inverse matrix P. Spearman's is Pearson's of
    the residuals of ranks.

    Args:
        matrix: [B, v, v] correlations; x, y, then the covariates.

    Returns:
        NaN where the covariates leave nothing of x or of y.

    Misleads: a partial *tau* is not 0 if x and y are independent given z: for normal variables
    with :math:`r_{xz} = r_{yz} = 0.8` and :math:`r_{xy} = 0.64` it is 0.14. Its p-value is
    therefore :func:`conditional_p`'s, whose null hypothesis has that value. A covariate
    measured with noise is taken out in part only.

    Example:
        >>> t = np.array([[[1, 0.5, 0.6], [0.5, 1, 0.4], [0.6, 0.4, 1]]])
        >>> partial_correlation(t).round(4).tolist()
        [0.3546]

    Source: Kendall 1942, doi:10.1093/biomet/32.3-4.277.
    """
    if matrix.shape[1] == 2:
        return np.asarray(matrix[:, 0, 1])
    fine = np.asarray(np.isfinite(matrix).all(axis=(1, 2)))
    safe = np.where(fine[:, None, None], matrix, np.eye(matrix.shape[1]))
    cross = safe[:, :2, 2:]
    inverse = np.linalg.pinv(safe[:, 2:, 2:], rcond=1e-9, hermitian=True)
    left = safe[:, :2, :2] - cross @ inverse @ np.swapaxes(cross, 1, 2)
    squares = left[:, 0, 0] * left[:, 1, 1]
    fine &= (left[:, 0, 0] > SINGULAR) & (left[:, 1, 1] > SINGULAR)
    value = left[:, 0, 1] / np.sqrt(np.where(fine, squares, 1.0))
    return np.where(fine, np.clip(value, -1.0, 1.0), np.nan)


def _scores(x: Floats, groups: Ints) -> Floats:
    # Normal scores within groups.
    result = np.zeros(len(x))
    for g in np.unique(groups):
        mine = groups == g
        ranks = scipy.stats.rankdata(x[mine])
        result[mine] = scipy.stats.norm.ppf(ranks / (mine.sum() + 1))
    return result


def conditional_p(
    columns: Floats,
    response: Floats,
    covariates: Floats,
    groups: Ints,
    orders: Ints,
    statistic: Statistic = "kendall",
) -> Floats:
    r"""Return p-values of columns and a response being independent given the covariates.

    The normal scores (within groups) of the response are regressed on those of the
    covariates, and the residuals are permuted and added back: :math:`y^* = \hat y + \pi(e)`,
    which keeps its tie to the covariates and breaks any other. With :math:`T^*` the partial
    correlations of :math:`y^*`, and :math:`m^*` their median,

    .. math:: p = \frac{1 + \#\{b : |T^*_b - m^*| \ge |T - m^*|\}}{1 + B}.

    Args:
        columns: [n, m].
        response: [n].
        covariates: [n, z].
        groups: [n].
        orders: [B, n], from :func:`~sharpkit.study.correlation.resampling.draw_orders`.
        statistic: Which correlation; for Pearson's the values take the place of the scores.

    Returns:
        [m]; NaN where the covariates leave nothing of the response or of the column.

    Misleads: it takes the scores as linear in each other, which holds for normal variables up
    to monotone transformations; with few models a covariate it is rough.

    Source: the permutation of residuals is Freedman and Lane's, 1983,
    doi:10.1080/07350015.1983.10509354; the scores and the centring are our choice.
    """
    target, design = response, covariates
    if statistic != "pearson":
        target = _scores(response, groups)
        design = np.stack([_scores(c, groups) for c in covariates.T], axis=1)
    dummies = (groups[:, None] == np.unique(groups)).astype(float)
    full = np.hstack([dummies, design])
    fitted = full @ np.linalg.lstsq(full, target, rcond=None)[0]
    residuals = target - fitted
    if np.std(residuals) <= SINGULAR * np.std(target):
        return np.full(columns.shape[1], np.nan)
    x, z = (features(c, groups, statistic) for c in (columns, covariates))
    inverse = np.linalg.pinv(z.T @ z, rcond=1e-9, hermitian=True)
    xz = x.T @ z
    x_left = (x * x).sum(axis=0) - ((xz @ inverse) * xz).sum(axis=1)

    def partial(y: Floats) -> Floats:
        yz = y.T @ z
        y_left = (y * y).sum(axis=0) - ((yz @ inverse) * yz).sum(axis=1)
        squares = np.outer(np.maximum(y_left, SINGULAR), np.maximum(x_left, SINGULAR))
        value: Floats = (y.T @ x - yz @ inverse @ xz.T) / np.sqrt(squares)
        return value

    at = partial(features(response[:, None], groups, statistic))[0]
    drawn = np.concatenate(
        [
            partial(features((fitted + residuals[part]).T, groups, statistic))
            for part in pieces(orders, x)
        ]
    )
    centre = np.median(drawn, axis=0)
    extreme = np.sum(np.abs(drawn - centre) >= np.abs(at - centre) - 1e-9, axis=0)
    return np.where(x_left > SINGULAR, (1 + extreme) / (1 + len(orders)), np.nan)
