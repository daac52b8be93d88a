"""The loss along a geodesic of the quotient by the network's symmetries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sharpkit.errors import MeasureError, SettingsError
from sharpkit.geometry.layouts import Factorization, find_pairs
from sharpkit.geometry.quotient import MetricName, Order
from sharpkit.geometry.quotient_space import QuotientSpace
from sharpkit.landscape.section import Axis
from sharpkit.objective import Objective
from sharpkit.results import Curve

__all__ = ["GeodesicDirection", "GeodesicSection", "geodesic_slice"]

GeodesicDirection: TypeAlias = Literal["gradient", "random"]


class GeodesicSection:
    r"""Geodesics of the quotient by the network's symmetries, from theta's canonical form.

    .. math:: x \mapsto \gamma_\xi(1), \qquad \xi = x_1 \xi_1 (+\, x_2 \xi_2)

    with horizontal velocities of length 1 in the metric, orthogonal to each other: the
    exponential map, in which distances from theta along a ray are those of the quotient. What it
    shows is the same for all parameters of the same function.

    Args:
        objective: Gives theta and L.
        directions: One or two of ``"gradient"``: uphill, the Riemannian gradient; ``"random"``: a
            normal draw on the horizontal space.
        metric: ``"inv"`` or ``"mix"``.
        order: Of the curves: ``"exact"``, 2 or 1.
        damping: As for the measure ``geodesic_sharpness_worst``.
        seed: Of the random draws.
        pairs: What :func:`sharpkit.geometry.layouts.find_pairs` returned before; default: it
            is asked.

    Attributes:
        quotient: The space of white coordinates.

    Raises:
        SettingsError: If a setting is unknown.
        MeasureError: If the gradient is zero, or a head lacks full rank without damping.

    Reference: the geometry of arXiv:2505.05409; the section is ours.
    """

    def __init__(
        self,
        objective: Objective,
        directions: Sequence[GeodesicDirection] = ("gradient",),
        *,
        metric: MetricName = "inv",
        order: Order = "exact",
        damping: float = 1e-4,
        seed: int = 0,
        pairs: Factorization | None = None,
    ):
        chosen = list(directions)
        if not 1 <= len(chosen) <= 2 or not set(chosen) <= {"gradient", "random"}:
            raise SettingsError(
                "Expected one or two directions, each 'gradient' or 'random'. Got"
                f" {', '.join(map(repr, chosen)) or 'none'}."
            )
        if chosen == ["gradient", "gradient"]:
            raise SettingsError("Expected two different directions. Got the gradient twice.")
        found = find_pairs(objective) if pairs is None else pairs
        self.quotient = quotient = QuotientSpace(
            objective.space,
            objective.theta,
            found.pairs,
            metric=metric,
            order=order,
            damping=damping,
        )
        self._settings = {"metric": metric, "order": order, "damping": damping}
        self._notes = (*found.notes, *quotient.notes)
        self._kinds, self._seed = chosen, seed
        generator = torch.Generator(quotient.scale.device).manual_seed(seed)
        self._zetas: list[Tensor] = []
        for kind in chosen:
            zeta = self._gradient(objective) if kind == "gradient" else self._random(generator)
            for other in self._zetas:
                zeta = zeta - other * (other @ zeta)
            length = float(zeta.norm())
            if not (length > 0 and math.isfinite(length)):
                raise MeasureError(
                    f"Expected a direction of positive length. Got {length:g}: the gradient is"
                    " zero or not finite. Take direction='random'."
                )
            self._zetas.append(zeta / length)

    def _gradient(self, objective: Objective) -> Tensor:
        return self.quotient.pull(objective.at(self.quotient.base).gradient())

    def _random(self, generator: torch.Generator) -> Tensor:
        like = self.quotient.scale
        zeta = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        if self.quotient.frozen is not None:
            zeta = zeta.masked_fill(self.quotient.frozen, 0.0)
        return self.quotient.project(zeta)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What each coordinate is."""
        label = f"distance in the {self._settings['metric']} metric"
        return tuple(
            Axis(
                "geodesic",
                label if len(self._kinds) == 1 else f"{label}, {kind}",
                self._step(i),
                self._seed if kind == "random" else None,
                {**self._settings, "direction": kind},
            )
            for i, kind in enumerate(self._kinds)
        )

    def _step(self, axis: int) -> float:
        # How far in theta one unit is; from a shorter one where the geodesic ends before.
        base = self.quotient.base
        for unit in (1.0, 0.1, 0.01, 1e-3):
            there = self.point([unit * (i == axis) for i in range(len(self._kinds))])
            if there is not None and bool(there.isfinite().all()):
                return float((there - base).double().norm()) / unit
        return 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, and what the damping does."""
        return self._notes

    def units(self) -> None:
        """A curved section has none."""
        return

    def point(self, coordinates: Sequence[float]) -> Tensor | None:
        """Return theta ``[P]`` there; None beyond the end of a geodesic."""
        pairs = zip(coordinates, self._zetas, strict=True)
        zeta = torch.stack([float(x) * z for x, z in pairs]).sum(dim=0)
        try:
            return self.quotient.base + self.quotient.push(zeta)
        except MeasureError:
            return None


def geodesic_slice(
    objective: Objective,
    x: Sequence[float],
    *,
    direction: Literal["gradient", "random"] = "gradient",
    metric: MetricName = "inv",
    order: Order = "exact",
    damping: float = 1e-4,
    seed: int = 0,
    pairs: Factorization | None = None,
) -> Curve:
    r"""Return :math:`L(\gamma_\xi(x))` along a geodesic of unit speed.

    The geodesic starts at theta's canonical representative, with a horizontal velocity xi of
    length 1 in the metric of ``geodesic_sharpness_worst``, so that x is the distance from theta
    in the quotient (to the order of the curve). The curve is the same for all parameters of
    the same function: what a straight slice shows of an attention head depends on the gauge
    that training happened to end in, this one does not.

    Args:
        objective: Gives theta and L.
        x: Signed distances.
        direction: ``"gradient"``: uphill, the Riemannian gradient; ``"random"``: a normal draw
            on the horizontal space.
        metric: ``"inv"`` or ``"mix"``.
        order: Of the curve: ``"exact"``, 2 or 1.
        damping: As for the measure.
        seed: Of the random draw.
        pairs: What :func:`sharpkit.geometry.layouts.find_pairs` returned before; default: it
            is asked.

    Returns:
        A curve; values that are not finite, or lie beyond the end of a geodesic of ``"mix"``,
        are NaN.

    Raises:
        SettingsError: If a setting is unknown.
        MeasureError: If the gradient is zero, or a head lacks full rank without damping.

    Cost: a loss each, one gradient for ``"gradient"``.

    Reference: the geometry of arXiv:2505.05409; the slice is ours.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)  # no pairs: relative to the weight
        >>> _ = model.weight.data.fill_(2.0)
        >>> data = (torch.ones(1, 1), torch.ones(1, 1))
        >>> objective = Objective(model, torch.nn.MSELoss(), data)
        >>> geodesic_slice(objective, [-0.5, 0.0, 0.5]).y
        (0.0, 1.0, 4.0)
    """
    section = GeodesicSection(
        objective,
        [direction],
        metric=metric,
        order=order,
        damping=damping,
        seed=seed,
        pairs=pairs,
    )
    values, ended = [], []
    for distance in x:
        theta = section.point([float(distance)])
        if theta is None:
            values.append(math.nan)
            ended.append(float(distance))
            continue
        value = float(objective.at(theta).value())
        values.append(value if math.isfinite(value) else math.nan)
    return Curve(
        x=tuple(float(distance) for distance in x),
        y=tuple(values),
        x_label=f"distance in the {metric} metric",
        y_label="loss",
        details={
            "direction": direction,
            "metric": metric,
            "order": order,
            "damping": damping,
            "seed": seed,
            "pairs": section.quotient.heads,
            "beyond_the_end": ended,
            "notes": list(section.notes),
        },
    )
