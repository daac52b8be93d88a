"""LookSAM: the second pass every few steps; what it taught is used in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit.optim import _tensors as tensors
from sharpkit.optim._checks import at_least_one, at_least_zero
from sharpkit.optim.sam import SAM

__all__ = ["LookSAM"]


class LookSAM(SAM):
    r"""SAM whose second pass is made every k-th step.

    .. math::
        \text{every k-th step: } & g_s = \nabla L(w + \rho\, g / \lVert g \rVert), \quad
            g_v = g_s - \frac{g_s^\top g}{\lVert g \rVert^2}\, g, \quad
            w \leftarrow \operatorname{Base}(w, g_s) \\
        \text{else: } & w \leftarrow \operatorname{Base}\Bigl(w,\
            g + \alpha \frac{\lVert g \rVert}{\lVert g_v \rVert}\, g_v\Bigr)

    Norms and products are over the whole parameter vector; some implementations take them per
    tensor. A second pass that GradScaler skips is made at the next step instead.

    Invariance: as SAM.

    Cost: :math:`1 + 1/k` gradients a step; one vector of the size of the weights is kept, also
    in ``state_dict``.

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius; 0.1, from a public implementation.
        every: k; 5 as SAF's authors quote the paper.
        alpha: The weight of the kept direction; 0.7, from a public implementation.
        **options: As `SAM`.

    Raises:
        SettingsError: For settings that make no sense.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = LookSAM(torch.optim.SGD([w], lr=0.1), every=3)
        >>> calls = []
        >>> def closure():
        ...     calls.append(0)
        ...     (w**2).sum().backward()
        >>> for _ in range(6):
        ...     opt.step(closure)
        >>> len(calls)  # 6 + 2
        8

    Source: Liu et al., CVPR 2022, arXiv 2203.02714.
    """

    takes_sparse = False
    uses_first_gradient = True
    saved_settings = ("rho", "norm", "every", "alpha")

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float = 0.1,
        every: int = 5,
        alpha: float = 0.7,
        **options: Any,
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **options)
        self.every = at_least_one("every", every)
        self.alpha = at_least_zero("alpha", alpha)
        self._since = 0

    def _wants_second_pass(self) -> bool:
        return self._since % self.every == 0

    def _descent(
        self, point: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        along = tensors.unit(first)
        across = tensors.scale_(along, -tensors.dot(second, along))
        torch._foreach_add_(across, list(second))
        self._staged["direction"] = dict(zip(point, tensors.unit(across), strict=True))
        return second

    def _one_pass_done(self) -> None:
        direction = self.memory.get("direction", {})
        pairs = [(p, p.grad) for p in self.parameters() if p.grad is not None]
        if not pairs:
            return
        self._slots()  # refuses sparse gradients
        length = tensors.norm([gradient for _, gradient in pairs])
        for parameter, gradient in pairs:
            if parameter in direction:
                factor = (self.alpha * length).to(gradient)
                parameter.grad = gradient + (factor * direction[parameter]).to(gradient)

    def _after_step(self) -> None:
        self._since = 1 if self._looked_twice else self._since + 1

    def _more_state(self) -> dict[str, Any]:
        return {"since": self._since}

    def _load_more_state(self, state: dict[str, Any]) -> None:
        self._since = state["since"]
