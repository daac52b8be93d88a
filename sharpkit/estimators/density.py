"""The spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

import torch

from sharpkit.estimators.krylov import Krylov
from sharpkit.estimators.protocol import Matrix, check_positive
from sharpkit.results import Cost, Spectrum

__all__ = ["spectral_density"]


def spectral_density(
    matrix: Matrix, *, num_probes: int = 4, num_steps: int = 40, generator: torch.Generator
) -> Spectrum:
    r"""Return Gauss nodes and weights of the eigenvalue density (Ubaru, Chen, Saad 2017).

    A Lanczos run of k steps from a random unit vector gives nodes (Ritz values) and
    weights (squared first components) whose first 2k moments are those of
    :math:`\sum_i (v^\top u_i)^2 \delta_{\lambda_i}`; the mean over vectors is the density.

    Args:
        matrix: The matrix ``A``.
        num_probes: Random start vectors; the outliers' weights are noisy with few.
        num_steps: Lanczos steps of each, at most P.
        generator: Source of the start vectors.

    Raises:
        SettingsError: If a number is less than 1.

    Example:
        >>> from sharpkit.operators import SymmetricOperator
        >>> A = SymmetricOperator.wrap(torch.diag(torch.tensor([1.0, 2.0])))
        >>> s = spectral_density(A, num_probes=1, num_steps=2, generator=torch.Generator())
        >>> [round(x, 4) for x in s.nodes[0]], round(sum(s.weights[0]), 6)
        ([1.0, 2.0], 1.0)
    """
    check_positive("num_probes", num_probes, minimum=1)
    check_positive("num_steps", num_steps, minimum=1)
    before = matrix.num_matvecs
    nodes, weights = [], []
    for _ in range(num_probes):
        krylov = Krylov(matrix, generator, None)
        while krylov.size < min(num_steps, matrix.dim) and not krylov.exhausted:
            krylov.step()
            if krylov.broke_down:  # an invariant subspace: the quadrature is exact
                break
        values, S, _ = krylov.ritz()
        nodes.append(tuple(float(x) for x in values))
        weights.append(tuple(float(x) for x in S[0] ** 2))
    cost = Cost(hvps=matrix.num_matvecs - before)
    return Spectrum(tuple(nodes), tuple(weights), matrix.dim, cost)
