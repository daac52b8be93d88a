"""Curvature matrices of an objective as symmetric operators."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sharpkit.objective import Objective
from sharpkit.operators.base import SymmetricOperator

__all__ = ["empirical_fisher", "ggn", "hessian", "mc_fisher"]


def hessian(objective: Objective) -> SymmetricOperator:
    r"""Return the Hessian :math:`\nabla^2 L(\theta)`, ``[P, P]``.

    Example:
        >>> import torch
        >>> data = (torch.eye(2), torch.zeros(2, 1))
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> hessian(Objective(model, torch.nn.MSELoss(), data)).to_dense().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return _operator(objective, objective.hvp)


def ggn(objective: Objective) -> SymmetricOperator:
    r"""Return the generalised Gauss-Newton matrix :math:`\frac1N\sum J^\top H_\ell J`."""
    return _operator(objective, objective.ggnvp)


def empirical_fisher(objective: Objective) -> SymmetricOperator:
    r"""Return :math:`\frac1N\sum_n g_n g_n^\top` of the example gradients."""
    return _operator(objective, objective.fisher_vp)


def mc_fisher(objective: Objective, num_samples: int = 1, seed: int = 0) -> SymmetricOperator:
    r"""Return the Fisher matrix with targets drawn from the model, whose mean is the GGN.

    .. math:: F = \frac1N\sum_n \tilde g_n \tilde g_n^\top

    Args:
        objective: With CrossEntropyLoss, MSELoss or BCEWithLogitsLoss.
        num_samples: Draws for each target.
        seed: Of the draws: one seed is one fixed matrix.
    """

    def matmat(V: Tensor) -> Tensor:
        return objective.mc_fisher_vp(V, num_samples=num_samples, seed=seed)

    return _operator(objective, matmat)


def _operator(objective: Objective, matmat: Callable[[Tensor], Tensor]) -> SymmetricOperator:
    space = objective.space
    return SymmetricOperator(
        matmat, space.dim, dtype=space.dtype, device=space.device, team=objective.team
    )
