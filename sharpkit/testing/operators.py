"""The check that an operator is a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpkit.operators import SymmetricOperator

__all__ = ["check_operator"]


def check_operator(operator: SymmetricOperator, dense: Tensor, *, tolerance: float = 1e-9) -> None:
    """Assert that an operator is the dense matrix, symmetric, linear, and counts products.

    Args:
        operator: In float64 for the default tolerance.
        dense: The matrix ``[P, P]`` that it should be.
        tolerance: Relative to the size of the products.

    Raises:
        AssertionError: If it is not.
    """
    g = torch.Generator().manual_seed(0)
    V = torch.randn(operator.dim, 3, generator=g, dtype=torch.float64).to(operator.dtype)
    before = operator.num_matvecs
    AV = operator @ V
    assert operator.num_matvecs == before + 3, "the counter does not count columns"
    scale = float((dense.abs() @ V.abs().to(dense.dtype)).max()) or 1.0

    def same(a: Tensor, b: Tensor, what: str) -> None:
        gap = float((a - b).abs().max()) / scale
        assert gap <= tolerance, f"{what}: off by {gap:.1e} of the products' size"

    same(AV, dense.to(AV.dtype) @ V, "the products are not those of the dense matrix")
    same(operator @ V[:, 0], AV[:, 0], "a vector and a column differ")
    assert operator.num_matvecs == before + 4, "the counter does not count vectors"
    a, b = V[:, 0], V[:, 1]
    same(operator @ (2 * a - 3 * b), 2 * AV[:, 0] - 3 * AV[:, 1], "not linear")
    assert abs(float(a @ AV[:, 1]) - float(b @ AV[:, 0])) <= tolerance * scale * operator.dim, (
        "not symmetric"
    )
    if operator.device.type == "cpu":
        through_scipy = torch.as_tensor(operator.to_scipy() @ V.numpy())
        same(through_scipy, AV, "SciPy sees another matrix")
