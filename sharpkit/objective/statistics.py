"""BatchNorm's running statistics at other parameters than those they were gathered at."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sharpkit.errors import ObjectiveError
from sharpkit.objective import batches as trees
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.objective import Objective
from sharpkit.objective.products import Named
from sharpkit.objective.states import state_of, with_state

__all__ = ["has_running_statistics", "reestimated", "running_statistics"]

_Norm = nn.modules.batchnorm._BatchNorm
KEPT = ("running_mean", "running_var")


def has_running_statistics(model: nn.Module) -> bool:
    """Return whether a network has BatchNorm layers that keep running statistics."""
    return any(_keeps(module) for module in model.modules())


def _keeps(module: nn.Module) -> bool:
    return isinstance(module, _Norm) and module.running_mean is not None


def reestimated(objective: Objective) -> Objective:
    r"""Return the same objective with BatchNorm statistics gathered at its own parameters.

    .. math::
        \mu = \sum_b \tfrac{n_b}{N}\,\mu_b, \qquad \sigma^2 = \sum_b \tfrac{n_b}{N}\,\sigma_b^2

    over the batches of the objective's data, from one pass in which BatchNorm layers normalise
    by their batch, as in training, and all other layers are in evaluation mode (what
    ``torch.optim.swa_utils.update_bn`` does, with batches weighted by their examples n_b). A
    layer that is called several times in a batch gets the mean of the calls, and one that is
    not called in some batches the statistics of the others; what is never called keeps its own.
    They depend on how the data are batched. The user's module keeps its own.

    Args:
        objective: The model, loss, data and theta.

    Raises:
        ObjectiveError: If there is no such layer, one has momentum 0 or was told not to track,
            or a batch has one value for a channel.

    Cost: a forward pass.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)).eval()
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> objective = Objective(model, nn.MSELoss(), (x, x))
        >>> reestimated(objective)._evaluator.buffers["0.running_mean"]
        tensor([2.])
    """
    if not has_running_statistics(objective.model):
        raise ObjectiveError(
            "Expected a network with BatchNorm layers that keep running statistics. This one has"
            " none, so there is nothing to re-estimate."
        )
    found = running_statistics(objective._evaluator, objective._leaves)
    objective._shared.forwards += 1
    return with_state(objective, {**state_of(objective), **found})


@torch.inference_mode(False)
def running_statistics(evaluator: Evaluator, theta: Named) -> dict[str, Tensor]:
    """Return all buffers, with running statistics gathered at these parameters.

    Args:
        evaluator: The model and the data.
        theta: The parameters that vary.

    Raises:
        ObjectiveError: As for :func:`reestimated`.
    """
    norms = {name: m for name, m in evaluator.model.named_modules() if _keeps(m)}
    names = [f"{name}.{kept}" for name in norms for kept in KEPT]
    for name, module in norms.items():
        if module.momentum == 0:
            raise ObjectiveError(
                f"Expected BatchNorm layers with a momentum. {name!r} has 0, so that its"
                " statistics never change. Keep them as they are."
            )
        if not module.track_running_stats:
            raise ObjectiveError(
                "Expected BatchNorm layers that track running statistics. Of"
                f" {name!r} track_running_stats is off, so that its statistics never change. Keep"
                " them as they are."
            )
    other = copy.copy(evaluator)
    among = set(norms.values())
    other._entered = False  # other flags than the surroundings have
    other._flags = {module: module in among for module in evaluator.model.modules()}
    state = {**evaluator.fixed, **evaluator.buffers, **theta}
    sums = {name: torch.zeros_like(evaluator.buffers[name], dtype=torch.float64) for name in names}
    weights = torch.zeros(len(norms), dtype=torch.float64)

    def one(batch: Any) -> tuple[Named, int]:
        fresh = {n: b.clone() for n, b in evaluator.buffers.items()}
        for name in names:
            fresh[name].zero_()
        for name in norms:
            fresh[f"{name}.num_batches_tracked"].zero_()
        named = {f"model.{n}": t for n, t in {**state, **fresh}.items()}
        try:
            with _averaging(norms.values()):
                functional_call(
                    evaluator._bound, named, (lambda model: evaluator.batch_loss(model, batch),)
                )
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ObjectiveError(
                "Expected batches with more than one value for each channel, to re-estimate"
                f" BatchNorm's statistics. {error}. Use larger batches, or keep the statistics."
            ) from error
        return fresh, trees.batch_size(batch) or 1

    def add(result: tuple[Named, int]) -> None:
        fresh, count = result
        for i, name in enumerate(norms):
            if not int(fresh[f"{name}.num_batches_tracked"]):
                continue  # not called on this batch
            weights[i] += count
            for kept in KEPT:
                sums[f"{name}.{kept}"].add_(fresh[f"{name}.{kept}"].double(), alpha=count)

    def work() -> list[Tensor]:
        other.each(one, add, grad=False)
        return [weights, *sums.values()]

    team = evaluator.team
    if team.shares_data:
        shapes = [
            ((len(norms),), torch.float64),
            *((tuple(s.shape), torch.float64) for s in sums.values()),
        ]
        total = team.sum(work, shapes, other.device, same=list(theta.values()))
    else:
        total = work()
    known = dict(zip(norms, total[0].tolist(), strict=True))
    means = {
        n: s / known[n.rpartition(".")[0]]
        for n, s in zip(names, total[1:], strict=True)
        if known[n.rpartition(".")[0]]
    }
    return {n: means[n].to(b.dtype) if n in means else b for n, b in evaluator.buffers.items()}


@contextlib.contextmanager
def _averaging(norms: Iterable[Any]) -> Iterator[None]:
    # Without a momentum a layer keeps the mean of its calls, from zero exactly.
    before: list[tuple[Any, float | None]] = [(m, m.momentum) for m in norms]
    try:
        for module, _ in before:
            module.momentum = None
        yield
    finally:
        for module, momentum in before:
            module.momentum = momentum
