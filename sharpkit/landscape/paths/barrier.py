"""How much the loss rises on a path between two minima."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sharpkit.errors import MeasureError, SettingsError
from sharpkit.landscape.paths.statistics import Statistics, like_there, with_statistics
from sharpkit.landscape.section import Section
from sharpkit.objective import Objective
from sharpkit.objective.groups import group_error
from sharpkit.results import Cost, to_plain

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Barrier", "Definition", "Profile", "barrier"]

Definition: TypeAlias = Literal["linear", "max_end", "mean_end"]
"""What the loss on the path is compared with: see :func:`barrier`."""

BASELINES: Mapping[str, str] = {
    "linear": "the line between the losses of the ends",
    "max_end": "the larger loss of the ends",
    "mean_end": "the mean loss of the ends",
}
METRICS = ("loss", "error")


@dataclass(frozen=True)
class Profile:
    """One number along a path, and how far it rises.

    Attributes:
        name: ``"loss"``, ``"error"``, ``"test/loss"``, ...
        values: At each t; NaN where it is not finite.
        errors: One standard error of each from the data being a sample; None if unknown.
        rises: The values less what they are compared with.
        rise_errors: One standard error of each rise. The same examples are used at all t, so
            it is the error of a difference of pairs.
        barrier: The largest rise; NaN where a value is not finite.
        error: Its standard error, as if its place had been known before; None if unknown.
        held_out: The rise at places chosen on other examples; None if unknown. Its mean is
            never above the true maximum on the grid, that of ``barrier`` never below.
        at: Where the largest rise is; NaN if it is unknown.
    """

    name: str
    values: tuple[float, ...]
    errors: tuple[float, ...] | None
    rises: tuple[float, ...]
    rise_errors: tuple[float, ...] | None
    barrier: float
    error: float | None
    held_out: float | None
    at: float

    def __str__(self) -> str:
        spread = "" if self.error is None else f" ± {self.error:.2g}"
        return f"{self.name} {self.barrier:.4g}{spread} at t = {self.at:.3g}"


@dataclass(frozen=True)
class Barrier:
    """The barrier on a path.

    Attributes:
        t: Where it was measured, from 0 to 1.
        profiles: By name; the first is the loss on the objective's data.
        definition: What was subtracted.
        notes: Sentences for a person.
        details: Kind of path, its length, the distance of the ends, data (JSON-able).
        cost: What it cost, over all data sets.
    """

    t: tuple[float, ...]
    profiles: Mapping[str, Profile]
    definition: Definition
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    @property
    def loss(self) -> Profile:
        """The profile of the loss."""
        return self.profiles["loss"]

    @property
    def value(self) -> float:
        """The barrier in the loss."""
        return self.loss.barrier

    @property
    def error(self) -> float | None:
        """Its standard error."""
        return self.loss.error

    def __getitem__(self, name: str) -> Profile:
        """Return a profile by name."""
        if name not in self.profiles:
            raise SettingsError(f"Expected one of {', '.join(self.profiles)}. Got {name!r}.")
        return self.profiles[name]

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return "; ".join(str(p) for p in self.profiles.values())

    def to_frame(self) -> pd.DataFrame:
        """Return a table with a row for each t: values, rises and their errors by name."""
        import pandas as pd

        columns: dict[str, Sequence[float]] = {"t": self.t}
        for name, profile in self.profiles.items():
            columns[name] = profile.values
            columns[f"{name} rise"] = profile.rises
            if profile.rise_errors is not None:
                columns[f"{name} rise error"] = profile.rise_errors
        return pd.DataFrame(columns)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN becomes None."""
        plain: dict[str, Any] = to_plain(
            {
                "t": self.t,
                "definition": self.definition,
                "profiles": {n: vars(p) for n, p in self.profiles.items()},
                "notes": self.notes,
                "details": self.details,
                "cost": vars(self.cost),
            }
        )
        return plain


def barrier(
    objective: Objective,
    path: Section,
    t: int | Sequence[float] = 25,
    metrics: Sequence[str] = ("loss",),
    *,
    test: Objective | Mapping[str, Objective] | None = None,
    definition: Definition = "linear",
    groups: int = 16,
    statistics: Statistics = "reestimate",
) -> Barrier:
    r"""Return how far the loss rises on a path above what its ends say.

    .. math::
        B = \max_t\,[\,L(\phi(t)) - (1 - t)\,L(\phi(0)) - t\,L(\phi(1))\,]

    (``"linear"``: Entezari et al.; it is 0 at the ends, so never negative.) The literature has
    others: the loss less the mean of the ends, :math:`\tfrac12(L(\phi(0)) + L(\phi(1)))`
    (``"mean_end"``: Frankle et al., there in the error rate), and less the larger end
    (``"max_end"``). They agree where both ends have the same loss. What was chosen is in the
    result.

    The maximum is over the points given, so that of the curve may lie higher, between two.
    A maximum over noisy values is biased upwards as an estimate for other data;
    ``held_out``, whose place is chosen without the examples that measure it, is biased
    downwards: the truth, for this grid, is between their means.

    Args:
        objective: Gives L; where it stands does not matter.
        path: A section with one coordinate from 0 to 1.
        t: A number of equal steps' ends, or values from 0 to 1, both included, ascending.
        metrics: Among ``"loss"`` and ``"error"``, the share of class labels missed.
        test: Other data: an objective with the same parameters, or several by name. Their
            profiles are called ``"test/loss"``, and so on.
        definition: See above.
        groups: Of the data, from whose differences the errors come; 4 at least.
        statistics: What becomes of running statistics between the ends; see
            :func:`~sharpkit.landscape.paths.statistics.with_statistics`. Other data are measured
            with those of the objective's.

    Returns:
        The barrier. Where a loss is not finite it is NaN, and a note says where.

    Raises:
        SettingsError: If a setting makes no sense.
        MeasureError: If the network has running statistics and it is not said what to do, or
            there are no class labels to count errors of.

    Cost: one forward pass each t and data set, two with ``"error"``.

    Reference: arXiv:1912.05671 (Frankle et al.), arXiv:2110.06296 (Entezari et al.).

    Example:
        >>> from sharpkit.landscape.paths import SegmentPath
        >>> x, y = torch.ones(8, 1), torch.ones(8, 1)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, lambda out, y: (out**2 - y).square().mean(), (x, y))
        >>> path = SegmentPath(torch.tensor([-1.0]), torch.tensor([1.0]))  # two minima of loss 0
        >>> found = barrier(objective, path, t=5)
        >>> found.value, found.loss.at
        (1.0, 0.5)
    """
    grid = _grid(t)
    if definition not in BASELINES:
        raise SettingsError(
            f"Expected `definition` among {', '.join(BASELINES)}. Got {definition!r}."
        )
    if isinstance(metrics, str) or not metrics or set(metrics) - set(METRICS):
        raise SettingsError(f"Expected `metrics` among {', '.join(METRICS)}. Got {metrics!r}.")
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 4:
        raise SettingsError(
            f"Expected `groups` to be a whole number of at least 4. Got {groups!r}."
        )
    if len(path.axes) != 1:
        raise SettingsError(f"Expected a path, with one coordinate. Got {len(path.axes)} axes.")
    wanted = [name for name in METRICS if name in metrics or name == "loss"]
    sets = _data_sets(objective, test)
    started = {name: each.cost for name, each in sets.items()}
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for at in grid:
        theta = path.point([at])
        if theta is None:
            raise MeasureError(f"Expected a path from t = 0 to 1. It has no point at t = {at:g}.")
        first = with_statistics(objective.at(theta), statistics)
        for name, each in sets.items():
            here = first if each is objective else like_there(each, first)
            for metric in wanted:
                found.setdefault(name + metric, []).append(_parts(here, metric, groups))
    profiles = {name: _profile(name, grid, rows, definition) for name, rows in found.items()}
    spent = [each.cost - started[name] for name, each in sets.items()]
    axis = path.axes[0]
    return Barrier(
        t=grid,
        profiles=profiles,
        definition=definition,
        notes=(*path.notes, *_notes(grid, profiles, definition)),
        details={
            "path": axis.kind,
            "distance": axis.step,
            **axis.details,
            "groups": groups,
            "data": {(name or "train").rstrip("/"): e.data_fingerprint for name, e in sets.items()},
        },
        cost=Cost(
            sum(c.hvps for c in spent),
            sum(c.gradients for c in spent),
            sum(c.forwards for c in spent),
            max(c.seconds for c in spent),
        ),
    )


def _grid(t: int | Sequence[float]) -> tuple[float, ...]:
    if isinstance(t, bool) or (isinstance(t, int) and t < 3):
        raise SettingsError(f"Expected at least three values of t. Got {t!r}.")
    grid = np.linspace(0, 1, t) if isinstance(t, int) else np.asarray(t, dtype=float)
    if grid.ndim != 1 or len(grid) < 3 or grid[0] != 0 or grid[-1] != 1:
        raise SettingsError(
            f"Expected values of t from 0 to 1, both included, and one between. Got {t!r}."
        )
    if not bool((np.diff(grid) > 0).all()):
        raise SettingsError(f"Expected ascending values of t. Got {t!r}.")
    return tuple(grid.tolist())


def _data_sets(
    objective: Objective, test: Objective | Mapping[str, Objective] | None
) -> dict[str, Objective]:
    sets = {"": objective}
    if test is not None:
        others = {"test": test} if isinstance(test, Objective) else test
        sets |= {f"{name}/": each for name, each in others.items()}
    for name, each in sets.items():
        if each.space.names != objective.space.names or each.space.dim != objective.space.dim:
            raise SettingsError(
                f"Expected the objective {name.rstrip('/')!r} to have the same parameters. It has"
                f" {each.space.dim} in {len(each.space.names)} tensors, the first one"
                f" {objective.space.dim} in {len(objective.space.names)}."
            )
    return sets


def _parts(objective: Objective, metric: str, groups: int) -> tuple[Tensor, Tensor]:
    # Shares of the terms and of the mean, by groups of the data.
    if metric == "loss":
        return objective.grouped_value(groups)
    margins, examples = objective.margins()
    count = int(examples.max()) + 1
    sums = torch.zeros(2, count, dtype=torch.float64, device="cpu")
    sums[0].index_add_(0, examples, torch.ones_like(margins))
    sums[1].index_add_(0, examples, (~(margins > 0)).double())
    weights, missed = (sums / len(margins)).unbind()
    if not bool(torch.isfinite(margins).all()):  # the outputs say nothing
        missed = torch.full_like(missed, math.nan)
    return weights, missed


def _profile(
    name: str,
    grid: tuple[float, ...],
    rows: list[tuple[Tensor, Tensor]],
    definition: Definition,
) -> Profile:
    weights = rows[0][0]
    parts = torch.stack([part for _, part in rows])  # [T, G]
    finite = torch.isfinite(parts).all(dim=1)
    parts = torch.where(finite[:, None], parts, math.nan)
    values = parts.sum(dim=1)
    first, last = parts[0], parts[-1]
    t = torch.tensor(grid, dtype=torch.float64, device="cpu")[:, None]
    if definition == "linear":
        above = parts - (1 - t) * first - t * last
        above[0] = 0 * above[0]  # exactly, and NaN where it is unknown
        above[-1] = 0 * above[-1]
    elif definition == "mean_end":
        above = parts - (first + last) / 2
    else:
        above = parts - (first if bool(values[0] >= values[-1]) else last)
    rises = above.sum(dim=1)
    errors = _errors(parts, weights)
    rise_errors = _errors(above, weights)
    known = bool(finite.all())
    best = int(rises.argmax()) if known else -1
    return Profile(
        name=name,
        values=tuple(values.tolist()),
        errors=errors,
        rises=tuple(rises.tolist()),
        rise_errors=rise_errors,
        barrier=float(rises[best]) if known else math.nan,
        error=rise_errors[best] if known and rise_errors else None,
        held_out=_held_out(above, weights) if known and rise_errors else None,
        at=grid[best] if known else math.nan,
    )


def _errors(parts: Tensor, weights: Tensor) -> tuple[float, ...] | None:
    found = [group_error(row, weights) for row in parts]
    kept = [error[0] for error in found if error is not None]
    return tuple(kept) if len(kept) == len(found) else None


def _held_out(above: Tensor, weights: Tensor) -> float:
    # Each group is read where the rise of all the others is largest.
    others = (above.sum(dim=1, keepdim=True) - above) / (1 - weights).clamp(min=1e-300)
    chosen = others.argmax(dim=0)
    return float(above[chosen, torch.arange(above.shape[1], device="cpu")].sum())


def _notes(
    grid: tuple[float, ...], profiles: Mapping[str, Profile], definition: Definition
) -> list[str]:
    notes = [
        f"The barrier is the largest of {len(grid)} values on the path less"
        f" {BASELINES[definition]}; between two of them the curve may be higher."
    ]
    if profiles["loss"].error is not None:
        notes.append(
            "Its error holds for a place that was known before. As the place is that of the"
            " largest value, the barrier is biased upwards for other data, and held_out"
            " downwards."
        )
    else:
        notes.append("There are fewer than four groups of data, so that no error is known.")
    for name, profile in profiles.items():
        unknown = [t for t, v in zip(grid, profile.values, strict=True) if math.isnan(v)]
        if unknown:
            seen = [r for r in profile.rises if not math.isnan(r)]
            notes.append(
                f"The barrier of {name} is unknown: at {len(unknown)} of {len(grid)} points, the"
                f" first at t = {unknown[0]:.4g}, it is not finite."
                + (f" The largest rise elsewhere is {max(seen):.4g}." if seen else "")
            )
    return notes
