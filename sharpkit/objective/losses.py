"""From a criterion with mean reduction to a sum of loss terms and their number."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpkit.errors import ObjectiveError
from sharpkit.objective import batches as trees

__all__ = ["BatchLoss", "CriterionLoss", "Terms"]

Terms: TypeAlias = tuple[Tensor, float]
"""The sum of the loss terms of a batch, and their (weighted) number."""

BatchLoss: TypeAlias = Callable[[nn.Module, Any], Any]

TARGET_KEYS = ("labels", "label", "targets", "target", "y")

_CLASS_INDEX = (nn.CrossEntropyLoss, nn.NLLLoss)
_PER_ELEMENT = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
    nn.KLDivLoss,
)
_PER_ELEMENT_FUNCTIONS = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.soft_margin_loss,
)


_FUNCTIONS = (F.cross_entropy, F.nll_loss, *_PER_ELEMENT_FUNCTIONS)


class CriterionLoss:
    """A criterion ``loss(outputs, targets)`` of mean reduction, as a batch loss.

    The number of loss terms of a batch is what the criterion divides by: targets that
    are not ignored, weighted by class where the criterion does so; elements for MSE and
    its like; otherwise the number of targets. Give ``num_terms(outputs, targets)`` for a
    criterion that divides by something else.
    """

    def __init__(
        self,
        criterion: Callable[[Any, Any], Tensor],
        num_terms: Callable[[Any, Any], float] | None = None,
    ):
        if not callable(criterion):
            raise ObjectiveError(
                "Expected `loss` to be a criterion such as torch.nn.CrossEntropyLoss()"
                f" or a function of (outputs, targets). Got {type(criterion).__name__}."
            )
        if isinstance(criterion, type):
            raise ObjectiveError(
                "Expected `loss` to be a criterion object. Got the class"
                f" {criterion.__name__}. Write {criterion.__name__}()."
            )
        reduction = getattr(criterion, "reduction", "mean")
        if reduction not in {"mean", "batchmean"}:
            raise ObjectiveError(
                "Expected a criterion with reduction='mean', as sharpkit measures the mean"
                f" loss per term. Got reduction={reduction!r}. Use reduction='mean', or"
                " Objective.from_batch_loss for another sum."
            )
        self.criterion = criterion
        self._num_terms = num_terms

    @property
    def counted_exactly(self) -> bool:
        """Whether the criterion is one of torch's own, of which the divisor is known."""
        known = type(self.criterion) in (*_CLASS_INDEX, *_PER_ELEMENT)
        return self._num_terms is None and (known or self.criterion in _FUNCTIONS)

    def to(self, device: torch.device, dtype: torch.dtype | None) -> CriterionLoss:
        """Return the same loss with a criterion of its own, its tensors moved and cast."""
        if not isinstance(self.criterion, nn.Module) or not self.criterion.state_dict():
            return self
        own = copy.deepcopy(self.criterion).to(device)
        return CriterionLoss(own.to(dtype) if dtype else own, self._num_terms)

    def __call__(self, model: nn.Module, batch: Any) -> Terms:
        """Return the sum and the number of the batch's loss terms."""
        inputs, targets = self.unpack(batch)
        outputs = self.outputs(model, inputs)
        return self.terms(outputs, targets)

    def terms(self, outputs: Any, targets: Any) -> Terms:
        """Return the sum and the number of loss terms of given outputs."""
        count = float((self._num_terms or self._count)(outputs, targets))
        if count == 0:  # every target is masked: the mean would be 0/0
            near = next((t for t in (outputs, targets) if isinstance(t, Tensor)), None)
            return torch.zeros((), device="cpu" if near is None else near.device), 0.0
        return self.criterion(outputs, targets) * count, count

    def stretch(self, outputs: Any, targets: Any) -> float:
        """Return how many loss terms count for one that the criterion divides by."""
        if self._num_terms is None:
            return 1.0
        usual = float(self._count(outputs, targets))
        return float(self._num_terms(outputs, targets)) / usual if usual else 1.0

    @staticmethod
    def unpack(batch: Any) -> tuple[Any, Any]:
        """Return ``(inputs, targets)`` of a pair, or of a mapping with a targets key."""
        if isinstance(batch, (Mapping, UserDict)):
            for key in TARGET_KEYS:
                if key in batch:
                    return {k: v for k, v in batch.items() if k != key}, batch[key]
            raise ObjectiveError(
                f"Expected a batch with one of the keys {', '.join(TARGET_KEYS)}. Got the"
                f" keys {', '.join(map(str, batch))}. Use Objective.from_batch_loss"
                " for other batches."
            )
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        what = (
            f"a {type(batch).__name__} of length {len(batch)}"
            if isinstance(batch, (tuple, list))
            else type(batch).__name__
        )
        raise ObjectiveError(
            f"Expected batches (inputs, targets). Got {what}. Use"
            " Objective.from_batch_loss(model, batch_loss, data) for other batches."
        )

    @staticmethod
    def outputs(model: nn.Module, inputs: Any) -> Any:
        """Call the model: a mapping by keywords, a tuple by position."""
        if isinstance(inputs, (Mapping, UserDict)):
            outputs = model(**inputs)
        elif isinstance(inputs, (tuple, list)):
            outputs = model(*inputs)
        else:
            outputs = model(inputs)
        if not isinstance(outputs, Tensor) and isinstance(getattr(outputs, "logits", None), Tensor):
            return outputs.logits
        return outputs

    def _count(self, outputs: Any, targets: Any) -> float:
        criterion = self.criterion
        if isinstance(criterion, _CLASS_INDEX) or criterion in (
            F.cross_entropy,
            F.nll_loss,
        ):
            return self._count_classes(outputs, targets)
        if isinstance(criterion, nn.KLDivLoss) and criterion.reduction == "batchmean":
            return outputs.shape[0]  # type: ignore[no-any-return]
        if isinstance(criterion, _PER_ELEMENT) or criterion in _PER_ELEMENT_FUNCTIONS:
            return outputs.numel()  # type: ignore[no-any-return]
        if isinstance(targets, Tensor):
            if not targets.is_floating_point() and targets.ndim > 0:
                return int((targets != -100).sum())
            return targets.shape[0] if targets.ndim > 0 else 1
        return trees.batch_size(targets) or 1

    def _count_classes(self, outputs: Tensor, targets: Tensor) -> float:
        if targets.is_floating_point():  # class probabilities: a mean over positions
            return targets.numel() / targets.shape[1 if targets.ndim > 1 else 0]
        ignored = getattr(self.criterion, "ignore_index", -100)
        valid = targets != ignored
        weight = getattr(self.criterion, "weight", None)
        if isinstance(weight, Tensor):
            return float(weight.to(targets.device)[targets[valid]].sum(dtype=torch.float64))
        del outputs  # the targets alone tell
        return int(valid.sum())
