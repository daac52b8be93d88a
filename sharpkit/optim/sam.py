"""SAM: the gradient at the worst point of a ball, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit.errors import SettingsError
from sharpkit.optim import _tensors as tensors
from sharpkit.optim._slots import Slot
from sharpkit.optim.base import SharpnessAware

__all__ = ["SAM"]


class SAM(SharpnessAware):
    r"""Sharpness-aware minimization.

    .. math:: \delta = \rho\, g / \lVert g \rVert_2 \quad (\ell_2), \qquad
        \delta = \rho\, \operatorname{sign}(g) \quad (\ell_\infty), \qquad g = \nabla L(w)

    The norm is over all perturbed parameters. A zero gradient perturbs nothing; no constant is
    added to the norm.

    Invariance: orthogonal maps of the parameters (:math:`\ell_2`), a positive factor on the
    loss. Not layer rescalings that leave the network's function alone.

    Cost: 2 gradients a step, one copy of the perturbed weights during the second pass (on the CPU
    its memory stays for the next).

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius; 0.05 in the paper.
        norm: ``"l2"`` or ``"linf"``; a radius of the one means nothing for the other.
        **options: As `SharpnessAware`.

    Raises:
        SettingsError: For another norm, and as `SharpnessAware`.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
        >>> def closure():
        ...     loss = 0.5 * (w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure).item()
        12.5
        >>> w.detach()  # w - 0.1 (w + 0.5 w / 5)
        tensor([2.6700, 3.5600])

    Source: Foret et al., ICLR 2021, arXiv 2010.01412.
    """

    takes_sparse = True
    saved_settings: ClassVar[tuple[str, ...]] = ("rho", "norm")

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float = 0.05,
        norm: Literal["l2", "linf"] = "l2",
        **options: Any,
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **options)
        if norm not in ("l2", "linf"):
            raise SettingsError(f'Expected `norm` "l2" or "linf". Got {norm!r}.')
        self.norm = norm

    def _perturbation(self, slots: Sequence[Slot]) -> list[Tensor] | tensors.Ray:
        gradient = [slot.gradient for slot in slots]
        if self.norm == "linf":
            return tensors.scale(list(map(torch.sign, gradient)), self.rho)
        return tensors.ray(gradient, size=self.rho)
