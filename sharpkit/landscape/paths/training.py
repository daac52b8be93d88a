"""Train a curve of low loss between two minima."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from sharpkit.errors import MeasureError, SettingsError
from sharpkit.landscape.paths.curves import BezierPath, Path, PolychainPath, SegmentPath
from sharpkit.landscape.paths.statistics import Statistics, with_statistics
from sharpkit.objective import Objective
from sharpkit.results import Cost

__all__ = ["Connection", "connect"]

Optimizing: TypeAlias = Literal["sgd", "adam"] | Callable[[list[Tensor]], torch.optim.Optimizer]

KINDS: Mapping[str, type[BezierPath] | type[PolychainPath]] = {
    "bezier": BezierPath,
    "polychain": PolychainPath,
}


@dataclass(frozen=True)
class Connection:
    """A curve that was trained.

    Attributes:
        path: The curve.
        losses: The mean of each epoch's batch losses at its random t, without weight decay.
        details: All settings (JSON-able).
        notes: Sentences for a person.
        cost: What it cost.
    """

    path: BezierPath | PolychainPath
    losses: tuple[float, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cost: Cost = field(default_factory=Cost)


def connect(
    objective: Objective,
    theta_a: Tensor,
    theta_b: Tensor,
    *,
    kind: Literal["bezier", "polychain"] = "bezier",
    num_bends: int = 1,
    epochs: int = 30,
    batch_size: int | None = None,
    lr: float = 0.05,
    optimizer: Optimizing = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    decay: bool = True,
    keep_batches: bool = True,
    statistics: Statistics = "reestimate",
    seed: int = 0,
) -> Connection:
    r"""Return a curve between two minima along which the loss was made small.

    .. math::
        \min_{c_1 \dots c_k}\ \mathrm{E}_{t \sim U[0, 1]}\left[ L(\phi(t)) +
        \tfrac{\lambda}{2}\|\phi(t)\|^2 \right]

    by stochastic gradients: one batch and one t a step, and for every bend
    :math:`w_i(t)\,(g + \lambda\phi(t))` with the gradient g of the batch's loss at
    :math:`\phi(t)`. The ends stay as they are, the bends begin evenly spaced on the segment.
    A batch's gradient counts by its share of the loss terms, so that a short last one does not
    count as much as a whole one.

    Args:
        objective: The model, loss and data. It is read batch by batch, and not changed.
        theta_a: One end, ``[P]``.
        theta_b: The other.
        kind: ``"bezier"`` or ``"polychain"``.
        num_bends: Control points between the ends: with one, the Bezier curve is quadratic.
        epochs: Passes over the data.
        batch_size: Examples a step; None: the batches as the data have them.
        lr: Learning rate.
        optimizer: ``"sgd"``, ``"adam"``, or a function of the list of bends.
        momentum: Of ``"sgd"``.
        weight_decay: :math:`\lambda`.
        decay: Whether the learning rate falls from half the steps on, linearly to a hundredth
            at nine tenths, as in the paper's code; it multiplies that of every group.
        keep_batches: Whether batches are held in memory between epochs, and dealt in random
            order. Otherwise they are streamed in the order of the data.
        statistics: What becomes of running statistics; see
            :func:`~sharpkit.landscape.paths.statistics.with_statistics`. The gradient takes
            them as constants, unlike a network in training mode.
        seed: Of every t and every order.

    Returns:
        The curve and how training went. Whether it is low between the points seen is for
        :func:`~sharpkit.landscape.paths.barrier` to say.

    Raises:
        SettingsError: If a setting makes no sense.
        ShapeError: If an end does not have shape ``[P]``.
        MeasureError: If the loss or the curve does not stay finite, or the network has running
            statistics and it is not said what to do.

    It misleads as evidence on the *data trained on*: a curve with more bends than needed fits
    them. Measure the barrier on other data too.

    Cost: a gradient and a forward pass over the data each epoch (the latter once, if batches
    are kept).

    Reference: Garipov et al., arXiv:1802.10026.

    Example:
        >>> x, y = torch.ones(8, 1), torch.ones(8, 1)
        >>> def loss(out, y):
        ...     return (out[:, 0] ** 2 + out[:, 1] ** 2 - y[:, 0]).square().mean()
        >>> model = torch.nn.Linear(1, 2, bias=False)  # minima: a circle
        >>> objective = Objective(model, loss, (x, y))
        >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> curve = connect(objective, a, b, epochs=400, lr=0.05).path
        >>> bool(objective.at(curve.point([0.5])).value() < 0.005)  # the segment: 0.25
        True
    """
    _check(kind, num_bends, epochs, lr, weight_decay, momentum)
    for end in (theta_a, theta_b):
        objective.space.check_vector(end)
    with_statistics(objective, statistics)
    started = objective.cost
    a, b = (
        end.detach().to(objective.space.device, objective.space.dtype) for end in (theta_a, theta_b)
    )
    line = SegmentPath(a, b)
    begin = [line.point([(i + 1) / (num_bends + 1)]) for i in range(num_bends)]
    curve = KINDS[kind](a, [p for p in begin if p is not None], b)
    bends = list(curve.bends)  # trained in place
    stepper = _optimizer(optimizer, bends, lr, momentum)
    rates = [group["lr"] for group in stepper.param_groups]
    generator = torch.Generator("cpu").manual_seed(seed)
    losses = []
    for epoch, shards in enumerate(_epochs(objective, epochs, batch_size, keep_batches, generator)):
        total, terms = 0.0, 0.0
        for shard, share, progress in shards:
            if decay:
                factor = _decay((epoch + progress) / epochs)
                for group, rate in zip(stepper.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            t = float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu"))
            value = _step(shard, curve, bends, stepper, t, share, weight_decay, statistics)
            total, terms = total + value * shard.num_terms, terms + shard.num_terms
        losses.append(total / terms)
    if not all(bool(torch.isfinite(bend).all()) for bend in bends):
        raise _diverged(lr)
    return Connection(
        path=KINDS[kind](a, bends, b),
        losses=tuple(losses),
        details={
            "kind": kind,
            "num_bends": num_bends,
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "optimizer": optimizer if isinstance(optimizer, str) else type(stepper).__name__,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decay": decay,
            "seed": seed,
        },
        notes=_notes(line, curve),
        cost=objective.cost - started,
    )


def bend_gradients(path: Path, t: float, gradient: Tensor) -> list[Tensor]:
    """Return the gradient by each bend, given that by the point at t."""
    return [weight * gradient for weight in path.weights(t)[1:-1]]


def _step(
    shard: Objective,
    curve: Path,
    bends: list[Tensor],
    stepper: torch.optim.Optimizer,
    t: float,
    share: float,
    weight_decay: float,
    statistics: Statistics,
) -> float:
    theta = curve.point([t])
    assert theta is not None
    here = with_statistics(shard.at(theta, copy_theta=False), statistics)
    value, gradient = here.value_and_gradient()
    if not math.isfinite(float(value)) or not bool(torch.isfinite(gradient).all()):
        raise _diverged(stepper.param_groups[0]["lr"])
    if weight_decay:
        gradient = gradient + weight_decay * theta
    for bend, slope in zip(bends, bend_gradients(curve, t, share * gradient), strict=True):
        bend.grad = slope
    stepper.step()
    return float(value)


def _epochs(
    objective: Objective, epochs: int, size: int | None, keep: bool, generator: torch.Generator
) -> Iterator[Iterator[tuple[Objective, float, float]]]:
    # Batches, their size relative to the mean one's, and how much of the epoch is done.
    kept: list[Objective] = []
    count = 0
    for shard in objective.shards(size):
        count += 1
        if keep:
            kept.append(shard)
    mean = objective.num_terms / max(count, 1)
    for _ in range(epochs):
        if keep:
            order = torch.randperm(count, generator=generator, device="cpu").tolist()
            shards = iter([kept[i] for i in order])
        else:
            shards = objective.shards(size)
        yield ((s, s.num_terms / mean, i / count) for i, s in enumerate(shards))


def _optimizer(
    optimizer: Optimizing, bends: list[Tensor], lr: float, momentum: float
) -> torch.optim.Optimizer:
    if callable(optimizer):
        return optimizer(bends)
    if optimizer == "sgd":
        return torch.optim.SGD(bends, lr=lr, momentum=momentum)
    if optimizer == "adam":
        return torch.optim.Adam(bends, lr=lr)
    raise SettingsError(
        "Expected `optimizer` to be 'sgd', 'adam' or a function of the list of bends. Got"
        f" {optimizer!r}."
    )


def _decay(progress: float) -> float:
    if progress <= 0.5:
        return 1.0
    return max(1.0 - 0.99 * (progress - 0.5) / 0.4, 0.01)


def _diverged(lr: float) -> MeasureError:
    return MeasureError(
        f"Expected the loss on the curve to stay finite. It did not, at a learning rate of {lr:g}."
        " Take a smaller lr."
    )


def _notes(line: SegmentPath, curve: Path) -> tuple[str, ...]:
    ratio = curve.length() / line.length() if line.length() > 0 else 1.0
    return (f"The curve is {ratio:.3g} times as long as the segment.",)


def _check(
    kind: str, num_bends: int, epochs: int, lr: float, weight_decay: float, momentum: float
) -> None:
    if kind not in KINDS:
        raise SettingsError(f"Expected `kind` among {', '.join(KINDS)}. Got {kind!r}.")
    for name, count in (("num_bends", num_bends), ("epochs", epochs)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise SettingsError(
                f"Expected `{name}` to be a whole number of at least 1. Got {count!r}."
            )
    for name, number in (("lr", lr), ("weight_decay", weight_decay), ("momentum", momentum)):
        low = name == "lr" and number == 0
        if not (math.isfinite(number) and number >= 0) or low:
            raise SettingsError(
                f"Expected `{name}` to be finite and {'above' if name == 'lr' else 'at least'} 0."
                f" Got {number!r}."
            )
