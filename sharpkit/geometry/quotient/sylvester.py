r"""The equation :math:`AX + XA = B` at a diagonal A, with all its derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["solve_sylvester"]


class _Solve(torch.autograd.Function):
    """The solution as a function of A and B; its derivatives solve the same equation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, B: Tensor, sums: Tensor) -> Tensor:
        del A  # diagonal; only its derivatives see more of it
        return B / sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        A, _, sums = inputs
        ctx.save_for_backward(A, output, sums)
        ctx.save_for_forward(A, output, sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        A, X, sums = ctx.saved_tensors
        Y: Tensor = _Solve.apply(A.mT, grads[0], sums)  # type: ignore[no-untyped-call]
        return -(Y @ X.mT + X.mT @ Y), Y, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        A, X, sums = ctx.saved_tensors
        dA, dB, _ = tangents
        right = torch.zeros_like(X) if dB is None else dB
        if dA is not None:
            right = right - dA @ X - X @ dA
        out: Tensor = _Solve.apply(A, right, sums)  # type: ignore[no-untyped-call]
        return out


def solve_sylvester(A: Tensor, B: Tensor, diagonal: Tensor) -> Tensor:
    r"""Return the X ``[..., h, h]`` with :math:`AX + XA = B`.

    At :math:`A = \mathrm{diag}(d)`, :math:`X_{ij} = B_{ij}/(d_i + d_j)`. Derivatives of every
    order are those of the solution for a general A: with respect to B the adjoint equation,
    to A :math:`-(YX^\top + X^\top Y)`. No gaps between eigenvalues enter them, so that equal
    ones do no harm.

    Args:
        A: ``[..., h, h]``, diagonal up to rounding.
        B: ``[..., h, h]``; axes in front of those of A are allowed.
        diagonal: d, ``[..., h]``, positive; taken as constant.
    """
    sums = (diagonal[..., :, None] + diagonal[..., None, :]).detach()
    shape = max(A.shape, B.shape, key=len)
    A, B, sums = A.expand(shape), B.expand(shape), sums.expand(shape)
    out: Tensor = _Solve.apply(A, B, sums)  # type: ignore[no-untyped-call]
    return out
