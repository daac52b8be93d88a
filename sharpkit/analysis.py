"""What measures of one objective share, each computed once."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
PRODUCT = 30  # products lose a few eps of their size
NOISE = 6.0  # one random change of the last digits may be smaller than the rounding itself
DISTANCES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
DISTANCE_FUNCTIONS = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
SATURATED = 100  # a cross-entropy below so many eps is a difference of rounded numbers


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

    @property
    def noise(self) -> tuple[float, float]:
        """The rounding level of the loss and of the gradient (its norm), at theta.

        What a sum loses by cancellation cannot be read off the sum. The weights are moved
        by one unit of rounding at random, which changes the outputs about as much as the
        rounding of the forward pass does, and the change is taken: one gradient more.
        """

        def compute() -> tuple[float, float]:
            eps = torch.finfo(self.objective.model_dtype).eps
            signs = torch.randint(
                2, self.theta.shape, generator=self.generator("noise"), device=self.theta.device
            )
            last_digits = self.theta * (eps * (2 * signs - 1)).to(self.theta)
            value, gradient = self.loss_and_gradient_at(last_digits)
            g = self.gradient.double()
            change = float((gradient.double() - g).norm())
            steps = float((g * self.theta.double()).norm())
            loss = max(2 * eps * abs(self.value), abs(value - self.value), eps * steps)
            slope = max(change, eps * float(g.norm()))
            floor = eps if self._logarithmic else 0.0
            return max(NOISE * loss, floor / 4), max(NOISE * slope, 2 * floor)

        return self._once(("noise",), compute)

    @property
    def product_error(self) -> float:
        """How wrong Hessian-vector products are, relative: rounding, or what differences lose.

        To be read after the products, which find out how they can be computed.
        """
        eps = torch.finfo(self.objective.model_dtype).eps
        error = max(PRODUCT * eps, float(self.objective.hvp_error))
        if self._logarithmic:
            error = max(error, min(eps / abs(self.value), 1.0) if self.value else 1.0)
        return error

    @property
    def _logarithmic(self) -> bool:
        # Whether the loss may be a logarithm of probabilities near 1. These are rounded to
        # eps, and so are their logarithms and slopes, however small the loss is.
        criterion = self.objective.criterion
        return abs(self.value) < 1 and not (
            isinstance(criterion, DISTANCES) or criterion in DISTANCE_FUNCTIONS
        )

    @property
    def saturated(self) -> bool:
        """Whether the loss is a logarithm that its dtype can hardly tell from zero."""
        eps = torch.finfo(self.objective.model_dtype).eps
        return self._logarithmic and abs(self.value) < SATURATED * eps

    def saturation_note(self) -> tuple[str, ...]:
        """Return the sentence for a number of a saturated loss; empty if it is not."""
        if not self.saturated:
            return ()
        dtype = str(self.objective.model_dtype).removeprefix("torch.")
        return (
            f"The loss, {self.value:.1e}, is at the rounding level of {dtype}, and what depends"
            " on it may be rounding only. Measure with dtype=torch.float64.",
        )

    def rounding(self, *losses: float) -> float:
        """Return the rounding level of a difference of these losses in the model's dtype."""
        noise, here = self.noise[0], abs(self.value)
        # A loss near zero is a square or a logarithm of what was rounded: its rounding
        # grows like its root, one far from zero like itself.
        return sum(
            noise * max(1.0, math.sqrt(abs(loss) / here) if here > 0 else 1.0)
            + ROUNDING * torch.finfo(self.objective.model_dtype).eps * abs(loss)
            for loss in losses
        )
