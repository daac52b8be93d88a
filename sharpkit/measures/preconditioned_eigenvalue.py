"""The largest eigenvalue of the Hessian as Adam sees it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.errors import MeasureError, OperatorError
from sharpkit.measures._extreme import largest_eigenvalue
from sharpkit.measures.registry import register
from sharpkit.operators import edge_of_stability as adam_threshold
from sharpkit.results import Estimate


@register(
    "preconditioned_eigenvalue",
    symbol="lambda_max(P^-1/2 H P^-1/2)",
    reference="Cohen et al. 2022, arXiv:2207.14484",
    cost="about 20-120 HVPs",
    invariant_to={"permutation", "key_bias_shift"},
    degree=1,
    nonnegative=False,
    needs={"optimizer"},
)
def preconditioned_eigenvalue(
    analysis: Analysis, *, tol: float = 1e-3, max_matvecs: int = 400
) -> Estimate:
    r"""Largest eigenvalue of the Hessian divided by what Adam divides its steps by.

    .. math:: \lambda_{\max}(P^{-1/2} H P^{-1/2}), \qquad
        P_t = (1 - \beta_1^t) \left[\sqrt{v_t / (1 - \beta_2^t)} + \epsilon\right]

    with the second moments of the given optimizer, Adam or AdamW. Trained with full batches,
    it rises to :math:`(2 + 2\beta_1) / ((1 - \beta_1)\eta)`, which is 38 over the learning rate
    at beta1 = 0.9, and stays there; details hold that threshold and the ratio to it, which is
    ``edge_of_stability``. The moments must belong to these very weights. Parameters whose
    gradients were tiny have a tiny P, and may make up the eigenvalue alone.

    Args:
        analysis: What is measured; it needs ``optimizer``.
        tol: Relative error at which the pair has converged; at most 0.01.
        max_matvecs: Budget of Hessian-vector products.

    Raises:
        MeasureError: If the optimizer was not given, or is neither Adam nor AdamW.
    """
    optimizer = analysis.optimizer
    try:
        scale = optimizer.adam_diagonal(analysis.objective.space)
    except OperatorError as error:
        raise MeasureError(str(error)) from error
    if not bool((scale > 0).all()):
        raise MeasureError(
            "Expected positive second moments, or a positive eps. Adam divides"
            f" {int((scale <= 0).sum())} of {len(scale)} parameters by zero. Leave these out with"
            " params=..."
        )
    factors = scale.double().rsqrt().to(analysis.theta.dtype)[:, None]

    def root(V: Tensor) -> Tensor:
        return factors * V

    estimate = largest_eigenvalue(
        analysis, "preconditioned_eigenvalue", root, tol=tol, max_matvecs=max_matvecs
    )
    try:
        threshold = adam_threshold(optimizer)
    except OperatorError as error:  # groups that differ have none in common
        return replace(estimate, notes=(*estimate.notes, str(error)))
    details = {**estimate.details, "threshold": threshold, "ratio": estimate.value / threshold}
    return replace(estimate, details=details)
