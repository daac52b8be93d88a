"""Networks whose logits have a fixed size."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sharpkit.errors import ObjectiveError

__all__ = ["LogitNormalized"]

SMALLEST = 1e-10


class LogitNormalized(nn.Module):
    r"""A classifier whose logits are centred and divided by their length.

    .. math:: z \mapsto \frac{z - \bar z}{\max(\|z - \bar z\|_2, 10^{-10})}

    The cross-entropy of a network can be made as small or as sharp as one likes by scaling
    its logits; this takes the scale out, as Andriushchenko et al. 2023 (arXiv:2302.07011) do
    before they compare networks. It is another loss: the smallest cross-entropy of
    normalised logits is far from zero. Parameters are called ``model.`` and their old name.

    Args:
        model: Maps inputs to logits, or to an object with the attribute ``logits``.
        dim: The axis of the classes: the last, or 1 for outputs ``[N, C, T]``.

    Example:
        >>> import torch
        >>> wrapped = LogitNormalized(nn.Identity())
        >>> wrapped(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]))
        tensor([[-0.7071,  0.0000,  0.7071],
                [-0.7071,  0.0000,  0.7071]])
    """

    def __init__(self, model: nn.Module, dim: int = -1):
        super().__init__()
        self.model, self.dim = model, dim
        self.training = model.training

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Return the normalised logits of the inputs."""
        logits = self.model(*inputs, **named)
        logits = getattr(logits, "logits", logits)
        if not isinstance(logits, Tensor):
            raise ObjectiveError(
                "Expected a model that returns logits, or an object with `logits`. Got"
                f" {type(logits).__name__}."
            )
        centred = logits - logits.mean(dim=self.dim, keepdim=True)
        length = centred.norm(dim=self.dim, keepdim=True)
        normalised: Tensor = centred / length.clamp(min=SMALLEST)
        return normalised
