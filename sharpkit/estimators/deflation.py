"""Random probes of what is left of a matrix when its outliers are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.estimators.basis import column_dots
from sharpkit.estimators.krylov import Krylov, tridiagonal
from sharpkit.estimators.protocol import (
    Matrix,
    RunningMoments,
    block_size,
    check_positive,
    random_signs,
)
from sharpkit.results import Cost, Estimate, Part

__all__ = [
    "Locked",
    "Probes",
    "Probing",
    "Quadrature",
    "deflated_quadrature",
    "deflated_trace",
    "frobenius_norm",
    "lock",
    "trace_of",
]

BASES = 2  # probes whose Lanczos vectors are handed out
FEWEST_FOR_TARGET = 16  # a standard error from fewer samples stops too early too often
FARTHEST = 1e6  # times the matrix: a node farther off has no weight left
LOCK_SHARE = 0.01  # relative residual at which a Ritz pair counts as an eigenpair
REORTHOGONALIZE = 2**28  # bytes of vectors that short runs may keep to stay orthogonal


@dataclass(frozen=True)
class Locked:
    """Eigenpairs that are known and projected out.

    Attributes:
        vectors: Orthonormal columns ``[P, q]``.
        values: Their Rayleigh quotients.
        residuals: ``||A v - theta v||`` of each, orthogonal to all of them.
        floor: The rounding level of eigenvalues.
        num_matvecs: Products that it took to find them.
        cross: Diagonal of ``R Q^T + Q R^T`` with the residual vectors R, ``[P]``: what the
            known part and the deflated matrix lack of A's diagonal; it sums to zero.
    """

    vectors: Tensor
    values: np.ndarray
    residuals: np.ndarray
    floor: float
    num_matvecs: int
    cross: Tensor | None = None

    @property
    def size(self) -> int:
        """The number q of pairs."""
        return len(self.values)

    def project(self, V: Tensor) -> Tensor:
        """Return ``(I - Q Q^T) V``."""
        if not self.size:
            return V
        along = self.vectors.T @ V
        if V.shape[1] == 1:
            return torch.addmv(V[:, 0], self.vectors, along[:, 0], alpha=-1)[:, None]
        rows = V.T.clone(memory_format=torch.contiguous_format)
        return rows.addmm_(along.T, self.vectors.T, alpha=-1).T


def lock(krylov: Krylov, steps: int) -> Locked:
    """Return the pairs that a Lanczos run has found after its first steps.

    Whatever is locked, traces stay unbiased: a loose pair only leaves more for the probes.
    """
    values, S, residuals = krylov.ritz(steps)
    found = residuals <= np.maximum(LOCK_SHARE * abs(values), 2 * krylov.floor(steps))
    vectors = krylov.vectors(S[:, found])
    beyond, coupling = krylov.beyond(steps)
    cross = None
    if beyond is not None:
        along = torch.as_tensor(coupling @ S[:, found], dtype=vectors.dtype, device=vectors.device)
        cross = torch.zeros(len(vectors), dtype=vectors.dtype, device=vectors.device)
        for x, row in zip(beyond.unbind(dim=1), along, strict=True):
            cross.addcmul_(x, vectors @ row, value=2)
    return Locked(
        vectors,
        values[found],
        residuals[found],
        krylov.floor(steps),
        krylov.steps[steps - 1].products,
        cross,
    )


# -- one product a probe -----------------------------------------------------------------


@dataclass(frozen=True)
class Probes:
    r"""What products with random signs tell of the deflated matrix.

    Attributes:
        traces: :math:`z^\top A' z` of each probe, :math:`A' = (I-QQ^\top)A(I-QQ^\top)`.
        squares: :math:`\|A' z\|^2` of each.
        variance: Of one entry of ``traces``.
        rounding: Below which no error of a sum is.
        cost: Products.
        blocks: What each block of the diagonal sums to, in the whole matrix, probe by probe.
    """

    locked: Locked
    traces: np.ndarray
    squares: np.ndarray
    variance: float
    rounding: float
    cost: Cost
    blocks: Mapping[str, np.ndarray] = field(default_factory=dict)


class Probing:
    """Products of the deflated matrix with random signs, as many as it takes.

    Args:
        matrix: The matrix ``A``.
        locked: What is projected out.
        generator: Source of the signs.
        blocks: Parts of the diagonal to be summed on their own, by name.
    """

    def __init__(
        self,
        matrix: Matrix,
        locked: Locked,
        generator: torch.Generator,
        blocks: Mapping[str, Sequence[slice]] | None = None,
    ):
        self.matrix, self.locked, self.generator = matrix, locked, generator
        self.blocks = blocks or {}
        self.sums: dict[str, list[float]] = {name: [] for name in self.blocks}
        self.entries = RunningMoments(matrix)
        self.traces: list[float] = []
        self.squares: list[float] = []
        self.before = matrix.num_matvecs

    def until(self, num_probes: int) -> Probes:
        """Go on until there are so many probes."""
        while len(self.traces) < num_probes:
            count = min(block_size(self.matrix), num_probes - len(self.traces))
            Z = random_signs(self.matrix, count, self.generator)
            AZ = self.locked.project(self.matrix @ self.locked.project(Z))
            for z, Az in zip(Z.unbind(dim=1), AZ.unbind(dim=1), strict=True):
                entries = z * Az
                self.entries.add(entries[:, None])
                for name, parts in self.blocks.items():
                    total = sum(float(entries[part].sum(dtype=torch.float64)) for part in parts)
                    self.sums[name].append(total)
            self.traces += column_dots(Z, AZ).tolist()
            self.squares += column_dots(AZ, AZ).tolist()
        # Var z.A'z = 2 sum_{i != j} A'_ij^2 = 2 sum_i Var(z_i (A'z)_i): the entries'
        # variances know it far better than the scatter of a few sums does.
        variance = 2 * float(self.entries.variances.sum())
        # Sums of P products in the matrix's precision: no standard error is below this.
        size = math.sqrt(float((self.locked.values**2).sum()) + max(self.squares))
        eps = torch.finfo(self.matrix.dtype).eps
        return Probes(
            self.locked,
            np.array(self.traces),
            np.array(self.squares),
            variance,
            eps * size * math.sqrt(1 + self.locked.size),
            Cost(hvps=self.matrix.num_matvecs - self.before),
            {n: self._known(n) + np.array(rows) for n, rows in self.sums.items()},
        )

    def _known(self, name: str) -> float:
        total, locked = 0.0, self.locked
        theta = torch.as_tensor(locked.values, dtype=torch.float64, device="cpu")
        for part in self.blocks[name]:
            Q = locked.vectors[part]
            total += float(theta @ column_dots(Q, Q).cpu()) if locked.size else 0.0
            if locked.cross is not None:
                total += float(locked.cross[part].double().sum())
        return total


def deflated_trace(
    probing: Probing, *, num_probes: int = 16, target_error: float | None = None
) -> Estimate:
    r"""Estimate ``tr A`` with its outliers taken out of the noise.

    .. math::
        \operatorname{tr} A = \sum_i \theta_i + E\, z^\top A' z, \qquad
        A' = (I-QQ^\top)A(I-QQ^\top), \quad \theta_i = q_i^\top A q_i

    for any orthonormal Q: unbiased, with the variance that Hutchinson's estimator has on
    :math:`A'`, :math:`2\sum_{i\ne j}A_{ij}'^2`. With the vectors of a Lanczos run for Q it
    ties with XTrace on matrices with outliers and loses nothing on others. With a target
    the probes are doubled until the standard error is below it or the budget is spent.

    Args:
        probing: The matrix, what to project out, the source of signs.
        num_probes: The budget of products, at least 2.
        target_error: Stop when the standard error is at most this fraction of the value.

    Returns:
        The trace; parts are the sums of the blocks, with the scatter over probes as error.

    Raises:
        SettingsError: If ``num_probes < 2``, or the target is not positive.

    Example:
        >>> from sharpkit.operators import SymmetricOperator
        >>> A = SymmetricOperator.wrap(torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0])))
        >>> krylov = Krylov(A, torch.Generator().manual_seed(0))
        >>> krylov.step(); krylov.step()
        >>> probing = Probing(A, lock(krylov, 2), torch.Generator())
        >>> t = deflated_trace(probing, num_probes=8)
        >>> abs(t.value - 12) < 4 * t.probe_error
        True
    """
    if num_probes < 2:
        raise SettingsError(
            f"Expected `num_probes` to be at least 2, to give an error. Got {num_probes}."
        )
    if target_error is not None:
        check_positive("target_error", target_error)
    count = num_probes if target_error is None else min(FEWEST_FOR_TARGET, num_probes)
    while True:
        estimate = trace_of(probing.until(count))
        value, error = estimate.value, estimate.probe_error or 0.0
        met = target_error is None or error <= target_error * abs(value)
        if met or count >= num_probes:
            break
        count = min(2 * count, num_probes)
    if met:
        return estimate
    relative = error / abs(value) if value else math.inf
    return replace(
        estimate,
        converged=False,
        notes=(
            f"The target error {target_error:g} was not reached with {num_probes} probes:"
            f" the relative standard error is {relative:.2g}. Give a larger `num_probes`.",
        ),
    )


def trace_of(probes: Probes) -> Estimate:
    """Return the trace with its standard error."""
    locked = probes.locked
    known = float(locked.values.sum())
    count = len(probes.traces)
    return Estimate(
        value=known + float(probes.traces.mean()),
        probe_error=max(math.sqrt(probes.variance / count), probes.rounding),
        error_kind="stderr",
        cost=probes.cost,
        details={
            "num_probes": count,
            "num_locked": locked.size,
            "locked_share": known,
            "frobenius_norm": _frobenius(probes)[0],
        },
        parts=tuple(
            Part(
                name,
                float(rows.mean()),
                max(float(rows.std(ddof=1)) / math.sqrt(count), probes.rounding),
                dof=count - 1,
            )
            for name, rows in probes.blocks.items()
        ),
        draws=tuple((known + probes.traces).tolist()),
    )


def _frobenius(probes: Probes) -> tuple[float, np.ndarray]:
    # ||A||_F^2 = sum theta^2 + 2 sum residual^2 + ||A'||_F^2, sample by sample.
    locked = probes.locked
    known = float((locked.values**2).sum() + 2 * (locked.residuals**2).sum())
    squares = known + probes.squares
    return math.sqrt(squares.mean()), squares


def frobenius_norm(probes: Probes) -> Estimate:
    r"""Return ``||A||_F`` from the lengths of the same products.

    .. math:: \|A\|_F^2 = \sum_i \theta_i^2 + 2\sum_i r_i^2 + E\|A' z\|^2

    with the residuals :math:`r_i`, which are orthogonal to Q. The error of the root comes
    from the scatter of the squares, with Student's t for its few samples.
    """
    value, squares = _frobenius(probes)
    count = len(squares)
    root = 2 * value or 1.0
    error = float(squares.std(ddof=1) / math.sqrt(count)) / root
    return Estimate(
        value=value,
        probe_error=max(error, probes.rounding),
        error_kind="stderr",
        cost=probes.cost,
        details={"num_probes": count, "num_locked": probes.locked.size},
        dof=count - 1,
        draws=tuple((value + (squares - squares.mean()) / root).tolist()),
    )


# -- a short Lanczos run a probe ---------------------------------------------------------


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
