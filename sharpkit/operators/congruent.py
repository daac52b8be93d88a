"""Operators seen through a symmetric map of their vectors, such as a layer's own weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sharpkit.errors import OperatorError, ShapeError
from sharpkit.operators.base import SymmetricOperator

__all__ = ["congruent", "gram_root"]

Map = Callable[[Tensor], Tensor]


def congruent(A: SymmetricOperator, root: Map) -> SymmetricOperator:
    """Return ``T A T`` for a symmetric linear map T of vectors ``[P, K]``.

    Args:
        A: The operator.
        root: Maps ``V [P, K]`` to ``T V``; symmetric, which is not checked.

    Example:
        >>> A = SymmetricOperator.wrap(torch.ones(2, 2))
        >>> congruent(A, lambda V: 3 * V).to_dense().tolist()
        [[9.0, 9.0], [9.0, 9.0]]
    """
    return SymmetricOperator(
        lambda V: root(A @ root(V)), A.dim, dtype=A.dtype, device=A.device, team=A.team
    )


def gram_root(weight: Tensor, *, axis: int = 0) -> Map:
    r"""Return the map :math:`V \mapsto (W W^\top)^{1/2} V` of a layer's vectors ``[P, K]``.

    The rows of W are the layer's neurons: the weight with ``axis`` first and all other axes
    flattened, so that a convolution's is ``(out, in * k * k)``. With the layer's block H of
    the Hessian, :func:`congruent` makes of it :math:`C^{1/2} H C^{1/2}` with
    :math:`C = W W^\top \otimes I`, whose trace is
    :math:`\sum_{s,s'} \langle w_s, w_{s'}\rangle \operatorname{tr} H_{ss'}`.

    Costs one singular value decomposition of the weight, in float64, and two products with
    its left vectors for each use.

    Args:
        weight: The layer's weight, of P entries; a vector is taken for one neuron's.
        axis: The axis of the neurons.

    Raises:
        ShapeError: If there is no such axis.
        OperatorError: If the weight is not finite.

    Example:
        >>> root = gram_root(torch.tensor([[3.0, 4.0]]))  # one neuron, of norm 5
        >>> root(torch.eye(2)).tolist()
        [[5.0, 0.0], [0.0, 5.0]]
    """
    if weight.ndim < 2:
        weight = weight.reshape(1, -1)
    if not 0 <= axis < weight.ndim:
        raise ShapeError(
            f"Expected `axis` to be one of the weight's {weight.ndim} axes. Got {axis}."
        )
    shape, size = weight.shape, weight.numel()
    W = weight.detach().double().movedim(axis, 0).flatten(1)
    if not bool(torch.isfinite(W).all()):
        raise OperatorError("Expected a finite weight. Got NaN or inf in it.")
    U, s, _ = torch.linalg.svd(W, full_matrices=False)

    def root(V: Tensor) -> Tensor:
        if V.ndim != 2 or V.shape[0] != size:
            raise ShapeError(f"Expected vectors of shape ({size}, K). Got {tuple(V.shape)}.")
        u, scale = U.to(V.dtype), s.to(V.dtype)[:, None]
        rows = V.T.reshape(-1, *shape).movedim(axis + 1, 1)
        flat = rows.flatten(2)
        turned = (u @ (scale * (u.T @ flat))).reshape(rows.shape)
        product: Tensor = turned.movedim(1, axis + 1).reshape(len(rows), size).T
        return product

    return root
