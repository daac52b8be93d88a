"""ASAM: SAM in a ball that is measured by the size of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit.errors import SettingsError
from sharpkit.geometry import Scaling
from sharpkit.optim import _tensors as tensors
from sharpkit.optim._checks import at_least_zero, check_list
from sharpkit.optim._slots import Slot
from sharpkit.optim.sam import SAM

__all__ = ["ASAM"]


class ASAM(SAM):
    r"""Adaptive sharpness-aware minimization.

    .. math:: \delta = \rho\, T_w^2 g / \lVert T_w g \rVert_2 \quad (\ell_2), \qquad
        \delta = \rho\, T_w \operatorname{sign}(g) \quad (\ell_\infty)

    with :math:`T_w` the diagonal of the sizes of the weights plus :math:`\eta`: each entry's
    own, the norm of its filter (the slice along the first axis; entries of vectors their own),
    or the norm of its tensor.

    Invariance: with ``eta=0`` and all parameters scaled, exactly invariant to rescalings of
    entries (elementwise), filters or tensors that leave the function alone, and to a positive
    factor on the loss. ``eta > 0`` or ``unscaled`` parameters break the first. Not invariant
    to rotations. With ``eta=0`` entries that are exactly zero never move.

    Cost: 2 gradients a step, one copy of the perturbed weights.

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius, in units of the weights' size; 0.5 in the authors' code.
        eta: Added to every size; 0.01 in the authors' code.
        scaling: ``"elementwise"``, ``"filter"`` or ``"layer"``.
        norm: ``"l2"`` or ``"linf"``.
        unscaled: Parameters with :math:`T = 1`. The authors' code takes those whose name does
            not contain "weight".
        **options: As `SharpnessAware`.

    Raises:
        SettingsError: For settings that make no sense.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = ASAM(torch.optim.SGD([w], lr=0.0), rho=1.0, eta=0.0)
        >>> w.sum().backward()
        >>> opt.first_step()  # w + (9, 16) / 5
        True
        >>> w.detach()
        tensor([4.8000, 7.2000])

    Source: Kwon et al., ICML 2021, arXiv 2102.11600; the layerwise form from Mueller et al.,
    arXiv 2306.04226, whose code multiplies the layer's norm by :math:`1 + \eta` instead.
    """

    saved_settings = ("rho", "eta", "scaling", "norm")

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float = 0.5,
        eta: float = 0.01,
        scaling: Scaling = "elementwise",
        norm: Literal["l2", "linf"] = "l2",
        unscaled: Iterable[Tensor] = (),
        **options: Any,
    ) -> None:
        super().__init__(base_optimizer, rho=rho, norm=norm, **options)
        if scaling not in ("elementwise", "filter", "layer"):
            raise SettingsError(
                f'Expected `scaling` "elementwise", "filter" or "layer". Got {scaling!r}.'
            )
        self.eta = at_least_zero("eta", eta)
        self.scaling = scaling
        check_list("unscaled", unscaled)
        self.unscaled = list(unscaled)

    def _size(self, slot: Slot) -> Tensor:
        weights = slot.point
        size: Tensor
        if self.scaling == "layer":
            size = torch.linalg.vector_norm(slot.parameter.detach()).expand(weights.shape)
        elif self.scaling == "filter" and weights.ndim >= 2:
            rows = torch.linalg.vector_norm(weights.flatten(1), dim=1)
            size = rows.reshape(-1, *[1] * (weights.ndim - 1)).expand(weights.shape)
        else:
            return weights.abs().add_(self.eta)
        return size + self.eta

    def _perturbation(self, slots: Sequence[Slot]) -> list[Tensor] | tensors.Ray:
        plain = {id(parameter) for parameter in self.unscaled}
        sizes = [
            torch.ones_like(slot.gradient) if id(slot.parameter) in plain else self._size(slot)
            for slot in slots
        ]
        gradient = [slot.gradient for slot in slots]
        if self.norm == "linf":
            signs = list(map(torch.sign, gradient))
            return tensors.scale_(list(torch._foreach_mul(signs, sizes)), self.rho)
        scaled = list(torch._foreach_mul(sizes, gradient))
        length = tensors.norm(scaled)
        torch._foreach_mul_(scaled, sizes)
        return tensors.ray(scaled, length, self.rho)
