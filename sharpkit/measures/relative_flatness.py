"""Relative flatness: the curvature of a layer relative to its weights."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from sharpkit.analysis import Analysis
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures._neurons import chosen_layers, neurons
from sharpkit.measures.registry import register
from sharpkit.operators import gram_root
from sharpkit.results import Cost, Estimate, Part
from sharpkit.spectral import HEAD_STEPS

BLOCK = 8


@register(
    "relative_flatness",
    symbol="sum_ss' <w_s, w_s'> tr H_ss'",
    reference="Petzka et al. 2021, arXiv:2001.00939",
    cost="24 Lanczos steps and num_probes HVPs (32) of each layer's block",
    invariant_to={
        "permutation",
        "layer_scale",
        "batch_norm_scale",
        "logit_scale",
        "key_bias_shift",
    },
    degree=1,
    nonnegative=False,
)
def relative_flatness(
    analysis: Analysis,
    *,
    layer: str | None = None,
    num_probes: int = 32,
    target_error: float | None = None,
    max_probes: int = 1024,
) -> Estimate:
    r"""Trace of a layer's block of the Hessian, weighted by the products of its neurons' weights.

    .. math:: \kappa_{\mathrm{Tr}} = \sum_{s,s'} \langle w_s, w_{s'}\rangle
        \operatorname{tr} H_{ss'} = \operatorname{tr} C^{1/2} H C^{1/2}, \qquad
        C = W W^\top \otimes I, \quad H_{ss'} =
        \frac{\partial^2 L}{\partial w_s\,\partial w_{s'}}

    with the rows :math:`w_s` of the layer's weight W as neurons (a convolution's filters, each
    flattened). The second form is a trace of products with the layer's block, which is never
    built: outliers count exactly, random probes measure the rest. To second order the loss
    rises by :math:`\tfrac{\sigma^2}{2}\kappa` on average when W becomes
    :math:`W(I + \sigma Z)` with standard normal Z. Unchanged when any invertible matrix is
    multiplied from the left and undone downstream, such as another scale of the layer or of
    its own neurons; a scale of the layer's inputs, one by one, changes it. The bias has no
    part in it.

    The paper takes the layer after the penultimate representation, which is the default; it
    normalizes features in some experiments, and does not here. Over several layers the value
    is the sum of the parts, our choice. Large where predictions are
    unsure, and misleading off the minimum: the trace may be negative there.

    Args:
        analysis: What is measured.
        layer: Glob of weights of two or more axes; ``"*"`` for all; None: the last one in the
            order of the parameters.
        num_probes: Hessian-vector products of each layer, beside its Lanczos run's.
        target_error: Go on until the standard error is below this fraction of the value.
        max_probes: Budget with a target error.
    """
    check_positive("num_probes", num_probes, minimum=2)
    check_positive("max_probes", max_probes, minimum=2)
    if target_error is not None:
        check_positive("target_error", target_error)
    most = num_probes if target_error is None else max_probes
    found, chosen = {}, chosen_layers(analysis, layer)
    for name, part in chosen.items():
        found[name] = _one(part, name, most, target_error)
        if len(chosen) > 1:
            part.objective.release()
    return _sum(found)


def _one(layer: Analysis, name: str, num_probes: int, target_error: float | None) -> Estimate:
    weight, axis = neurons(layer)
    root = gram_root(weight, axis=axis)
    spectral = layer.congruent(f"relative_flatness {name}", root)
    dim = layer.objective.space.dim
    if dim > HEAD_STEPS + num_probes:
        estimate = spectral.trace(num_probes=num_probes, target_error=target_error)
        size = float(estimate.details["frobenius_norm"])
        wrong = layer.product_error * size
        return replace(estimate, probe_error=math.hypot(estimate.probe_error or 0.0, wrong))
    value = size = 0.0
    for start in range(0, dim, BLOCK):
        index = torch.arange(start, min(start + BLOCK, dim), device=weight.device)
        units = torch.zeros(dim, len(index), device=weight.device, dtype=weight.dtype)
        units[index, index - start] = 1
        X = root(units)
        Y = layer.hessian @ X
        value += float((X.double() * Y.double()).sum())
        size += float((X.double().norm(dim=0) * Y.double().norm(dim=0)).sum())
    estimate = Estimate(
        value=value,
        probe_error=layer.product_error * size,
        error_kind="rounding",
        cost=Cost(hvps=dim),
        details={"num_probes": 0},
    )
    return spectral.with_data_error(estimate, lambda x: x)


def _sum(found: dict[str, Estimate]) -> Estimate:
    # The layers' probes are independent, and their groups of the data are the same ones.
    estimates = list(found.values())
    exact = all(e.error_kind == "rounding" for e in estimates)
    errors = [e.probe_error or 0.0 for e in estimates]
    draws = [e.data_draws for e in estimates]
    data_error: float | None = None
    data_draws: tuple[float, ...] = ()
    if all(draws) and len({len(d) for d in draws}) == 1:
        data_draws = tuple(map(sum, zip(*draws, strict=True)))
        spread = torch.tensor(data_draws, dtype=torch.float64, device="cpu").std()
        data_error = float(spread) / math.sqrt(len(data_draws))
    return Estimate(
        value=sum(e.value for e in estimates),
        probe_error=sum(errors) if exact else math.hypot(*errors),
        error_kind="rounding" if exact else "stderr",
        data_error=data_error,
        converged=all(e.converged for e in estimates),
        cost=Cost(hvps=sum(e.cost.hvps for e in estimates)),
        parts=tuple(
            Part(name, e.value, e.probe_error, e.converged, e.dof) for name, e in found.items()
        ),
        details={"num_layers": len(estimates), "num_probes": _probes(estimates)},
        notes=tuple(f"{name}: {note}" for name, e in found.items() for note in e.notes),
        draws=estimates[0].draws if len(estimates) == 1 else (),
        data_draws=data_draws,
    )


def _probes(estimates: list[Estimate]) -> int:
    return max(int(e.details["num_probes"]) for e in estimates)
