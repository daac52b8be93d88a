"""Symmetric matrices that are known only through their products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from sharpkit.errors import OperatorError, ShapeError
from sharpkit.team import SOLO, Team

__all__ = ["SymmetricOperator"]


class SymmetricOperator:
    """A symmetric matrix ``A`` of size ``[P, P]``, given by ``V -> A V``.

    Args:
        matmat: Maps ``V [P, K]`` to ``A V [P, K]``.
        dim: The size P.
        dtype: Dtype of vectors.
        device: Where vectors live.
        team: The ranks that all compute the same products; they share out a basis.

    Attributes:
        num_matvecs: Products done so far, counted by columns.

    Example:
        >>> D = torch.diag(torch.tensor([1.0, 2.0]))
        >>> A = SymmetricOperator(lambda V: D @ V, 2)
        >>> (A @ torch.ones(2)).tolist(), A.num_matvecs
        ([1.0, 2.0], 1)
    """

    def __init__(
        self,
        matmat: Callable[[Tensor], Tensor],
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        team: Team = SOLO,
    ):
        self._matmat, self.team = matmat, team
        self.dim, self.dtype, self.device = dim, dtype, torch.device(device)
        self.num_matvecs = 0

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        return (self.dim, self.dim)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return ``A v`` for ``v [P]``, or ``A V`` for ``V [P, K]``.

        Raises:
            ShapeError: If the first axis is not P.
            OperatorError: If the product is not finite.
        """
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.dim:
            raise ShapeError(
                f"Expected vectors of shape ({self.dim},) or ({self.dim}, K)."
                f" Got {tuple(vectors.shape)}."
            )
        V = vectors if vectors.ndim == 2 else vectors[:, None]
        self.num_matvecs += V.shape[1]
        product = self._matmat(V)
        if product.shape != V.shape:
            raise ShapeError(
                f"Expected a product of shape {tuple(V.shape)}. The operator returned"
                f" {tuple(product.shape)}."
            )
        if not bool(torch.isfinite(product).all()):
            raise OperatorError(
                "Expected finite matrix-vector products. Got NaN or inf: the second"
                " derivative overflows or does not exist here. Try dtype=torch.float64, and"
                " look for sqrt(0), log(0) or norms of zero in the model and the loss."
            )
        return product if vectors.ndim == 2 else product[:, 0]

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{type(self).__name__}({self.dim} x {self.dim}, {dtype}, {self.device})"

    @classmethod
    def from_matvec(
        cls,
        matvec: Callable[[Tensor], Tensor],
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> SymmetricOperator:
        """Return the operator of a function of one vector ``[P]``."""

        def matmat(V: Tensor) -> Tensor:
            return torch.stack([matvec(v) for v in V.unbind(dim=1)], dim=1)

        return cls(matmat, dim, dtype=dtype, device=device)

    @classmethod
    def wrap(cls, operator: Any) -> SymmetricOperator:
        """Return a symmetric operator for a dense matrix or another library's operator.

        Accepts a square tensor, a curvlinops operator, a hessian-eigenthings operator and
        anything else with a ``shape`` (or ``size``) and ``@`` or ``matvec``.

        Raises:
            OperatorError: If the object is none of these or is not square.
        """
        if isinstance(operator, cls):
            return operator
        shape = getattr(operator, "shape", None)
        size = getattr(operator, "size", None)
        if isinstance(shape, (tuple, torch.Size)) and len(shape) == 2:
            if shape[0] != shape[1]:
                raise OperatorError(f"Expected a square operator. Got shape {tuple(shape)}.")
            dim = int(shape[0])
        elif isinstance(size, int):
            dim = size
        else:
            raise OperatorError(
                "Expected a square tensor or an operator with `shape` or `size`. Got"
                f" {type(operator).__name__}. Use SymmetricOperator.from_matvec."
            )
        dtype = getattr(operator, "dtype", None)
        dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
        device = getattr(operator, "device", None)
        device = device if isinstance(device, (torch.device, str)) else "cpu"
        if isinstance(operator, Tensor):
            A = operator
            return cls(lambda V: A @ V, dim, dtype=dtype, device=A.device)
        if hasattr(operator, "__matmul__"):
            return cls(lambda V: operator @ V, dim, dtype=dtype, device=device)
        if callable(getattr(operator, "matvec", None)):
            return cls.from_matvec(operator.matvec, dim, dtype=dtype, device=device)
        raise OperatorError(
            f"Expected an operator with `@` or `matvec`. {type(operator).__name__} has neither."
        )

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """Return a SciPy ``LinearOperator`` on the CPU, in float32 or float64."""
        numpy_dtype = np.float64 if self.dtype == torch.float64 else np.float32

        def matmat(V: Any) -> Any:
            tensor = torch.as_tensor(np.ascontiguousarray(V), dtype=self.dtype, device="cpu")
            product = self @ tensor.to(self.device)
            return product.cpu().numpy().astype(numpy_dtype, copy=False)

        return scipy.sparse.linalg.LinearOperator(
            self.shape, matvec=matmat, rmatvec=matmat, matmat=matmat, dtype=numpy_dtype
        )

    def to_dense(self, *, block: int = 64) -> Tensor:
        """Return the matrix ``[P, P]``, at the price of P products."""
        eye = torch.eye(self.dim, dtype=self.dtype, device=self.device)
        return torch.cat([self @ piece for piece in torch.split(eye, block, dim=1)], dim=1)

    def check_symmetric(self, generator: torch.Generator, *, tolerance: float = 1e-3) -> float:
        """Return ``|u.Av - v.Au|`` relative to ``|Au|`` and ``|Av|``, for random normal u and v.

        Both are of the size of the Frobenius norm, of A's skew part and of A, whatever P.

        Costs two products.

        Raises:
            OperatorError: If it exceeds the tolerance.
        """
        u, v = torch.randn(2, self.dim, generator=generator, dtype=self.dtype, device=self.device)
        Au, Av = self @ u, self @ v
        scale = float(Av.norm() + Au.norm())
        gap = abs(float(u @ Av) - float(v @ Au)) / scale if scale > 0 else 0.0
        if gap > tolerance:
            raise OperatorError(
                f"Expected a symmetric operator. u.Av and v.Au differ by {gap:.1e} of their"
                f" size (allowed {tolerance:.0e}). Is the loss differentiated twice correctly?"
            )
        return gap
