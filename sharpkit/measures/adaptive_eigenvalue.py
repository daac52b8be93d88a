"""The largest eigenvalue of the Hessian relative to the size of each weight."""

from __future__ import annotations

from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.measures._extreme import largest_eigenvalue
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "adaptive_eigenvalue",
    symbol="lambda_max(diag|w| H diag|w|)",
    reference="Kwon et al. 2021, arXiv:2102.11600",
    cost="about 20-120 HVPs",
    invariant_to={
        "permutation",
        "layer_scale",
        "node_scale",
        "pair_scale",
        "batch_norm_scale",
        "logit_scale",
        "key_bias_shift",
    },
    degree=1,
    nonnegative=False,
)
def adaptive_eigenvalue(
    analysis: Analysis, *, tol: float = 1e-3, max_matvecs: int = 400
) -> Estimate:
    r"""Largest curvature when each weight moves in proportion to its size.

    .. math:: \lambda_{\max}(D H D) = \max_{\|\delta / |\theta|\| \le 1} \delta^\top H \delta,
        \qquad D = \operatorname{diag}|\theta|

    At a minimum, :math:`\tfrac{\rho^2}{2}` times it is what ``adaptive_sharpness_worst`` with
    ``norm="l2"`` is for small rho: the same without a rho to choose and without an ascent.
    Off the minimum that one grows with the gradient, which has no part here. Unchanged by any
    scale of single weights that the network undoes. Weights of zero do not move.

    Args:
        analysis: What is measured.
        tol: Relative error at which the pair has converged; at most 0.01.
        max_matvecs: Budget of Hessian-vector products.
    """
    sizes = analysis.theta.abs()[:, None]

    def root(V: Tensor) -> Tensor:
        return sizes * V

    return largest_eigenvalue(
        analysis, "adaptive_eigenvalue", root, tol=tol, max_matvecs=max_matvecs
    )
