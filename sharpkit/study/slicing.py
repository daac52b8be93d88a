"""From a recipe and checkpoints to slices: sections by name, data sets, one slice a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sharpkit.errors import SettingsError, SharpkitWarning
from sharpkit.geometry.canonical import canonical_form
from sharpkit.landscape import (
    Direction,
    GeodesicSection,
    Marker,
    Section,
    Slice,
    SliceProgress,
    StraightSection,
    between,
    compute_slice,
    eigen_directions,
    gradient_direction,
    orthogonalized,
    parse_range,
    plane_through,
    random_direction,
    tensor_direction,
    trajectory_plane,
    worst_direction,
)
from sharpkit.landscape.geodesics import GeodesicDirection
from sharpkit.objective import Objective
from sharpkit.objective.labels import has_labels
from sharpkit.objective.states import state_of, with_state
from sharpkit.parameters import Selection
from sharpkit.study.checkpoints import fit_state_dict, read_state_dict
from sharpkit.study.recipe import Recipe, load_recipe
from sharpkit.team import Group

__all__ = ["DIRECTIONS", "Source", "Wanted", "slices_of"]

RANDOM = ("filter", "layer", "weight", "theta")
OF_SEVERAL = ("trajectory", "endpoints")
DIRECTIONS = (*RANDOM, "eigen", "negative", "gradient", "adversarial", *OF_SEVERAL, "geodesic",
              "tensor:FILE")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where objectives come from; it can be sent to other processes.

    Attributes:
        recipe: The file.
        checkpoint: The file.
        dtype: To evaluate in.
        device: To move the model to.
        params: Overrides the recipe's selection.
        trust_pickle: Allow checkpoints that run code when loaded.
        test: Whether to add the test data.
        canonical: Whether to take the network's canonical form.
        group: Ranks that measure together.
    """

    recipe: Path
    checkpoint: Path
    dtype: torch.dtype | None = None
    device: str | None = None
    params: Selection | None = None
    trust_pickle: bool = False
    test: bool = False
    canonical: bool = False
    group: Group = None

    def __call__(self) -> dict[str, Objective]:
        """Return the objectives by data set."""
        return self.load(load_recipe(self.recipe))

    def load(self, recipe: Recipe) -> dict[str, Objective]:
        """Return the objectives of a recipe that is there already.

        Args:
            recipe: The recipe.
        """

        def one(test: bool) -> Objective:
            objective, _ = recipe.objective(
                self.checkpoint,
                dtype=self.dtype,
                device=self.device,
                params=self.params,
                trust_pickle=self.trust_pickle,
                test=test,
                process_group=self.group,
                share="probes",
            )
            return objective

        first = one(False)
        found = {"train" if self.test else "": first}
        if self.test:
            found["test"] = one(True)
        if self.canonical:
            form = canonical_form(first)
            if not form.factorization.pairs:
                warnings.warn(
                    "The network has no pairs of factors to balance: its canonical form is itself.",
                    SharpkitWarning,
                    stacklevel=2,
                )
            found = {name: with_state(o, form.state) for name, o in found.items()}
        return found


@dataclass(frozen=True)
class Wanted:
    """What to draw.

    Attributes:
        directions: One name or two: see ``DIRECTIONS``.
        x: Range along the first axis; None: what suits the directions.
        y: Along the second; None: a line.
        plane: Whether there is a second axis, whose range may be left to the directions.
        seed: Of random draws; the second direction takes the next one.
        rise: Of the quadratic model at one step, for eigenvectors and the gradient.
        rho: Radius of the adversarial ball.
        orthogonal: Whether to take the first direction's part off the second.
        metrics: Besides the loss; None: accuracy where the criterion has class labels.
        options: For :func:`compute_slice`: loss_max, refine, batch_norm, quadratic, num_groups,
            workers.
        command: Kept with the slice.
    """

    directions: tuple[str, ...] = ("filter",)
    x: str | None = None
    y: str | None = None
    plane: bool = False
    seed: int = 0
    rise: float = 0.1
    rho: float = 0.05
    orthogonal: bool = False
    metrics: tuple[str, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def dim(self) -> int:
        """1 or 2."""
        return 2 if self.plane or self.y is not None else 1

    def check(self, count: int) -> None:
        """Refuse what cannot be drawn, before anything is loaded.

        Args:
            count: Of checkpoints.

        Raises:
            SettingsError: If names are unknown, or do not go together.
        """
        for name in self.directions:
            if name not in DIRECTIONS and not name.startswith("tensor:"):
                raise SettingsError(
                    f"Expected directions among {', '.join(DIRECTIONS)}. Got {name!r}."
                )
        if not 1 <= len(self.directions) <= self.dim:
            raise SettingsError(
                f"Expected one direction for a line, one or two for a plane (-y). Got"
                f" {', '.join(self.directions)} for {self.dim} axes."
            )
        several = [d for d in self.directions if d in (*OF_SEVERAL, "geodesic")]
        if several and len(self.directions) > 1:
            raise SettingsError(f"Expected {several[0]!r} alone: it gives all axes by itself.")
        needed = {"trajectory": self.dim + 1, "endpoints": self.dim + 1}.get(self.directions[0], 1)
        exact = self.directions[0] == "endpoints"
        if count < needed or (exact and count != needed):
            raise SettingsError(
                f"Expected {'' if exact else 'at least '}{needed} checkpoints for a"
                f" {self.dim}-D slice of {self.directions[0]!r}. Got {count}."
            )
        for text in (self.x, self.y):
            if text is not None:
                parse_range(text)


@dataclass(frozen=True)
class _Drawn:
    # A section with what is shown on it.
    section: Section
    markers: tuple[Marker, ...] | None = None
    grid: tuple[np.ndarray, ...] | None = None
    notes: tuple[str, ...] = ()


def slices_of(
    checkpoints: Sequence[Path],
    source: Callable[[Path], Source],
    wanted: Wanted,
    *,
    parts: Callable[[Path], Path | None] = lambda _: None,
    on_start: Callable[[Path, Section], None] | None = None,
    progress: Callable[[SliceProgress], None] | None = None,
) -> list[Slice]:
    """Compute one slice of each checkpoint, or one of all where the directions are of several.

    Args:
        checkpoints: The files; the last one is the centre of a trajectory.
        source: Where a checkpoint's objectives come from.
        wanted: What to draw.
        parts: Where the points of a checkpoint's slice are kept.
        on_start: Called with each file and its section before its points.
        progress: As for :func:`compute_slice`.

    Raises:
        SettingsError: If what is wanted does not go together.
    """
    wanted.check(len(checkpoints))
    together = wanted.directions[0] in OF_SEVERAL
    found = []
    for path in [checkpoints[-1]] if together else checkpoints:
        own = source(path)
        recipe = load_recipe(own.recipe)
        objectives = own.load(recipe)
        first = next(iter(objectives.values()))
        if together:
            drawn = _of_several(checkpoints, source, recipe, first, wanted)
        else:
            drawn = _Drawn(_section(first, wanted))
        if on_start is not None:
            on_start(path, drawn.section)
        metrics = wanted.metrics
        if metrics is None:
            metrics = ("accuracy",) if has_labels(first._evaluator) else ()
        x, y = _ranges(wanted, drawn)
        one = compute_slice(
            drawn.section,
            objectives,
            x,
            y,
            metrics=metrics,
            factory=own if wanted.options.get("workers", 1) > 1 else None,
            markers=drawn.markers,
            parts=parts(path),
            progress=progress,
            details={
                "checkpoint": path.name if not together else f"{len(checkpoints)} checkpoints",
                "seed": wanted.seed,
                "command": wanted.command,
                "canonical": own.canonical,
            },
            **wanted.options,
        )
        found.append(_noted(one, drawn.notes))
    return found


def _noted(one: Slice, notes: Sequence[str]) -> Slice:
    return replace(one, notes=tuple(dict.fromkeys((*one.notes, *notes))))


def _ranges(wanted: Wanted, drawn: _Drawn) -> tuple[Any, Any]:
    usual = drawn.grid or (parse_range("-1:1:51"),) * wanted.dim
    x = parse_range(wanted.x) if wanted.x is not None else usual[0]
    if wanted.dim == 1:
        return x, None
    return x, parse_range(wanted.y) if wanted.y is not None else usual[1]


def _section(objective: Objective, wanted: Wanted) -> Section:
    names, dim = wanted.directions, wanted.dim
    if names[0] == "geodesic":
        kinds: tuple[GeodesicDirection, ...] = ("gradient", "random")
        return GeodesicSection(objective, kinds[:dim], seed=wanted.seed)
    if len(names) == 2:
        chosen = [_directions(objective, n, 1, wanted, place=i)[0] for i, n in enumerate(names)]
    else:
        chosen = _directions(objective, names[0], dim, wanted)
    if wanted.orthogonal and len(chosen) == 2:
        chosen[1] = orthogonalized(chosen[0], chosen[1])
    return StraightSection(objective.theta, chosen)


def _directions(
    objective: Objective, name: str, count: int, wanted: Wanted, place: int = 0
) -> list[Direction]:
    seed, rise = wanted.seed, wanted.rise
    if name in RANDOM:
        return [random_direction(objective, name, seed=seed + place + i) for i in range(count)]  # type: ignore[arg-type]
    if name == "eigen":
        return list(eigen_directions(objective, count, rise=rise, seed=seed))
    if name == "negative":
        (last,) = eigen_directions(objective, 1, which="smallest", rise=rise, seed=seed)
        top = eigen_directions(objective, 1, rise=rise, seed=seed) if count == 2 else ()
        return [*top, last]
    if name == "gradient":
        first = gradient_direction(objective, rise=rise)
    elif name == "adversarial":
        first = worst_direction(objective, wanted.rho, seed=seed)
    else:
        path = Path(name.removeprefix("tensor:"))
        state = fit_state_dict(read_state_dict(path), objective.model)
        vector = objective.space.flatten({n: state[n] for n in objective.space.names})
        first = tensor_direction(vector, objective.space, label=f"multiples of {path.name}")
    rest = [random_direction(objective, seed=seed + i) for i in range(count - 1)]
    return [first, *rest]


def _of_several(
    checkpoints: Sequence[Path],
    source: Callable[[Path], Source],
    recipe: Recipe,
    last: Objective,
    wanted: Wanted,
) -> _Drawn:
    thetas, dim = [], wanted.dim
    kept = _kept(last)
    moved, held = [], []
    for path in checkpoints[:-1]:
        other = next(iter(source(path).load(recipe).values()))
        own = _kept(other)
        differ = {n for n in kept if n not in own or not torch.equal(own[n], kept[n])}
        if any(_is_statistic(n) for n in differ):
            moved.append(path.name)
        held += [n for n in sorted(differ) if not _is_statistic(n) and n not in held]
        thetas.append(other.theta)
    thetas.append(last.theta)
    names = [p.stem for p in checkpoints]
    notes: tuple[str, ...] = ()
    if moved and wanted.options.get("batch_norm") != "reestimate":
        notes = (
            f"BatchNorm's statistics are those of {checkpoints[-1].name} everywhere, also at"
            f" {', '.join(moved[:3])}: use --batch-norm reestimate.",
        )
    if held:
        notes += (
            f"{', '.join(held[:3])}{', ...' if len(held) > 3 else ''} differ between the"
            f" checkpoints, but do not move along the slice: they are those of"
            f" {checkpoints[-1].name} everywhere, so that at the others it is not their loss.",
        )
    if wanted.directions[0] == "trajectory":
        found = trajectory_plane(thetas, names, axes=dim)
        return _Drawn(found.section, found.markers, found.grid(), (*found.notes, *notes))
    if dim == 2:
        section, markers = plane_through(thetas[0], thetas[1], thetas[2], names)
        return _Drawn(section, markers, _around(markers), notes)
    line = StraightSection(
        thetas[0],
        [between(thetas[0], thetas[1], label=f"share of the way from {names[0]} to {names[1]}")],
    )
    ends = (Marker(names[0], (0.0,)), Marker(names[1], (1.0,)))
    return _Drawn(line, ends, (np.linspace(-0.25, 1.25, 61),), notes)


def _kept(objective: Objective) -> dict[str, torch.Tensor]:
    # What a slice does not move: buffers, and parameters that are not selected.
    chosen = set(objective.space.names)
    return {
        n: t
        for n, t in state_of(objective).items()
        if n not in chosen and not n.endswith("num_batches_tracked")
    }


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def _around(markers: Sequence[Marker]) -> tuple[np.ndarray, ...]:
    at = np.array([m.coordinates for m in markers])
    low, high = at.min(axis=0), at.max(axis=0)
    room = 0.2 * (high - low).max()
    return tuple(np.linspace(a - room, b + room, 51) for a, b in zip(low, high, strict=True))
