"""What sharpkit returns: numbers with their error, their cost and their origin."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import scipy.stats

from sharpkit.errors import MeasureError, SettingsError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Cost",
    "Curve",
    "ErrorKind",
    "Estimate",
    "Part",
    "Score",
    "Scores",
    "Spectrum",
    "format_value",
    "to_plain",
]

ErrorKind: TypeAlias = Literal["stderr", "bound", "lower_bound", "rounding"]


def to_plain(value: Any) -> Any:
    """Return what JSON can hold: NaN becomes None, infinity a string, an array a list."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        value = float(value)
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(v) for v in value]
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return to_plain(value.tolist())
    return str(value)


_BEYOND = {"inf": math.inf, "-inf": -math.inf}


def _restored(plain: Mapping[str, Any]) -> dict[str, Any]:
    # The fields of an estimate or a part, with the numbers that JSON does not have.
    given = dict(plain)
    for name in {"value", "probe_error", "data_error", "dof"} & given.keys():
        given[name] = _BEYOND.get(given[name], given[name])
    if given["value"] is None:
        given["value"] = math.nan
    return given


def _number(value: Any) -> float | None:
    # NumPy's and torch's scalars become Python's: the same text everywhere.
    return None if value is None else float(value)


@dataclass(frozen=True)
class Cost:
    """What a number cost, counted over the whole data set.

    Attributes:
        hvps: Hessian-vector products (other curvature products count too).
        gradients: Gradients of the loss.
        forwards: Forward passes without a gradient.
        seconds: Wall-clock time.
    """

    hvps: int = 0
    gradients: int = 0
    forwards: int = 0
    seconds: float = 0.0

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.hvps - other.hvps,
            self.gradients - other.gradients,
            self.forwards - other.forwards,
            self.seconds - other.seconds,
        )


@dataclass(frozen=True)
class Part:
    """One of several numbers that belong to an estimate, such as the third eigenvalue."""

    label: str
    value: float
    probe_error: float | None
    converged: bool = True
    dof: float | None = None

    def __post_init__(self) -> None:
        for name in ("value", "probe_error", "dof"):
            object.__setattr__(self, name, _number(getattr(self, name)))


@dataclass(frozen=True)
class Estimate:
    """A number, how wrong it may be, and what it cost.

    Attributes:
        value: The estimate.
        probe_error: How far the value may be from the exact number *for these data*, in
            the units of ``value``. ``error_kind`` says in what sense. ``None``: unknown.
        error_kind: ``"stderr"``: one standard error of a Monte Carlo mean.
            ``"bound"``: the exact number is within ``probe_error`` of ``value``, under
            the conditions that the measure states. ``"lower_bound"``: ``value`` was
            attained, so the exact maximum is at least as large; ``probe_error`` is the
            first-order room left at the best point, and no guarantee. ``"rounding"``:
            the formula was evaluated exactly, and only floating-point rounding is left.
        data_error: One standard error from the data being a sample; ``None``: not
            estimated, so the number speaks of these data only.
        converged: Whether the method met its own tolerance.
        cost: Products, gradients, forward passes and seconds spent.
        parts: Further numbers of the same measure.
        details: What else a careful reader needs (JSON-able).
        notes: Sentences for a person: what limits this number.
        dof: Degrees of freedom of a standard error that was itself estimated from few
            samples; ``None``: many. Intervals are as much wider as Student's t says.
        draws: One value a random probe, whose mean is ``value`` (a jackknife's pseudo-values
            where the number is no mean): what a paired comparison subtracts. Not in JSON.
        data_draws: One value a group of the data, likewise.

    Example:
        >>> e = Estimate(2.0, 0.1, "stderr", dof=7)
        >>> float(e), str(e)
        (2.0, '2.00 ± 0.10')
        >>> tuple(round(x, 3) for x in e.interval())
        (1.764, 2.236)
    """

    value: float
    probe_error: float | None
    error_kind: ErrorKind
    data_error: float | None = None
    converged: bool = True
    cost: Cost = field(default_factory=Cost)
    parts: tuple[Part, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dof: float | None = None
    draws: tuple[float, ...] = field(default=(), repr=False, compare=False)
    data_draws: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("value", "probe_error", "data_error", "dof"):
            object.__setattr__(self, name, _number(getattr(self, name)))

    def interval(self, level: float = 0.95, *, data: bool = False) -> tuple[float, float]:
        """Return an interval that holds the exact number with the stated probability.

        Args:
            level: Probability, between 0 and 1. A bound or a rounding error is taken
                whole, whatever the level; above a lower bound there is no end.
            data: Whether to add the error from the data being a sample, so that the
                interval speaks of the population.

        Raises:
            SettingsError: If the level is not between 0 and 1.
            MeasureError: With ``data``, if the data error was not estimated.
        """
        if not 0 < level < 1:
            raise SettingsError(f"Expected `level` between 0 and 1. Got {level!r}.")
        if self.probe_error is None:
            return -math.inf, math.inf
        half = self.probe_error
        if self.error_kind == "stderr":
            half *= _quantile(level, self.dof)
        if data:
            if self.data_error is None:
                raise MeasureError(
                    "Expected an estimate with a data error. This one speaks of the given data"
                    " only. Use data=False."
                )
            groups = len(self.data_draws)
            half = math.hypot(half, self.data_error * _quantile(level, groups - 1 or None))
        high = math.inf if self.error_kind == "lower_bound" else self.value + half
        low = self.value - (half if self.error_kind != "lower_bound" or data else 0.0)
        return low, high

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        text = format_value(self.value, self.probe_error, self.error_kind)
        return text if self.converged else f"{text} (not converged)"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN becomes None."""
        plain = {
            "value": self.value,
            "probe_error": self.probe_error,
            "error_kind": self.error_kind,
            "data_error": self.data_error,
            "converged": self.converged,
            "cost": vars(self.cost),
            "parts": [vars(part) for part in self.parts],
            "dof": self.dof,
            "details": dict(self.details),
            "notes": list(self.notes),
        }
        result: dict[str, Any] = to_plain(plain)
        return result

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Estimate:
        """Return the estimate that :meth:`to_dict` described; draws are not kept there.

        Example:
            >>> estimate = Estimate(2.0, 0.1, "stderr", parts=(Part("first", math.inf, None),))
            >>> Estimate.from_dict(estimate.to_dict()) == estimate
            True
        """
        given = _restored(plain)
        given["cost"] = Cost(**given["cost"])
        given["parts"] = tuple(Part(**_restored(part)) for part in given["parts"])
        given["notes"] = tuple(given["notes"])
        return cls(**given)


def _quantile(level: float, dof: float | None) -> float:
    upper = (1 + level) / 2
    if dof is None or dof <= 0:
        return float(scipy.stats.norm.ppf(upper))
    return float(scipy.stats.t.ppf(upper, dof))


def format_value(value: float, error: float | None, kind: ErrorKind = "stderr") -> str:
    """Return a value and its error with as many digits as the error leaves standing.

    Example:
        >>> format_value(1234.567, 8.9)
        '1234.6 ± 8.9'
        >>> format_value(0.000012345, 0.0000001)
        '1.2345e-05 ± 1e-07'
        >>> format_value(3.14159265, 1e-9, "rounding")
        '3.14159'
        >>> format_value(0.25, 0.01, "lower_bound")
        '>= 0.250 (+0.010)'
    """
    if not math.isfinite(value):
        return str(value)
    if kind == "rounding" and error is not None and error <= 1e-5 * abs(value):
        return f"{value:.6g}"
    if error is None or not math.isfinite(error):
        shown = f"{value:.4g}"
        return f">= {shown}" if kind == "lower_bound" else f"{shown} ± ?"
    if abs(value) != 0 and not 1e-3 <= abs(value) < 1e6:
        digits = 1
        if error > 0:
            ratio = math.log10(abs(value)) - math.log10(error)
            digits = min(max(math.ceil(ratio) + 1, 1), 6)
        shown, width = f"{value:.{digits}e}", f"{error:.1g}"
    else:
        places = 4 if error == 0 else min(max(1 - math.floor(math.log10(error)), 0), 6)
        shown = f"{value:.{places}f}"
        width = f"{error:.{places}f}" if error == 0 or error >= 10**-places else f"{error:.0e}"
    return f">= {shown} (+{width})" if kind == "lower_bound" else f"{shown} ± {width}"


@dataclass(frozen=True)
class Score:
    """A measured number and all that is needed to get it again.

    Attributes:
        measure: Name of the measure.
        estimate: The number; ``None`` if the measure failed.
        settings: The measure's settings, defaults included.
        seed: Seed of every random draw.
        provenance: Checkpoint and data fingerprints, versions, dtype, device, HVP mode.
        error: Why the measure failed, one sentence; ``None`` if it did not.
    """

    measure: str
    estimate: Estimate | None
    settings: Mapping[str, Any]
    seed: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        result: dict[str, Any] = to_plain(
            {
                "measure": self.measure,
                "estimate": self.estimate.to_dict() if self.estimate else None,
                "settings": dict(self.settings),
                "seed": self.seed,
                "provenance": dict(self.provenance),
                "error": self.error,
            }
        )
        return result

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Score:
        """Return the score that :meth:`to_dict` described."""
        held = plain["estimate"]
        return cls(**{**plain, "estimate": None if held is None else Estimate.from_dict(held)})


@dataclass(frozen=True)
class Scores(Sequence[Score]):
    """The scores of one objective, in the order asked for.

    Example:
        >>> scores = Scores((Score("loss", Estimate(0.5, 0.0, "rounding"), {}, 0),))
        >>> scores["loss"].estimate.value
        0.5
    """

    items: tuple[Score, ...]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Score]:
        return iter(self.items)

    def __getitem__(self, key: Any) -> Any:
        """Return the score at an index, or the first one of a measure's name."""
        if isinstance(key, str):
            for score in self.items:
                if score.measure == key:
                    return score
            raise KeyError(f"No score of {key!r}; there are {[s.measure for s in self]}.")
        return self.items[key]

    @property
    def failed(self) -> tuple[Score, ...]:
        """The scores whose measure failed."""
        return tuple(s for s in self.items if s.error is not None)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return plain data for JSON, one dict a score."""
        return [score.to_dict() for score in self.items]

    def to_json(self, indent: int | None = 2) -> str:
        """Return strict JSON (no NaN)."""
        return json.dumps(self.to_dicts(), indent=indent, allow_nan=False)

    def to_frame(self, *, parts: bool = False) -> pd.DataFrame:
        """Return a table, one row a measure; with ``parts``, one row a number."""
        import pandas as pd

        rows = []
        for s in self.items:
            e = s.estimate
            row = {
                "measure": s.measure,
                "part": "",
                "value": e.value if e else math.nan,
                "probe_error": e.probe_error if e else None,
                "data_error": e.data_error if e else None,
                "error_kind": e.error_kind if e else None,
                "converged": bool(e and e.converged),
                "hvps": e.cost.hvps if e else 0,
                "gradients": e.cost.gradients if e else 0,
                "forwards": e.cost.forwards if e else 0,
                "seconds": e.cost.seconds if e else 0.0,
                "settings": json.dumps(to_plain(dict(s.settings))),
                "seed": s.seed,
                "error": s.error,
            }
            rows.append(row)
            if parts and e:
                rows.extend(
                    {
                        **row,
                        "part": p.label,
                        "value": p.value,
                        "probe_error": p.probe_error,
                        "converged": p.converged,
                    }
                    for p in e.parts
                )
        frame = pd.DataFrame(rows, columns=None if rows else ["part", "measure", "value"])
        return frame if parts else frame.drop(columns="part")


@dataclass(frozen=True)
class Curve:
    """A function sampled on a line, such as the loss along a direction.

    Attributes:
        x: Positions, in the units that ``x_label`` states.
        y: Values; NaN where the function is not finite.
        x_label: What x is.
        y_label: What y is.
        details: Direction kind, seed, norm and whatever else a caption needs.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    x_label: str = "x"
    y_label: str = "y"
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN becomes None."""
        result: dict[str, Any] = to_plain(dict(vars(self)))
        return result


@dataclass(frozen=True)
class Spectrum:
    """Gauss nodes and weights of the spectral density, one row a random probe.

    The density of eigenvalues is approximated by the mean over probes of
    ``sum_i weights[p][i] * delta(x - nodes[p][i])``; the weights of a probe sum to 1.

    Attributes:
        nodes: Ritz values of each probe, ascending.
        weights: Their Gauss weights.
        dim: Number of eigenvalues P that the density stands for.
        cost: What it cost.
        known: Eigenvalues that are exact: nodes of weight ``1 / dim`` in every probe.

    Example:
        >>> s = Spectrum(((0.0, 4.0),), ((0.75, 0.25),), dim=4)
        >>> s.cumulative([-1.0, 2.0, 5.0])[0]
        [0.0, 0.75, 1.0]
    """

    nodes: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    dim: int
    cost: Cost = field(default_factory=Cost)
    known: tuple[float, ...] = ()

    def cumulative(
        self, grid: Sequence[float], level: float = 0.95
    ) -> tuple[list[float], list[float], list[float]]:
        """Return the share of eigenvalues up to each point, and a band that holds it.

        Between two nodes of a probe the share for its start vector is known to within the
        weights of both (Chebyshev, Markov and Stieltjes); to this comes the scatter over
        probes, with Student's t for their number. With one probe the scatter is unknown,
        and the band is that of the probe.

        Args:
            grid: Points.
            level: Probability of the band, point by point.

        Returns:
            Shares, lower and upper ends, each with one number a point.
        """
        points = np.asarray(grid, dtype=float)
        exact = np.asarray(sorted(self.known))
        base = np.searchsorted(exact, points, side="right") / self.dim
        rows = []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            x, w = np.asarray(nodes), np.asarray(weights)
            bulk = _without(x, exact)
            x, w = x[bulk], w[bulk]
            steps = np.r_[0.0, np.cumsum(w)]
            at = np.searchsorted(x, points, side="right")
            lower, upper = steps[np.maximum(at - 1, 0)], steps[np.minimum(at + 1, len(w))]
            rows.append(np.stack([steps[at], lower, upper]))
        share, low, high = np.mean(rows, axis=0)
        spread = np.zeros_like(share)
        if len(rows) > 1:
            spread = np.std([r[0] for r in rows], axis=0, ddof=1) / math.sqrt(len(rows))
            spread = spread * _quantile(level, len(rows) - 1)
        return (
            np.minimum(base + share, 1.0).tolist(),
            np.maximum(base + low - spread, 0.0).tolist(),
            np.minimum(base + high + spread, 1.0).tolist(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "nodes": [list(row) for row in self.nodes],
            "weights": [list(row) for row in self.weights],
            "dim": self.dim,
            "known": list(self.known),
            "cost": vars(self.cost),
        }


def _without(nodes: np.ndarray, known: np.ndarray) -> np.ndarray:
    # Which nodes are left when each known value is taken out once.
    keep = np.ones(len(nodes), dtype=bool)
    for value in known:
        found = np.flatnonzero((nodes == value) & keep)
        if len(found):
            keep[found[0]] = False
    return keep
