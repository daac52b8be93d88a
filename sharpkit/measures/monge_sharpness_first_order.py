"""The first-order value of the sharpness in the Monge metric."""

import math

import torch

from sharpkit.analysis import Analysis
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures.gradient_norm import gradient_norm
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "monge_sharpness_first_order",
    symbol="rho |g| / sqrt(1 + a^2 |g|^2)",
    reference="Jacobsen and Arvanitidis 2025, arXiv:2502.08448",
    cost="2 gradients, the second for the error",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=None,
    nonnegative=True,
)
def monge_sharpness_first_order(
    analysis: Analysis, *, rho: float = 0.05, alpha: float = 1.0
) -> Estimate:
    r"""First-order rise of the loss over the ball of the Monge metric.

    .. math:: g^\top\delta^* = \frac{\rho\|g\|}{\sqrt{1+\alpha^2\|g\|^2}}, \qquad
        \delta^* = \frac{\rho\, g}{\|g\|\sqrt{1+\alpha^2\|g\|^2}}

    Bounded by rho/alpha, so it saturates: it cannot rank checkpoints of large gradient
    norm, and at a critical point it is 0. The paper gives the maximiser; the value is the
    inner product with the gradient. As published it is invariant to isometries only, not to
    reparametrizations: rescaling layers changes it, and so does the scale of the loss.

    Args:
        analysis: What is measured.
        rho: Radius in the metric.
        alpha: Scale of the loss axis, at least 0 (our extension; the paper has 1).
    """
    check_positive("rho", rho)
    check_positive("alpha", alpha, minimum=0)
    norm = gradient_norm(analysis)
    length, error = norm.value, norm.probe_error or 0.0
    stretch = math.sqrt(1 + (alpha * length) ** 2)
    eps = torch.finfo(analysis.objective.model_dtype).eps
    return Estimate(
        value=rho * length / stretch,
        probe_error=rho * (_slope(length, error, alpha) * error + eps * length / stretch),
        error_kind="rounding",
        converged=norm.converged,
        cost=norm.cost,
        notes=norm.notes,
    )


def _slope(length: float, error: float, alpha: float) -> float:
    # The steepest slope of n / sqrt(1 + a^2 n^2) within the error of n.
    return math.sqrt(1 + (alpha * max(length - error, 0.0)) ** 2) ** -3
