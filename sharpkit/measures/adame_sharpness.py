"""The sharpness that AdamE minimizes implicitly."""

from __future__ import annotations

from sharpkit.analysis import Analysis, DiagonalMethod
from sharpkit.errors import SettingsError
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures._concave import Concave, concave_estimate, entries
from sharpkit.measures.registry import register
from sharpkit.results import Estimate


@register(
    "adame_sharpness",
    symbol="sum_i H_ii^(1 - lambda)",
    reference="Li, Wen, Lyu 2025, arXiv:2511.02773",
    cost="num_probes HVPs (100), P if exact; GGN: a gradient an output",
    invariant_to={"permutation", "key_bias_shift"},
    degree=0.75,
    nonnegative=True,
)
def adame_sharpness(
    analysis: Analysis,
    *,
    exponent: float = 0.25,
    num_probes: int = 100,
    method: DiagonalMethod = "auto",
) -> Estimate:
    r"""Sum of a power of the Hessian's diagonal, which AdamE minimizes implicitly.

    .. math:: \operatorname{tr}\bigl(\operatorname{diag}(H)^{1-\lambda}\bigr)
        = \sum_i H_{ii}^{1-\lambda}

    for steps divided by :math:`v^\lambda`, so that 1/2 is Adam (``adam_sharpness``) and 0 is
    SGD (the trace). Above 1/2 it counts the entries that are not zero rather than their size,
    and noise in zeros weighs ever more: take ``method="ggn"`` or ``"exact"`` there.

    Defined at (near-)minimisers, where no entry is negative; negative ones count as 0 and
    their share is stated. The error is bounded as in ``adam_sharpness``.

    Args:
        analysis: What is measured.
        exponent: lambda, from 0 to less than 1.
        num_probes: Budget of Hessian-vector products for the estimate.
        method: ``"auto"``, ``"exact"``, ``"hutchinson"``, ``"xdiag"`` or ``"ggn"``, as in
            ``adam_sharpness``.
    """
    check_positive("num_probes", num_probes, minimum=2)
    if not 0 <= exponent < 1:
        raise SettingsError(f"Expected `exponent` from 0 to less than 1. Got {exponent!r}.")
    power = 1 - exponent
    function = Concave(
        lambda h: float((h**power).sum()),
        lambda h: power * h ** (power - 1),
        powers=(power,),
    )
    traces = entries(analysis, method=method, num_probes=num_probes)
    return concave_estimate(analysis, "adame_sharpness", traces, function)
