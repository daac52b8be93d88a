"""Monge SAM: SAM in the metric of the graph of the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit.errors import SettingsError
from sharpkit.optim import _tensors as tensors
from sharpkit.optim._checks import at_least_one, at_least_zero
from sharpkit.optim._guards import RandomState, kept_buffers
from sharpkit.optim._slots import Displacement, Slot
from sharpkit.optim.base import SharpnessAware

__all__ = ["MongeSAM"]


class MongeSAM(SharpnessAware):
    r"""Sharpness-aware minimization in the Monge metric.

    .. math:: \delta = \rho\, G^{-1} g / \sqrt{g^\top G^{-1} g}
        = \frac{\rho}{\sqrt{1 + \lVert g \rVert^2}} \frac{g}{\lVert g \rVert},
        \qquad G = I + g g^\top

    The steeper the loss, the smaller the perturbation: it goes to plain descent where g is
    large and to SAM where g is small.

    Two options carry out what the authors leave open, both off by default. With ``average_over
    = n`` the metric is :math:`I + \tfrac1n \sum u u^\top` over the gradients of this and the
    last ``n - 1`` steps. With ``neighbours = s`` the sum has, beside the gradient here, those
    at s random points :math:`w + \sigma \xi`, :math:`\xi \sim N(0, I)`. The inverse is exact
    (Woodbury). With both, the average is over all of them.

    Invariance: orthogonal maps of the parameters, permutations, a constant added to the loss.
    Not layer rescalings, and not a factor on the loss: give it the gradient of the loss itself
    (with GradScaler it is unscaled here). "Invariant" in the paper's title holds only if the
    metric is carried along as a tensor, which no implementation does.

    Cost: 2 gradients a step and one copy of the perturbed weights; ``average_over`` keeps
    ``n - 1`` gradients more (also in ``state_dict``), ``neighbours`` takes s gradients more.

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius; 0.05 as for SAM, our choice: the paper tunes from 0.005 to 0.05.
        average_over: Number n of steps whose gradients make the metric; 1 in the paper.
        neighbours: Number s of random points; 0 in the paper. Needs ``step(closure)``.
        spread: :math:`\sigma`, the standard deviation of the random points per coordinate.
        seed: Of the random points.
        **options: As `SharpnessAware`.

    Raises:
        SettingsError: For settings that make no sense, and in `first_step` by hand or with a
            GradScaler when ``neighbours`` is not 0.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = MongeSAM(torch.optim.SGD([w], lr=0.0), rho=1.0)
        >>> (w @ torch.tensor([3.0, 4.0])).backward()
        >>> opt.first_step()  # (0.6, 0.8) / sqrt(1 + 25)
        True
        >>> w.detach()
        tensor([0.1177, 0.1569])

    Source: Jacobsen and Arvanitidis, arXiv 2502.08448, equations 6 to 9. "MSAM" also names
    Momentum-SAM (`MomentumSAM`), "mSAM" the micro-batch form (`MicroBatchSAM`).
    """

    saved_settings = ("rho", "average_over", "neighbours", "spread")

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float = 0.05,
        average_over: int = 1,
        neighbours: int = 0,
        spread: float = 0.01,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **options)
        self.average_over = at_least_one("average_over", average_over)
        if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 0:
            raise SettingsError(f"Expected an integer `neighbours` from 0. Got {neighbours!r}.")
        self.neighbours = neighbours
        self.spread = at_least_zero("spread", spread)
        self._generator = torch.Generator().manual_seed(seed)
        self._around: list[dict[Tensor, Tensor]] = []

    @property
    def takes_sparse(self) -> bool:  # type: ignore[override]
        """Whether gradients may have rows only: where the metric is of one of them."""
        return self.average_over == 1 and self.neighbours == 0

    def _num_kept(self) -> int:
        return (self.average_over - 1) * (1 + self.neighbours)

    def _look_around(
        self, closure: Callable[..., Any], scaler: Any, random: RandomState | None
    ) -> None:
        if not self.neighbours:
            return
        if scaler is not None:
            raise SettingsError(
                "Expected no GradScaler with `neighbours`. Got one; train in bfloat16, or set"
                " neighbours=0."
            )
        here = self._own_gradients()
        slots = self._slots()
        self._around = []
        for _ in range(self.neighbours):
            noise = [
                self.spread
                * torch.randn(s.gradient.shape, generator=self._generator, dtype=torch.float64).to(
                    s.gradient
                )
                for s in slots
            ]
            displacement = Displacement(slots)
            try:
                displacement.move(noise)
                torch.clear_autocast_cache()
                with kept_buffers(self.model):
                    self._again(random, closure)
            finally:
                displacement.undo()
                torch.clear_autocast_cache()
            self._around.append(self._own_gradients())
        for parameter in self.parameters():
            parameter.grad = here.get(parameter)

    def _perturbation(self, slots: Sequence[Slot]) -> tensors.Ray:
        gradient = [slot.gradient for slot in slots]
        around, self._around = self._around, []
        if len(around) != self.neighbours:
            raise SettingsError(
                "Expected `step(closure)` with `neighbours`, which needs the loss at more points."
                " Got `first_step()` by hand."
            )
        rows = [gradient]
        for others in [*around, *list(self.memory.values())[: self._num_kept()]]:
            rows.append(
                [
                    others[s.parameter] if s.parameter in others else torch.zeros_like(s.gradient)
                    for s in slots
                ]
            )
        self._remember(slots, around)
        if len(rows) == 1:
            length = tensors.norm(gradient)
            unit = tensors.ray(gradient, length, self.rho)
            return tensors.Ray(gradient, unit.divisor * torch.sqrt(1 + length.square()))
        natural, square = _inverse(rows)
        return tensors.ray(natural, square.sqrt(), self.rho)

    def _remember(self, slots: Sequence[Slot], around: list[dict[Tensor, Tensor]]) -> None:
        """Stage the gradients of this step, newest first, and drop those too old."""
        if self._num_kept() == 0:
            return
        own = self._own_gradients()
        newest = [{s.parameter: own[s.parameter] for s in slots}, *around]
        rows = [*newest, *self.memory.values()][: self._num_kept()]
        self._staged = {f"gradient {i}": row for i, row in enumerate(rows)}


def _inverse(rows: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], Tensor]:
    r"""Return :math:`G^{-1} g` and :math:`g^\top G^{-1} g` for ``g = rows[0]``.

    :math:`G = I + U U^\top / n` with the n rows as columns of U, so
    :math:`G^{-1} g = g - U (n I + U^\top U)^{-1} U^\top g`.
    """
    n = len(rows)
    gram = torch.stack([torch.stack([tensors.dot(a, b) for b in rows]) for a in rows])
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    coefficients = torch.linalg.solve(n * eye + gram, gram[:, 0])
    natural = list(rows[0])
    for coefficient, row in zip(coefficients, rows, strict=True):
        natural = tensors.add(natural, row, -coefficient)
    # With K = U^T U and c the coefficients: g^T G^-1 g = K_00 - (K c)_0, and K c = K e_0 - n c.
    return natural, n * coefficients[0]
