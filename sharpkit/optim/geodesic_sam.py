"""Geodesic SAM: SAM modulo what the function does not see of the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpkit.errors import SettingsError
from sharpkit.geometry.layouts import FactorPair, find_pairs
from sharpkit.geometry.quotient import MetricName, Order
from sharpkit.objective import Objective
from sharpkit.objective.isolation import unwrap
from sharpkit.optim._factors import Factors, alike
from sharpkit.optim._slots import Slot
from sharpkit.optim.base import SharpnessAware

__all__ = ["GeodesicSAM"]


class GeodesicSAM(SharpnessAware):
    r"""Sharpness-aware minimization in the quotient metric, along its geodesics.

    .. math:: w + \delta = \gamma_\xi(1), \qquad \xi = \rho\,
        \frac{\operatorname{grad} L}{\lVert \operatorname{grad} L \rVert_g}, \qquad
        \lVert \xi \rVert_g^2 = \sum_{\text{pairs}} \lVert (\xi_G, \xi_H) \rVert^2 +
        \sum_{\text{others}} (\xi_w / w)^2

    A pair of factors (G, H) is what the network sees as :math:`GH^\top` alone: queries with
    keys and values with the output projection in an attention head, low-rank adapters, two
    linear layers in a row. Its length is
    :math:`\operatorname{Tr}(M_G^{-1}\xi_G^\top\xi_G + M_H^{-1}\xi_H^\top\xi_H)` (``"inv"``) or
    :math:`\operatorname{Tr}(M_H\xi_G^\top\xi_G + M_G\xi_H^\top\xi_H)` (``"mix"``), with
    :math:`M_G = G^\top G`, :math:`M_H = H^\top H`; its gradient is horizontal, and
    :math:`\gamma` is the geodesic, to second order in :math:`\rho`. All other parameters move
    relative to their size, as in `ASAM` with ``eta=0``; the bias of attention's keys, which
    softmax does not see, stays where it is. This is the first, normalised step of the ascent of
    geodesic sharpness; the paper does not train with it.

    The weights keep the gauge in which they are trained: the perturbation is computed in the
    balanced gauge and taken back by each head's group element.

    Invariance: exactly that of the perturbed loss to GL(h) of every head, shifts of key
    biases, permutations, rescalings of the other parameters' entries that leave the function
    alone, and a positive factor on the loss. The path of training is another at equivalent
    weights, because the base optimizer's step is not invariant. Entries of other parameters
    that are exactly zero never move, nor do heads below full rank (a warning says so); a head
    whose product is zero, such as an adapter at its start, is taken entry by entry. Weights kept in
    bfloat16 or float16 round the moved point, and so the invariance.

    Cost: 2 gradients a step, and a thin QR and an SVD of every head in float64,
    :math:`O((n + m) h^2 + h^3)`.

    Args:
        base_optimizer: An instance of a torch optimizer.
        pairs: The pairs, or an `Objective` of the model, on whose data
            :func:`sharpkit.geometry.layouts.find_pairs` finds and tests them, once.
        model: The network, whose names the pairs use.
        rho: The radius in the metric; 0.1 by default, as for geodesic sharpness. The paper
            states none.
        metric: ``"inv"`` (relative) or ``"mix"`` (of the product, in its units).
        order: 1: straight lines, 2, or ``"exact"``.
        damping: Added to both Gram matrices in the balanced gauge, in units of each head's
            largest singular value (not for h = 1).
        **options: As `SharpnessAware`.

    Raises:
        SettingsError: For settings that make no sense, pairs of parameters that are not all
            perturbed or share entries, or an objective of another model.

    Example:
        >>> from sharpkit.geometry.layouts import Block, FactorPair
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 3, bias=False)
        ... )
        >>> pair = FactorPair(
        ...     "linear", "", (Block.of("1.weight", (3, 2), lambda w: w[None]),),
        ...     (Block.of("0.weight", (2, 3), lambda w: w.mT[None]),),
        ... )
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> opt = GeodesicSAM(sgd, pairs=[pair], model=model, rho=0.05)
        >>> def closure():
        ...     loss = (model(torch.eye(3)) - torch.eye(3)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> first = opt.step(closure)
        >>> bool(opt.step(closure) < first)
        True

    Source: metrics and curves of da Silva, Dangel and Oore, ICML 2025, arXiv 2505.05409.
    """

    saved_settings = ("rho", "metric", "order", "damping")

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        pairs: Objective | Sequence[FactorPair],
        model: nn.Module,
        rho: float = 0.1,
        metric: MetricName = "inv",
        order: Order = 2,
        damping: float = 1e-4,
        **options: Any,
    ) -> None:
        super().__init__(base_optimizer, rho=rho, model=model, **options)
        if metric not in ("inv", "mix"):
            raise SettingsError(f"Expected `metric` to be 'inv' or 'mix'. Got {metric!r}.")
        if order not in (1, 2, "exact"):
            raise SettingsError(f"Expected `order` to be 1, 2 or 'exact'. Got {order!r}.")
        if isinstance(damping, bool) or not 0 <= damping < math.inf:
            raise SettingsError(f"Expected `damping` to be finite and at least 0. Got {damping!r}.")
        self.metric, self.order, self.damping = metric, order, float(damping)
        inner = unwrap(model)
        if isinstance(pairs, Objective):
            if unwrap(pairs.model) is not inner:
                raise SettingsError(
                    "Expected in `pairs` an objective of `model`. Got one of another module."
                )
            pairs = find_pairs(pairs).pairs
        self.pairs = tuple(pairs)
        self._named = dict(inner.named_parameters())
        self._check_pairs()
        self._groups = alike(self.pairs)

    def _check_pairs(self) -> None:
        perturbed = {id(p) for p in self.perturbed_parameters()}
        seen: dict[str, Tensor] = {}
        for pair in self.pairs:
            for name in pair.names:
                parameter = self._named.get(name)
                if parameter is None or id(parameter) not in perturbed:
                    raise SettingsError(
                        f"Expected all parameters of the {pair.kind} pair in {pair.module!r} to"
                        f" be perturbed. Got {name!r}, which is not; leave the pair out."
                    )
                if not parameter.is_contiguous():
                    raise SettingsError(
                        f"Expected contiguous parameters in pairs. Got {name!r} with strides"
                        f" {parameter.stride()}."
                    )
                if name not in seen:
                    seen[name] = torch.zeros(parameter.shape)
            for block in pair.blocks:
                block.view(seen[block.name]).add_(1)
        shared = [name for name, count in seen.items() if bool((count > 1).any())]
        if shared:
            raise SettingsError(f"Expected pairs without entries in common. Got some in {shared}.")

    def _perturbation(self, slots: Sequence[Slot]) -> list[Tensor]:
        # White coordinates of all entries; those of the pairs are replaced below.
        white = [(slot.gradient * slot.point.abs()).contiguous() for slot in slots]
        number = {slot.parameter: i for i, slot in enumerate(slots)}
        places = {
            name: number[parameter]
            for name, parameter in self._named.items()
            if parameter in number
        }
        point = {name: slots[i].point for name, i in places.items()}
        slope = {name: slots[i].gradient.contiguous() for name, i in places.items()}
        entries = {name: white[i] for name, i in places.items()}
        groups = []
        for pairs in self._groups:
            present = [pair for pair in pairs if all(name in places for name in pair.names)]
            found = self._group(present, point, slope, entries) if present else None
            if found is not None:
                groups.append(found)
        device = white[0].device
        wide = torch.float32 if device.type == "mps" else torch.float64
        total = torch.stack(
            [w.to(wide).square().sum().to(device) for w in white]
            + [group.square().to(device) for group in groups]
        ).sum()
        length = torch.where(total > 0, self.rho / total.sqrt(), 0 * total)
        delta = [
            w * slot.point.abs() * length.to(device=w.device, dtype=w.dtype)
            for w, slot in zip(white, slots, strict=True)
        ]
        moved = {name: delta[i] for name, i in places.items()}
        for group in groups:
            group.write(moved, group.change(length.to(group.element.device)))
        return delta

    def _group(
        self,
        pairs: Sequence[FactorPair],
        point: dict[str, Tensor],
        slope: dict[str, Tensor],
        entries: dict[str, Tensor],
    ) -> Factors | None:
        """Return pairs of one shape, and clear the entries that belong to them."""
        found, entrywise = Factors.at(
            pairs, point, slope, metric=self.metric, order=self.order, damping=self.damping
        )
        begin = 0
        for pair in pairs:
            single = entrywise[begin : begin + pair.heads]
            begin += pair.heads
            for blocks, shifts in ((pair.G, False), (pair.H, False), (pair.shift, True)):
                for block in blocks:
                    view = block.view(entries[block.name])
                    keep = torch.zeros_like(single) if shifts else single
                    view.mul_(keep.to(view).reshape(-1, *[1] * (view.ndim - 1)))
        return found
