"""The mean rise of a function under random perturbations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sharpkit.errors import MeasureError, SettingsError
from sharpkit.estimators.ascent import Norm, check_norm
from sharpkit.estimators.protocol import check_positive
from sharpkit.results import Cost, Estimate

__all__ = ["average_rise", "perturbation"]


def perturbation(like: Tensor, norm: Norm, generator: torch.Generator) -> Tensor:
    """Return z with entries from N(0, 1) for l2, or uniform on [-1, 1] for linf."""
    if norm == "l2":
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    z = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return 2 * z - 1


def average_rise(
    function: Callable[[Tensor], float],
    *,
    start_value: float,
    like: Tensor,
    rho: float,
    norm: Norm,
    num_pairs: int,
    generator: torch.Generator,
) -> Estimate:
    r"""Estimate ``E f(z) - f(0)`` for random z in pairs ``z, -z``.

    For ``"l2"`` z is :math:`N(0, \rho^2 I)` (rho is the standard deviation of an entry,
    not the length of z), for ``"linf"`` uniform on :math:`[-\rho, \rho]^P`. A pair cancels
    every odd term of the function, so the error is that of the curvature alone.

    Args:
        function: Maps ``z [P]`` to a number.
        start_value: The function at 0.
        like: A vector with the shape, dtype and device of z.
        rho: Scale of the perturbation.
        norm: ``"l2"`` or ``"linf"``.
        num_pairs: Pairs to draw, at least 2.
        generator: Source of z.

    Raises:
        SettingsError: If a setting is out of range.
        MeasureError: If the function is not finite at some draws, as its mean then is not.

    Example:
        >>> e = average_rise(lambda z: float(z @ z), start_value=0.0, like=torch.zeros(50),
        ...     rho=1.0, norm="l2", num_pairs=200, generator=torch.Generator().manual_seed(0))
        >>> abs(e.value - 50) < 3 * e.probe_error
        True
    """
    check_norm(norm, ("l2", "linf"))
    check_positive("rho", rho)
    if num_pairs < 2:
        raise SettingsError(
            f"Expected `num_pairs` to be at least 2, to give an error. Got {num_pairs}."
        )
    rises, bad = [], 0
    for _ in range(num_pairs):
        z = perturbation(like, norm, generator)
        values = [function(rho * z), function(-rho * z)]
        bad += sum(not math.isfinite(v) for v in values)
        rises.append(sum(values) / 2 - start_value)
    if bad:
        raise MeasureError(
            f"Expected finite losses around the minimum. {bad} of {2 * num_pairs} perturbed"
            f" losses are not finite at rho={rho:g}, so their mean is not either. Use a"
            " smaller rho."
        )
    x = torch.tensor(rises, dtype=torch.float64, device="cpu")
    return Estimate(
        value=float(x.mean()),
        probe_error=float(x.std() / math.sqrt(num_pairs)),
        error_kind="stderr",
        cost=Cost(forwards=2 * num_pairs),
        details={"num_pairs": num_pairs},
    )
