"""The true eigenvalues and traces of the trained networks, as far as they can be known."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor
from trained import CACHE, CE, Case

import sharpkit as sk
from sharpkit.estimators import lanczos

FEWEST = 96  # probes of the truth of the trace
WANTED = 3e-3  # its relative standard error, unless
SECONDS = 150.0  # are over before


@dataclass
class Truth:
    """What is taken as true, and how far it may be wrong."""

    largest: np.ndarray
    smallest: np.ndarray
    eigen_gap: float  # sharpkit's long run against scipy's, over the scale of errors
    trace: float
    trace_error: float  # standard error
    square: float  # tr H^2
    square_error: float
    one_probe: float  # standard deviation of one probe of plain Hutchinson

    def top_error(self, values: np.ndarray) -> float:
        """Return the worst relative error of the five largest eigenvalues."""
        return _worst(values, self.largest, abs(self.largest))

    def magnitude_error(self, values: np.ndarray) -> float:
        """Return the worst relative error of the five largest in magnitude."""
        both = np.concatenate([self.largest, self.smallest])
        true = both[np.argsort(-abs(both))][:5]
        return _worst(values, np.sort(true)[::-1], abs(np.sort(true)[::-1]))

    def bottom_error(self, values: np.ndarray) -> float:
        """Return the worst error of the five smallest, a small one against 5% of the largest."""
        scale = np.maximum(abs(self.smallest), 0.05 * abs(self.largest[0]))
        return _worst(values, self.smallest, scale, ascending=True)


def _worst(values: np.ndarray, true: np.ndarray, scale: np.ndarray, ascending: bool = False):
    found = np.sort(np.asarray(values, dtype=float))
    found = found if ascending else found[::-1]
    return float(np.max(abs(found - true) / scale)) if len(found) == len(true) else math.inf


def truth_of(case: Case) -> Truth:
    """Return the truth; it is kept beside the weights, and dropped when those change."""
    path = CACHE / f"{case.name}-truth.pt"
    mark = float(sum(p.detach().double().abs().sum() for p in case.model.parameters()))
    if path.exists():
        kept = torch.load(path, weights_only=False)
        if kept["mark"] == mark:
            return Truth(**kept["truth"])
    objective = sk.Objective(case.model, CE, [(case.x, case.y)], hvp_mode="kept")
    truth = Truth(*_eigenvalues(objective), *_traces(objective))
    torch.save({"mark": mark, "truth": vars(truth)}, path)
    return truth


def _eigenvalues(objective: sk.Objective) -> tuple[np.ndarray, np.ndarray, float]:
    # Two methods on the same products; Ritz values lie inside, so the outer one is nearer.
    dim = objective.space.dim
    long = lanczos(
        sk.hessian(objective),
        k=5,
        tol=1e-5,
        max_matvecs=600,
        generator=torch.Generator().manual_seed(12345),
    )

    def product(v: np.ndarray) -> np.ndarray:
        return objective.hvp(torch.from_numpy(v.astype(np.float32).ravel())).double().numpy()

    matrix = scipy.sparse.linalg.LinearOperator((dim, dim), matvec=product, dtype=np.float64)
    start = np.random.default_rng(54321).standard_normal(dim)
    arpack = np.sort(
        scipy.sparse.linalg.eigsh(
            matrix, k=10, which="BE", tol=1e-5, ncv=60, v0=start, return_eigenvectors=False
        )
    )
    top, bottom = np.array(long.largest), np.array(long.smallest)
    scale = 0.05 * max(abs(top[0]), abs(bottom[0]))
    gap = max(
        float(np.max(abs(top - arpack[::-1][:5]) / np.maximum(abs(top), scale))),
        float(np.max(abs(bottom - arpack[:5]) / np.maximum(abs(bottom), scale))),
    )
    return np.maximum(top, arpack[::-1][:5]), np.minimum(bottom, arpack[:5]), gap


def _traces(objective: sk.Objective) -> tuple[float, float, float, float, float]:
    # tr H and tr H^2: exact on the range Q of a random sketch of H, by independent random
    # signs on its complement. Unbiased given Q; the scatter of the signs gives the error.
    dim = objective.space.dim
    generator = torch.Generator().manual_seed(999)
    columns = min(100, 2 * 2**30 // (4 * dim))
    sketch = torch.empty(dim, columns)
    for j in range(columns):
        sketch[:, j] = objective.hvp(_signs(dim, generator))
    Q, _ = torch.linalg.qr(sketch)
    for j in range(columns):
        sketch[:, j] = objective.hvp(Q[:, j].contiguous())
    exact, exact_square = _dot(Q, sketch), _dot(sketch, sketch)
    values, squares, plain = [], [], []
    deadline = time.process_time() + SECONDS
    while True:
        z = _signs(dim, generator)
        along = Q.T @ z
        inside = sketch @ along  # H Q Q'z
        z_out = z - Q @ along
        outside = objective.hvp(z_out)
        values.append(_dot(z_out, outside))
        squares.append(_dot(outside, outside))
        plain.append(_dot(z, inside + outside))
        n = len(values)
        if n >= FEWEST:
            error = np.std(values, ddof=1) / math.sqrt(n)
            trace = exact + float(np.mean(values))
            if error <= WANTED * abs(trace) or time.process_time() > deadline:
                break
    square = exact_square + float(np.mean(squares))
    square_error = float(np.std(squares, ddof=1)) / math.sqrt(n)
    return trace, float(error), square, square_error, float(np.std(plain, ddof=1))


def _signs(dim: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (dim,), generator=generator).float().mul_(2).sub_(1)


def _dot(a: Tensor, b: Tensor) -> float:
    # In double precision; a block of vectors column by column, to save memory.
    if a.dim() == 1:
        return float(torch.dot(a.double(), b.double()))
    return sum(_dot(a[:, j], b[:, j]) for j in range(a.shape[1]))
