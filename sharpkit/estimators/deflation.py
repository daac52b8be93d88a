"""Random probes of what is left of a matrix when its outliers are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.estimators.basis import column_dots
from sharpkit.estimators.krylov import Krylov
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
    "deflated_trace",
    "frobenius_norm",
    "lock",
    "trace_of",
]

FEWEST_FOR_TARGET = 16  # a standard error from fewer samples stops too early too often
LOCK_SHARE = 0.01  # relative residual at which a Ritz pair counts as an eigenpair


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

    def project(self, V: Tensor, *, keep: bool = True) -> Tensor:
        """Return ``(I - Q Q^T) V``; without ``keep`` V may be written over."""
        if not self.size:
            return V
        along = self.vectors.T @ V
        if V.shape[1] == 1:
            return torch.addmv(V[:, 0], self.vectors, along[:, 0], alpha=-1)[:, None]
        rows = V.T
        if keep or not rows.is_contiguous():
            rows = rows.clone(memory_format=torch.contiguous_format)
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
            AZ = self.locked.project(self.matrix @ self.locked.project(Z), keep=False)
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
