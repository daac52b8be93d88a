"""Every number of the Hessian's spectrum from one pass, and differences of two checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sharpkit.analysis import Analysis
from sharpkit.errors import SettingsError
from sharpkit.estimators import density_of
from sharpkit.estimators.protocol import check_positive
from sharpkit.objective import Objective
from sharpkit.results import Cost, ErrorKind, Estimate, Scores, Spectrum
from sharpkit.scoring import MeasureRequest, measure_all, parse_request

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SpectrumSummary", "compare", "spectrum"]


@dataclass(frozen=True)
class SpectrumSummary:
    """The numbers of a spectrum and its density.

    Attributes:
        scores: One score a number, by the names of the measures.
        density: Nodes and weights of the eigenvalues' density.
        cost: What all of it cost together.
    """

    scores: Scores
    density: Spectrum
    cost: Cost

    def __getitem__(self, name: str) -> Estimate:
        """Return the estimate of a measure, such as ``"hessian_trace"``.

        Raises:
            KeyError: If there is none of this name, or the measure failed.
        """
        score = self.scores[name]
        if score.estimate is None:
            raise KeyError(f"{name} failed: {score.error}")
        estimate: Estimate = score.estimate
        return estimate

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "scores": self.scores.to_dicts(),
            "density": self.density.to_dict(),
            "cost": vars(self.cost),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Return strict JSON (no NaN)."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def to_frame(self, *, parts: bool = False) -> pd.DataFrame:
        """Return a table, one row a number; with ``parts``, layers and further eigenvalues."""
        return self.scores.to_frame(parts=parts)


def spectrum(
    objective: Objective,
    *,
    k: int = 5,
    tol: float = 1e-3,
    max_matvecs: int = 400,
    num_probes: int = 16,
    num_quadratures: int = 4,
    num_steps: int = 12,
    max_steps: int = 96,
    alpha: float = 2.0,
    seed: int = 0,
    max_basis: int | None = None,
    num_groups: int = 8,
) -> SpectrumSummary:
    """Measure the Hessian's spectrum in one pass: both ends, traces, entropies, density.

    One Lanczos run finds the outliers and goes on to both ends; random probes of the rest
    give the trace and the Frobenius norm, short runs from the same probes the entropies,
    the negative mass and the density. Each number equals what :func:`sharpkit.score` gives
    for the same settings and seed.

    Args:
        objective: Model, loss and data.
        k: Eigenvalues at each end.
        tol: Their relative error.
        max_matvecs: Budget of the search for them.
        num_probes: Products for the trace and the Frobenius norm.
        num_quadratures: Short Lanczos runs for the entropies and the density.
        num_steps: Steps of each; more resolve the bulk's density better.
        max_steps: Up to how many they go on for the entropies and the negative mass.
        alpha: Order of the Renyi sharpness; the usual family comes with it as parts.
        seed: Seed of every random draw.
        max_basis: Most Krylov vectors to hold; None: what a quarter of the memory holds.
        num_groups: Groups of the data for the error from the data; 0: none.

    Raises:
        SettingsError: If a setting is out of range.

    Example:
        >>> import torch
        >>> data = (torch.eye(2), torch.zeros(2, 1))
        >>> objective = Objective(torch.nn.Linear(2, 1, bias=False), torch.nn.MSELoss(), data)
        >>> summary = spectrum(objective, k=1)
        >>> round(summary["hessian_trace"].value, 4), round(summary["effective_rank"].value, 4)
        (2.0, 2.0)
    """
    _need_objective(objective, "spectrum")
    runs = {"num_probes": num_quadratures, "num_steps": num_steps, "max_steps": max_steps}
    requests: list[MeasureRequest] = [
        ("hessian_trace", {"num_probes": num_probes}),
        ("frobenius_norm", {"num_probes": num_probes}),
        ("stable_rank", {"num_probes": num_probes}),
        ("top_eigenvalues", {"k": k, "tol": tol, "max_matvecs": max_matvecs}),
        ("effective_rank", runs),
        ("negative_mass", runs),
        ("renyi_sharpness", {"alpha": alpha, **runs}),
    ]
    if not 1 <= k <= objective.space.dim:
        raise SettingsError(
            f"Expected `k` between 1 and the number of parameters, {objective.space.dim}. Got {k}."
        )
    check_positive("num_quadratures", num_quadratures, minimum=2)
    check_positive("num_steps", num_steps, minimum=1)
    check_positive("max_steps", max_steps, minimum=1)
    analysis = Analysis(objective, seed=seed, max_basis=max_basis, num_groups=num_groups)
    before = objective.cost
    scores = measure_all(analysis, [parse_request(r) for r in requests])
    quadrature = analysis.spectral().quadrature(num_probes=num_quadratures, num_steps=num_steps)
    return SpectrumSummary(scores, density_of(quadrature), objective.cost - before)


def compare(
    first: Objective,
    second: Objective,
    request: MeasureRequest,
    *,
    paired: bool = True,
    seed: int = 0,
    max_basis: int | None = None,
    num_groups: int = 8,
) -> Estimate:
    """Measure ``first - second``, two checkpoints of one network on the same data.

    Paired, both see the same probes and the same groups of the data, and the error is that
    of the differences, often far below that of either number. Errors that are bounds add up.

    Args:
        first: Objective of one checkpoint.
        second: Objective of the other.
        request: A measure, as for :func:`sharpkit.score`.
        paired: Whether to pair probes and data; otherwise the errors are independent.
        seed: Seed of every random draw; the second has another one if not paired.
        max_basis: As for :class:`sharpkit.Analysis`.
        num_groups: As for :class:`sharpkit.Analysis`.

    Returns:
        The difference; ``details`` hold both numbers and the errors that independent
        measurements would have.

    Raises:
        SettingsError: If paired and the parameters or the data differ.

    Example:
        >>> import torch
        >>> def of(weight):
        ...     model = torch.nn.Linear(1, 1, bias=False)
        ...     torch.nn.init.constant_(model.weight, weight)
        ...     return Objective(model, torch.nn.MSELoss(), (torch.ones(2, 1), torch.zeros(2, 1)))
        >>> compare(of(3.0), of(1.0), "gradient_norm").value
        4.0
    """
    for objective in (first, second):
        _need_objective(objective, "compare")
    measure, settings = parse_request(request)
    if paired:
        _must_match(first, second)
    seeds = (seed, seed if paired else seed + 1)
    estimates = []
    for objective, own_seed in zip((first, second), seeds, strict=True):
        before = objective.cost
        analysis = Analysis(objective, seed=own_seed, max_basis=max_basis, num_groups=num_groups)
        estimate = measure(analysis, **settings)
        estimates.append(replace(estimate, cost=objective.cost - before))
    a, b = estimates
    alone = _apart(a.probe_error, b.probe_error)
    data_alone = _apart(a.data_error, b.data_error)
    error, dof, kind = alone, _least(a.dof, b.dof), _kind(a.error_kind, b.error_kind)
    if kind != "stderr" and a.probe_error is not None and b.probe_error is not None:
        error = a.probe_error + b.probe_error
    draws: tuple[float, ...] = ()
    data_draws: tuple[float, ...] = ()
    data = data_alone
    if paired and a.error_kind == "stderr" and len(a.draws) == len(b.draws) > 1:
        draws = tuple(x - y for x, y in zip(a.draws, b.draws, strict=True))
        eps = max(torch.finfo(o.model_dtype).eps for o in (first, second))
        floor = max(1e-7, eps) * max(abs(a.value), abs(b.value))  # rounding does not cancel
        error, dof = max(_stderr(draws), floor), len(draws) - 1
    if paired and len(a.data_draws) == len(b.data_draws) > 1:
        data_draws = tuple(x - y for x, y in zip(a.data_draws, b.data_draws, strict=True))
        data = _stderr(data_draws)
    return Estimate(
        value=a.value - b.value,
        probe_error=error,
        error_kind=kind,
        data_error=data,
        converged=a.converged and b.converged,
        cost=Cost(
            *(
                getattr(a.cost, name) + getattr(b.cost, name)
                for name in ("hvps", "gradients", "forwards", "seconds")
            )
        ),
        details={
            "measure": measure.name,
            "first": a.value,
            "second": b.value,
            "paired": paired,
            "unpaired_probe_error": alone,
            "unpaired_data_error": data_alone,
        },
        notes=(*a.notes, *(n for n in b.notes if n not in a.notes)),
        dof=dof,
        draws=draws,
        data_draws=data_draws,
    )


def _need_objective(objective: Objective, name: str) -> None:
    if not isinstance(objective, Objective):
        raise SettingsError(
            f"Expected an Objective. Got {type(objective).__name__}. Write"
            f" sharpkit.{name}(sharpkit.Objective(model, loss, data), ...)."
        )


def _must_match(first: Objective, second: Objective) -> None:
    if (first.space.names, first.space.shapes) != (second.space.names, second.space.shapes):
        raise SettingsError(
            f"Expected the same parameters in both. Got {first.space.dim} in"
            f" {len(first.space.names)} tensors and {second.space.dim} in"
            f" {len(second.space.names)}: probes cannot be common. Use paired=False."
        )
    if first.data_fingerprint != second.data_fingerprint:
        raise SettingsError(
            "Expected the same data in both. They differ, so nothing cancels. Pass the same"
            " examples, or use paired=False."
        )


def _apart(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else math.hypot(a, b)


def _kind(a: ErrorKind, b: ErrorKind) -> ErrorKind:
    # A difference of lower bounds may be off to either side, and one random error makes
    # the whole random.
    if "stderr" in (a, b):
        return "stderr"
    return a if a == b != "lower_bound" else "bound"


def _least(a: float | None, b: float | None) -> float | None:
    known = [x for x in (a, b) if x is not None]
    return min(known) if known else None


def _stderr(draws: tuple[float, ...]) -> float:
    return float(np.std(draws, ddof=1) / math.sqrt(len(draws)))
