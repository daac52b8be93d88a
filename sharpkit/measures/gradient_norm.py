"""The norm of the gradient."""

import torch

from sharpkit.analysis import Analysis
from sharpkit.measures.registry import register
from sharpkit.results import Estimate

ROUNDING = 50  # gradients of examples cancel near a minimum; their rounding does not


@register(
    "gradient_norm",
    symbol="|g|_2",
    reference="Zhao, Zhang, Hu 2022, arXiv:2202.03599",
    cost="1 gradient",
    invariant_to={"permutation", "orthogonal"},
    degree=1,
    nonnegative=True,
)
def gradient_norm(analysis: Analysis) -> Estimate:
    r"""Euclidean norm of the gradient of the loss, which says how far from critical.

    .. math:: \|g\|_2, \quad g = \nabla L(\theta)

    The first-order rise of the loss over a ball of radius rho is rho times this norm. The
    error is the rounding left by the sum over examples, estimated from the largest entry.

    Args:
        analysis: What is measured.
    """
    g = analysis.gradient.double()
    eps = torch.finfo(analysis.objective.model_dtype).eps
    # Rounding noise of each entry is a few eps of the terms that were added up. Their size
    # is not known from the sum; the loss bounds it where the gradient is nearly zero.
    noise = eps * (float(g.norm()) + ROUNDING * abs(analysis.value) + eps)
    return Estimate(value=float(g.norm()), probe_error=noise, error_kind="rounding")
