"""Renyi sharpness layer by layer, as its paper measures it."""

from __future__ import annotations

import math

from sharpkit.analysis import Analysis
from sharpkit.errors import MeasureError
from sharpkit.estimators.functions import check_alpha
from sharpkit.measures._entropy import MAX_STEPS, Spectrum, check_quadrature
from sharpkit.measures.registry import register
from sharpkit.measures.renyi_sharpness import renyi
from sharpkit.results import Estimate, Part


@register(
    "renyi_sharpness_per_layer",
    symbol="mean over layers of -H_alpha(H_ll)",
    reference="Zhang et al. 2025, arXiv:2510.07758",
    cost="24 Lanczos steps and 48 to 384 HVPs of each layer's block",
    invariant_to={"permutation", "layer_scale", "logit_scale", "key_bias_shift"},
    degree=0,
    nonnegative=False,
    dear=True,
)
def renyi_sharpness_per_layer(
    analysis: Analysis,
    *,
    alpha: float = 2.0,
    spectrum: Spectrum = "abs",
    num_probes: int = 4,
    num_steps: int = 12,
    max_steps: int = MAX_STEPS,
) -> Estimate:
    r"""Renyi sharpness of each layer's weights, and their mean.

    .. math:: -H_\alpha(H_{\ell\ell}) = \frac{1}{\alpha-1} \log
        \frac{\operatorname{tr}|H_{\ell\ell}|^\alpha}
        {(\operatorname{tr}|H_{\ell\ell}|)^\alpha}

    for the Hessian's diagonal block of every tensor with two or more axes (biases and norms
    are left out, unless there is nothing else). Scaling a layer of a ReLU network scales its
    block as a whole, which the entropy does not see. The paper reports layers one by one,
    with alpha chosen by the shape of the spectrum; these are the parts here. The mean
    is ours, as one number is wanted.

    The error from the data is to first order in the change of the Hessian: where the data
    decide which eigenvalues are positive (few examples, a wide bulk), it was up to half too
    small.

    Args:
        analysis: What is measured.
        alpha: Order, greater than 0; inf is allowed.
        spectrum: As for ``renyi_sharpness``.
        num_probes: Random vectors of each layer, beside its Lanczos run's.
        num_steps: Lanczos steps of each to begin with.
        max_steps: Up to how many they go on, while what they leave open of eigenvalues near
            zero is more than the probes' error.

    Raises:
        MeasureError: If every layer's block is zero; a single one is left out and named.
    """
    check_quadrature(num_probes, num_steps, max_steps)
    check_alpha(alpha)
    found, zero = {}, []
    for name, layer in analysis.layers().items():
        try:
            found[name] = renyi(layer, alpha, spectrum, num_probes, num_steps, max_steps)
        except MeasureError:
            zero.append(name)
        layer.objective.release()
    if not found:
        raise MeasureError(
            "Expected a layer whose block of the Hessian is not zero. Those of all"
            f" {len(zero)} layers are, and zero has no entropy."
        )
    count = len(found)
    notes = [f"{name}: {note}" for name, e in found.items() for note in e.notes]
    if zero:
        notes.append(f"Left out, as their blocks are zero: {', '.join(zero)}.")
    data = [e.data_error for e in found.values()]
    return Estimate(
        converged=all(e.converged for e in found.values()),
        value=sum(e.value for e in found.values()) / count,
        probe_error=math.hypot(*(e.probe_error or 0.0 for e in found.values())) / count,
        error_kind="stderr",
        # The layers see the same examples: their errors may all point the same way.
        data_error=None if None in data else sum(d for d in data if d is not None) / count,
        parts=tuple(
            Part(name, e.value, e.probe_error, e.converged, e.dof) for name, e in found.items()
        ),
        details={"alpha": alpha, "spectrum": spectrum, "num_layers": count},
        notes=tuple(notes),
        dof=next(iter(found.values())).dof,
    )
