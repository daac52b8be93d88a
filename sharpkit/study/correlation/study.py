"""Everything about how the scores of a study go together with its gap, in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.errors import SettingsError
from sharpkit.study.correlation.carried import Carried, carried_interval, order_sentences
from sharpkit.study.correlation.granulated import granulated_tau
from sharpkit.study.correlation.multiple import Correction, adjust
from sharpkit.study.correlation.partial import conditional_p
from sharpkit.study.correlation.ranks import Floats, Ints, Statistic, check_statistic, codes, texts
from sharpkit.study.correlation.resampling import (
    FEWEST,
    arrangements,
    draw_orders,
    permutation_p,
)
from sharpkit.study.correlation.sign_error import EnvironmentKind, sign_error
from sharpkit.study.correlation.study_frame import Filter, Models, select_models

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["StudyCorrelation", "correlate_study"]

NOISY = 0.9  # a reliability below it is worth a sentence


@dataclass(frozen=True)
class StudyCorrelation:
    """What a study says about sharpness and generalization.

    Attributes:
        frame: One row a measure; see :func:`correlate_study` for the columns.
        axes: One row a measure and axis: granulated tau. Empty without axes.
        environments: One row a measure and environment: sign-errors. Empty without axes.
        filter: The sentence that says which models are correlated, with counts. It is also
            in ``attrs["filter"]`` of every table.
        warnings: Sentences on what limits these numbers.
        settings: What was asked for.
    """

    frame: pd.DataFrame
    axes: pd.DataFrame
    environments: pd.DataFrame
    filter: str
    warnings: tuple[str, ...]
    settings: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """Return the table with a row a measure."""
        return self.frame

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN becomes None."""
        tables = {"measures": self.frame, "axes": self.axes, "environments": self.environments}
        return {
            "filter": self.filter,
            "warnings": list(self.warnings),
            "settings": dict(self.settings),
            "tables": {
                name: {"filter": self.filter, "rows": _rows(table)}
                for name, table in tables.items()
            },
        }


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    def plain(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{str(k): plain(v) for k, v in row.items()} for row in table.to_dict("records")]


def correlate_study(
    scores: pd.DataFrame,
    *,
    gap: str,
    group: str | None = None,
    cluster: str | None = None,
    axes: Sequence[str] | None = None,
    partial: Sequence[str] = (),
    measures: Sequence[str] | None = None,
    converged: Filter | None = None,
    statistic: Statistic = "kendall",
    correction: Correction = "holm",
    num_test: int | None = None,
    environments: EnvironmentKind = "axis",
    min_effective: float = 1.0,
    seed: int = 0,
) -> StudyCorrelation:
    """Correlate every measure of a study with the gap, with intervals, p-values and warnings.

    Columns of the table: ``measure``; ``n`` models; ``unconverged`` of them; ``tau`` (or
    ``rho``, ``r``: the column is always called ``tau``) of the measured values; ``tau_exact``,
    corrected for measurement noise, and ``reliability``, the share of the values' variance
    that is not noise; ``low``, ``high``: the 95% interval for the correlation of the exact
    values (the measured ones where they have no error); ``p`` by permutation and
    ``p_adjusted`` for the number of measures. With a group the same with the ending
    ``_within``, and ``disagree`` where the pooled interval excludes 0 and the other does not, or
    where the signs differ and one of the intervals excludes 0. With covariates the ending
    ``_partial``, within groups if there are groups. With axes ``psi`` and ``sign_error``,
    ``robust_sign_error``.

    Args:
        scores: The long table; see :func:`~.study_frame.select_models`.
        gap: Metadata entry of the generalization gap.
        group: Metadata entry of the groups, such as the architecture.
        cluster: Metadata entry of what models are alike by, such as the setting of which they
            are seeds. ``None``: if there are axes and models that agree in all of them, those.
        axes: Metadata entries that are hyperparameters; the seed is none.
        partial: Metadata entries or labels that are held fixed.
        measures: Labels or names of measures; ``None``: all.
        converged: Which models count as converged; ``None``: :class:`~.study_frame.Filter`'s
            defaults.
        statistic: ``"kendall"``, ``"spearman"`` or ``"pearson"``. Granulated tau and
            sign-errors are of ranks whatever the statistic.
        correction: ``"holm"``, ``"bh"`` or ``"none"``.
        num_test: Test points behind the gap, for the weights of the sign-error.
        environments: Of the sign-error.
        min_effective: Of the sign-error.
        seed: Of the bootstrap and of the permutations.

    Raises:
        SettingsError: If a name is unknown or a setting makes no sense.

    Misleads: it corrects for the measures in this table, not for the filters, groups and
    settings that were tried. Models that were trained on the same data are not a sample of
    all models.

    Cost: seconds for hundreds of models and 40 measures.
    """
    import pandas as pd

    check_statistic(statistic)
    models = select_models(scores, gap, converged or Filter(), measures)
    warn = list(models.notes)
    groups = None if group is None else texts(models.column(group))
    table = None
    if axes:
        table = pd.DataFrame({a: texts(models.column(a)) for a in axes}, dtype=object)
    for name in dict.fromkeys(n for n in (group, cluster, *(axes or ())) if n is not None):
        missing = int(models.column(name).isna().sum())
        if missing:
            warn.append(
                f"{missing} of {len(models.gap)} models have no `{name}`; they are taken as alike"
                " in it."
            )
    clusters = _clusters(models, cluster, table, groups, warn)
    covariates = _covariates(models, partial)
    rows, axis_rows, environment_rows, noisy = [], [], [], []
    tester = _Tester(models, groups, clusters, covariates, statistic, seed)
    for label in models.values.columns:
        row, one = _row(models, str(label), groups, clusters, covariates, statistic, seed)
        row |= tester(str(label))
        warn += order_sentences(str(label), one)
        x = models.values[label].tolist()
        if table is not None:
            if one.reliability < NOISY:
                noisy.append(str(label))
            g = granulated_tau(x, models.gap.tolist(), table)
            row |= {"psi": g.psi, "psi_low": g.low, "psi_high": g.high}
            axis_rows += [{"measure": label, **vars(a)} for a in g.axes]
            s = sign_error(
                x, models.gap.tolist(), table, num_test=num_test, environments=environments,
                min_effective=min_effective, seed=seed,
            )  # fmt: skip
            row |= {
                "sign_error": s.mean, "robust_sign_error": s.robust, "robust_low": s.low,
                "robust_high": s.high, "worst_environment": s.worst,
                "environments_dropped": s.dropped,
            }  # fmt: skip
            environment_rows += [{"measure": label, **vars(e)} for e in s.environments]
        rows.append(row)
    if noisy:
        warn.append(
            "Granulated tau and sign-errors are of the measured values, and their intervals do not"
            " carry the noise, which makes the one smaller and the others more like a coin's:"
            f" {', '.join(noisy)}."
        )
    frame = pd.DataFrame(rows)
    for ending in ("", "_within", "_partial"):
        if f"p{ending}" in frame:
            at = int(frame.columns.get_loc(f"p{ending}")) + 1  # type: ignore[arg-type]
            frame.insert(
                at,
                f"p{ending}_adjusted",
                adjust(frame[f"p{ending}"].to_numpy(dtype=float), correction),
            )
    frames = [frame, pd.DataFrame(axis_rows), pd.DataFrame(environment_rows)]
    warn += _remarks(frame, frames[1], models, group, correction, num_test if axes else None)
    warn += tester.remarks
    for f in frames:
        f.attrs["filter"] = models.sentence
    settings = {
        "gap": gap, "group": group, "cluster": cluster, "axes": list(axes or ()),
        "partial": list(partial), "statistic": statistic, "correction": correction,
        "num_test": num_test, "environments": environments, "min_effective": min_effective,
        "seed": seed, **vars(converged or Filter()),
    }  # fmt: skip
    main, per_axis, per_environment = frames
    return StudyCorrelation(
        main, per_axis, per_environment, models.sentence, tuple(dict.fromkeys(warn)), settings
    )


def _clusters(
    models: Models,
    cluster: str | None,
    table: pd.DataFrame | None,
    groups: list[str] | None,
    warn: list[str],
) -> list[str] | None:
    if cluster is not None:
        names = texts(models.column(cluster))
    elif table is not None and table.duplicated().any():
        names = ["; ".join(row) for row in table.to_numpy()]
        warn.append(
            f"Models that agree in {', '.join(table.columns)} are drawn and permuted together, as"
            " seeds of one setting."
        )
    else:
        return None
    # Models of two groups are never of one cluster.
    return names if groups is None else [f"{g} | {c}" for g, c in zip(groups, names, strict=True)]


def _covariates(models: Models, partial: Sequence[str]) -> Floats:
    import pandas as pd

    columns = []
    for name in partial:
        column = pd.to_numeric(models.column(name), errors="coerce").to_numpy(dtype=float)
        if len(column) and not np.isfinite(column).any():
            raise SettingsError(
                f"Expected numbers in the covariate {name!r}. Got none. Use it as the group."
            )
        columns.append(column)
    return np.stack(columns, axis=1) if columns else np.zeros((len(models.gap), 0))


def _row(
    models: Models,
    label: str,
    groups: list[str] | None,
    clusters: list[str] | None,
    covariates: Floats,
    statistic: Statistic,
    seed: int,
) -> tuple[dict[str, Any], Carried]:
    x = models.values[label].to_numpy(dtype=float)
    errors = models.errors[label].to_numpy(dtype=float)
    kinds = [None if k is None else str(k) for k in models.kinds[label]]
    loose = ~models.converged[label].to_numpy(dtype=bool) & np.isfinite(x)
    row: dict[str, Any] = {"measure": label}

    def one(inner: list[str] | None, given: Floats) -> Carried:
        return carried_interval(
            x, models.gap, errors, kinds, groups=inner, clusters=clusters, covariates=given,
            statistic=statistic, seed=seed,
        )  # fmt: skip

    nothing = np.zeros((len(x), 0))
    pooled = one(None, nothing)
    row |= {"n": pooled.n, "unconverged": int(loose.sum()), **pooled.columns("")}
    if groups is not None:
        inner = one(groups, nothing)
        row |= inner.columns("_within")
        excludes = [c.low > 0 or c.high < 0 for c in (pooled, inner)]
        opposite = pooled.value * inner.value < 0
        row["disagree"] = bool((opposite and any(excludes)) or (excludes[0] and not excludes[1]))
    if covariates.shape[1]:
        row |= one(groups, covariates).columns("_partial")
    return row, pooled


class _Tester:
    # Permutation p-values: measures that have the same models share the orders.
    def __init__(
        self,
        models: Models,
        groups: list[str] | None,
        clusters: list[str] | None,
        covariates: Floats,
        statistic: Statistic,
        seed: int,
    ) -> None:
        n = len(models.gap)
        self.remarks: list[str] = []
        self._found: dict[str, dict[str, float]] = {}
        values = models.values.to_numpy(dtype=float)
        alike = np.arange(n) if clusters is None else codes(clusters, n)
        kinds: list[tuple[str, Ints, Floats]] = [("p", codes(None, n), np.zeros((n, 0)))]
        if groups is not None:
            kinds.append(("p_within", codes(groups, n), np.zeros((n, 0))))
        if covariates.shape[1]:
            kinds.append(("p_partial", codes(groups, n), covariates))
        for key, labels, given in kinds:
            whole = np.asarray(np.isfinite(given).all(axis=1))
            usable = np.isfinite(values) & whole[:, None]
            for pattern in np.unique(usable, axis=1).T:
                same = np.flatnonzero((usable == pattern[:, None]).all(axis=0))
                p = np.full(len(same), np.nan)
                if pattern.sum() >= FEWEST:
                    inner, outer = alike[pattern], labels[pattern]
                    orders = draw_orders(inner, outer, seed)
                    x, y = values[np.ix_(pattern, same)], models.gap[pattern]
                    if given.shape[1]:
                        p = conditional_p(x, y, given[pattern], outer, orders, statistic)
                    else:
                        p = permutation_p(x, y, outer, orders, statistic)
                    self._note(arrangements(inner, outer), key)
                for k, value in zip(same, p, strict=True):
                    name = str(models.values.columns[int(k)])
                    self._found.setdefault(name, {})[key] = float(value)

    def _note(self, ways: float, key: str) -> None:
        if ways < 1000:
            self.remarks.append(
                f"`{key}`: clusters of one size in one group can be ordered in {ways:.0f} ways"
                f" only, so p is at least about {1 / ways:.2g}."
            )

    def __call__(self, label: str) -> dict[str, float]:
        return self._found[label]


def _remarks(
    frame: pd.DataFrame,
    axes: pd.DataFrame,
    models: Models,
    group: str | None,
    correction: str,
    num_test: int | None,
) -> list[str]:
    found = []
    if "disagree" in frame and frame["disagree"].any():
        names = ", ".join(frame["measure"][frame["disagree"]])
        found.append(
            f"Simpson: pooled and within-{group} values disagree for {names}. The pooled ones are"
            f" then an effect of {group}."
        )
    loose = frame[frame["unconverged"] > 0] if len(frame) else frame
    found += [
        f"{r.measure}: {r.unconverged} of {r.n} values did not converge and are kept."
        for r in loose.itertuples()
    ]
    few = frame[frame["low"].isna()] if len(frame) else frame
    if len(few):
        found.append(
            f"No interval for {', '.join(few['measure'])}: fewer than {FEWEST} models or clusters,"
            " or a constant."
        )
    for name in dict.fromkeys(axes["axis"] if len(axes) else ()):
        mine = axes[axes["axis"] == name]
        if mine["levels"].max() < 2:
            found.append(f"Axis {name} has one level: it has no granulated tau.")
        elif mine["fixings"].max() < FEWEST:
            found.append(
                f"Axis {name} has {mine['fixings'].max()} fixings with a tau: too few for an"
                " interval."
            )
    if num_test is not None and len(models.gap) and np.abs(models.gap).max() > 1:
        found.append(
            "The weights of the sign-error need a gap of a loss in [0, 1], such as the error"
            " rate; this gap goes beyond 1."
        )
    if len(frame) > 1:
        text = {"holm": "Holm's", "bh": "Benjamini and Hochberg's", "none": "no"}[correction]
        counted = int(frame["p"].notna().sum())
        found.append(f"`p_adjusted` is for {counted} measures, by {text} correction.")
    return found
