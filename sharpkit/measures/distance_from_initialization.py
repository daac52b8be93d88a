"""The distance from the initial parameters."""

from sharpkit.analysis import Analysis
from sharpkit.measures._norms import Which, norm_of
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "distance_from_initialization",
    symbol="|theta - theta_0|_2",
    reference="Jiang et al. 2020, arXiv:1912.02178, eq. 40; Nagarajan and Kolter 2019,"
    " arXiv:1901.01672",
    cost="none",
    invariant_to={"permutation", "orthogonal"},
    degree=0,
    nonnegative=True,
    needs={"initial"},
)
def distance_from_initialization(
    analysis: Analysis, *, which: Which = "all", squared: bool = False
) -> Estimate:
    r"""Euclidean distance of the parameters from those before training.

    .. math:: \|\theta - \theta_0\|_2

    Parts are the distances of the layers. Unchanged where a symmetry acts on both ends of the
    training alike. It grows with the training time and the learning rate by themselves.

    Args:
        analysis: What is measured, with ``initial``.
        which: ``"all"`` parameters, or ``"weights"``: those of two axes or more, without biases
            and norm layers.
        squared: Whether to give the sum of squares (as Jiang et al. do) and not its root.
    """
    moved = analysis.theta.double() - analysis.initial.double()
    return norm_of(analysis, moved, which, squared)
