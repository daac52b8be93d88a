"""SAF: stay near the outputs of some epochs ago, at the cost of plain training."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.optim._distillation import TrajectoryLoss, whole

__all__ = ["SAFLoss"]


class SAFLoss(TrajectoryLoss):
    r"""The trajectory loss of sharpness-aware training for free, added to the loss.

    .. math:: \lambda\,\tau^2\, \frac1{|B|} \sum_{i \in B} \operatorname{KL}\bigl(
        \operatorname{softmax}(z_i^{(e - \tilde E)} / \tau) \,\big\Vert\,
        \operatorname{softmax}(z_i / \tau)\bigr)

    with :math:`z_i` the logits of example i now and :math:`z_i^{(e - \tilde E)}` those recorded
    :math:`\tilde E` epochs ago. It is zero before ``start_epoch``. The paper's equation has no
    :math:`\tau^2`; the authors' code, with which the default weight was found, does
    (``squared``).

    A loss term, not an optimizer: it goes with any. The data must give the number of each
    example. Logits are recorded whenever the module is in training mode, with whatever
    augmentation and dropout the epoch had; an example without a record of the right epoch is
    left out of the mean. A second pass in the same epoch records over the first, so do not put
    it under a closure of a two-pass optimizer.

    Invariance: whatever leaves the logits alone, since it sees nothing else.

    Cost: no gradient beyond the one of training. Memory :math:`N (\tilde E + 1) C` entries,
    in ``state_dict`` too (57 MB for CIFAR, 14.6 GB for ImageNet in the paper). Under
    DistributedDataParallel every rank records its own examples: the records are right only if
    an example stays on its rank.

    Args:
        num_examples: N, of the training data.
        num_classes: C.
        weight: :math:`\lambda`; 0.3 in the paper.
        temperature: :math:`\tau`; 5 in the paper.
        epochs_back: :math:`\tilde E`; 3 in the paper.
        start_epoch: Plain training before it; 5 in the paper.
        squared: Multiply by :math:`\tau^2`.
        dtype: Of the records; half precision halves the memory.

    Raises:
        SettingsError: For settings that make no sense, and for logits that are not
            ``[B, C]`` or numbers of examples that do not fit.

    Example:
        >>> term = SAFLoss(num_examples=4, num_classes=2, epochs_back=1, start_epoch=1)
        >>> logits, number = torch.tensor([[2.0, -1.0]]), torch.tensor([3])
        >>> term(logits, number).item()  # recorded
        0.0
        >>> term.set_epoch(1)
        >>> round(term(-logits, number).item(), 4)
        1.3109

    Source: Du et al., NeurIPS 2022, arXiv 2205.14083, equation 8.
    """

    logits: Tensor
    recorded: Tensor

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        *,
        weight: float = 0.3,
        temperature: float = 5.0,
        epochs_back: int = 3,
        start_epoch: int = 5,
        squared: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            weight=weight, temperature=temperature, start_epoch=start_epoch, squared=squared
        )
        self.num_examples = whole("num_examples", num_examples, 1)
        self.num_classes = whole("num_classes", num_classes, 2)
        self.epochs_back = whole("epochs_back", epochs_back, 1)
        # One slot more than epochs back: this epoch's records never meet those being read.
        slots = self.epochs_back + 1
        self.register_buffer("logits", torch.zeros(num_examples, slots, num_classes, dtype=dtype))
        self.register_buffer("recorded", torch.full((num_examples, slots), -1, dtype=torch.int32))

    def forward(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Return the term, a scalar, and record the logits.

        Args:
            logits: ``[B, C]``, of this pass.
            indices: The numbers of the examples, ``[B]``, from 0 below N.
        """
        if (
            logits.ndim != 2
            or logits.shape[1] != self.num_classes
            or indices.shape != logits.shape[:1]
        ):
            raise SettingsError(
                f"Expected logits [B, {self.num_classes}] and numbers [B]. Got"
                f" {list(logits.shape)} and {list(indices.shape)}."
            )
        if not self.training:
            return logits.new_zeros(())
        rows = indices.to(self.logits.device)
        slots = self.epochs_back + 1
        term = logits.new_zeros((), dtype=torch.promote_types(torch.float32, logits.dtype))
        then = self.epoch - self.epochs_back
        if self.active and then >= 0:
            known = (self.recorded[rows, then % slots] == then).to(logits.device)
            each = self.divergences(self.logits[rows, then % slots].to(logits.device), logits)
            term = torch.where(known, each, 0).sum() / known.sum().clamp(min=1)
        self.logits[rows, self.epoch % slots] = logits.detach().to(self.logits)
        self.recorded[rows, self.epoch % slots] = self.epoch
        return term
