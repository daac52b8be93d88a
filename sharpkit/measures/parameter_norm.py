"""The norm of the parameters."""

from sharpkit.analysis import Analysis
from sharpkit.measures._norms import Which, norm_of
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "parameter_norm",
    symbol="|theta|_2",
    reference="Jiang et al. 2020, arXiv:1912.02178, eq. 42",
    cost="none",
    invariant_to={"permutation", "orthogonal"},
    degree=0,
    nonnegative=True,
)
def parameter_norm(analysis: Analysis, *, which: Which = "all", squared: bool = False) -> Estimate:
    r"""Euclidean norm of the parameters, the baseline that any sharpness must beat.

    .. math:: \|\theta\|_2

    Parts are the norms of the layers. Says nothing of the function: rescaling the layers of a
    ReLU network, or the weights before a BatchNorm, changes it at will.

    Args:
        analysis: What is measured.
        which: ``"all"`` parameters, or ``"weights"``: those of two axes or more, without biases
            and norm layers.
        squared: Whether to give the sum of squares (as Jiang et al. do) and not its root.
    """
    return norm_of(analysis, analysis.theta, which, squared)
