"""Worst-case adaptive sharpness: perturbations relative to each weight."""

from sharpkit.analysis import Analysis
from sharpkit.estimators.ascent import Norm
from sharpkit.geometry import ElementwiseMetric
from sharpkit.measures._ball import worst_rise
from sharpkit.measures.registry import register
from sharpkit.results import Estimate

DEFAULT_RHO = {"l2": 0.5, "linf": 0.002}  # in the middle of the grids of arXiv:2302.07011


@register(
    "adaptive_sharpness_worst",
    symbol="max_{|d/w|<=rho} L(theta+d) - L(theta)",
    reference="Kwon et al. 2021, arXiv:2102.11600; Andriushchenko et al. 2023, arXiv:2302.07011",
    cost="steps + 1 gradients (21)",
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
    nonnegative=True,
)
def adaptive_sharpness_worst(
    analysis: Analysis, *, rho: float | None = None, norm: Norm = "l2", steps: int = 20
) -> Estimate:
    r"""Largest rise of the loss over perturbations relative to the weights.

    .. math:: \max_{\|\delta \oslash |w|\|_p \le \rho} L(\theta+\delta) - L(\theta)

    The ascent runs in the coordinates :math:`\zeta = \delta/|w|`, where the ball is round;
    weights that are exactly zero stay so. All parameters take part, biases and norms too.
    Invariant to rescaling the nodes of a ReLU network, not to the GL(h) symmetry of
    attention heads. The loss is that of all data, not a mean of batch-wise maxima.

    Args:
        analysis: What is measured.
        rho: Radius; default 0.5 for l2 and 0.002 for linf.
        norm: ``"l2"`` or ``"linf"``.
        steps: Gradients to spend.
    """
    return worst_rise(
        analysis,
        ElementwiseMetric(analysis.theta.abs()),
        rho=DEFAULT_RHO[norm] if rho is None else rho,
        norm=norm,
        steps=steps,
        purpose="adaptive_sharpness_worst",
    )
