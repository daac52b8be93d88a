"""Spectral norms of the layers."""

import math

import torch
from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.estimators import lanczos
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures.registry import register
from sharpkit.objective.network import LinearLayer
from sharpkit.operators import SymmetricOperator
from sharpkit.results import Cost, Estimate, Part

DENSE = 1024  # smaller sides of a matrix up to which its singular values are computed
ROUNDING = 30  # in eps of float64


@register(
    "spectral_norms",
    symbol="sum_l log |A_l|_2^2",
    reference="Bartlett et al. 2017, arXiv:1706.08498; Jiang et al. 2020, arXiv:1912.02178, eq. 32",
    cost="1 forward of an example; products with single layers",
    invariant_to={"permutation", "layer_scale", "batch_norm_scale", "key_bias_shift"},
    degree=0,
    nonnegative=False,
    needs={"layers"},
)
def spectral_norms(analysis: Analysis, *, tol: float = 1e-4, max_matvecs: int = 400) -> Estimate:
    r"""Logarithm of the product of the layers' squared spectral norms; each norm as a part.

    .. math:: \sum_l \log \|A_l\|_2^2, \qquad \|A_l\|_2 = \max_{\|x\|=1} \|A_l x\|

    The product bounds how much the network stretches its input, and unlike the sum of the norms
    it does not change when layers of a ReLU network are rescaled; the logarithm keeps it finite
    in deep networks. A_l is the layer's linear map without its bias, a BatchNorm right after it
    folded in. For a convolution that is the operator on inputs of the size that reaches it,
    padding and stride included, not its kernel as a matrix, whose norm may be several times off.
    Large layers by the Lanczos method on :math:`A^\top A`, with its residual as the error: it
    tells how far the nearest singular value is, if the largest was not missed. Embeddings are
    left out. A network may stretch far less than the product says.

    Args:
        analysis: What is measured.
        tol: Relative error of the squared norms found by iteration.
        max_matvecs: Products that each may take.
    """
    check_positive("tol", tol)
    check_positive("max_matvecs", max_matvecs, minimum=1)
    generator = analysis.generator("spectral_norms")
    parts, total, error, missed, folded = [], 0.0, 0.0, [], []
    iterated = False
    for layer in analysis.objective.linear_layers():
        square, wrong, converged = _squared_norm(layer, tol, max_matvecs, generator)
        norm = math.sqrt(max(square, 0.0))
        iterated |= layer.matrix is None or min(layer.matrix.shape) > DENSE
        parts.append(Part(layer.name, norm, wrong / (2 * norm) if norm else wrong**0.5, converged))
        total += math.log(square) if square > 0 else -math.inf
        error += wrong / square if square > 0 else 0.0
        if not converged:
            missed.append(layer.name)
        if layer.folded:
            folded.append(layer.folded)
    notes = []
    if missed:
        notes.append(
            f"The norms of {', '.join(missed[:5])} did not converge in {max_matvecs} products."
            " Give more `max_matvecs`."
        )
    if total == -math.inf:
        zeros = ", ".join(part.label for part in parts if part.value == 0)
        notes.append(f"The weights of {zeros} are zero, and so is the product of the norms.")
    return Estimate(
        value=total,
        probe_error=error,
        error_kind="bound" if iterated else "rounding",
        converged=not missed,
        cost=Cost(forwards=1),
        parts=tuple(parts),
        details={"folded": folded, "sum_of_squared_norms": sum(p.value**2 for p in parts)},
        notes=tuple(notes),
    )


def _squared_norm(
    layer: LinearLayer, tol: float, max_matvecs: int, generator: torch.Generator
) -> tuple[float, float, bool]:
    # |A|^2, how wrong it may be, and whether that meets the tolerance.
    rounding = ROUNDING * torch.finfo(torch.float64).eps
    if layer.matrix is not None and min(layer.matrix.shape) <= DENSE:
        square = float(torch.linalg.matrix_norm(layer.matrix, ord=2)) ** 2
        return square, rounding * square, True
    operator = _gram(layer, generator.device)
    if operator.dim <= max(8, max_matvecs // 8):
        values = torch.linalg.eigvalsh(operator.to_dense())
        square = max(float(values[-1]), 0.0)
        return square, rounding * square, True
    pairs = lanczos(
        operator, k=1, which="largest", tol=min(tol, 0.01), max_matvecs=max_matvecs,
        generator=generator,
    )  # fmt: skip
    square = max(float(pairs.largest[0]), 0.0)
    wrong = float(pairs.largest_residuals[0]) + rounding * square
    return square, wrong, bool(pairs.largest_converged[0])


def _gram(layer: LinearLayer, device: torch.device) -> SymmetricOperator:
    matrix, apply = layer.matrix, layer.apply
    if matrix is not None:
        tall = matrix if matrix.shape[1] <= matrix.shape[0] else matrix.T
        return SymmetricOperator(
            lambda V: tall.T @ (tall @ V), tall.shape[1], dtype=matrix.dtype, device=matrix.device
        )
    assert apply is not None
    shape = layer.in_shape

    def product(v: Tensor) -> Tensor:
        return layer.transposed(apply(v.reshape(1, *shape))).reshape(-1)

    return SymmetricOperator.from_matvec(
        product, math.prod(shape), dtype=torch.float64, device=device
    )
