"""How long a run will take and how much memory, before it starts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sharpkit.errors import SharpkitError
from sharpkit.objective.memory import available_memory
from sharpkit.scoring import MeasureRequest, parse_requests
from sharpkit.study.doctor import (
    USUAL_FORWARDS,
    USUAL_GRADIENTS,
    USUAL_HVPS,
    shown_bytes,
    shown_duration,
    timed,
)
from sharpkit.study.identity import Options
from sharpkit.study.recipe import load_recipe
from sharpkit.study.store import Store

__all__ = ["forecast"]

T = TypeVar("T")

BASIS = 150  # Lanczos vectors, as many as most measures need


def forecast(
    store: Store,
    files: Sequence[Path],
    recipe: Path,
    names: Sequence[MeasureRequest] | None,
    options: Options,
    workers: int,
) -> str:
    """Return a sentence on time and memory; empty if all checkpoints were measured already.

    Checkpoints of which the study holds no score with these options are counted. The time of one
    is what one took
    on average that the study holds with as many measures; without such, the largest file is
    loaded and its gradient and product timed, and all measures are taken to cost what they
    cost on small networks. It is a forecast for planning, not a promise.
    """
    found = store.query(
        "SELECT DISTINCT e.path FROM entry e JOIN score s ON s.subject = e.subject AND"
        " s.seed = e.seed WHERE e.error IS NULL AND e.options = ? AND e.seed = ?",
        (options.text(), options.seed),
    )
    known = {row[0] for row in found}
    new = [f for f in files if store.relative(f) not in known]
    if not new:
        return ""
    requests = parse_requests(names)
    rows = store.query(
        "SELECT sum(s.seconds) FROM entry e JOIN score s ON s.subject = e.subject AND"
        " s.seed = e.seed WHERE e.asked = ? AND e.options = ? GROUP BY e.path, e.recipe, e.seed",
        (requests.text, options.text()),
    )
    spent = [float(row[0]) for row in rows if row[0]]
    memory = ""
    if spent:
        one, source = statistics.fmean(spent), f"from {len(spent)} measured before"
    else:
        largest = max(new, key=lambda f: f.stat().st_size if f.is_file() else 0)
        try:
            objective, _ = load_recipe(recipe).objective(
                largest,
                dtype=options.torch_dtype(),
                device=options.device,
                params=None if options.params is None else list(options.params),
                trust_pickle=options.trust_pickle,
            )
            gradient = objective.gradient()
            forward = _least(objective.value)
            backward = _least(objective.gradient)
            objective.hvp(gradient)
            product = _least(lambda: objective.hvp(gradient))
        except (SharpkitError, RuntimeError):
            return ""  # the run will say why
        one = USUAL_HVPS * product + USUAL_GRADIENTS * backward + USUAL_FORWARDS * forward
        if requests.others == "none":
            one *= min(1.0, len(requests.parsed) / 4)  # the first few share most of the work
        source = f"one gradient of {largest.name} takes {backward:.2g} s"
        vectors = options.max_basis or min(BASIS, objective.space.dim)
        basis = vectors * objective.space.dim * objective.space.dtype.itemsize * workers
        memory = f"; Krylov bases up to {shown_bytes(basis)}"
        free = available_memory(objective.space.device)
        if free is not None:
            memory += f" of {shown_bytes(free)} free"
    total = one * len(new) / min(workers, len(new))
    return f"forecast: about {shown_duration(total)} for {len(new)} new ({source}){memory}"


def _least(function: Callable[[], T]) -> float:
    # The first call pays for what later ones find ready.
    return min(timed(function)[1] for _ in range(2))
