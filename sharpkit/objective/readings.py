"""What an objective reads off the outputs and the examples, beside L and its curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharpkit.errors import ShapeError
from sharpkit.objective import fisher, labels, network, products
from sharpkit.objective.matrix_products import MatrixProducts

__all__ = ["Readings"]


class Readings(MatrixProducts):
    """What an :class:`Objective` knows of labels, of single examples and of layers.

    Attributes:
        space: The parameters that span theta.
    """

    # -- labels ----------------------------------------------------------------------

    @property
    def has_labels(self) -> bool:
        """Whether the criterion is one of class labels, so that errors can be counted."""
        return labels.has_labels(self._evaluator)

    @torch.inference_mode(False)
    def margins(self) -> tuple[Tensor, Tensor]:
        """Return the margin of each class label, and the number of its example.

        The margin is the logit of the label minus the largest other one; it is positive where
        the network is right. Both are ``[M]`` on the CPU, margins in float64. One forward pass.

        Raises:
            MeasureError: If there are no class labels.
        """
        margins, examples, _ = self._margins()
        return margins, examples

    def _margins(self) -> tuple[Tensor, Tensor, list[int]]:
        # The labels of each batch of all data too.
        self._shared.forwards += 1

        def one(batch: Any) -> tuple[Tensor, Tensor, int]:
            found, rows, size = labels.batch_margins(self._evaluator, self._leaves, batch)
            return found.cpu().double(), rows.cpu(), size

        margins, examples, counts, seen = [], [], [], 0
        for pieces in self._evaluator.collect(one, grad=False):
            for found, rows, size in pieces:
                margins.append(found)
                examples.append(rows + seen)
                seen += size
            counts.append(sum(len(found) for found, _, _ in pieces))
        return torch.cat(margins), torch.cat(examples), counts

    def error_rate(self) -> float:
        """Return the share of class labels that the outputs miss (ties are misses).

        One forward pass.

        Raises:
            MeasureError: If there are no class labels.

        Example:
            >>> from sharpkit import Objective
            >>> model = torch.nn.Linear(1, 2, bias=False)
            >>> _ = model.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
            >>> x, y = torch.tensor([[1.0], [-2.0]]), torch.tensor([0, 0])
            >>> Objective(model, torch.nn.CrossEntropyLoss(), (x, y)).error_rate()
            0.5
        """
        return _missed(self.margins()[0])

    @torch.inference_mode(False)
    def weakest_margins(self, count: int) -> tuple[float, Tensor, float]:
        r"""Return how far the weakest labels are from being missed, its gradient, and the misses.

        .. math:: -\frac1k \sum_{j \in \text{k smallest}} \max(m_j, 0)

        over the k labels of smallest margin m: it is zero where k labels are missed, and
        climbing it leads there sooner than climbing the loss. A forward pass and a gradient.

        Args:
            count: k.

        Returns:
            The value, its gradient ``[P]``, and the share of labels missed.

        Raises:
            MeasureError: If there are no class labels.
        """
        margins, _, counts = self._margins()
        weights = torch.zeros_like(margins)
        weakest = margins.argsort(stable=True)[:count]
        weights[weakest] = (margins[weakest] > 0).double() / count
        self._shared.gradients += 1
        gradient = torch.zeros(self.space.dim, dtype=self.space.dtype, device=self.space.device)
        team, seen = self.team, 0
        own = torch.cat(
            [
                part
                for (rank, _), part in zip(
                    self._evaluator.order, torch.split(weights, counts), strict=True
                )
                if rank == team.rank or not team.shares_data
            ]
            or [weights[:0]]
        )

        def one(batch: Any) -> tuple[Tensor, int]:
            found = labels.batch_margins(self._evaluator, self._leaves, batch)[0]
            w = own[seen : seen + len(found)].to(found)
            total = -(w * found)[w > 0].sum()
            return products.flat_gradient(total, self._leaves, self.space.dtype)[0], len(found)

        def add(result: tuple[Tensor, int]) -> None:
            nonlocal seen
            gradient.add_(result[0])
            seen += result[1]

        def work() -> list[Tensor]:
            self._evaluator.each(one, add, grad=True, theta=self._leaves)
            return [gradient]

        (gradient,) = self._over_data(work, [(gradient.shape, gradient.dtype)])
        chosen = weights > 0
        value = -float((weights[chosen] * margins[chosen]).sum())
        return value, gradient, _missed(margins)

    # -- examples --------------------------------------------------------------------

    @property
    def adds_up(self) -> bool:
        """Whether the loss is a sum over examples, which then have gradients of their own."""
        return self._evaluator.additive

    @torch.inference_mode(False)
    def example_slopes(self, v: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`v^\top g_n` of each example's gradient and its size, each ``[N]``.

        In float64. The size is the sum of the magnitudes whose sum the slope is, over outputs
        or over parameters: times eps it is what rounding takes.
        At the price of one curvature product where outputs have a row for each example,
        otherwise of one backward pass an example.

        Raises:
            ShapeError: If v is not ``[P]``.
            ObjectiveError: If the loss is not a sum over examples.
        """
        if v.shape != (self.space.dim,):
            raise ShapeError(
                f"Expected a vector of shape ({self.space.dim},). Got {tuple(v.shape)}."
            )
        v = v.detach().to(self.space.device, self.space.dtype)
        self._shared.hvps += 1
        slopes, looped = fisher.example_slopes(self._evaluator, self._leaves, self._through, v)
        self._shared.gradients += looped
        return slopes[0], slopes[1]

    @torch.inference_mode(False)
    def each_group_gradient(self, size: int, consume: Callable[[Tensor, int], None]) -> None:
        """Call ``consume`` with the mean gradient ``[P]`` of groups, and their examples.

        Args:
            size: Examples of a group; 1 gives example gradients.
            consume: Takes a gradient and a number of examples.

        Raises:
            ObjectiveError: If the loss is not a sum over examples.
        """
        self._shared.gradients += 1
        fisher.each_group_gradient(self._evaluator, self._leaves, self.space.dtype, size, consume)

    # -- layers ----------------------------------------------------------------------

    @torch.inference_mode(False)
    def path_sum(self) -> float:
        """Return the sum over all paths of the product of their squared weights.

        See :func:`sharpkit.objective.network.path_sum`.

        Raises:
            MeasureError: If the network is not made of homogeneous layers.
        """
        self._shared.forwards += 4
        return network.path_sum(self._evaluator, self._leaves)

    @torch.inference_mode(False)
    def linear_layers(self) -> list[network.LinearLayer]:
        """Return the linear maps of the network's layers, as they act on an example.

        Raises:
            MeasureError: If there are none.
        """
        self._shared.forwards += 1
        return network.linear_layers(self._evaluator, self._leaves)


def _missed(margins: Tensor) -> float:
    return 1.0 - float((margins > 0).double().mean())
