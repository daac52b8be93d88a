"""A correlation whose interval carries the errors of the measured values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sharpkit.study.correlation.measurement import (
    LEAST,
    ValueErrors,
    disattenuate,
    possible_taus,
    reliability,
)
from sharpkit.study.correlation.partial import partial_correlation
from sharpkit.study.correlation.ranks import (
    Floats,
    Sample,
    Statistic,
    codes,
    from_normal,
    to_normal,
)
from sharpkit.study.correlation.resampling import FEWEST, draw_counts, interval

__all__ = ["Carried", "carried_interval", "order_sentences"]


@dataclass(frozen=True)
class Carried:
    """A correlation, corrected for noise, with its interval.

    Attributes:
        value: Of the measured values.
        exact: Of the values without their noise, as far as it can be told.
        reliability: The share of the values' variance that is not noise.
        low: Lower end of the 95% interval for the correlation of the exact values.
        high: Upper end.
        n: Models.
        errors: The values' errors, by kind.
        open_width: By how much bounds on the values widened the interval.
    """

    value: float
    exact: float
    reliability: float
    low: float
    high: float
    n: int
    errors: ValueErrors
    open_width: float = 0.0

    def columns(self, ending: str) -> dict[str, float]:
        """Return the numbers by the names they have in a table."""
        return {
            f"tau{ending}": self.value,
            f"low{ending}": self.low,
            f"high{ending}": self.high,
            f"tau_exact{ending}": self.exact,
            f"reliability{ending}": self.reliability,
        }


def carried_interval(
    x: Floats,
    y: Floats,
    errors: Floats,
    kinds: Sequence[str | None],
    *,
    groups: Sequence[str] | None = None,
    clusters: Sequence[str] | None = None,
    covariates: Floats | None = None,
    statistic: Statistic = "kendall",
    seed: int = 0,
) -> Carried:
    r"""Return a correlation, partial if there are covariates, with what the errors do to it.

    Noise makes a correlation smaller, and a bootstrap of noisy values holds the smaller one.
    So every resample is corrected for the noise of its own values
    (:func:`~sharpkit.study.correlation.measurement.disattenuate`), and the interval is that of
    the corrected draws. Drawing the values anew within their errors would add the noise a
    second time and make the correlation smaller still. Pearson's corrected draws may lie beyond
    1, where Fisher's scale has no room: its interval is made on the scale of the measured values
    from :math:`r^* \sqrt{R / R^*}`, and its ends are divided by :math:`\sqrt R`; with covariates
    R is that of what they leave. Bounds and rounding are no noise: the
    interval is widened on each side by as much as the order of the exact values may change
    tau in the sample.

    Args:
        x: [n] measured values; models with NaN in any variable are left out.
        y: [n] the gap.
        errors: [n] the probe errors; NaN where unknown, which counts as 0 and is said.
        kinds: [n] what they mean.
        groups: [n] or None.
        clusters: [n] or None.
        covariates: [n, z] or None; taken as exact.
        statistic: Which correlation.
        seed: Of the bootstrap.

    Misleads: noise is taken as independent between models. Probes that all models share
    (one seed) make errors alike, which changes the order of models less than this says; the
    interval is then too wide. For Spearman's and Pearson's the widening is tau's, translated as
    for normal variables. The error of the data being a sample is common to the models and not
    carried.
    """
    given = np.zeros((len(x), 0)) if covariates is None else covariates
    columns = np.hstack([x[:, None], y[:, None], given])
    fine = np.asarray(np.isfinite(columns).all(axis=1))
    n = int(fine.sum())
    found = ValueErrors.of(errors[fine], [k for k, f in zip(kinds, fine, strict=True) if f])
    if n == 0:
        return Carried(math.nan, math.nan, math.nan, math.nan, math.nan, 0, found)
    labels = codes(groups, len(x))[fine]
    alike = (np.arange(len(x)) if clusters is None else codes(clusters, len(x)))[fine]
    alike = np.unique(alike, return_inverse=True)[1].reshape(-1)
    noise = found.noise if found.noise.any() else None
    sample = Sample(columns[fine], labels, alike, statistic, errors=noise)

    def both(counts: Floats) -> tuple[Floats, Floats, Floats]:
        matrix = sample.matrix(counts)
        rel = np.ones(len(counts)) if noise is None else reliability(sample, counts)
        exact = matrix if noise is None else disattenuate(matrix, rel, statistic)
        return partial_correlation(matrix), partial_correlation(exact), rel

    value, exact, rel = (float(v[0]) for v in both(sample.once))
    result = Carried(value, exact, rel, math.nan, math.nan, n, found)
    if n < FEWEST or not math.isfinite(value):
        return result
    if rel <= LEAST:
        return replace(result, exact=math.nan, low=-1.0, high=1.0)
    counts = draw_counts(sample, seed)
    scale = 1.0
    if statistic == "pearson" and noise is not None:
        here, there = (
            _left_reliability(sample.matrix(c), both(c)[2]) for c in (sample.once, counts)
        )
        if here[0] <= LEAST:
            return replace(result, exact=math.nan, low=-1.0, high=1.0)
        scale = math.sqrt(here[0])
        at, draws = value, both(counts)[0] * np.sqrt(here[0] / there)
    else:
        at, draws = exact, both(counts)[1]
    low, high = interval(
        at, draws, units=sample.num_clusters, groups=sample.num_groups,
        clustered=sample.num_clusters < n, statistic=statistic,
    )  # fmt: skip
    low, high = (min(max(end / scale, -1.0), 1.0) for end in (low, high))
    if not (found.below.any() or found.above.any()):
        return replace(result, low=low, high=high)
    down, up = _shifts(columns[fine], labels, found, statistic)
    if down + up < 1e-12:
        return replace(result, low=low, high=high)
    return replace(
        result, low=max(low - down, -1.0), high=min(high + up, 1.0), open_width=down + up
    )


def _left_reliability(matrix: Floats, rel: Floats) -> Floats:
    # Reliability of what the covariates leave of the first variable: (R - P) / (1 - P), where
    # P is the share of its variance that they explain.
    cross = matrix[:, 0, 2:]
    inverse = np.linalg.pinv(np.nan_to_num(matrix[:, 2:, 2:]), rcond=1e-9, hermitian=True)
    share = np.einsum("bi,bij,bj->b", cross, inverse, cross)
    left = np.maximum(1 - share, 1e-12)
    return np.asarray(np.maximum((rel - share) / left, LEAST))


def _shifts(
    columns: Floats, labels: np.ndarray, found: ValueErrors, statistic: Statistic
) -> tuple[float, float]:
    x, y = columns[:, 0], columns[:, 1]
    zero = np.zeros(len(x))
    at = possible_taus(x, y, labels, zero, zero)[0]
    ends = possible_taus(x, y, labels, found.below, found.above)
    if not all(math.isfinite(v) for v in (at, *ends)):
        return 0.0, 0.0
    if statistic == "kendall":
        return at - ends[0], ends[1] - at
    there = [float(from_normal(to_normal(np.array(v), "kendall"), statistic)) for v in (at, *ends)]
    return there[0] - there[1], there[2] - there[0]


def order_sentences(label: str, one: Carried) -> list[str]:
    """Return sentences on what the errors of one measure's values mean for its correlation."""
    found = []
    if one.errors.unknown:
        found.append(
            f"{label}: {one.errors.unknown} of {one.n} values have no known error and are taken"
            " as exact."
        )
    if one.errors.lower_bounds:
        found.append(
            f"{label}: {one.errors.lower_bounds} of {one.n} values are lower bounds; the exact"
            " maxima may be ordered otherwise, beyond what the interval allows for."
        )
    if one.reliability <= LEAST:
        found.append(
            f"{label}: measurement noise swamps the differences between models; measure more"
            " precisely."
        )
    elif one.reliability < 0.9:
        found.append(
            f"{label}: {1 - one.reliability:.0%} of the variance between models is measurement"
            f" noise; tau is {one.value:+.2f} as measured and {one.exact:+.2f} without it."
        )
    if one.open_width > 0.02:
        found.append(
            f"{label}: bounds on the values leave the order of models open; the interval is"
            f" wider by {one.open_width:.2f}."
        )
    return found
