"""Gauss quadratures of what is left of a matrix when its outliers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.estimators.basis import column_dots
from sharpkit.estimators.deflation import Locked
from sharpkit.estimators.krylov import tridiagonal
from sharpkit.estimators.protocol import Matrix, block_size, check_positive, random_signs
from sharpkit.results import Cost

__all__ = ["Place", "Quadrature", "QuadratureRuns", "deflated_quadrature"]

Place: TypeAlias = Literal["gauss", "zero", "apart"]

BASES = 2  # probes whose Lanczos vectors are handed out
FARTHEST = 1e6  # times the matrix: a node farther off has no weight left
REORTHOGONALIZE = 2**28  # bytes of vectors that runs may keep to stay orthogonal
PHASES = 12  # places of the nodes beside zero that are tried
TAIL = 6  # last steps that tell the scale of the steps to come

Rule: TypeAlias = tuple[np.ndarray, np.ndarray]


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
    _rules: dict[tuple[int, int, Place], Rule] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def floor(self) -> float:
        """The rounding level of eigenvalues."""
        return self.locked.floor

    @property
    def ended(self) -> bool:
        """Whether every run met an invariant subspace, so that its rule is exact."""
        return all(len(b) < len(a) for a, b in zip(self.alphas, self.betas, strict=True))

    def first(self, steps: int) -> Quadrature:
        """Return what was known after the first steps."""
        if steps >= self.num_steps:
            return self
        alphas = tuple(a[:steps] for a in self.alphas)
        alive = [len(a) for a, mass in zip(alphas, self.masses, strict=True) if mass > 0]
        return replace(
            self,
            alphas=alphas,
            betas=tuple(b[:steps] for b in self.betas),
            cost=Cost(hvps=sum(alive)),
            bases=tuple(basis[:steps] for basis in self.bases),
        )

    def rules(self, steps: int | None = None, *, place: Place = "gauss") -> list[Rule]:
        """Return nodes and weights of each probe; the weights sum to 1.

        All rules after the same steps that have one node more have the same moments, and
        differ in where their nodes lie. A function with a kink at zero has its smallest
        integral where a node is at zero, its largest where zero is amidst two nodes.

        Args:
            steps: Use only the first steps; None: all.
            place: ``"gauss"``: the rule of highest degree; ``"zero"``: a node at zero
                (Gauss-Radau), where almost all eigenvalues of a network lie;
                ``"apart"``: nodes to both sides of zero, as far off as moments allow.
        """
        result = []
        for probe, (alphas, betas) in enumerate(zip(self.alphas, self.betas, strict=True)):
            count = min(len(alphas), steps or len(alphas))
            ended = len(betas) < count  # by itself: exact as it is
            key: tuple[int, int, Place] = (probe, count, "gauss" if ended else place)
            if key not in self._rules:
                self._rules[key] = _rule(alphas[:count], betas[:count], key[2])
            result.append(self._rules[key])
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
        place: Place = "gauss",
    ) -> np.ndarray:
        """Return each probe's estimate of ``tr f(A)``, ``[m]``; see :meth:`rules`."""
        known = float(function(self.locked.values).sum())
        rules = self.rules(steps, place=place)
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


def _rule(alphas: np.ndarray, betas: np.ndarray, place: Place) -> Rule:
    last = _radau(alphas, betas) if place == "zero" else None
    if place == "apart":
        return _apart(alphas, betas)
    if last is None:
        nodes, S = tridiagonal(alphas, betas[: len(alphas) - 1])
    else:
        nodes, S = tridiagonal(np.append(alphas, last), betas)
    return nodes, S[0] ** 2


def _apart(alphas: np.ndarray, betas: np.ndarray) -> Rule:
    # One more diagonal entry, of any size, keeps all moments. Over its sizes the nodes move
    # once from each to the next; take the largest mean magnitude.
    count = len(alphas)
    tail = min(TAIL, count)
    centre, scale = alphas[-tail:].mean() / 2, betas[-tail:].mean()
    angles = np.arange(1, PHASES) * math.pi / PHASES - math.pi / 2
    T = np.zeros((len(angles), count + 1, count + 1))
    index = np.arange(count)
    T[:, index, index], T[:, count, count] = alphas, centre + scale * np.tan(angles)
    T[:, index, index + 1] = T[:, index + 1, index] = betas
    nodes, S = np.linalg.eigh(T)
    weights = S[:, 0] ** 2
    best = int((weights * abs(nodes)).sum(axis=1).argmax())
    return nodes[best], weights[best]


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


class QuadratureRuns:
    """Lanczos runs of what is left beside the known eigenpairs, which can be continued.

    All probes go through a step together, so streamed data are read once a step. The first
    vectors of the runs are kept while they fit into 256 MB, for the others to stay orthogonal
    to them; beyond that a run is orthogonal to its last two vectors only. The numbers after
    some steps do not depend on how many more were made.

    Args:
        matrix: The matrix ``A``.
        locked: What is projected out.
        num_probes: Random sign vectors, at least 2.
        generator: Source of the signs.

    Raises:
        SettingsError: If there are fewer than two probes.
    """

    def __init__(
        self, matrix: Matrix, locked: Locked, *, num_probes: int, generator: torch.Generator
    ):
        if num_probes < 2:
            raise SettingsError(
                f"Expected `num_probes` to be at least 2, to give an error. Got {num_probes}."
            )
        self.matrix, self.locked, self.num_probes = matrix, locked, num_probes
        self._generator = generator
        self._blocks: list[_Block] = []
        self._count = 0
        self._rules: dict[tuple[int, int, Place], Rule] = {}

    def until(self, num_steps: int) -> Quadrature:
        """Go on until the runs have so many steps; return what was known after these.

        Raises:
            SettingsError: If there are no steps.
        """
        check_positive("num_steps", num_steps, minimum=1)
        most = self.matrix.dim - self.locked.size
        steps = min(num_steps, most)
        itemsize = torch.finfo(self.matrix.dtype).bits // 8
        rows = REORTHOGONALIZE // (self.num_probes * self.matrix.dim * itemsize)
        at = 0
        while at < len(self._blocks) or self._count < self.num_probes:
            if at == len(self._blocks):
                count = min(block_size(self.matrix), self.num_probes - self._count)
                Z = random_signs(self.matrix, count, self._generator)
                self._blocks.append(_Block(self.matrix, self.locked, Z, alive=most > 0))
                self._count += count
            self._blocks[at].until(steps, min(rows, steps))
            at += 1
        runs = [run for block in self._blocks for run in block.runs]
        quadrature = Quadrature(
            self.locked,
            np.array([run.mass for run in runs]),
            tuple(np.array(run.alphas or [0.0]) for run in runs),
            tuple(np.array(run.betas) for run in runs),
            self.matrix.dim,
            Cost(hvps=sum(len(run.alphas) for run in runs)),
            tuple(run.vectors(steps) for run in runs[:BASES]) if rows >= steps else (),
            self._rules,
        )
        return quadrature.first(max(steps, 1))


def deflated_quadrature(
    matrix: Matrix,
    locked: Locked,
    *,
    num_probes: int,
    num_steps: int,
    generator: torch.Generator,
) -> Quadrature:
    """Return Gauss quadratures of what is left beside the known eigenpairs.

    Args:
        matrix: The matrix ``A``.
        locked: What is projected out.
        num_probes: Random sign vectors, at least 2.
        num_steps: Lanczos steps of each.
        generator: Source of the signs.

    Raises:
        SettingsError: If there are fewer than two probes or no steps.
    """
    runs = QuadratureRuns(matrix, locked, num_probes=num_probes, generator=generator)
    return runs.until(num_steps)


class _Block:
    # Independent Lanczos runs, one a column, a product of the whole block at a time.
    def __init__(self, matrix: Matrix, locked: Locked, Z: Tensor, *, alive: bool):
        self.matrix, self.locked = matrix, locked
        V = locked.project(locked.project(Z))
        eps = torch.finfo(matrix.dtype).eps
        least = (100 * eps) ** 2 * matrix.dim  # of a probe that lies in the span of the known
        masses = [m if m >= least and alive else 0.0 for m in column_dots(V, V).tolist()]
        self.runs = [_Run(v, mass) for v, mass in zip(V.unbind(dim=1), masses, strict=True)]
        self.scale = float(abs(locked.values).max()) if locked.size else 0.0
        self.smallest = 10 * eps

    def until(self, steps: int, rows: int) -> None:
        for run in self.runs:
            run.make_room(rows)
        while True:
            waiting = [(r, r.next) for r in self.runs if len(r.alphas) < steps]
            alive = [(run, v) for run, v in waiting if v is not None]
            if not alive:
                break
            W = self.locked.project(self.matrix @ torch.stack([v for _, v in alive]).T)
            for (run, v), w in zip(alive, W.unbind(dim=1), strict=True):
                self.scale = run.step(v, w, self.locked, self.smallest, self.scale)


class _Run:
    # One Lanczos run. Its first vectors are the basis; of the later ones the last stays.
    def __init__(self, start: Tensor, mass: float):
        self.mass = mass
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.basis = start.new_zeros(0, len(start))
        self.rows = 0  # of the basis that vectors may fill
        self.latest: list[Tensor] = []
        self.next = start / math.sqrt(mass) if mass else None

    def make_room(self, rows: int) -> None:
        # Only as long as no vector was left out of the basis.
        if self.next is None or rows <= self.rows or len(self.alphas) > self.rows:
            return
        basis = self.basis.new_zeros(rows, self.basis.shape[1])
        basis[: len(self.basis)] = self.basis
        self.basis, self.rows = basis, rows

    def vectors(self, steps: int) -> Tensor:
        count = min(len(self.alphas), steps)
        return self.basis[:count] if count else self.basis.new_zeros(1, self.basis.shape[1])

    def step(self, v: Tensor, w: Tensor, locked: Locked, smallest: float, scale: float) -> float:
        # What changes is set at the end, so that an interrupted step can be made again.
        at, latest = len(self.alphas), self.latest
        if at < self.rows:
            self.basis[at] = v
        else:
            latest = [*latest, v]
        alpha = float(column_dots(v[:, None], w[:, None]))
        for _ in range(2):  # again for what the first time left by rounding
            for V in [self.basis[: min(at + 1, self.rows)], *(u[None] for u in latest)]:
                w = torch.addmv(w, V.T, V.mv(w), alpha=-1)
        w = locked.project(w[:, None])[:, 0]
        beta = math.sqrt(float(column_dots(w[:, None], w[:, None])))
        scale = max(scale, abs(alpha) + beta)
        following = w / beta if beta > smallest * scale else None
        self.alphas.append(alpha)
        if following is not None:
            self.betas.append(beta)
        self.latest, self.next = latest[-1:], following
        return scale
