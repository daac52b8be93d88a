"""The Fisher-Rao norm."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpkit.analysis import Analysis
from sharpkit.errors import MeasureError
from sharpkit.measures.registry import register
from sharpkit.objective.groups import group_error
from sharpkit.results import Cost, Estimate

MOST_DRAWS = 1024  # groups of the data that are kept
ROUNDING = 100  # a slope is a chain of sums: some eps of its size are lost
SLOPE = 4  # eps that each slope loses of its size
SAFETY = 6.0  # one random change of the last digits may be smaller than the rounding itself
MODELS = (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss)
MODEL_FUNCTIONS = (F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits)


@register(
    "fisher_rao_norm",
    symbol="theta' F theta",
    reference="Liang et al. 2019, arXiv:1711.01530",
    cost="1 curvature product and 1 gradient, 2 products if true; one by one where outputs are"
    " not by example",
    invariant_to={
        "permutation",
        "orthogonal",
        "layer_scale",
        "node_scale",
        "pair_scale",
        "batch_norm_scale",
        "logit_scale",
        "attention_gl",
        "key_bias_shift",
    },
    degree=2,
    nonnegative=True,
    needs={"examples"},
)
def fisher_rao_norm(
    analysis: Analysis, *, fisher: Literal["empirical", "true"] = "empirical"
) -> Estimate:
    r"""Squared length of the parameters in the Fisher metric.

    .. math:: \theta^\top F \theta = \frac1N \sum_n (\theta^\top g_n)^2

    with the gradients g of single examples; ``"true"`` averages over the targets that the model
    predicts, which gives :math:`\theta^\top G\,\theta` with the Gauss-Newton matrix. The square,
    as published; take the root for a length. Every linear symmetry of the network carries
    theta with it and leaves the norm as it is. It vanishes with the loss: after training to zero
    loss, the empirical norm is that of a few examples.

    Args:
        analysis: What is measured.
        fisher: ``"empirical"``: at the given targets; ``"true"``: at those that the model
            predicts, for CrossEntropyLoss, MSELoss and BCEWithLogitsLoss.
    """
    if fisher == "true":
        return _true(analysis)
    objective, before = analysis.objective, analysis.objective.cost
    slopes, sizes = objective.example_slopes(analysis.theta)
    squares, eps = slopes.square(), torch.finfo(objective.model_dtype).eps
    lost = SLOPE * eps * sizes  # large where logits are, whatever their differences
    cancelled = float((lost * (2 * slopes.abs() + lost)).mean())
    data = _by_groups(squares) if analysis.num_groups else None
    spent = objective.cost - before
    value = float(squares.mean())
    return Estimate(
        value=value,
        probe_error=max(ROUNDING * eps * value, cancelled),
        error_kind="rounding",
        data_error=data[0] if data else None,
        data_draws=data[1] if data else (),
        cost=Cost(hvps=spent.hvps, gradients=spent.gradients),
        details={"fisher": fisher},
        notes=analysis.saturation_note(),
    )


def _by_groups(squares: Tensor) -> tuple[float, tuple[float, ...]] | None:
    count = min(len(squares), MOST_DRAWS)
    place = torch.arange(len(squares), device="cpu") % count
    parts = torch.zeros(count, dtype=torch.float64, device="cpu").index_add_(0, place, squares)
    weights = torch.bincount(place, minlength=count).double() / len(squares)
    return group_error(parts / len(squares), weights)


def _true(analysis: Analysis) -> Estimate:
    objective, theta = analysis.objective, analysis.theta
    criterion = objective.criterion
    if not (type(criterion) in MODELS or criterion in MODEL_FUNCTIONS):
        name = getattr(criterion, "__name__", type(criterion).__name__)
        raise MeasureError(
            "Expected CrossEntropyLoss, MSELoss or BCEWithLogitsLoss for fisher='true', as"
            f" targets are drawn from the model. Got {name if criterion else 'a batch loss'}."
            " Use fisher='empirical'."
        )
    # Logits far larger than their differences lose more than the sums do: what moving the last
    # digits of theta changes shows it.
    near = objective.at(theta + analysis.last_digits)
    moved = float(near.theta.double() @ near.ggnvp(near.theta).double())
    eps, data = torch.finfo(objective.model_dtype).eps, None
    if analysis.num_groups:
        forms = objective.grouped_forms(
            theta, [theta], matrix="ggn", num_groups=analysis.num_groups
        )
        assert forms is not None
        value = float(forms.forms.sum())
        data = forms.error(torch.ones(1, 1, device="cpu"))
    else:
        value = float(theta.double() @ objective.ggnvp(theta).double())
    return Estimate(
        value=value,
        probe_error=max(ROUNDING * eps * abs(value), SAFETY * abs(moved - value)),
        error_kind="rounding",
        data_error=data[0] if data else None,
        data_draws=data[1] if data else (),
        cost=Cost(hvps=2),
        details={"fisher": "true"},
    )
