"""Class labels: which of them the network's outputs meet, and by how much."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpkit.errors import MeasureError
from sharpkit.objective import batches as trees
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.losses import CriterionLoss
from sharpkit.objective.products import Named

__all__ = ["batch_margins", "has_labels", "label_margins"]

_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_OF_CLASSES_FUNCTIONS = (F.cross_entropy, F.nll_loss)
_OF_SIGNS = (nn.BCEWithLogitsLoss,)
_OF_SIGNS_FUNCTIONS = (F.binary_cross_entropy_with_logits,)

_WANTED = (
    "Expected a criterion of class labels: CrossEntropyLoss or NLLLoss with class indices, or"
    " BCEWithLogitsLoss with targets 0 and 1."
)


def has_labels(evaluator: Evaluator) -> bool:
    """Return whether the criterion is one of class labels, whatever its targets."""
    loss = evaluator.batch_loss
    if not isinstance(loss, CriterionLoss):
        return False
    known = isinstance(loss.criterion, (*_OF_CLASSES, *_OF_SIGNS))
    return known or loss.criterion in (*_OF_CLASSES_FUNCTIONS, *_OF_SIGNS_FUNCTIONS)


def label_margins(criterion: object, outputs: Tensor, targets: object) -> tuple[Tensor, Tensor]:
    r"""Return the margin of each label that counts, and the row of the outputs it is in.

    For class indices that is :math:`z_y - \max_{j \ne y} z_j`, the classes on axis 1 (0 of
    one example's vector), ignored labels left out; for a binary logit z or -z, which is the
    margin of the two logits (z, 0). A label is met where its margin is positive: ties and
    NaN are errors.

    Args:
        criterion: The criterion.
        outputs: Of the network.
        targets: The labels.

    Raises:
        MeasureError: If the targets are no class labels, or the criterion takes none.

    Example:
        >>> z, y = torch.tensor([[3.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0])
        >>> label_margins(nn.CrossEntropyLoss(), z, y)[0].tolist()
        [2.0, -2.0]
    """
    if not isinstance(targets, Tensor) or not isinstance(outputs, Tensor):
        raise MeasureError(f"{_WANTED} Got targets of type {type(targets).__name__}.")
    if isinstance(criterion, _OF_SIGNS) or criterion in _OF_SIGNS_FUNCTIONS:
        return _signed(outputs, targets)
    if isinstance(criterion, _OF_CLASSES) or criterion in _OF_CLASSES_FUNCTIONS:
        return _classes(criterion, outputs, targets)
    name = getattr(criterion, "__name__", type(criterion).__name__)
    raise MeasureError(f"{_WANTED} Got {name}.")


def _signed(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if targets.shape != outputs.shape or not bool(((targets == 0) | (targets == 1)).all()):
        raise MeasureError(
            "Expected targets 0 and 1 of the shape of the outputs, to tell right from wrong."
            " Got soft targets or another shape. Pass hard labels."
        )
    signs = 2 * targets.to(outputs.dtype) - 1
    return (signs * outputs).reshape(-1), _rows(outputs)


def _classes(criterion: object, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    axis = 1 if outputs.ndim > 1 else 0
    whole = outputs.ndim > 0 and targets.shape == outputs.select(axis, 0).shape
    if targets.is_floating_point() or not whole:
        raise MeasureError(
            "Expected class indices as targets, to tell right from wrong. Got class"
            f" probabilities or another shape, {tuple(targets.shape)} for outputs"
            f" {tuple(outputs.shape)}. Pass integer labels."
        )
    if outputs.shape[axis] < 2:
        raise MeasureError(
            "Expected outputs with two classes at least. Got one. Use BCEWithLogitsLoss for a"
            " single logit."
        )
    valid = targets != getattr(criterion, "ignore_index", -100)
    z = torch.movedim(outputs, axis, -1)[valid]
    own = targets[valid].unsqueeze(-1)
    here = z.gather(-1, own)
    rest = z.scatter(-1, own, -torch.inf).amax(dim=-1)
    margins = here.squeeze(-1) - rest
    return margins, _rows(targets)[valid.reshape(-1)]


def _rows(tensor: Tensor) -> Tensor:
    # The first index of each entry, in flat order; one example alone is row 0.
    if tensor.ndim == 0:
        return torch.zeros(1, dtype=torch.long, device=tensor.device)
    index = torch.arange(tensor.shape[0], device=tensor.device)
    return index.repeat_interleave(tensor[0].numel() if len(tensor) else 0)


def batch_margins(evaluator: Evaluator, theta: Named, batch: object) -> tuple[Tensor, Tensor, int]:
    """Return margins and rows of a batch, and its number of examples.

    Raises:
        MeasureError: For an objective made from a batch loss, and as for `label_margins`.
    """
    if not isinstance(evaluator.batch_loss, CriterionLoss):
        raise MeasureError(
            f"{_WANTED} Got a batch loss. Make the objective by Objective(model, criterion, data)."
        )
    outputs, targets = evaluator.outputs(theta, batch)
    margins, rows = label_margins(evaluator.batch_loss.criterion, outputs, targets)
    return margins, rows, trees.batch_size(batch) or 1
