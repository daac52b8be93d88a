"""Hessian-vector products of one batch, by each of the ways that autograd offers.

Costs in gradients of the same batch (G), for K columns: kept graph 2K, rebuilt double
backward 1 + 2K, forward over reverse about 4K, central differences 4K (two steps each).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sharpkit.errors import ObjectiveError

__all__ = [
    "GradientGraph",
    "central_difference",
    "double_backward",
    "flat_gradient",
    "forward_over_reverse",
    "gradient_graph",
    "gradients",
    "saved_bytes",
]

Named: TypeAlias = dict[str, Tensor]
LossOf: TypeAlias = Callable[[Named], Tensor]

CENTRAL_TOLERANCE = 1e-2  # relative disagreement of the two steps that is still accepted


def flat(parts: Sequence[Tensor | None], like: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return gradients as one vector; ``None`` (an unused parameter) becomes zeros."""
    return torch.cat(
        [
            like[i].new_zeros(like[i].numel(), dtype=dtype)
            if part is None
            else _dense(part.detach()).reshape(-1).to(dtype)
            for i, part in enumerate(parts)
        ]
    )


def _dense(part: Tensor) -> Tensor:
    return part if part.layout == torch.strided else part.to_dense()  # nn.Embedding(sparse=True)


def columns(V: Tensor, theta: Named) -> list[list[Tensor]]:
    """Return each column of ``V [P, K]`` as tensors of the parameters' shapes and dtypes."""
    sizes = [t.numel() for t in theta.values()]
    return [
        [
            piece.view(t.shape).to(t.dtype)
            for piece, t in zip(
                torch.split(column.contiguous(), sizes), theta.values(), strict=True
            )
        ]
        for column in V.unbind(dim=1)
    ]


def flat_gradient(loss: Tensor, theta: Named, dtype: torch.dtype) -> tuple[Tensor, list[bool]]:
    """Return the gradient ``[P]`` and which parameters the loss uses."""
    grads = gradients(loss, theta)
    return flat(grads, list(theta.values()), dtype), [g is not None for g in grads]


def gradients(loss: Tensor, theta: Named) -> Sequence[Tensor | None]:
    """Return the gradient by each parameter; None for those that the loss does not use."""
    if not loss.requires_grad:  # the batch says nothing about these parameters
        return [None] * len(theta)
    grads: Sequence[Tensor | None]
    grads = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
    return grads


@dataclass
class GradientGraph:
    """The gradient of a batch with its graph, ready to be differentiated again."""

    grads: list[Tensor]  # only those that depend on theta
    index: list[int]  # which parameter each of them belongs to
    used: list[bool]


def gradient_graph(loss: Tensor, theta: Named) -> GradientGraph:
    """Differentiate once and keep the graph."""
    if not loss.requires_grad:
        return GradientGraph([], [], [False] * len(theta))
    grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True, allow_unused=True)
    index = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
    return GradientGraph(
        [grads[i] for i in index],
        index,
        [g is not None for g in grads],
    )


def double_backward(
    graphs: Sequence[GradientGraph], theta: Named, V: Tensor, *, keep: bool
) -> Tensor:
    """Return the sum of the graphs' ``H V [P, K]``; one engine call a column.

    Args:
        graphs: Gradients of batches at ``theta``.
        theta: The leaves that the graphs were built on.
        V: Vectors ``[P, K]``.
        keep: Whether the graphs are needed again.
    """
    like = list(theta.values())
    outputs = [g for graph in graphs for g in graph.grads]
    if not outputs:  # the gradient does not depend on theta: a linear loss
        return torch.zeros_like(V)
    products = V.new_empty(V.shape[1], V.shape[0])  # rows: each column in one piece
    vectors = columns(V, theta)
    for k in range(len(vectors)):
        vector, vectors[k] = vectors[k], []  # freed as soon as it is used
        weights = [vector[i] for graph in graphs for i in graph.index]
        parts = torch.autograd.grad(
            outputs,
            like,
            grad_outputs=weights,
            retain_graph=keep or k + 1 < len(vectors),
            allow_unused=True,
        )
        products[k] = flat(parts, like, V.dtype)
    return products.T


def forward_over_reverse(loss_of: LossOf, theta: Named, V: Tensor) -> Tensor:
    """Return ``H V [P, K]`` by forward-mode derivatives of the gradient."""
    gradient = torch.func.grad(loss_of)
    primal = {n: t.detach() for n, t in theta.items()}
    like = list(primal.values())
    products = []
    for vector in columns(V, theta):
        tangent = dict(zip(primal, vector, strict=True))
        product = torch.func.jvp(gradient, (primal,), (tangent,))[1]
        products.append(flat(list(product.values()), like, V.dtype))
    return torch.stack(products).T  # columns are contiguous: what vectors are made of


def central_difference(
    gradient_at: Callable[[Tensor], Tensor], theta: Tensor, v: Tensor
) -> tuple[Tensor, float]:
    r"""Return :math:`(g(\theta+hv) - g(\theta-hv)) / 2h` and its estimated error.

    The same at the step :math:`2h` tells how far the quotient can be trusted; where the
    two disagree (kinks of ReLU networks, noise), the quotient is refused.

    Args:
        gradient_at: The gradient as a function of the flat parameters.
        theta: Parameters ``[P]``.
        v: Direction ``[P]``.

    Returns:
        The product ``[P]`` and the relative difference of the two steps.

    Raises:
        ObjectiveError: If the two steps disagree by more than 1%.
    """
    width = central_step(theta, v, torch.finfo(theta.dtype).eps ** (1 / 3))
    if width == 0:
        return torch.zeros_like(v), 0.0
    near, far = (quotient(gradient_at, theta, v, h) for h in (width, 2 * width))
    relative = disagreement(near, far)
    if not relative <= CENTRAL_TOLERANCE:  # also catches NaN
        raise ObjectiveError(
            "Expected the central difference at two step sizes to agree within"
            f" {CENTRAL_TOLERANCE:.0%}. They differ by {relative:.0%}: the loss is not"
            " smooth at this scale (ReLU kinks or round-off). Measure in float64"
            " (dtype=torch.float64), or use operations with second derivatives."
        )
    return near, relative


def central_step(theta: Tensor, v: Tensor, fraction: float) -> float:
    """Return the h at which h*v is, as a root mean square, a fraction of theta; 0 if v is."""
    length = float(v.norm())
    if length == 0:
        return 0.0
    scale = float(theta.norm()) / theta.numel() ** 0.5 or 1.0
    return float(fraction * (scale + 1e-3) * theta.numel() ** 0.5 / length)


def quotient(
    function: Callable[[Tensor], Tensor], theta: Tensor, v: Tensor, width: float
) -> Tensor:
    """Return the central difference quotient of a function of the flat parameters."""
    return (function(theta + width * v) - function(theta - width * v)) / (2 * width)


def disagreement(a: Tensor, b: Tensor) -> float:
    """Return the distance of two vectors, relative to the longer one."""
    size = max(float(a.norm()), float(b.norm()))
    return float((a - b).norm()) / size if size > 0 else 0.0


class saved_bytes:  # noqa: N801  (a context, used like a function)
    """Count the bytes that autograd keeps for graphs built inside, except for ``owned``."""

    def __init__(self, owned: Sequence[Tensor] = ()):
        self._seen = {t.untyped_storage().data_ptr() for t in owned if t.layout == torch.strided}
        self._keep: list[Tensor] = []  # alive until the end, so that no address comes twice
        self.total = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self._keep.append(tensor.detach())
                self.total += storage.nbytes()
        # Detached: a node that holds its own output with its history is never freed.
        return tensor.detach()

    def __enter__(self) -> saved_bytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)
        self._keep.clear()
        self._seen.clear()
