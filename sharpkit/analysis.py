"""What measures of one objective share, each computed once."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharpkit.errors import MeasureError
from sharpkit.estimators import (
    Diagonal,
    Eigenpairs,
    Which,
    exact_diagonal,
    hutchinson_diagonal,
    lanczos,
)
from sharpkit.objective import Objective
from sharpkit.operators import SymmetricOperator, hessian

__all__ = ["Analysis"]

T = TypeVar("T")

ROUNDING = 8  # a loss is a chain of sums: a few eps of its size are lost


class Analysis:
    """The gradient, the Hessian and what was already computed of them.

    Args:
        objective: What is measured.
        seed: Seed of every random draw. Each purpose has its own stream, so a number does
            not depend on which other measures were asked for.
    """

    def __init__(self, objective: Objective, *, seed: int = 0):
        self.objective, self.seed = objective, seed
        self._memory: dict[tuple[Any, ...], Any] = {}

    def _once(self, key: tuple[Any, ...], compute: Callable[[], T]) -> T:
        if key not in self._memory:
            self._memory[key] = compute()
        value: T = self._memory[key]
        return value

    def generator(self, purpose: str) -> torch.Generator:
        """Return a fresh generator for a purpose, on the objective's device."""
        mixed = (self.seed * 0x9E3779B1 + zlib.crc32(purpose.encode())) % 2**63
        return torch.Generator(self.objective.space.device).manual_seed(mixed)

    @property
    def value(self) -> float:
        """L(theta)."""
        return self._value_and_gradient()[0]

    @property
    def gradient(self) -> Tensor:
        """The gradient, ``[P]``."""
        return self._value_and_gradient()[1]

    def _value_and_gradient(self) -> tuple[float, Tensor]:
        def compute() -> tuple[float, Tensor]:
            value, gradient = self.objective.value_and_gradient()
            if not bool(torch.isfinite(gradient).all()):
                raise MeasureError(
                    "Expected a finite gradient. Got NaN or inf. Look for sqrt(0) or norms"
                    " of zero in the model and the loss."
                )
            return float(value), gradient

        return self._once(("value_and_gradient",), compute)

    @property
    def hessian(self) -> SymmetricOperator:
        """The Hessian as an operator."""
        return self._once(("hessian",), lambda: hessian(self.objective))

    def eigenpairs(self, *, k: int, which: Which, tol: float, max_matvecs: int) -> Eigenpairs:
        """Return extreme eigenpairs of the Hessian; the same settings are computed once."""
        return self._once(
            ("eigenpairs", k, which, tol, max_matvecs),
            lambda: lanczos(
                self.hessian,
                k=k,
                which=which,
                tol=tol,
                max_matvecs=max_matvecs,
                generator=self.generator("lanczos"),
            ),
        )

    def diagonal(self, *, method: str, num_probes: int) -> Diagonal:
        """Return the Hessian's diagonal; ``"auto"`` is exact if that takes no more probes."""
        exact = method == "exact" or (method == "auto" and self.objective.space.dim <= num_probes)
        if exact:
            return self._once(("diagonal",), lambda: exact_diagonal(self.hessian))
        return self._once(
            ("diagonal", num_probes),
            lambda: hutchinson_diagonal(
                self.hessian, num_probes=num_probes, generator=self.generator("diagonal")
            ),
        )

    def loss_at(self, delta: Tensor) -> float:
        """Return ``L(theta + delta)``; it may be inf or NaN."""
        return float(self.objective.at(self.theta + delta).value())

    def loss_and_gradient_at(self, delta: Tensor) -> tuple[float, Tensor]:
        """Return the value and the gradient ``[P]`` at ``theta + delta``."""
        value, gradient = self.objective.at(self.theta + delta).value_and_gradient()
        return float(value), gradient

    @property
    def theta(self) -> Tensor:
        """The parameters, ``[P]``."""
        return self._once(("theta",), lambda: self.objective.theta)

    def rounding(self, *losses: float) -> float:
        """Return the rounding level of a difference of these losses in the model's dtype."""
        eps = torch.finfo(self.objective.model_dtype).eps
        return ROUNDING * eps * sum(abs(loss) for loss in losses)
