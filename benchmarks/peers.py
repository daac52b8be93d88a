"""The other packages' calls, one class each, as their users would write them.

Every class builds its operator in `__init__`, counts products in `products`, and raises
`TooManyError` beyond `LIMIT`. `None` in place of a call means that the package offers none.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor
from trained import CE, Case

LIMIT = 1500  # products that one call may take
STEPS, RUNS = 40, 4  # of the density, for all packages
GIBI = 2**30


class TooManyError(Exception):
    """A call took more products than LIMIT."""


class Counter:
    """What all peers share: the count of products."""

    name = ""

    def __init__(self) -> None:
        self.products, self.limit = 0, float(LIMIT)

    def count(self, columns: int = 1) -> None:
        """Add products; give up beyond the limit."""
        self.products += columns
        if self.products > self.limit:
            raise TooManyError

    def close(self) -> None:
        """Free what the package left in the model."""


def square_trace(dim: int, nodes: list[Any], weights: list[Any]) -> float:
    """Return tr H^2 from the nodes and weights of a density."""
    runs = [
        float(np.sum(np.asarray(w) * np.asarray(t) ** 2))
        for t, w in zip(nodes, weights, strict=True)
    ]
    return dim * sum(runs) / len(runs)


def renyi(trace: float, square: float) -> float:
    """Return the Renyi entropy of order 2 from tr H and tr H^2."""
    return 2 * math.log(abs(trace)) - math.log(square) if trace and square > 0 else math.nan


class Curvlinops(Counter):
    """curvlinops 3.0.1 with scipy's eigsh."""

    name = "curvlinops"
    top_ladders = (((1e-1, 20), (1e-2, 20), (1e-3, 20), (1e-4, 20)),)  # tol, ncv (20: default)
    bottom_ladders = (*top_ladders, ((1e-1, 60), (1e-2, 60), (1e-3, 60), (1e-4, 60)))
    trace_methods = ("hutchinson", "xtrace", "hutch++")

    def __init__(self, case: Case):
        from curvlinops import HessianLinearOperator

        super().__init__()
        self.dim = case.dim
        self.operator = HessianLinearOperator(
            case.model,
            CE,
            list(case.model.parameters()),
            [(case.x, case.y)],
            check_deterministic=False,
        )
        plain = self.operator._matmat

        def counted(X: list[Tensor]) -> list[Tensor]:
            self.count(X[0].shape[-1])
            return plain(X)

        self.operator._matmat = counted

    def _eigsh(self, seed: int, knob: tuple[float, int], which: str) -> np.ndarray:
        tol, ncv = knob
        start = np.random.default_rng(seed).standard_normal(self.dim)
        matrix = self.operator.to_scipy()
        return scipy.sparse.linalg.eigsh(
            matrix, k=5, which=which, tol=tol, ncv=ncv, v0=start, return_eigenvectors=False
        )

    def top(self, seed: int, knob: tuple[float, int]) -> np.ndarray:
        """Return the five largest eigenvalues."""
        return self._eigsh(seed, knob, "LA")

    def bottom(self, seed: int, knob: tuple[float, int]) -> np.ndarray:
        """Return the five smallest eigenvalues."""
        return self._eigsh(seed, knob, "SA")

    def trace(self, seed: int, method: str, products: int) -> float:
        """Return an estimate of the trace."""
        from curvlinops import hutchinson_trace, hutchpp_trace, xtrace

        torch.manual_seed(seed)
        if method == "hutchinson":  # one column at a time: all at once need all memory
            return sum(float(hutchinson_trace(self.operator, 1)) for _ in range(products)) / (
                products
            )
        columns = ByColumns(self.operator)
        return float({"xtrace": xtrace, "hutch++": hutchpp_trace}[method](columns, products))

    def density(self, seed: int) -> float:
        """Compute the density; return its tr H^2."""
        from curvlinops import LanczosApproximateSpectrumCached

        torch.manual_seed(seed)
        spectrum = LanczosApproximateSpectrumCached(self.operator, STEPS)
        spectrum.approximate_spectrum(num_repeats=RUNS)
        runs = spectrum._lanczos_iters
        return square_trace(self.dim, [t for t, _ in runs], [S[0] ** 2 for _, S in runs])


class ByColumns:
    """curvlinops' operator applied to one column after the other: less memory and often time."""

    def __init__(self, operator: Any):
        self.operator, self.shape = operator, operator.shape
        self.device, self.dtype = operator.device, operator.dtype

    def __matmul__(self, X: Tensor) -> Tensor:
        return torch.stack([self.operator @ x for x in X.T.contiguous()], dim=1)


class PyHessian(Counter):
    """PyHessian 0.1 with one kept batch; largest magnitudes only, no smallest end."""

    name = "PyHessian"
    top_ladders = ((1e-3, 1e-4, 1e-5, 1e-6, 1e-7),)  # tol
    bottom_ladders = ()
    trace_methods = ("hutchinson",)

    def __init__(self, case: Case):
        from pyhessian import hessian
        from pyhessian.utils import hessian_vector_product

        super().__init__()
        self.dim, self.model = case.dim, case.model
        case.model.zero_grad(set_to_none=True)
        self.hessian = hessian(case.model, CE, data=(case.x, case.y), cuda=False)

        def counted(*arguments: Any) -> Any:
            self.count()
            return hessian_vector_product(*arguments)

        sys.modules["pyhessian.hessian"].hessian_vector_product = counted

    def close(self) -> None:
        """Break the cycle of parameters and the gradients' graph."""
        self.hessian = None
        self.model.zero_grad(set_to_none=True)

    def top(self, seed: int, knob: float) -> np.ndarray:
        """Return the five eigenvalues largest in magnitude."""
        torch.manual_seed(seed)
        return np.array(self.hessian.eigenvalues(maxIter=LIMIT, tol=knob, top_n=5)[0])

    bottom = None

    def trace(self, seed: int, method: str, products: int) -> float:
        """Return an estimate of the trace; its own stopping rule is switched off."""
        assert method == "hutchinson"
        torch.manual_seed(seed)
        return float(np.mean(self.hessian.trace(maxIter=products, tol=-math.inf)))

    def density(self, seed: int) -> float:
        """Compute the density with torch.eig restored; return its tr H^2."""
        torch.manual_seed(seed)
        torch.eig = _eig
        try:
            nodes, weights = self.hessian.density(iter=STEPS, n_v=RUNS)
        finally:
            del torch.eig
        return square_trace(self.dim, nodes, weights)


def _eig(T: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
    # What torch.eig, which is gone from torch, returned for a symmetric matrix.
    assert eigenvectors
    values, vectors = torch.linalg.eigh(T)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


class Eigenthings(Counter):
    """hessian-eigenthings 1.0.0a5, full reorthogonalization, steps picked by hand."""

    name = "hessian-eigenthings"
    top_ladders = ((20, 30, 40, 50, 60, 80, 100, 130, 160, 200),)  # Lanczos steps
    bottom_ladders = ((40, 60, 80, 100, 130, 160, 200, 250, 300),)
    trace_methods = ("hutchinson", "hutch++")

    def __init__(self, case: Case):
        from hessian_eigenthings.operators import HessianOperator

        super().__init__()
        self.dim = case.dim
        self.operator = HessianOperator(
            case.model, [(case.x, case.y)], lambda m, b: CE(m(b[0]), b[1])
        )
        plain = self.operator.matvec

        def counted(v: Tensor) -> Tensor:
            self.count()
            return plain(v)

        self.operator.matvec = counted

    def _lanczos(self, seed: int, steps: int, which: str) -> np.ndarray:
        from hessian_eigenthings.algorithms import lanczos

        found = lanczos(
            self.operator, k=5, max_iter=steps, reorthogonalize=True, which=which, seed=seed
        )
        return found.eigenvalues.numpy()

    def top(self, seed: int, knob: int) -> np.ndarray:
        """Return the five largest eigenvalues."""
        return self._lanczos(seed, knob, "LA")

    def bottom(self, seed: int, knob: int) -> np.ndarray:
        """Return the five smallest eigenvalues."""
        return self._lanczos(seed, knob, "SA")

    def trace(self, seed: int, method: str, products: int) -> float:
        """Return an estimate of the trace."""
        from hessian_eigenthings.algorithms import trace

        return trace(self.operator, num_matvecs=products, method=method, seed=seed).estimate

    def density(self, seed: int) -> float:
        """Compute the density; return its tr H^2."""
        from hessian_eigenthings.algorithms import spectral_density

        found = spectral_density(
            self.operator, num_runs=RUNS, lanczos_steps=STEPS, seed=1000 * seed
        )
        return square_trace(self.dim, list(found.raw_eigenvalues), list(found.raw_weights))


def most_products(method: str, dim: int) -> int:
    """Return the most products that a trace may take: LIMIT, or 2 GiB for a block of vectors."""
    share = {"hutchinson": 0.0, "xtrace": 1 / 2, "hutch++": 1 / 3}[method]
    return min(LIMIT, int(2 * GIBI / (4 * dim * share))) if share else LIMIT


def installed() -> list[type[Any]]:
    """Return the peers that import; say which do not."""
    found: list[type[Any]] = []
    for peer, package in (
        (PyHessian, "pyhessian"),
        (Curvlinops, "curvlinops"),
        (Eigenthings, "hessian_eigenthings"),
    ):
        try:
            __import__(package)
        except ImportError as reason:
            print(f"note: without {peer.name}: {reason}")
        else:
            found.append(peer)
    return found
