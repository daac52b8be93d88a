"""The trace of the Hessian."""

import math
from dataclasses import replace
from typing import Literal

from sharpkit.analysis import Analysis
from sharpkit.estimators import hutch_plus_plus, hutchinson_trace, xtrace
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures.registry import register
from sharpkit.results import Cost, Estimate, Part
from sharpkit.spectral import HEAD_STEPS


@register(
    "hessian_trace",
    symbol="tr H",
    reference="Yao et al. 2020, arXiv:1912.07145",
    cost="24 Lanczos steps (shared) and num_probes HVPs (16)",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=1,
    nonnegative=False,
)
def hessian_trace(
    analysis: Analysis,
    *,
    method: Literal["deflated", "hutchinson", "hutch++", "xtrace"] = "deflated",
    num_probes: int = 16,
    target_error: float | None = None,
    max_probes: int = 1024,
) -> Estimate:
    r"""Trace of the Hessian, the mean curvature over random directions times P.

    .. math:: \operatorname{tr} H = \sum_i \lambda_i, \qquad
        E_{\varepsilon \sim N(0,\sigma^2 I)}[L(\theta+\varepsilon)] - L(\theta)
        \approx \tfrac{\sigma^2}{2} \operatorname{tr} H

    Deflated: the outliers that a short Lanczos run finds count exactly, and random probes
    measure the rest with their standard error; parts are the traces of the layers' blocks,
    from the same products, which sum to the whole. Exact where P is small. Misleads between
    networks of other scale: rescaling the layers of a ReLU network changes it at will.

    Args:
        analysis: What is measured.
        method: ``"deflated"``; ``"hutchinson"`` (arXiv:1912.07145), which holds no vectors;
            ``"hutch++"`` (arXiv:2010.09649); ``"xtrace"`` (arXiv:2301.07825).
        num_probes: Hessian-vector products, beside the Lanczos run's.
        target_error: Go on until the standard error is below this fraction of the value
            (deflated and hutchinson).
        max_probes: Budget with a target error.
    """
    check_positive("num_probes", num_probes, minimum=2)
    check_positive("max_probes", max_probes, minimum=2)
    if target_error is not None:
        check_positive("target_error", target_error)
    spectral = analysis.spectral()
    if analysis.objective.space.dim <= HEAD_STEPS + num_probes:
        return _exact(analysis, num_probes)
    most = num_probes if target_error is None else max_probes
    if method == "deflated":
        estimate = spectral.trace(num_probes=most, target_error=target_error)
    else:
        generator = analysis.generator("hessian_trace")
        if method == "hutchinson":
            estimate = hutchinson_trace(
                analysis.hessian, num_probes=most, target_error=target_error, generator=generator
            )
        elif method == "hutch++":
            estimate = hutch_plus_plus(
                analysis.hessian, num_matvecs=num_probes, generator=generator
            )
        else:
            estimate = xtrace(
                analysis.hessian, num_matvecs=num_probes + num_probes % 2, generator=generator
            )
        estimate = spectral.with_plain_data_error(estimate)
    size = float(estimate.details.get("frobenius_norm", abs(estimate.value)))
    wrong = analysis.product_error * size
    return replace(estimate, probe_error=math.hypot(estimate.probe_error or 0.0, wrong))


def _exact(analysis: Analysis, num_probes: int) -> Estimate:
    h = analysis.diagonal(method="exact", num_probes=num_probes).values.double()
    estimate = Estimate(
        value=float(h.sum()),
        probe_error=analysis.product_error * float(h.abs().sum()),
        error_kind="rounding",
        cost=Cost(hvps=h.numel()),
        parts=tuple(
            Part(name, float(part.sum()), analysis.product_error * float(part.abs().sum()))
            for name, part in analysis.by_layer(h).items()
        ),
        details={"num_probes": 0},
    )
    return analysis.spectral().with_data_error(estimate, lambda x: x)
