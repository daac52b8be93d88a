"""Relative flatness by largest eigenvalues, neuron by neuron."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sharpkit.analysis import Analysis
from sharpkit.estimators import lanczos
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures._extreme import largest_eigenvalue
from sharpkit.measures._neurons import chosen_layers, neurons
from sharpkit.measures.registry import register
from sharpkit.operators import SymmetricOperator, gram_root
from sharpkit.results import Cost, Estimate, Part


@register(
    "relative_flatness_max",
    symbol="sum_s |w_s|^2 lambda_max(H_ss)",
    reference="Petzka et al. 2021, arXiv:2001.00939",
    cost="10-40 HVPs of the layer's block a neuron, for 64 neurons; joint: 20-120",
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
def relative_flatness_max(
    analysis: Analysis,
    *,
    layer: str | None = None,
    form: Literal["neurons", "joint"] = "neurons",
    max_neurons: int = 64,
    tol: float = 1e-2,
    max_matvecs: int = 100,
) -> Estimate:
    r"""Largest curvature of each neuron of a layer times its squared weight, summed up.

    .. math:: \kappa_{\max} = \sum_s \|w_s\|^2 \lambda_{\max}(H_{ss})

    with the neurons and layers of ``relative_flatness``: the form of the authors' code. Every
    neuron needs a Lanczos run of its own, as a product with the layer's block mixes them; of
    more than ``max_neurons`` a random sample is taken, and the error is then the standard error
    of the sum. With ``"joint"`` the neurons are taken together,

    .. math:: \lambda_{\max}(C^{1/2} H C^{1/2}), \qquad C = W W^\top \otimes I

    which is ours: one run, at most :math:`\kappa_{\mathrm{Tr}}` where H has
    no negative eigenvalue, and like that unchanged by any matrix from the left; the sum is
    unchanged only by scales of the neurons. Over several layers the value is the sum of the
    parts.

    Args:
        analysis: What is measured.
        layer: Glob of weights of two or more axes; ``"*"`` for all; None: the last one.
        form: ``"neurons"`` or ``"joint"``.
        max_neurons: Most neurons of a layer to measure, at least 2.
        tol: Relative error at which an eigenvalue has converged; at most 0.01.
        max_matvecs: Budget of products for each eigenvalue.
    """
    check_positive("max_neurons", max_neurons, minimum=2)
    found, chosen = {}, chosen_layers(analysis, layer)
    for name, part in chosen.items():
        if form == "joint":
            weight, axis = neurons(part)
            found[name] = largest_eigenvalue(
                part,
                f"relative_flatness {name}",
                gram_root(weight, axis=axis),
                tol=tol,
                max_matvecs=max_matvecs,
            )
        else:
            found[name] = _by_neurons(part, name, max_neurons, tol, max_matvecs)
        if len(chosen) > 1:
            part.objective.release()
    estimates = list(found.values())
    if len(estimates) == 1:
        return estimates[0]
    sampled = any(e.error_kind == "stderr" for e in estimates)
    errors = [e.probe_error or 0.0 for e in estimates]
    return Estimate(
        value=sum(e.value for e in estimates),
        probe_error=math.hypot(*errors) if sampled else sum(errors),
        error_kind="stderr" if sampled else "bound",
        converged=all(e.converged for e in estimates),
        cost=Cost(hvps=sum(e.cost.hvps for e in estimates)),
        parts=tuple(
            Part(name, e.value, e.probe_error, e.converged, e.dof) for name, e in found.items()
        ),
        details={"form": form, "num_layers": len(estimates)},
        notes=tuple(f"{name}: {note}" for name, e in found.items() for note in e.notes),
        dof=_common_dof(estimates),
    )


def _common_dof(estimates: list[Estimate]) -> float | None:
    # Of the errors' root sum of squares, after Welch and Satterthwaite.
    squares = [(e.probe_error or 0.0) ** 2 for e in estimates]
    uncertain = math.fsum(
        v * v / e.dof for v, e in zip(squares, estimates, strict=True) if e.dof is not None
    )
    return math.fsum(squares) ** 2 / uncertain if uncertain > 0 else None


def _by_neurons(
    layer: Analysis, name: str, max_neurons: int, tol: float, max_matvecs: int
) -> Estimate:
    weight, axis = neurons(layer)
    generator = layer.generator(f"relative_flatness_max {name}")
    count = weight.shape[axis]
    index = torch.arange(layer.theta.numel(), device=weight.device).reshape(weight.shape)
    rows = index.movedim(axis, 0).flatten(1)
    squares = weight.double().movedim(axis, 0).flatten(1).square().sum(dim=1).tolist()
    sample = list(range(count))
    if count > max_neurons:
        order = torch.randperm(count, generator=generator, device=weight.device)
        sample = sorted(order[:max_neurons].tolist())
    terms, errors, products, late = [], [], 0, 0
    for s in sample:
        block = _neuron(layer, rows[s])
        pairs = lanczos(
            block, k=1, which="largest", tol=tol, max_matvecs=max_matvecs, generator=generator
        )
        wrong = layer.product_error * abs(pairs.largest[0])
        terms.append(squares[s] * pairs.largest[0])
        errors.append(squares[s] * (pairs.largest_residuals[0] + wrong))
        products += block.num_matvecs
        late += not pairs.converged
    scale = count / len(sample)
    details: dict[str, Any] = {"form": "neurons", "num_neurons": count, "num_measured": len(sample)}
    notes: tuple[str, ...] = ()
    if late:
        notes = (
            f"{late} of {len(sample)} eigenvalues did not converge in {max_matvecs} products."
            " Give a larger `max_matvecs`.",
        )
    bound = scale * sum(errors)
    kind, error, dof = "bound", bound, None
    if len(sample) < count:
        # A sample without replacement: what was measured no longer scatters.
        spread = float(np.std(terms, ddof=1)) * math.sqrt(1 - len(sample) / count)
        kind, dof = "stderr", len(sample) - 1
        error = math.hypot(count * spread / math.sqrt(len(sample)), bound)
    return Estimate(
        value=scale * sum(terms),
        probe_error=error,
        error_kind="stderr" if kind == "stderr" else "bound",
        converged=not late and not layer.saturated,
        cost=Cost(hvps=products),
        details=details,
        notes=notes + layer.saturation_note(),
        dof=dof,
    )


def _neuron(layer: Analysis, rows: Tensor) -> SymmetricOperator:
    # One neuron's block: products of the layer's, of vectors that are zero elsewhere.
    hessian = layer.hessian

    def matmat(V: Tensor) -> Tensor:
        whole = torch.zeros(hessian.dim, V.shape[1], dtype=V.dtype, device=V.device)
        whole[rows] = V
        return (hessian @ whole)[rows]

    return SymmetricOperator(matmat, len(rows), dtype=hessian.dtype, device=hessian.device)
