"""Gauss quadratures of what is left of a matrix when its outliers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.estimators.basis import column_dots
from sharpkit.estimators.deflation import Locked
from sharpkit.estimators.krylov import tridiagonal
from sharpkit.estimators.protocol import Matrix, block_size, check_positive, random_signs
from sharpkit.results import Cost

__all__ = ["Quadrature", "deflated_quadrature"]

BASES = 2  # probes whose Lanczos vectors are handed out
FARTHEST = 1e6  # times the matrix: a node farther off has no weight left
REORTHOGONALIZE = 2**28  # bytes of vectors that short runs may keep to stay orthogonal


@dataclass(frozen=True)
class Quadrature:
    r"""Gauss quadratures of the deflated matrix, one from each probe.

    :math:`\operatorname{tr} f(A) \approx \sum_i f(\theta_i) + \frac1m\sum_p
    |z'_p|^2 \sum_j w_{pj} f(x_{pj})`, exact in the mean for polynomials of degree below
    twice the steps.

    Attributes:
        locked: The eigenvalues known.
        masses: :math:`|z'_p|^2` of each probe: about ``P - q``.
        alphas: Diagonals of the tridiagonal matrices, a row a probe.
        betas: Their off-diagonals; a last one, beyond the matrix, where the run could go on.
        dim: P.
        cost: Products.
        bases: Lanczos vectors of the first probes, each ``[steps, P]``, where they fit.
    """

    locked: Locked
    masses: np.ndarray
    alphas: tuple[np.ndarray, ...]
    betas: tuple[np.ndarray, ...]
    dim: int
    cost: Cost
    bases: tuple[Tensor, ...] = ()

    @property
    def floor(self) -> float:
        """The rounding level of eigenvalues."""
        return self.locked.floor

    def rules(
        self, steps: int | None = None, *, zero: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return nodes and weights of each probe; the weights sum to 1.

        Args:
            steps: Use only the first steps; None: all.
            zero: Put a node at zero (Gauss-Radau), where almost all eigenvalues of a
                network lie: a node beside it would count them all as curvature.
        """
        result = []
        for alphas, betas in zip(self.alphas, self.betas, strict=True):
            count = min(len(alphas), steps or len(alphas))
            diagonal, off = alphas[:count], betas[:count]
            last = _radau(diagonal, off) if zero and len(off) == count else None
            if last is None:
                nodes, S = tridiagonal(diagonal, off[: count - 1])
            else:
                nodes, S = tridiagonal(np.append(diagonal, last), off)
            result.append((nodes, S[0] ** 2))
        return result

    @property
    def num_steps(self) -> int:
        """The most steps of a probe."""
        return max((len(a) for a in self.alphas), default=0)

    def sums(
        self,
        function: Callable[[np.ndarray], np.ndarray],
        steps: int | None = None,
        *,
        zero: bool = False,
    ) -> np.ndarray:
        """Return each probe's estimate of ``tr f(A)``, ``[m]``; see :meth:`rules`."""
        known = float(function(self.locked.values).sum())
        rules = self.rules(steps, zero=zero)
        return np.array(
            [
                known + mass * float(weights @ function(nodes))
                for mass, (nodes, weights) in zip(self.masses, rules, strict=True)
            ]
        )

    def slopes(self, slope: Callable[[np.ndarray], np.ndarray], probe: int) -> np.ndarray:
        """Return ``f'(A') z`` as coefficients of a probe's basis, given the slope ``f'``."""
        steps = len(self.bases[probe])
        diagonal, off = self.alphas[probe][:steps].copy(), self.betas[probe][: steps - 1]
        if 1 < steps == len(self.betas[probe]):  # a run that ended by itself is exact as it is
            last = _radau(diagonal[:-1], off)
            diagonal[-1] = diagonal[-1] if last is None else last
        nodes, S = tridiagonal(diagonal, off)
        result: np.ndarray = S @ (slope(nodes) * S[0]) * math.sqrt(self.masses[probe])
        return result

    def extremes(self) -> tuple[float, float]:
        """Return the smallest and the largest value met."""
        rules = zip(self.masses, self.rules(), strict=True)
        values = np.concatenate([self.locked.values, *[x for mass, (x, _) in rules if mass > 0]])
        return float(values.min()), float(values.max())


def _radau(alphas: np.ndarray, betas: np.ndarray) -> float | None:
    # The last diagonal entry that gives the tridiagonal matrix an eigenvalue of zero (Golub
    # 1973, doi:10.1137/1015032); None if a node is there already.
    T = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    unit = np.zeros(len(alphas))
    unit[-1] = betas[-1] ** 2
    try:
        last = float(np.linalg.solve(T, unit)[-1])
    except np.linalg.LinAlgError:
        return None
    return last if abs(last) < FARTHEST * max(np.abs(T).max(), betas[-1]) else None


def deflated_quadrature(
    matrix: Matrix,
    locked: Locked,
    *,
    num_probes: int,
    num_steps: int,
    generator: torch.Generator,
) -> Quadrature:
    """Return Gauss quadratures of what is left beside the known eigenpairs.

    All probes go through a step together, so streamed data are read once a step. Vectors
    of a run stay orthogonal by reorthogonalization while they fit into 256 MB, and by the
    shortness of the runs beyond that.

    Args:
        matrix: The matrix ``A``.
        locked: What is projected out.
        num_probes: Random sign vectors, at least 2.
        num_steps: Lanczos steps of each.
        generator: Source of the signs.

    Raises:
        SettingsError: If there are fewer than two probes or no steps.
    """
    if num_probes < 2:
        raise SettingsError(
            f"Expected `num_probes` to be at least 2, to give an error. Got {num_probes}."
        )
    check_positive("num_steps", num_steps, minimum=1)
    before = matrix.num_matvecs
    masses: list[float] = []
    alphas: list[np.ndarray] = []
    betas: list[np.ndarray] = []
    steps = min(num_steps, matrix.dim - locked.size)
    bases: list[Tensor] = []
    while len(masses) < num_probes:
        Z = random_signs(matrix, min(block_size(matrix), num_probes - len(masses)), generator)
        run = _lockstep(matrix, locked, Z, steps, 0 if bases else BASES)
        masses += run[0]
        alphas += run[1]
        betas += run[2]
        bases = bases or run[3]
    cost = Cost(hvps=matrix.num_matvecs - before)
    return Quadrature(
        locked, np.array(masses), tuple(alphas), tuple(betas), matrix.dim, cost, tuple(bases)
    )


def _lockstep(
    matrix: Matrix, locked: Locked, Z: Tensor, steps: int, num_bases: int
) -> tuple[list[float], list[np.ndarray], list[np.ndarray], list[Tensor]]:
    # Independent Lanczos runs, one a column, a product of the whole block at a time.
    V = locked.project(locked.project(Z))
    eps = torch.finfo(matrix.dtype).eps
    least = (100 * eps) ** 2 * matrix.dim  # of a probe that lies in the span of the known
    masses = [m if m >= least and steps > 0 else 0.0 for m in column_dots(V, V).tolist()]
    fits = steps * Z.numel() * Z.element_size() <= REORTHOGONALIZE
    runs = [
        _Run(v / math.sqrt(mass) if mass else None, steps if fits else 2, v)
        for v, mass in zip(V.unbind(dim=1), masses, strict=True)
    ]
    del V
    scale = float(abs(locked.values).max()) if locked.size else 0.0
    smallest = 10 * eps
    for _ in range(steps):
        alive = [run for run in runs if run.next is not None]
        if not alive:
            break
        W = locked.project(matrix @ torch.stack([run.take() for run in alive]).T)
        for run, w in zip(alive, W.unbind(dim=1), strict=True):
            scale = run.step(w, locked, smallest, scale)
    return (
        masses,
        [np.array(run.alphas or [0.0]) for run in runs],
        [np.array(run.betas) for run in runs],
        [run.basis[: max(len(run.alphas), 1)] for run in runs[: num_bases if fits else 0]],
    )


class _Run:
    # One Lanczos run; with a basis of two rows only, it stays orthogonal to those.
    def __init__(self, start: Tensor | None, rows: int, like: Tensor):
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.basis = like.new_zeros(max(rows, 1), len(like))
        self.next = start

    def take(self) -> Tensor:
        assert self.next is not None
        at = len(self.alphas)
        if at >= len(self.basis):  # forget the oldest: the recurrence needs the last two
            self.basis[:-1] = self.basis[1:].clone()
            at = len(self.basis) - 1
        self.basis[at] = self.next
        return self.basis[at]

    def step(self, w: Tensor, locked: Locked, smallest: float, scale: float) -> float:
        V = self.basis[: min(len(self.alphas) + 1, len(self.basis))]
        alpha = float(column_dots(V[-1:].T, w[:, None]))
        w = torch.addmv(w, V.T, V.mv(w), alpha=-1)
        w = torch.addmv(w, V.T, V.mv(w), alpha=-1)  # what the first time left by rounding
        w = locked.project(w[:, None])[:, 0]
        beta = math.sqrt(float(column_dots(w[:, None], w[:, None])))
        scale = max(scale, abs(alpha) + beta)
        self.alphas.append(alpha)
        self.next = None
        if beta > smallest * scale:
            self.betas.append(beta)
            self.next = w / beta
        return scale
