"""The path norm."""

import math

import torch

from sharpkit.analysis import Analysis
from sharpkit.measures.registry import register
from sharpkit.results import Cost, Estimate

ROUNDING = 1e3  # products of squares along many layers, in eps of float64


@register(
    "path_norm",
    symbol="sqrt(sum_paths prod w^2)",
    reference="Neyshabur et al. 2015, arXiv:1506.02617; Jiang et al. 2020, arXiv:1912.02178,"
    " eq. 44",
    cost="4 forwards of a few examples",
    invariant_to={"permutation", "layer_scale", "node_scale"},
    degree=0,
    nonnegative=True,
    needs={"paths"},
)
def path_norm(analysis: Analysis, *, squared: bool = False) -> Estimate:
    r"""Root of the sum, over all paths from inputs to outputs, of the product of squared weights.

    .. math:: \Big(\sum_{\text{paths}} \prod_{e \in \text{path}} w_e^2\Big)^{1/2}
        = \Big(\sum_k f_{\theta^2}(\mathbf 1)_k\Big)^{1/2}

    The network with squared weights is evaluated on an input of ones, in float64; paths start
    at biases too. BatchNorm is folded into the layer before it, pooling keeps its coefficients,
    and of a maximum the largest path counts. All parameters take part, also those that are not
    in theta. Defined only where paths multiply weights: linear, convolutional and BatchNorm
    layers with ReLU; others are refused, by their kind or because doubling the input and the
    biases does not double the output. It sees neither the data nor the loss.

    Args:
        analysis: What is measured.
        squared: Whether to give the sum (as Jiang et al. do) and not its root.
    """
    total = analysis.objective.path_sum()
    value = total if squared else math.sqrt(total)
    return Estimate(
        value=value,
        probe_error=ROUNDING * torch.finfo(torch.float64).eps * value,
        error_kind="rounding",
        cost=Cost(forwards=4),
    )
