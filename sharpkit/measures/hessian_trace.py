"""The trace of the Hessian."""

import math
from dataclasses import replace

from sharpkit.analysis import Analysis
from sharpkit.estimators import hutchinson_trace
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures.registry import register
from sharpkit.results import Cost, Estimate


@register(
    "hessian_trace",
    symbol="tr H",
    reference="Yao et al. 2020, arXiv:1912.07145",
    cost="num_probes HVPs (64), or P if that is less",
    invariant_to={"permutation", "orthogonal"},
    degree=1,
    nonnegative=False,
)
def hessian_trace(
    analysis: Analysis, *, num_probes: int = 64, target_error: float | None = None
) -> Estimate:
    r"""Trace of the Hessian, the mean curvature over random directions times P.

    .. math:: \operatorname{tr} H = \sum_i \lambda_i, \qquad
        E_{\varepsilon \sim N(0,\sigma^2 I)}[L(\theta+\varepsilon)] - L(\theta)
        \approx \tfrac{\sigma^2}{2} \operatorname{tr} H

    By Hutchinson's estimator with its standard error, or exactly, from the diagonal, where
    P products are no more than ``num_probes``. Misleads between networks of other scale:
    rescaling the layers of a ReLU network changes it at will.

    Args:
        analysis: What is measured.
        num_probes: Budget of Hessian-vector products.
        target_error: Stop once the standard error is below this fraction of the value.
    """
    check_positive("num_probes", num_probes, minimum=2)
    if target_error is not None:
        check_positive("target_error", target_error)
    if analysis.objective.space.dim <= num_probes:
        h = analysis.diagonal(method="exact", num_probes=num_probes).values.double()
        return Estimate(
            value=float(h.sum()),
            probe_error=analysis.product_error * float(h.abs().sum()),
            error_kind="rounding",
            cost=Cost(hvps=h.numel()),
            details={"num_probes": 0},
        )
    estimate = hutchinson_trace(
        analysis.hessian,
        num_probes=num_probes,
        target_error=target_error,
        generator=analysis.generator("hessian_trace"),
    )
    wrong = analysis.product_error * float(estimate.details["frobenius_norm"])
    return replace(estimate, probe_error=math.hypot(estimate.probe_error or 0.0, wrong))
