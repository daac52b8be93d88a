r"""Geodesics of the two metrics to the end: a closed form, and an integration.

Both are meant for points in the balanced gauge, where rounding is least; neither needs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sharpkit.errors import MeasureError
from sharpkit.geometry.quotient.pair import Pair

__all__ = ["exact_crossed", "exact_inverse"]


def exact_inverse(G: Tensor, xi: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return end and velocity at time 1 of a geodesic of one factor in the inverse Gram metric.

    The map :math:`Q \mapsto QG` is a Riemannian submersion from GL(n) with the right-invariant
    metric :math:`\|\dot QQ^{-1}\|_F`, whose geodesics are known (Martin and Neff,
    arXiv:1409.7849): with :math:`W = \xi M^{-1}G^\top`,

    .. math:: G(t) = e^{t(W - W^\top)}\,e^{tW^\top}G

    which stays in the columns of G and xi. With :math:`G = QC^\top`, :math:`C` the Cholesky
    factor of :math:`M`, and :math:`\zeta = \xi C^{-\top}`, :math:`S = \zeta^\top Q`,

    .. math::
        G(t) = \begin{pmatrix}Q & \zeta\end{pmatrix}
            \exp t\begin{pmatrix}-S & -\zeta^\top\zeta\\ I & S^\top\end{pmatrix}
            \begin{pmatrix}I\\0\end{pmatrix}\,e^{tS}\,C^\top.

    Args:
        G: ``[..., n, h]``, of full column rank.
        xi: The velocity, ``[..., n, h]``.

    Cost: ``O(n h^2)`` and matrix exponentials of sizes 2h and h a head.
    """
    h = G.shape[-1]
    C = torch.linalg.cholesky(G.mT @ G)
    Q, zeta = (
        torch.linalg.solve_triangular(C.mT, part, upper=True, left=False) for part in (G, xi)
    )
    Q = Q.expand_as(zeta)
    S = zeta.mT @ Q
    eye = torch.eye(h, dtype=G.dtype, device=G.device).expand_as(S)
    K = torch.cat(
        [torch.cat([-S, -zeta.mT @ zeta], dim=-1), torch.cat([eye, S.mT], dim=-1)], dim=-2
    )
    first = torch.linalg.matrix_exp(K)[..., :h]
    basis = torch.cat([Q, zeta], dim=-1)
    last = torch.linalg.matrix_exp(S) @ C.mT
    return basis @ (first @ last), basis @ ((K @ first + first @ S) @ last)


# Dormand and Prince 1980: the stages, and the weights of fifth minus fourth order.
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_SHORTEST = 1e-6  # of the whole time; a geodesic that needs shorter steps has met its end
_FIRST = 0.1


def exact_crossed(pair: Pair, xi: Pair, tolerance: float | None = None) -> tuple[Pair, Pair]:
    r"""Return end and velocity at time 1 of a geodesic of the crossed Gram metric.

    The acceleration is a combination of the columns of G and :math:`\xi_G` (of H and
    :math:`\xi_H`), so that :math:`G(t) = (G\ \xi_G)K_G(t)`: what is integrated are matrices
    ``[2h, h]``, with the method of Dormand and Prince (1980) of orders 5 and 4 and steps of
    each head's own. The graph holds the accepted steps; their lengths are constants.

    Args:
        pair: The start, of full column rank.
        xi: The velocity; more leading axes are allowed.
        tolerance: The largest error of a step in position and velocity, in the metric of the
            start, relative to the speed. None: 1e-11 in float64, 1e-6 in float32. The error
            at the end was below that times the length wherever it was compared; it can grow
            near the end of a geodesic.

    Cost: ``O((n + m) h^2)`` a head once, then 6 evaluations of ``O(h^3)`` a step; three
    transfers of a boolean to the host a step.

    Raises:
        MeasureError: If a geodesic ends before time 1.
    """
    if tolerance is None:
        tolerance = 1e-11 if pair.G.dtype == torch.float64 else 1e-6
    h = pair.G.shape[-1]
    bases = [torch.cat([at.expand_as(v), v], dim=-1) for at, v in zip(pair, xi, strict=True)]
    gram = torch.stack([basis.mT @ basis for basis in bases], dim=-3)
    eye = torch.eye(2 * h, dtype=gram.dtype, device=gram.device)
    start = torch.stack([eye[:, :h], eye[:, :h], eye[:, h:], eye[:, h:]])
    state = _integrate(start.expand(*gram.shape[:-3], 4, 2 * h, h), gram, tolerance)
    K = state.unbind(-3)
    return (
        Pair(bases[0] @ K[0], bases[1] @ K[1]),
        Pair(bases[0] @ K[2], bases[1] @ K[3]),
    )


def _slope(state: Tensor, gram: Tensor) -> Tensor:
    """Return the derivative of positions and velocities ``[..., (G, H, dG, dH), 2h, h]``."""
    at, v = state[..., :2, :, :], state[..., 2:, :, :]
    pulled = gram @ at
    cross = v.mT @ pulled
    # NaN, which makes the step fail, where a trial has left the full rank.
    C, failed = torch.linalg.cholesky_ex(at.mT @ pulled)
    C = torch.where((failed != 0)[..., None, None], torch.nan, C)
    turn = v @ (cross + cross.mT).flip(-3) - at @ (v.mT @ (gram @ v)).flip(-3)
    bend = torch.cholesky_solve(turn.mT, C.flip(-3)).mT
    return torch.cat([v, -bend], dim=-3)


def _step(state: Tensor, slope: Tensor, gram: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the state after a step, the slope there, and the estimated error."""
    over = dt[..., None, None, None]
    slopes = [slope]
    new = state
    for row in _STAGES:
        new = state + over * sum(a * k for a, k in zip(row, slopes, strict=True) if a)
        slopes.append(_slope(new, gram))
    error = sum(e * k for e, k in zip(_ERROR, slopes, strict=True) if e)
    return new, slopes[-1], (over * error).detach()


def _integrate(state: Tensor, gram: Tensor, tolerance: float) -> Tensor:
    """Return the state at time 1."""
    h = state.shape[-1]
    with torch.no_grad():
        # The metric of the start, [..., (G, H), h, h], and the speed in it, [...].
        weight = gram[..., :h, :h].flip(-3)

        def sizes(part: Tensor) -> Tensor:
            square = (weight * (part.mT @ (gram @ part))).sum((-3, -2, -1))
            return square.clamp_min(0).sqrt()  # NaN stays

        speed = sizes(state[..., 2:, :, :])
        allowed = torch.where(speed > 0, tolerance * speed, 1)
        done = torch.zeros_like(speed)
        dt = torch.where(speed > 0, _FIRST, 1.0).to(speed.dtype)
    slope = _slope(state, gram)
    while True:
        new, ahead, error = _step(state, slope, gram, dt)
        with torch.no_grad():
            largest = torch.maximum(sizes(error[..., :2, :, :]), sizes(error[..., 2:, :, :]))
            ratio = largest / allowed
            kept = ratio <= 1
            every = bool(kept.all())
        if not every:
            taken = torch.where(kept, dt, 0)
            new, ahead, _ = _step(state, slope, gram, taken)
        with torch.no_grad():
            # Step lengths are the same whatever other heads need.
            factor = (0.9 * ratio.clamp_min(1e-10).pow(-0.2)).clamp(0.2, 5.0)
            factor = torch.where(torch.isfinite(ratio), factor, 0.2)
            done = torch.where(kept, done + dt, done)
            left = 1 - done
            dt = torch.where(left > dt * 1e-6, torch.minimum(dt * factor, left), 0)
            lost = (dt > 0) & (dt < _SHORTEST) & (dt < left)
            if bool(lost.any()):
                raise MeasureError(
                    "Expected a geodesic that lasts until the asked time. Got one that loses "
                    f"column rank right after the fraction {float(done[lost].min()):.4g} of it. "
                    "Use a smaller radius, or order=2."
                )
            if not bool((dt > 0).any()):
                return new
        state, slope = new, ahead
