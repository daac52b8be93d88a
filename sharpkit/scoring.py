"""Score an objective with several measures."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from sharpkit import measures
from sharpkit.analysis import Analysis
from sharpkit.errors import MeasureError, SettingsError, SharpkitError, SharpkitWarning
from sharpkit.geometry.canonical import canonical_form
from sharpkit.objective import Objective
from sharpkit.objective.states import state_of
from sharpkit.results import Score, Scores, to_plain

__all__ = [
    "ALL",
    "MeasureRequest",
    "Prepared",
    "Request",
    "Requests",
    "listed",
    "measure_all",
    "parse_request",
    "parse_requests",
    "prepare",
    "score",
]

ALL = "all"

MeasureRequest: TypeAlias = str | tuple[str, Mapping[str, Any]]
"""``"name"``, ``"name:key=value,key=value"``, or ``("name", {"key": value})``."""

Request: TypeAlias = tuple[measures.Measure, dict[str, Any]]
"""A measure and its complete settings."""


def parse_request(request: MeasureRequest) -> tuple[measures.Measure, dict[str, Any]]:
    """Return the measure and its complete settings.

    Raises:
        UnknownMeasureError: If there is no such measure.
        SettingsError: If a setting is unknown or cannot be read.

    Example:
        >>> measure, settings = parse_request("monge_sharpness_first_order:rho=0.1")
        >>> measure.name, settings
        ('monge_sharpness_first_order', {'rho': 0.1, 'alpha': 1.0})
    """
    if isinstance(request, str):
        name, _, rest = request.partition(":")
        given: dict[str, Any] = {}
        for item in filter(None, rest.split(",")):
            key, equals, value = item.partition("=")
            if not equals or not key.strip() or key.strip() in given:
                raise SettingsError(
                    "Expected settings as name:key=value,key=value, each key once. Got"
                    f" {request!r}."
                )
            given[key.strip()] = value.strip()
        measure = measures.get(name.strip())
        return measure, measure.complete(given)
    try:
        named, values = request
        given = dict(values)
    except (TypeError, ValueError):
        named, given = "", {}
    if not (named and isinstance(named, str)):
        raise SettingsError(
            "Expected a measure as 'name', 'name:key=value' or ('name', {'key': value})."
            f" Got {request!r}."
        )
    measure = measures.get(named)
    return measure, measure.complete(given)


def score(
    objective: Objective,
    names: MeasureRequest | Iterable[MeasureRequest] | None = None,
    *,
    seed: int = 0,
    max_basis: int | None = None,
    num_groups: int = 8,
    initial: nn.Module | Mapping[str, Tensor] | Tensor | None = None,
    optimizer: object = None,
    canonical: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
    on_score: Callable[[Score], None] | None = None,
) -> Scores:
    """Measure an objective: the front door of sharpkit.

    What measures share (gradient, eigenpairs, diagonal) is computed once; a measure that
    fails is recorded with its error, warned about, and the others go on. All requests are
    checked before anything is computed.

    Args:
        objective: Model, loss and data.
        names: Measures with settings. ``None`` asks for those whose needs are met, but for
            the dear ones, which take hundreds of passes; ``"all"`` (alone or beside others,
            which then have their own settings) for the dear ones too.
        seed: Seed of every random draw.
        max_basis: Most Krylov vectors to hold; None: what a quarter of the memory holds.
        num_groups: Groups of the data for the error from the data; 0: none.
        initial: The parameters before training, for measures that need them: a module, a
            state dict, or theta ``[P]``.
        optimizer: The optimizer that trained the model, or its state dict.
        canonical: Whether to measure at the canonical form (:func:`sharpkit.canonicalize`):
            the same function with the factors of attention heads, adapters and linear layers
            in a row balanced. ``initial`` moves along, by the same group element; what the
            optimizer knows does not, so that measures that need it are left out.
        provenance: Added to each score's provenance.
        progress: Called with the name of each measure before it starts.
        on_score: Called with each score as soon as it is there.

    Returns:
        One score a request, in the order asked for.

    Raises:
        UnknownMeasureError: If there is no measure of a name.
        SettingsError: If a setting is unknown or cannot be read.

    Example:
        >>> data = (torch.eye(2), torch.zeros(2, 1))
        >>> objective = Objective(torch.nn.Linear(2, 1, bias=False), torch.nn.MSELoss(), data)
        >>> scores = score(objective, ["hessian_trace", "top_eigenvalues:k=1"], seed=0)
        >>> [round(float(s.estimate), 4) for s in scores]
        [2.0, 1.0]
    """
    requests = parse_requests(names)
    prepared = prepare(
        objective,
        seed=seed,
        max_basis=max_basis,
        num_groups=num_groups,
        initial=initial,
        optimizer=optimizer,
        canonical=canonical,
        provenance=provenance,
    )
    return measure_all(
        prepared.analysis,
        prepared.resolve(requests),
        provenance=prepared.provenance,
        progress=progress,
        on_score=on_score,
    )


@dataclass(frozen=True)
class Requests:
    """What was asked for, checked.

    Attributes:
        parsed: Measures with their complete settings.
        others: Which measures beside these: ``"none"``, ``"usual"`` (all whose needs are met
            but the dear ones) or ``"all"``.
    """

    parsed: tuple[Request, ...]
    others: Literal["none", "usual", "all"]

    @property
    def text(self) -> str:
        """The same requests give the same text."""
        named = [[m.name, to_plain(dict(s))] for m, s in self.parsed]
        return json.dumps([self.others, *named], sort_keys=True)


def listed(
    names: MeasureRequest | Iterable[MeasureRequest] | None,
) -> tuple[MeasureRequest, ...] | None:
    """Return one or several requests as a tuple; None stays None.

    Raises:
        SettingsError: If they are none.
    """
    if names is None:
        return None
    if isinstance(names, str) or (
        isinstance(names, tuple) and len(names) == 2 and isinstance(names[1], Mapping)
    ):
        return (names,)
    try:
        return tuple(names)
    except TypeError:
        raise SettingsError(
            f"Expected names of measures. Got {names!r}. Write for example"
            " ['hessian_trace', 'top_eigenvalues:k=1']."
        ) from None


def parse_requests(names: MeasureRequest | Iterable[MeasureRequest] | None) -> Requests:
    """Return the measures that are asked for; see :func:`score`.

    Raises:
        UnknownMeasureError: If there is no measure of a name.
        SettingsError: If a setting is unknown or cannot be read.
    """
    requests = listed(names)
    if requests is None:
        return Requests((), "usual")
    parsed = tuple(parse_request(request) for request in requests if request != ALL)
    return Requests(parsed, "all" if ALL in requests else "none")


@dataclass(frozen=True)
class Prepared:
    """An analysis of an objective, and what its scores say of their origin."""

    analysis: Analysis
    provenance: Mapping[str, Any]
    withheld: Mapping[str, str]

    def resolve(self, requests: Requests) -> list[Request]:
        """Return the measures to take, in order; see :func:`score`."""
        chosen = list(requests.parsed)
        if requests.others == "none":
            return chosen
        asked = {m.name for m, _ in chosen}
        candidates = [
            m
            for m in map(measures.get, measures.names())
            if m.name not in asked and (requests.others == "all" or not m.dear)
        ]
        chosen += [
            (m, dict(m.settings)) for m in candidates if all(map(self.analysis.meets, m.needs))
        ]
        for need, reason in self.withheld.items():
            lost = [m.name for m in candidates if need in m.needs]
            if lost:
                text = f"Left out: {', '.join(lost)}. {reason}"
                warnings.warn(text, SharpkitWarning, stacklevel=3)
        return chosen


def prepare(
    objective: Objective,
    *,
    seed: int = 0,
    max_basis: int | None = None,
    num_groups: int = 8,
    initial: nn.Module | Mapping[str, Tensor] | Tensor | None = None,
    optimizer: object = None,
    canonical: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Prepared:
    """Return an analysis ready to be measured; the arguments are those of :func:`score`."""
    if not isinstance(objective, Objective):
        raise SettingsError(
            f"Expected an Objective. Got {type(objective).__name__}. Write"
            " sharpkit.score(sharpkit.Objective(model, loss, data), ...)."
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise SettingsError(f"Expected `seed` to be a whole number. Got {seed!r}.")
    beside: dict[str, Any] = {"initial": initial, "optimizer": optimizer}
    if canonical:
        objective, beside, done = _canonical(objective, initial, optimizer)
        provenance = {**(provenance or {}), "canonical": done}
    analysis = Analysis(objective, seed=seed, max_basis=max_basis, num_groups=num_groups, **beside)
    origin = {**_provenance(objective), **(provenance or {})}
    return Prepared(analysis, origin, beside.get("withheld", {}))


def _canonical(
    objective: Objective, initial: Any, optimizer: object
) -> tuple[Objective, dict[str, Any], dict[str, Any]]:
    # The objective at its canonical form, what an analysis of it is given, and what was done.
    form = canonical_form(objective)
    withheld: dict[str, str] = {}
    if optimizer is not None:
        withheld["optimizer"] = (
            "Expected the parameters that the optimizer trained, to which its state belongs: it"
            " does not move with them to the canonical form. Measure without the canonical form."
        )
    start = None
    if initial is not None:
        start = Analysis(objective, initial=initial).initial
        state = {**state_of(objective), **objective.space.unflatten(start.double())}
        try:
            moved = form.gauge.move(state)
            start = objective.space.flatten({n: moved[n] for n in objective.space.names})
        except MeasureError as error:
            start, withheld["initial"] = None, str(error)
    done = {**form.to_dict(), "withheld": withheld}
    return form.objective, {"initial": start, "withheld": withheld}, done


def measure_all(
    analysis: Analysis,
    parsed: Iterable[tuple[measures.Measure, Mapping[str, Any]]],
    *,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
    on_score: Callable[[Score], None] | None = None,
) -> Scores:
    """Return the scores of parsed requests; see :func:`score`."""
    origin = dict(provenance) if provenance is not None else _provenance(analysis.objective)
    scores = []
    for measure, settings in parsed:
        if progress:
            progress(measure.name)
        result = _one(analysis, measure, settings, analysis.seed, origin)
        scores.append(result)
        if on_score:
            on_score(result)
    return Scores(tuple(scores))


def _one(
    analysis: Analysis,
    measure: measures.Measure,
    settings: Mapping[str, Any],
    seed: int,
    origin: Mapping[str, Any],
) -> Score:
    team = analysis.objective.team
    team.begin(measure.name)
    before = analysis.objective.cost
    estimate, error = None, None
    try:
        estimate = measure(analysis, **settings)
    except Exception as failure:  # whatever it is: the numbers already there must not be lost
        text = " ".join(str(failure).split())
        error = text if isinstance(failure, SharpkitError) else f"{type(failure).__name__}: {text}"
        warnings.warn(f"{measure.name} failed: {error}", SharpkitWarning, stacklevel=3)
    # Seconds, and what is kept in memory, are the first rank's.
    spent, how = team.first(lambda: (analysis.objective.cost - before, analysis.objective.hvp_mode))
    if estimate is not None:
        estimate = replace(estimate, cost=spent)
    mode = {"hvp_mode": how} if spent.hvps else {}
    if spent.hvps and analysis.objective.hvp_error:
        mode["hvp_relative_error"] = str(analysis.objective.hvp_error)
    return Score(measure.name, estimate, dict(settings), seed, {**origin, **mode}, error)


def _provenance(objective: Objective) -> dict[str, Any]:
    theta = objective.theta
    digest = hashlib.sha256(theta.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "loss": float(objective.value()),
        "num_parameters": objective.space.dim,
        "num_examples": objective.num_examples,
        "num_terms": objective.num_terms,
        "theta_sha256": digest.hexdigest(),
        "data_fingerprint": objective.data_fingerprint,
        "dtype": str(objective.model_dtype).removeprefix("torch."),
        "device": str(objective.space.device),
        "sharpkit": importlib.metadata.version("sharpkit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
