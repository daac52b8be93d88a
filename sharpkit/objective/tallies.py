"""Loss and metrics of one forward pass, by groups of the data, at many parameters."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpkit.errors import ObjectiveError, SettingsError
from sharpkit.objective import batches as trees
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.groups import group_error
from sharpkit.objective.labels import has_labels, label_margins
from sharpkit.objective.losses import CriterionLoss
from sharpkit.objective.objective import Objective
from sharpkit.objective.products import Named
from sharpkit.objective.statistics import has_running_statistics, running_statistics

__all__ = ["BatchNormMode", "Metric", "Tallies", "Tally"]

Metric: TypeAlias = Callable[[Any, Any], Tensor]
"""``(outputs, targets)`` to one value an example (or position), or to the mean of a batch."""

BatchNormMode: TypeAlias = str
"""``"keep"`` the running statistics, or ``"reestimate"`` them at every point."""

HELD = 2**20  # numbers of outputs that are kept before they are made use of
_ROWS: tuple[type[nn.Module], ...] = (
    nn.CrossEntropyLoss,
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCEWithLogitsLoss,
    nn.BCELoss,
    nn.SoftMarginLoss,
)  # never negative, but for targets that are no probabilities
_ROW_FUNCTIONS = (
    F.cross_entropy,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
    F.soft_margin_loss,
)


@dataclass(frozen=True)
class Tally:
    """Sums over the data at one point.

    Attributes:
        sums: Of each value over each group, ``[M, G]``.
        counts: What they are divided by, ``[M, G]``.
        complete: Whether all data were seen; otherwise the loss is above the limit.
    """

    sums: Tensor
    counts: Tensor
    complete: bool = True

    @property
    def means(self) -> Tensor:
        """The values, ``[M]`` (NaN without a term)."""
        return self.sums.sum(1) / self.counts.sum(1)

    def errors(self, start: Tally | None = None) -> Tensor:
        """Return one standard error of each value from the data being a sample, ``[M]``.

        Args:
            start: Of the difference from this tally of the same groups; None: of the value.

        Returns:
            NaN where fewer than four groups have terms.
        """
        sums = self.sums if start is None else self.sums - start.sums
        found = []
        for row, counts in zip(sums, self.counts, strict=True):
            total = counts.sum()
            known = group_error(row / total, counts / total) if float(total) > 0 else None
            found.append(math.nan if known is None else known[0])
        return torch.tensor(found, dtype=torch.float64)


class Tallies:
    r"""Evaluate the loss and metrics at many parameters, one forward pass each.

    Values are :math:`\sum_g s_g / \sum_g c_g` over groups g of the examples: the same groups
    at every point, so that differences between points have errors of their own. With fewer
    batches than groups the examples of each are dealt out at random, so that data sorted by class
    are not taken for a stratified sample; otherwise whole batches are, at random too.

    Args:
        objective: The model, loss and data.
        metrics: By name; ``"accuracy"`` may be given as None: the share of labels that are met.
        num_groups: G; 1: no errors.
        batch_norm: Keep BatchNorm's running statistics, or re-estimate them at every point
            (another pass).

    Attributes:
        names: ``"loss"``, then the metrics.
        reestimates: Whether running statistics are re-estimated: never without BatchNorm.

    Raises:
        SettingsError: If a setting is unknown, or accuracy is asked of an objective without
            class labels.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> x, y = torch.tensor([[1.0], [-2.0]]), torch.tensor([0, 0])
        >>> objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
        >>> tallies = Tallies(objective, {"accuracy": None})
        >>> tally = tallies(objective.theta)
        >>> dict(zip(tallies.names, [round(v, 3) for v in tally.means.tolist()]))
        {'loss': 2.073, 'accuracy': 0.5}
    """

    def __init__(
        self,
        objective: Objective,
        metrics: Mapping[str, Metric | None] | None = None,
        *,
        num_groups: int = 8,
        batch_norm: BatchNormMode = "keep",
    ):
        metrics = dict(metrics or {})
        if batch_norm not in ("keep", "reestimate"):
            raise SettingsError(
                f"Expected `batch_norm` to be 'keep' or 'reestimate'. Got {batch_norm!r}."
            )
        if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < 1:
            raise SettingsError(f"Expected at least 1 group of the data. Got {num_groups!r}.")
        self._objective, self._evaluator = objective, copy.copy(objective._evaluator)
        self._evaluator.fused = True  # nothing is differentiated here
        loss = self._evaluator.batch_loss
        if metrics and not isinstance(loss, CriterionLoss):
            raise SettingsError(
                "Expected an objective made from a criterion, whose outputs metrics can see. Got a"
                " batch loss. Leave out the metrics, or use Objective(model, loss, data)."
            )
        counts_labels = "accuracy" in metrics and metrics["accuracy"] is None
        if counts_labels and not has_labels(self._evaluator):
            raise SettingsError(
                "Expected a criterion of class labels, to count accuracy. Got"
                f" {_name(loss)}. Give a function as metrics={{'accuracy': ...}}."
            )
        for name, metric in metrics.items():
            if name == "accuracy" and metric is None:
                continue
            if not callable(metric) or name == "loss":
                raise SettingsError(
                    f"Expected metrics as functions of (outputs, targets), none of them called"
                    f" 'loss'. Got {name!r}: {type(metric).__name__}."
                )
        self.names = ("loss", *metrics)
        self.reestimates = batch_norm == "reestimate" and has_running_statistics(objective.model)
        self.num_groups = num_groups
        self._metrics: list[Any] = list(metrics.values())
        self._deal_rows = self._evaluator.additive and self._evaluator.num_batches < num_groups
        self._number = {key: i for i, key in enumerate(self._evaluator.order)}
        generator = torch.Generator().manual_seed(trees.DEAL)
        self._order = torch.randperm(len(self._number), generator=generator).tolist()
        self._counts: Tensor | None = None
        self._row_loss = _row_loss(loss)
        self._never_negative = True  # until a target says otherwise
        self._dealt: dict[int, Tensor] = {}

    def many(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which many calls cost less than one by one."""
        return self._evaluator.many_passes()

    def statistics(self, theta: Tensor) -> Named | None:
        """Return the buffers to evaluate with at theta, re-estimated on these data.

        Args:
            theta: The parameters.

        Returns:
            None where the running statistics are kept.
        """
        if not self.reestimates:
            return None
        self._objective._shared.forwards += 1
        return running_statistics(self._evaluator, self._leaves(theta))

    def __call__(
        self, theta: Tensor, *, above: float | None = None, buffers: Named | None = None
    ) -> Tally:
        """Return the sums at theta ``[P]``; ends early once the loss must be above a limit.

        Args:
            theta: The parameters.
            above: The limit; used where no term of the loss can be negative.
            buffers: To evaluate with, from :meth:`statistics` of these or other data; None:
                the objective's, or re-estimated here.
        """
        self._objective._shared.forwards += 1
        if buffers is None:
            buffers = self.statistics(theta)
        evaluator = self._evaluator
        if buffers is not None:
            evaluator = copy.copy(evaluator)
            evaluator.set_buffers(buffers)
        return self._tally(evaluator, self._leaves(theta), above)

    def _leaves(self, theta: Tensor) -> Named:
        objective = self._objective
        parts = objective.space.unflatten(theta.detach())
        with torch.inference_mode(False), torch.no_grad():
            return {n: t.to(objective._leaves[n].dtype) for n, t in parts.items()}

    @torch.inference_mode(False)
    def _tally(self, evaluator: Evaluator, leaves: Named, above: float | None) -> Tally:
        limit = None
        if above is not None and self._ends_early and not evaluator.team.shares_data:
            limit = above * evaluator.num_terms
            limit += 1e-12 * abs(limit)  # what is equal but for rounding is not above
        run = _Pass(self, evaluator, counting=self._counts is None, limit=limit)

        def work() -> list[Tensor]:
            evaluator.bound(leaves, run)  # once for the pass
            return [run.found]

        found = run.found
        if evaluator.team.shares_data:
            (found,) = evaluator.team.sum(
                work,
                [(tuple(found.shape), found.dtype)],
                torch.device("cpu"),
                same=list(leaves.values()),
            )
        else:
            work()
        if run.counting and run.complete:
            self._counts = found[1]
        counts = self._counts if self._counts is not None else found[1]
        return Tally(found[0], counts, run.complete)

    @property
    def _ends_early(self) -> bool:
        # The targets must have been seen: beyond [0, 1] they make terms negative.
        return self._row_loss is not None and self._counts is not None and self._never_negative

    def _groups(self, number: int, start: int, size: int) -> Tensor:
        # The group of each of some examples of a batch.
        if not self._deal_rows:
            return torch.full((size,), self._order[number] % self.num_groups)
        rank, batch = self._evaluator.order[number]
        total = max(self._evaluator.sizes[rank][batch] or 1, start + size)
        dealt = self._dealt.get(number)
        if dealt is None or len(dealt) < total:
            generator = torch.Generator().manual_seed(number)
            dealt = torch.randperm(total, generator=generator) % self.num_groups
            self._dealt[number] = dealt
        return dealt[start : start + size]


class _Pass:
    # One pass over the data: outputs are collected, and what is wanted of many is computed at
    # once, as a call of its own for each batch takes longer than a small network.
    def __init__(
        self, tallies: Tallies, evaluator: Evaluator, *, counting: bool, limit: float | None
    ):
        self.tallies, self.evaluator = tallies, evaluator
        self.counting, self.limit = counting, limit
        self.complete = True
        # Sums, then what they are divided by: it does not depend on theta, so it is counted once.
        self.found = torch.zeros(2, len(tallies.names), tallies.num_groups, dtype=torch.float64)
        self._seen: dict[int, int] = {}  # examples of each batch so far: a pass may cut them
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []
        self._rows = 0

    def __call__(self, model: nn.Module) -> None:
        loss = self.evaluator.batch_loss
        if isinstance(loss, CriterionLoss):
            self.evaluator.each(lambda batch: self._outputs(model, loss, batch), self._take,
                                grad=False)  # fmt: skip
            self._flush(loss)
        else:
            self.evaluator.each(lambda batch: self._sums(model, loss, batch), self._deal,
                                grad=False)  # fmt: skip

    def _place(self, size: int, *, taken: bool = True) -> Tensor:
        # The groups of the next examples of the batch at hand.
        team = self.evaluator.team
        rank = team.rank if team.shares_data else 0
        number = self.tallies._number[(rank, self.evaluator.at_batch)]
        start = self._seen.get(number, 0)
        if taken:
            self._seen[number] = start + size
        return self.tallies._groups(number, start, size)

    # -- batch losses: sums of pieces --

    def _sums(self, model: nn.Module, loss: Any, batch: Any) -> tuple[Tensor, Tensor, int]:
        size = trees.batch_size(batch) or 1
        groups = self._place(size, taken=False)
        found = sorted(set(groups.tolist()))
        pieces = [batch]
        if len(found) > 1:
            rows = [(groups == g).nonzero()[:, 0] for g in found]
            pieces = [trees.taken(batch, r, self.evaluator.shared) for r in rows]
        each = [loss(model, piece) for piece in pieces]
        sums = torch.stack([s.detach().reshape(()).cpu().double() for s, _ in each])
        return sums, torch.tensor([float(c) for _, c in each], dtype=torch.float64), size

    def _deal(self, result: tuple[Tensor, Tensor, int]) -> None:
        sums, terms, size = result
        groups = torch.tensor(sorted(set(self._place(size).tolist())))
        self._add(0, groups, sums, terms)

    # -- criteria --

    def _outputs(self, model: nn.Module, loss: CriterionLoss, batch: Any) -> tuple[Any, Any, int]:
        inputs, targets = loss.unpack(batch)
        return loss.outputs(model, inputs), targets, trees.batch_size(batch) or 1

    def _take(self, result: tuple[Any, Any, int]) -> bool:
        outputs, targets, size = result
        tallies, loss = self.tallies, self.evaluator.batch_loss
        assert isinstance(loss, CriterionLoss)
        groups = self._place(size)
        for m, metric in enumerate(tallies._metrics, start=1):
            if metric is not None:
                values, rows = _metric_rows(metric(outputs, targets), size)
                self._add(m, groups[rows], values)
        if not _by_row(outputs, targets, size):
            self._whole(loss, outputs, targets, groups)
            return False
        self._held.append((outputs, targets, groups))
        self._rows += outputs.numel()
        return self._rows >= HELD and self._flush(loss)

    def _whole(self, loss: CriterionLoss, outputs: Any, targets: Any, groups: Tensor) -> None:
        # Outputs that have no row for each example: the batch is in one group.
        total, count = loss.terms(outputs, targets)
        terms = torch.tensor([count], dtype=torch.float64)
        self._add(0, groups[:1], total.detach().reshape(1).cpu().double(), terms)
        for m, metric in enumerate(self.tallies._metrics, start=1):
            if metric is None:
                margins, _ = label_margins(loss.criterion, outputs, targets)
                self._add(m, groups[:1].expand(len(margins)), (margins > 0).cpu().double())

    def _flush(self, loss: CriterionLoss) -> bool:
        # What is wanted of the outputs that are held; True once the loss must be above the limit.
        if not self._held:
            return False
        row_loss = self.tallies._row_loss
        # A loss that is no sum over examples is asked of each batch as it came.
        joined = row_loss is not None or self.evaluator.additive
        outputs, targets, groups = _together(self._held, joined)
        self._held, self._rows = [], 0
        for o, t, g in zip(outputs, targets, groups, strict=True):
            if row_loss is not None:
                terms = _terms_by_row(loss, o, t) if self.counting else None
                if self.counting and _may_be_negative(loss.criterion, t):
                    self.tallies._never_negative = False
                self._add(0, g, row_loss(o, t).cpu(), terms)
            else:
                self._slices(loss, o, t, g)
            for m, metric in enumerate(self.tallies._metrics, start=1):
                if metric is None:
                    self._add(m, *_hits(loss.criterion, o, t, g))
        if self.limit is not None:
            self.complete = not float(self.found[0, 0].sum()) > self.limit
        return not self.complete

    def _slices(
        self, loss: CriterionLoss, outputs: Tensor, targets: Tensor, groups: Tensor
    ) -> None:
        # A criterion whose terms are not known by row: on the rows of each group.
        for group in sorted(set(groups.tolist())):
            rows = (groups == group).to(outputs.device)
            total, count = loss.terms(outputs[rows], targets[rows])
            terms = torch.tensor([count], dtype=torch.float64)
            sums = total.detach().reshape(1).cpu().double()
            self._add(0, torch.tensor([group]), sums, terms)

    def _add(self, m: int, groups: Tensor, values: Tensor, terms: Tensor | None = None) -> None:
        self.found[0, m].index_add_(0, groups, values.double())
        if self.counting:
            ones = torch.ones_like(values, dtype=torch.float64) if terms is None else terms
            self.found[1, m].index_add_(0, groups, ones)


def _together(
    held: list[tuple[Tensor, Tensor, Tensor]], joined: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    # One block where all rows are of one shape, otherwise as they came.
    shapes = {(o.shape[1:], t.shape[1:]) for o, t, _ in held}
    if len(held) == 1 or len(shapes) > 1 or not joined:
        outputs, targets, groups = zip(*held, strict=True)
        return list(outputs), list(targets), list(groups)
    return tuple([torch.cat(parts)] for parts in zip(*held, strict=True))  # type: ignore[return-value]


def _hits(
    criterion: Any, outputs: Tensor, targets: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    hits = _class_hits(criterion, outputs, targets)
    if hits is not None:
        return groups, hits.cpu()
    margins, rows = label_margins(criterion, outputs, targets)
    return groups[rows.cpu()], (margins > 0).cpu()


def _class_hits(criterion: Any, outputs: Any, targets: Any) -> Tensor | None:
    # The usual case of label_margins, without the margins: all other logits are smaller.
    if not (isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)) and _plain(outputs, targets)):
        return None
    ignored = (targets < 0) | (targets == criterion.ignore_index)
    if outputs.shape[1] < 2 or bool(ignored.any()):
        return None
    own = outputs.gather(1, targets[:, None])
    hits: Tensor = (outputs < own).sum(1) == outputs.shape[1] - 1
    return hits


def _plain(outputs: Any, targets: Any) -> bool:
    tensors = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    return tensors and outputs.ndim == 2 and targets.ndim == 1 and not targets.is_floating_point()


def _metric_rows(value: Any, size: int) -> tuple[Tensor, Tensor]:
    # Values, and the example that each belongs to; a mean over the batch is that of its first.
    if not isinstance(value, Tensor):
        value = torch.as_tensor(float(value))
    value = value.detach().cpu().double()
    if value.ndim and value.shape[0] == size:
        flat = value.reshape(size, -1)
        return flat.reshape(-1), torch.arange(size).repeat_interleave(flat.shape[1])
    if value.numel() != 1:
        raise ObjectiveError(
            f"Expected a metric to return one value an example ({size} here) or the mean of the"
            f" batch. Got shape {tuple(value.shape)}."
        )
    return value.reshape(1).expand(size), torch.zeros(size, dtype=torch.int64)


def _by_row(outputs: Any, targets: Any, size: int) -> bool:
    return all(isinstance(t, Tensor) and t.ndim and t.shape[0] == size for t in (outputs, targets))


def _name(loss: Any) -> str:
    criterion = getattr(loss, "criterion", loss)
    return getattr(criterion, "__name__", type(criterion).__name__)


def _row_loss(loss: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    # The terms of each row in one call, for torch's own criteria that are never negative.
    if not (isinstance(loss, CriterionLoss) and loss.counted_exactly):
        return None
    criterion: Any = loss.criterion
    if type(criterion) in _ROWS:
        criterion = copy.copy(criterion)
        criterion.reduction = "none"
    elif criterion in _ROW_FUNCTIONS:
        function = criterion

        def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
            terms: Tensor = function(outputs, targets, reduction="none")
            return terms
    else:
        return None

    def rows(outputs: Tensor, targets: Tensor) -> Tensor:
        terms: Tensor = criterion(outputs, targets)
        return terms.detach().reshape(len(outputs), -1).sum(1, dtype=torch.float64)

    return rows


def _may_be_negative(criterion: object, targets: Tensor) -> bool:
    # Cross-entropies of targets that are no probabilities.
    binary = isinstance(criterion, nn.BCEWithLogitsLoss)
    binary |= criterion is F.binary_cross_entropy_with_logits
    if binary:
        return not bool(((targets >= 0) & (targets <= 1)).all())
    return (
        targets.is_floating_point() and _is_cross_entropy(criterion) and bool((targets < 0).any())
    )


def _is_cross_entropy(criterion: object) -> bool:
    return isinstance(criterion, nn.CrossEntropyLoss) or criterion is F.cross_entropy


def _terms_by_row(loss: CriterionLoss, outputs: Tensor, targets: Tensor) -> Tensor:
    # What each row adds to the divisor.
    counts = [loss._count(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(outputs))]
    return torch.tensor(counts, dtype=torch.float64)
