"""ESAM: some tensors perturbed, some examples looked at again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit.errors import SettingsError
from sharpkit.optim import _tensors as tensors
from sharpkit.optim._checks import fraction
from sharpkit.optim._slots import Slot
from sharpkit.optim.base import SharpnessAware

__all__ = ["ESAM"]


class ESAM(SharpnessAware):
    r"""Efficient sharpness-aware minimization.

    .. math:: \delta_j = \frac{z_j}{\beta}\, \rho\, \frac{g_j}{\lVert g \rVert}, \quad
        z_j \sim \operatorname{Bernoulli}(\beta) \text{ per tensor } j, \qquad
        w \leftarrow \operatorname{Base}\Bigl(w,\ \nabla \frac{1}{|K|} \sum_{i \in K}
        \ell_i(w + \delta)\Bigr)

    with K the :math:`\lfloor \gamma n \rfloor` examples (at least one) whose loss
    :math:`\ell_i(w + \delta) - \ell_i(w)` rises most. The norm is over all tensors, so that
    the expectation over z is SAM's perturbation; the authors' code takes it over the drawn
    ones.

    The closure is another one than usual: ``closure(subset)`` returns the losses of the
    examples, one each, and does not call ``backward``. ``subset`` is None for the whole batch,
    or a tensor of indices.

    Invariance: a positive factor on the loss.

    Cost: :math:`1 + \gamma` gradients a step, and a forward pass more if
    :math:`\gamma < 1`.

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius; 0.05 in the authors' code.
        beta: The share of tensors that are perturbed; 0.6 in the authors' script for ResNet-18.
        gamma: The share of examples in the second pass; 0.5 in the authors' script.
        seed: Of the drawn tensors.
        **options: As `SharpnessAware`.

    Raises:
        SettingsError: For settings that make no sense, losses that are not one per example,
            and by hand if ``gamma`` is not 1.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> x = torch.tensor([1.0, 2.0, 3.0, 10.0])
        >>> opt = ESAM(torch.optim.SGD([w], lr=0.1), rho=1.0, beta=1.0, gamma=0.5)
        >>> def losses(subset):
        ...     part = x if subset is None else x[subset]
        ...     return 0.5 * (w - part) ** 2
        >>> opt.step(losses).item()
        14.25
        >>> w.detach()  # at -1 the last two rise most: 0.1 ((3 + 10) / 2 + 1)
        tensor([0.7500])

    Source: Du et al., ICLR 2022, arXiv 2110.03141.
    """

    saved_settings = ("rho", "beta", "gamma")

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **options)
        self.beta = fraction("beta", beta, zero=False)
        self.gamma = fraction("gamma", gamma, zero=False)
        self._generator = torch.Generator().manual_seed(seed)

    def first_step(self, *, scaler: Any = None) -> bool:
        """Perturb by hand, as `SharpnessAware.first_step`; for ``gamma=1`` only.

        Raises:
            SettingsError: If ``gamma`` is not 1.
        """
        if self.gamma < 1:
            raise SettingsError(
                "Expected gamma=1 for `first_step()`, or `step(closure)`, which chooses the"
                f" examples. Got gamma={self.gamma}."
            )
        return super().first_step(scaler=scaler)

    def _perturbation(self, slots: Sequence[Slot]) -> list[Tensor]:
        drawn = torch.rand(len(slots), generator=self._generator) < self.beta
        whole = tensors.unit([slot.gradient for slot in slots], size=self.rho / self.beta)
        return [delta if bool(z) else delta.zero_() for delta, z in zip(whole, drawn, strict=True)]

    def _run(self, closure: Callable[..., Any], scaler: Any) -> Any:
        def mean_of(subset: Tensor | None) -> tuple[Tensor, Tensor]:
            losses = self._losses(closure, subset)
            loss = losses.mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss, losses.detach()

        random = self._randomness()
        with self._local_gradients():
            loss, before = self._pass(mean_of, None)
        if super().first_step(scaler=scaler):
            subset = None
            if self.gamma < 1:
                after = self._again(random, self._forward, closure)
                kept = max(1, int(self.gamma * len(before)))
                subset = (after - before).topk(kept).indices
            self._again(random, mean_of, subset)
        self._finish(scaler)
        return loss

    def _forward(self, closure: Callable[..., Any]) -> Tensor:
        with torch.no_grad():
            return self._losses(closure, None)

    def _losses(self, closure: Callable[..., Any], subset: Tensor | None) -> Tensor:
        losses = closure(subset)
        if not isinstance(losses, Tensor) or losses.ndim != 1 or len(losses) == 0:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise SettingsError(
                f"Expected from closure(subset) the losses of the examples, shape [n]. Got {got}."
                " Use reduction='none' and do not call backward."
            )
        return losses
