"""mSAM: every micro-batch has its own perturbation; their gradients are averaged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit.errors import SettingsError
from sharpkit.optim._checks import at_least_one
from sharpkit.optim.base import SharpnessAware
from sharpkit.optim.sam import SAM

__all__ = ["MicroBatchSAM", "MicroBatches"]


class MicroBatches(SharpnessAware):
    """Both passes on one micro-batch after the other; put it before a method in the bases.

    ``class MicroBatchASAM(MicroBatches, ASAM)`` is ASAM with a perturbation per micro-batch.
    Methods that keep state, step along both gradients or have passes of their own (ESAM,
    Momentum-SAM) do not fit and are refused.

    Args:
        base_optimizer: An instance of a torch optimizer.
        num_micro_batches: Into how many disjoint parts a batch is cut.
        **options: As the method takes them.

    Raises:
        SettingsError: If the number is not at least 1, or the method does not fit.
    """

    def __init__(
        self, base_optimizer: Optimizer, *, num_micro_batches: int, **options: Any
    ) -> None:
        self.num_micro_batches = at_least_one("num_micro_batches", num_micro_batches)
        super().__init__(base_optimizer, **options)
        if self.uses_first_gradient or type(self)._run is not SharpnessAware._run:
            raise SettingsError(
                "Expected a method that steps along the second gradient alone, of two passes of"
                f" one closure. Got {type(self).__name__}; it cannot be cut into micro-batches."
            )

    def shards(self, *batch: Tensor) -> list[tuple[Tensor, ...]]:
        """Cut tensors along their first axis into ``num_micro_batches`` parts.

        Raises:
            SettingsError: If there are fewer examples than parts, or the sizes differ.
        """
        sizes = {len(tensor) for tensor in batch}
        if len(sizes) != 1 or min(sizes) < self.num_micro_batches:
            raise SettingsError(
                f"Expected tensors of one length of at least {self.num_micro_batches}. Got"
                f" lengths {[len(tensor) for tensor in batch]}."
            )
        parts = [torch.tensor_split(tensor, self.num_micro_batches) for tensor in batch]
        return list(zip(*parts, strict=True))

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[int], Any] | None = None,
        *,
        sizes: Sequence[float] | None = None,
        scaler: Any = None,
    ) -> Any:
        """Make one step.

        Args:
            closure: ``closure(i)`` computes the mean loss of micro-batch i, calls ``backward``
                and returns the loss.
            sizes: Numbers of examples, if they differ: the weights of the average.
            scaler: The GradScaler that the closure scales its loss with, if it does.

        Returns:
            The weighted mean of the first losses, a tensor or float; None if the closure
            returns none.

        Raises:
            SettingsError: Without a closure, or with sizes that do not fit.
        """
        if closure is None:
            raise SettingsError(
                f"Expected `step(closure)` with closure(i). Got `step()`; {type(self).__name__}"
                " runs the passes of every micro-batch itself."
            )
        n = self.num_micro_batches
        if sizes is not None and (len(sizes) != n or min(sizes) <= 0):
            raise SettingsError(f"Expected {n} `sizes` above 0. Got {list(sizes)}.")
        weights = [1.0 / n] * n if sizes is None else [size / sum(sizes) for size in sizes]
        return self._guarded(functools.partial(self._all, weights), closure, scaler)

    def first_step(self, *, scaler: Any = None) -> bool:
        """Refuse: micro-batches are stepped through by ``step(closure)``.

        Raises:
            SettingsError: Always.
        """
        del scaler
        raise SettingsError(
            f"Expected `step(closure)` with closure(i). Got `first_step()`; {type(self).__name__}"
            " perturbs once for every micro-batch."
        )

    def _all(self, weights: Sequence[float], closure: Callable[[int], Any], scaler: Any) -> Any:
        self._begun = True
        self.steps += 1
        total: dict[Tensor, Tensor] = {}
        mean: Any = None
        for index, weight in enumerate(weights):
            random = self._randomness()
            self._pass_number = 0  # each micro-batch has a first pass
            with self._local_gradients():
                loss = self._pass(closure, index)
            if loss is not None:
                if isinstance(loss, tuple | list | dict):
                    raise SettingsError(
                        "Expected a closure that returns the loss, of which the mean is taken."
                        f" Got {type(loss).__name__}."
                    )
                part = weight * (loss.detach() if isinstance(loss, Tensor) else loss)
                mean = part if mean is None else mean + part
            if self._wants_second_pass():
                if scaler is not None and not self._unscale_first(scaler):
                    self._skipped = True
                    break
                self._perturb()
                if self._staged:
                    raise SettingsError(
                        "Expected a method that keeps nothing from step to step. Got"
                        f" {type(self).__name__}; it cannot be cut into micro-batches."
                    )
                self._again(random, closure, index)
                self._undo()
            for parameter in self.parameters():
                if parameter.grad is None:
                    continue
                if parameter in total:
                    total[parameter].add_(parameter.grad, alpha=weight)
                else:
                    total[parameter] = parameter.grad * weight
        else:
            for parameter in self.parameters():
                parameter.grad = total.get(parameter)
        self._finish(scaler)
        return mean


class MicroBatchSAM(MicroBatches, SAM):
    r"""SAM with a perturbation per micro-batch (mSAM).

    .. math:: w \leftarrow \operatorname{Base}\Bigl(w,\ \frac1n \sum_{i=1}^{n}
        \nabla L_{S_i}\bigl(w + \rho\, g_i / \lVert g_i \rVert\bigr)\Bigr),
        \qquad g_i = \nabla L_{S_i}(w)

    with n disjoint parts :math:`S_i` of the batch, each with its own gradient and its own
    norm. It is not gradient accumulation of SAM, which perturbs once by the gradient of the
    whole batch (a closure that loops does that). The argument is never called m: it is the
    number of micro-batches in one paper and their size in another.

    Invariance: as SAM.

    Cost: 2 gradients of the batch a step, as SAM; the activations of one micro-batch at a
    time; one gradient more for the sum. With ``synchronize=False`` under
    DistributedDataParallel every rank's micro-batches are perturbed on their own.

    Args:
        base_optimizer: An instance of a torch optimizer.
        num_micro_batches: n.
        rho: The radius; 0.05 as for SAM.
        norm: ``"l2"`` or ``"linf"``.
        **options: As `SharpnessAware`.

    Raises:
        SettingsError: For settings that make no sense.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = MicroBatchSAM(torch.optim.SGD([w], lr=1.0), num_micro_batches=2, rho=0.5)
        >>> x, = zip(*opt.shards(torch.tensor([[1.0, 0.0], [0.0, 2.0]])))
        >>> def closure(i):
        ...     loss = 0.5 * ((w - x[i]) ** 2).sum()
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure).item()
        1.25
        >>> w.detach()  # -((-1, 0) + 0.5 (-1, 0) + (0, -2) + 0.5 (0, -1)) / 2
        tensor([0.7500, 1.2500])

    Source: Behdin et al., arXiv 2302.09693; the m-sharpness of Foret et al., arXiv 2010.01412,
    section 4.1.
    """
