"""Sparse SAM: a mask says which weights are perturbed, by Fisher information or by growth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit.errors import SettingsError
from sharpkit.optim import _tensors as tensors
from sharpkit.optim._checks import at_least_one, fraction
from sharpkit.optim._guards import RandomState, kept_buffers
from sharpkit.optim._slots import Slot
from sharpkit.optim.base import SharpnessAware

__all__ = ["DynamicSparseSAM", "FisherSparseSAM"]


class _SparseSAM(SharpnessAware):
    r"""SAM with :math:`\delta = \rho\, (g / \lVert g \rVert) \odot` mask, not renormalized."""

    def __init__(
        self, base_optimizer: Optimizer, *, rho: float, sparsity: float, **options: Any
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **options)
        self.sparsity = fraction("sparsity", sparsity, one=False)

    def _perturbation(self, slots: Sequence[Slot]) -> list[Tensor]:
        mask = self.memory["mask"]
        delta = tensors.unit([slot.gradient for slot in slots], size=self.rho)
        for d, slot in zip(delta, slots, strict=True):
            d.mul_(mask[slot.parameter].to(d.device))
        return delta

    def _num_kept(self, total: int) -> int:
        return max(1, round((1 - self.sparsity) * total))

    def _set_mask(self, flat: Tensor) -> None:
        """Keep a flat mask of all perturbed parameters as one mask per parameter."""
        self.memory["mask"] = _by_parameter(flat, self.perturbed_parameters())

    def _probe(self, closure: Callable[..., Any], *arguments: Any) -> Tensor:
        """Return the gradient of a pass that leaves nothing behind, flat, on the CPU."""
        before = {p: p.grad for p in self.parameters()}
        random = RandomState(self.parameters())
        self._pass_number = 1  # no first pass of a step
        try:
            with kept_buffers(self.model):
                self._pass(closure, *arguments)
            parts = [
                torch.zeros(p.numel()) if p.grad is None else p.grad.to_dense().flatten().cpu()
                for p in self.perturbed_parameters()
            ]
            return torch.cat([part.to(torch.float64) for part in parts])
        finally:
            self._pass_number = 0
            random.restore()
            for parameter, gradient in before.items():
                parameter.grad = gradient

    def _check_idle(self) -> None:
        if self._begun:
            raise SettingsError(
                "Expected `update_mask` between two steps. Got it after `first_step()`; call"
                " `step()` first."
            )


class FisherSparseSAM(_SparseSAM):
    r"""Sparse SAM with the mask of the largest Fisher information (SSAM-F).

    .. math:: \delta = \rho\, \frac{g}{\lVert g \rVert} \odot m, \qquad
        m = \text{the largest } (1 - s) P \text{ entries of }
        f = \sum_{i=1}^{N} (\nabla \ell_i)^2

    The norm is over all parameters and the masked perturbation is not brought back to the
    length :math:`\rho`; SAM-ON (`NormOnlySAM`) does the opposite. Call `update_mask` before the
    first step and then every few epochs; the authors' code makes a plain step first instead.

    Invariance: permutations of the parameters and flips of their signs, a positive factor on
    the loss.

    Cost: 2 gradients a step; N gradients of single examples for a mask.

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius; 0.05 in the authors' code.
        sparsity: s, the share of weights that are not perturbed; 0.2 in the authors' code.
        **options: As `SharpnessAware`.

    Raises:
        SettingsError: For settings that make no sense, and for a step without a mask.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(4))
        >>> opt = FisherSparseSAM(torch.optim.SGD([w], lr=0.1), sparsity=0.5)
        >>> x = torch.tensor([[1.0, 5.0, 2.0, 0.0], [1.0, -5.0, 0.0, 3.0]])
        >>> opt.update_mask(lambda i: (x[i] @ w).backward(), num_samples=2)
        >>> opt.memory["mask"][w]
        tensor([False,  True, False,  True])

    Source: Mi et al., NeurIPS 2022, arXiv 2210.05177, and the authors' code.
    """

    saved_settings = ("rho", "sparsity")

    def __init__(
        self, base_optimizer: Optimizer, *, rho: float = 0.05, sparsity: float = 0.2, **options: Any
    ) -> None:
        super().__init__(base_optimizer, rho=rho, sparsity=sparsity, **options)

    @torch.no_grad()
    def update_mask(self, closure: Callable[[int], Any], num_samples: int) -> None:
        """Choose the weights to perturb; gradients, buffers and random states stay.

        Args:
            closure: ``closure(i)`` computes the loss of example i and calls ``backward``.
            num_samples: N; 1024 is the authors' default, 16 to 128 their recipes.

        Raises:
            SettingsError: If N is less than 1, or in the middle of a step.
        """
        self._check_idle()
        fisher = sum(
            self._probe(closure, i).square()
            for i in range(at_least_one("num_samples", num_samples))
        )
        assert isinstance(fisher, Tensor)
        mask = torch.zeros(len(fisher), dtype=torch.bool)
        mask[fisher.topk(self._num_kept(len(fisher))).indices] = True
        self._set_mask(mask)

    def _perturbation(self, slots: Sequence[Slot]) -> list[Tensor]:
        mask = self.memory.get("mask", {})
        if any(slot.parameter not in mask for slot in slots):
            raise SettingsError(
                "Expected `update_mask(closure, num_samples)` before the first step, and after"
                " `add_param_group`. Got a step without a mask."
            )
        return super()._perturbation(slots)


class DynamicSparseSAM(_SparseSAM):
    r"""Sparse SAM with a mask that drops and grows (SSAM-D).

    .. math:: \delta = \rho\, \frac{g}{\lVert g \rVert} \odot m

    The mask starts at random. `update_mask` drops, of the perturbed weights, the share
    :math:`\tfrac{d}{2} (1 + \cos \pi t)` with the smallest :math:`|g|`, t from 0 to 1 over the
    training, and lets as many of those that were not perturbed grow at random. The number of
    perturbed weights does not change.

    Invariance: a positive factor on the loss.

    Cost: 2 gradients a step, one for a new mask.

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius; 0.05 in the authors' code.
        sparsity: The share of weights that are not perturbed; 0.2 in the authors' code.
        drop_rate: d; 0.5 in the authors' code.
        seed: Of the first mask and of the growth.
        **options: As `SharpnessAware`.

    Raises:
        SettingsError: For settings that make no sense.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(10))
        >>> opt = DynamicSparseSAM(torch.optim.SGD([w], lr=0.1), sparsity=0.5)
        >>> first = opt.memory["mask"][w]
        >>> opt.update_mask(lambda: (w**2).sum().backward(), progress=0.0)
        >>> int((first & ~opt.memory["mask"][w]).sum()), int(opt.memory["mask"][w].sum())
        (2, 5)

    Source: Mi et al., NeurIPS 2022, arXiv 2210.05177, and the authors' code.
    """

    saved_settings = ("rho", "sparsity", "drop_rate")

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float = 0.05,
        sparsity: float = 0.2,
        drop_rate: float = 0.5,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(base_optimizer, rho=rho, sparsity=sparsity, **options)
        self.drop_rate = fraction("drop_rate", drop_rate)
        self._generator = torch.Generator().manual_seed(seed)
        self.memory["mask"] = self._random_mask(self.perturbed_parameters())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, with a random mask; the others keep theirs."""
        super().add_param_group(param_group)
        mask = self.memory["mask"]
        new = [p for p in self.perturbed_parameters() if p not in mask]
        if new:
            self.memory["mask"] = {**mask, **self._random_mask(new)}

    def _random_mask(self, parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        total = sum(p.numel() for p in parameters)
        mask = torch.zeros(total, dtype=torch.bool)
        mask[torch.randperm(total, generator=self._generator)[: self._num_kept(total)]] = True
        return _by_parameter(mask, parameters)

    @torch.no_grad()
    def update_mask(self, closure: Callable[[], Any], progress: float) -> None:
        """Drop and grow; gradients, buffers and random states stay.

        Args:
            closure: Computes the loss of a batch and calls ``backward``.
            progress: t, the part of the training that is over, from 0 to 1.

        Raises:
            SettingsError: If the progress is not in [0, 1], or in the middle of a step.
        """
        self._check_idle()
        t = fraction("progress", progress)
        size = self._probe(closure).abs()
        parameters = self.perturbed_parameters()
        mask = torch.cat([self.memory["mask"][p].flatten().cpu() for p in parameters])
        active, idle = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        share = self.drop_rate * (1 + math.cos(math.pi * t)) / 2
        count = min(int(share * len(active)), len(idle))
        dropped = active[size[active].topk(count, largest=False).indices]
        grown = idle[torch.randperm(len(idle), generator=self._generator)[:count]]
        mask[dropped], mask[grown] = False, True
        self._set_mask(mask)


def _by_parameter(flat: Tensor, parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    parts = torch.split(flat, [p.numel() for p in parameters])
    return {
        p: part.reshape(p.shape).to(p.device) for p, part in zip(parameters, parts, strict=True)
    }
