"""Eigen-SAM: SAM, tilted towards the top eigenvector of the Hessian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit.errors import SettingsError, SharpkitWarning
from sharpkit.optim import _tensors as tensors
from sharpkit.optim._checks import at_least_one, at_least_zero
from sharpkit.optim._curvature import Curvature, watched
from sharpkit.optim._guards import RandomState, kept_buffers
from sharpkit.optim._slots import Slot
from sharpkit.optim.base import SharpnessAware

__all__ = ["EigenSAM"]


class EigenSAM(SharpnessAware):
    r"""Eigenvalue-regularized sharpness-aware minimization.

    .. math:: \delta = \rho\,\bigl(\hat g + \alpha \operatorname{sign}(g^\top v)\,
        (v - (v^\top \hat g)\, \hat g)\bigr), \qquad \hat g = g / \lVert g \rVert_2

    with v the unit eigenvector that power iteration finds: ``iterations`` products with the
    Hessian of the loss of the batch at hand, at the first and then every ``every``-th step,
    from the vector found before (from a random one at first). The perturbation is not
    rescaled: its length is :math:`\rho` to :math:`\rho\sqrt{1 + \alpha^2}`.

    Power iteration finds the eigenvalue of largest size; early in training that can be a
    negative one. The Hessian is that of the loss the closure computes, dropout masks and batch
    statistics included; the authors' code takes it in evaluation mode. It is the block of the
    perturbed parameters. Products are exact second derivatives (through the graph of the
    gradient), not differences: fused attention runs as its math kernel and compiled modules
    run eagerly meanwhile. Layers without a second derivative raise.

    Invariance: orthogonal maps of the parameters, up to the random first vector; a positive
    factor on the loss. Not layer rescalings.

    Cost: 2 gradients a step, and on every ``every``-th about 2 gradients an iteration and 1.5
    more: 2.12 on average by default. One vector is kept, also in ``state_dict``; the graph of
    the gradient of the whole batch is in memory during the iterations.

    Args:
        base_optimizer: An instance of a torch optimizer.
        rho: The radius; 0.05 in the authors' code, 0.1 in its example.
        alpha: How far to tilt; 0.2 in the authors' code.
        every: Steps from one power iteration to the next; 100 in the authors' code.
        iterations: Products in each; 5 in the authors' code.
        seed: Of the first vector.
        **options: As `SharpnessAware`; give ``model`` under DistributedDataParallel, where
            products are averaged over the ranks.

    Raises:
        SettingsError: For settings that make no sense, and in ``first_step`` by hand where
            products are due, for which ``step(closure)`` is needed.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([4.0, 3.0]))
        >>> opt = EigenSAM(torch.optim.SGD([w], lr=0.0), rho=1.0, alpha=0.5, iterations=50)
        >>> seen = []
        >>> def closure():
        ...     seen.append(w.detach().clone())
        ...     loss = 0.5 * w[0] ** 2 + w[1] ** 2
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure).item()
        17.0
        >>> opt.memory["eigenvector"][w].abs().round(decimals=4)
        tensor([0., 1.])
        >>> len(seen)  # once more for the Hessian
        3

    Source: Luo et al., NeurIPS 2024, arXiv 2501.12666; settings of the authors' code.
    """

    saved_settings = ("rho", "alpha", "every", "iterations")

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float = 0.05,
        alpha: float = 0.2,
        every: int = 100,
        iterations: int = 5,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(base_optimizer, rho=rho, **options)
        self.alpha = at_least_zero("alpha", alpha)
        self.every = at_least_one("every", every)
        self.iterations = at_least_one("iterations", iterations)
        self._generator = torch.Generator().manual_seed(seed)
        self._since = 0
        self._looked = False

    def restore(self) -> None:  # noqa: D102
        super().restore()
        self._looked = False

    def _look_around(
        self, closure: Callable[..., Any], scaler: Any, random: RandomState | None
    ) -> None:
        self._looked = True
        if self._since % self.every:
            return
        here = {p: p.grad for p in self.parameters()}
        with kept_buffers(self.model), self._on_this_rank():
            perturbed = self.perturbed_parameters()
            with watched(perturbed, lambda: self._again(random, closure)) as curvature:
                found = self._power_iteration(curvature)
        for parameter, gradient in here.items():
            parameter.grad = gradient
        if found is not None:
            self._staged["eigenvector"] = found
        elif scaler is None:
            warnings.warn(
                "The products with the Hessian are not finite. EigenSAM keeps the eigenvector"
                " that it had, if any, and looks again at the next step.",
                SharpkitWarning,
                stacklevel=2,
            )

    def _power_iteration(self, curvature: Curvature) -> dict[Tensor, Tensor] | None:
        known = self.memory.get("eigenvector", {})
        vector = [known[p] if p in known else torch.zeros_like(p) for p in curvature.parameters]
        if not known or not bool(tensors.norm(vector) > 0):
            vector = [self._noise(p) for p in curvature.parameters]
        vector = tensors.unit(vector)
        for _ in range(self.iterations):
            vector = tensors.unit(self._averaged(curvature.product(vector)))
        if not bool(torch.isfinite(tensors.norm(vector))):
            return None
        return dict(zip(curvature.parameters, vector, strict=True))

    def _noise(self, parameter: Tensor) -> Tensor:
        # Drawn on the CPU in float64: the same numbers on every device and in every dtype.
        draw = torch.randn(parameter.shape, generator=self._generator, dtype=torch.float64)
        return draw.to(device=parameter.device, dtype=parameter.dtype)

    def _on_this_rank(self) -> AbstractContextManager[Any]:
        model: Any = self.model
        return model.no_sync() if hasattr(model, "no_sync") else nullcontext()

    def _averaged(self, products: list[Tensor]) -> list[Tensor]:
        group = getattr(self.model, "process_group", None)
        if group is not None:
            ranks = torch.distributed.get_world_size(group)
            for part in products:
                torch.distributed.all_reduce(part, group=group)
                part.div_(ranks)
        return products

    def _perturbation(self, slots: Sequence[Slot]) -> list[Tensor]:
        if self._since % self.every == 0 and not self._looked:
            raise SettingsError(
                "Expected `step(closure)` where EigenSAM takes products with the Hessian. Got"
                " `first_step()` by hand."
            )
        along = tensors.unit([slot.gradient for slot in slots])
        known = self._staged.get("eigenvector") or self.memory.get("eigenvector", {})
        vector = [
            known[s.parameter] if s.parameter in known else torch.zeros_like(s.gradient)
            for s in slots
        ]
        inner = tensors.dot(vector, along)
        across = tensors.add(vector, along, -inner)
        tilted = tensors.scale_(across, self.alpha * torch.sign(inner))
        torch._foreach_add_(tilted, along)
        return tensors.scale_(tilted, self.rho)

    def _after_step(self) -> None:
        looked = self._since % self.every == 0
        if looked and "eigenvector" not in self._staged:
            return  # not finite: look again
        self._since = 1 if looked else self._since + 1

    def _more_state(self) -> dict[str, Any]:
        return {"since": self._since}

    def _load_more_state(self, state: dict[str, Any]) -> None:
        self._since = state["since"]
