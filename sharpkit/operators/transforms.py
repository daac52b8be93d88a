"""Operators made of others: in other coordinates, shifted, deflated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit.errors import OperatorError, ShapeError
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.optimizer_state import OptimizerState
from sharpkit.parameters import ParameterSpace

__all__ = [
    "adam_diagonal",
    "adam_preconditioned",
    "adaptive",
    "deflated",
    "edge_of_stability",
    "preconditioned",
    "scaled",
    "shifted",
]


def scaled(A: SymmetricOperator, scale: Tensor) -> SymmetricOperator:
    """Return ``diag(s) A diag(s)``; a zero of s freezes its coordinate.

    Args:
        A: The operator.
        scale: ``s [P]``.

    Raises:
        ShapeError: If s does not have shape ``[P]``.
        OperatorError: If s is not finite.

    Example:
        >>> A = SymmetricOperator.wrap(torch.ones(2, 2))
        >>> scaled(A, torch.tensor([2.0, 0.0])).to_dense().tolist()
        [[4.0, 0.0], [0.0, 0.0]]
    """
    s = _vector(A, scale, "scale")[:, None]
    return _made_of(A, lambda V: s * (A @ (s * V)))


def adaptive(A: SymmetricOperator, theta: Tensor) -> SymmetricOperator:
    r"""Return ``diag|theta| A diag|theta|``, whose top eigenvalue is adaptive sharpness.

    .. math:: \lambda_{\max} = \max_{\|\delta / |\theta|\| \le 1} \delta^\top A \delta

    after Kwon et al. 2021 (arXiv:2102.11600), element by element. Parameters that are
    zero do not move.

    Args:
        A: The operator.
        theta: The parameters ``[P]``, such as ``objective.theta``.

    Raises:
        ShapeError: If theta does not have shape ``[P]``.
        OperatorError: If theta is not finite.

    Example:
        >>> A = SymmetricOperator.wrap(torch.ones(2, 2))
        >>> adaptive(A, torch.tensor([-2.0, 3.0])).to_dense().tolist()
        [[4.0, 6.0], [6.0, 9.0]]
    """
    return scaled(A, _vector(A, theta, "theta").abs())


def preconditioned(A: SymmetricOperator, diagonal: Tensor) -> SymmetricOperator:
    """Return ``D^{-1/2} A D^{-1/2}``, whose eigenvalues are those of ``D^{-1} A``.

    Args:
        A: The operator.
        diagonal: The diagonal of D, ``[P]``, positive.

    Raises:
        ShapeError: If the diagonal does not have shape ``[P]``.
        OperatorError: If an entry is not positive and finite.

    Example:
        >>> A = SymmetricOperator.wrap(torch.ones(2, 2))
        >>> preconditioned(A, torch.tensor([4.0, 1.0])).to_dense().tolist()
        [[0.25, 0.5], [0.5, 1.0]]
    """
    D = _vector(A, diagonal, "diagonal")
    if not bool((D > 0).all()):
        raise OperatorError(
            f"Expected a positive diagonal. {int((D <= 0).sum())} of its {A.dim} entries are"
            f" not, the lowest is {float(D.min()):.3g}. To freeze coordinates use scaled(A, s)"
            " with zeros in s."
        )
    return scaled(A, D.rsqrt())


def shifted(A: SymmetricOperator, sigma: float) -> SymmetricOperator:
    """Return ``A + sigma I``.

    Example:
        >>> shifted(SymmetricOperator.wrap(torch.zeros(2, 2)), 3.0).to_dense().tolist()
        [[3.0, 0.0], [0.0, 3.0]]
    """
    if not math.isfinite(sigma):
        raise OperatorError(f"Expected a finite shift. Got {sigma}.")
    return _made_of(A, lambda V: A @ V + float(sigma) * V)


def deflated(A: SymmetricOperator, Q: Tensor) -> SymmetricOperator:
    """Return ``(I - Q Q^T) A (I - Q Q^T)``, which is A without the directions of Q.

    Args:
        A: The operator.
        Q: Orthonormal columns ``[P, q]``.

    Raises:
        ShapeError: If Q does not have shape ``[P, q]``.
        OperatorError: If its columns are not orthonormal up to rounding.

    Example:
        >>> A = SymmetricOperator.wrap(torch.ones(2, 2))
        >>> deflated(A, torch.eye(2)[:, :1]).to_dense().tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    if Q.ndim != 2 or Q.shape[0] != A.dim:
        raise ShapeError(f"Expected Q of shape ({A.dim}, q). Got {tuple(Q.shape)}.")
    given = Q.detach().to(A.device)
    Q = given.to(A.dtype)
    eps = max(torch.finfo(t.dtype).eps for t in (given, Q) if t.is_floating_point())
    gap = (Q.T @ Q - torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)).abs()
    worst = float(gap.max()) if gap.numel() else 0.0
    if not worst <= eps**0.75:
        raise OperatorError(
            f"Expected orthonormal columns. Q^T Q differs from the identity by {worst:.1e}."
            " Use torch.linalg.qr(Q).Q."
        )

    def project(V: Tensor) -> Tensor:
        for _ in range(2):  # the second time takes what rounding left
            V = V - Q @ (Q.T @ V)
        return V

    return _made_of(A, lambda V: project(A @ project(V)))


# -- Adam --------------------------------------------------------------------------------


def adam_diagonal(space: ParameterSpace, model: nn.Module, optimizer: object) -> Tensor:
    r"""Return the diagonal ``[P]`` by which Adam's next step divides its momentum.

    .. math:: P_t = (1 - \beta_1^t) \left[\sqrt{v_t / (1 - \beta_2^t)} + \epsilon\right]

    after Cohen et al. 2022 (arXiv:2207.14484), with ``max v`` in place of v for AMSGrad:
    torch's step is :math:`\theta \leftarrow \theta - \eta P_t^{-1} m_t`. Weight decay has
    no part in it.

    Args:
        space: Of the parameters, such as ``objective.space``.
        model: The module that the optimizer trains.
        optimizer: ``torch.optim.Adam`` or ``AdamW`` after at least one step, or its
            ``state_dict()``.

    Raises:
        OperatorError: If it is another optimizer, another model's, or has no state yet.
    """
    return OptimizerState.of(optimizer, model).adam_diagonal(space)


def adam_preconditioned(
    A: SymmetricOperator, space: ParameterSpace, model: nn.Module, optimizer: object
) -> SymmetricOperator:
    r"""Return ``P^{-1/2} A P^{-1/2}`` with Adam's :func:`adam_diagonal` P.

    Of the Hessian, the top eigenvalue is the preconditioned sharpness of Cohen et al. 2022
    (arXiv:2207.14484), to be compared with :func:`edge_of_stability`.

    Args:
        A: The operator, in the given parameters.
        space: Of the parameters, such as ``objective.space``.
        model: The module that the optimizer trains.
        optimizer: ``torch.optim.Adam`` or ``AdamW`` after at least one step, or its
            ``state_dict()``.

    Raises:
        ShapeError: If the space is not that of A.
        OperatorError: As for :func:`adam_diagonal`.
    """
    return preconditioned(A, adam_diagonal(space, model, optimizer))


def edge_of_stability(optimizer: object) -> float:
    r"""Return the preconditioned curvature above which Adam's steps oscillate and grow.

    .. math:: \frac{2 + 2\beta_1}{(1 - \beta_1)\,\eta} \quad (= 38/\eta \text{ at } \beta_1 = 0.9)

    for a fixed preconditioner on a quadratic, full batch, without weight decay (Cohen et
    al. 2022, arXiv:2207.14484).

    Args:
        optimizer: ``torch.optim.Adam`` or ``AdamW``, or the :class:`OptimizerState` of one.

    Raises:
        OperatorError: For other optimizers, a learning rate of zero, and groups of parameters
            that differ in learning rate or beta1.

    Example:
        >>> optimizer = torch.optim.Adam([torch.zeros(1)], lr=0.5, betas=(0.5, 0.9))
        >>> edge_of_stability(optimizer)
        12.0
    """
    found = {(float(g["lr"]), float(g["betas"][0])) for g in _adam_groups(optimizer)}
    if len(found) != 1:
        shown = ", ".join(f"lr={lr:g} and beta1={beta1:g}" for lr, beta1 in sorted(found))
        raise OperatorError(
            f"Expected one learning rate and one beta1. The groups have {shown}: they have no"
            " common threshold. Restrict the operator to one group, and compute its own."
        )
    ((lr, beta1),) = found
    if lr <= 0:
        raise OperatorError(f"Expected a positive learning rate. Got {lr:g}.")
    return (2 + 2 * beta1) / ((1 - beta1) * lr)


def _adam_groups(optimizer: object) -> Sequence[Mapping[str, Any]]:
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return optimizer.param_groups
    if isinstance(optimizer, OptimizerState) and optimizer.adam:
        return optimizer.groups
    kind = optimizer.kind if isinstance(optimizer, OptimizerState) else type(optimizer).__name__
    raise OperatorError(
        f"Expected a torch.optim.Adam or AdamW. Got {kind}, whose threshold is another one."
    )


def _vector(A: SymmetricOperator, vector: Tensor, name: str) -> Tensor:
    if vector.shape != (A.dim,):
        raise ShapeError(f"Expected `{name}` of shape ({A.dim},). Got {tuple(vector.shape)}.")
    vector = vector.detach().to(A.device, A.dtype)
    if not bool(torch.isfinite(vector).all()):
        raise OperatorError(f"Expected a finite `{name}`. Got NaN or inf in it.")
    return vector


def _made_of(A: SymmetricOperator, matmat: Callable[[Tensor], Tensor]) -> SymmetricOperator:
    return SymmetricOperator(matmat, A.dim, dtype=A.dtype, device=A.device, team=A.team)
