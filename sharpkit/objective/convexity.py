"""Whether a criterion is convex in the outputs, as the Gauss-Newton matrix needs it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpkit.errors import ObjectiveError
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.gauss_newton import curvature, tensor_outputs
from sharpkit.objective.isolation import is_out_of_memory
from sharpkit.objective.losses import CriterionLoss
from sharpkit.objective.output_hessians import closed_form
from sharpkit.objective.probing import PROBE_EXAMPLES, first_piece
from sharpkit.objective.products import Named

__all__ = ["verify_criterion"]

DENSE = 256  # outputs of an example, up to which its Hessian is looked at as a whole
FORMS = 16  # random quadratic forms
NEGATIVE = 1e-6  # relative to the largest magnitude: rounding
ELSEWHERE = (0.1, 0.0)  # times the outputs: what is rounding where the loss is saturated
# Flat at outliers only, which the few examples may be.
_FLAT_IN_PARTS = (nn.SmoothL1Loss, nn.HuberLoss)
_FLAT_IN_PARTS_FUNCTIONS = (F.smooth_l1_loss, F.huber_loss)


def verify_criterion(evaluator: Evaluator, theta: Named, what: str) -> None:
    """Look at the criterion's second derivatives over the outputs of a few examples.

    Args:
        evaluator: The loss of batches.
        theta: The parameters.
        what: What needs it, in words.

    Raises:
        ObjectiveError: If there is none, it is not convex there, or has no curvature at all.
    """
    criterion = evaluator.batch_loss
    if not isinstance(criterion, CriterionLoss):
        raise ObjectiveError(
            f"Expected an objective with a criterion, as {what} goes through the network's"
            " outputs. Got one made by from_batch_loss. Use Objective(model, loss, data)."
        )
    with torch.no_grad():
        double = evaluator.in_double()
        leaves = {n: t.detach().double() for n, t in theta.items()}
    for which, at in ((double, leaves), (evaluator, theta)):
        try:
            found = first_piece(which, at, partial(_extremes, which, at), most=PROBE_EXAMPLES)
            break
        except Exception as error:
            # Double precision is not for every model.
            if which is evaluator or not (
                is_out_of_memory(error) or isinstance(error, (RuntimeError, TypeError))
            ):
                raise
    if found is None:  # no loss terms
        return
    lowest, largest, sure = found
    name = getattr(criterion.criterion, "__name__", type(criterion.criterion).__name__)
    if largest == 0:
        if sure:
            return
        raise ObjectiveError(
            "Expected a criterion with curvature over the network's outputs, as the GGN is"
            f" made of it. {name} is linear in them. Return logits and use CrossEntropyLoss"
            " if the model returns log-probabilities; otherwise use the Hessian."
        )
    eps = torch.finfo(Evaluator.coarsest_dtype(at)).eps
    if lowest < -max(NEGATIVE, 1e2 * eps) * largest:
        raise ObjectiveError(
            "Expected a criterion that is convex in the network's outputs, as the GGN is then"
            f" positive semidefinite. {name} has the curvature {lowest:.2g} there, beside"
            f" {largest:.2g}. Let the model return what the loss is convex in (logits), or use"
            " the Hessian."
        )


def _extremes(evaluator: Evaluator, theta: Named, piece: Any) -> tuple[float, float, bool] | None:
    # The lowest curvature, the largest magnitude, and whether zero is no surprise.
    criterion = evaluator.batch_loss
    assert isinstance(criterion, CriterionLoss)
    own = criterion.criterion
    sure = type(own) in _FLAT_IN_PARTS or own in _FLAT_IN_PARTS_FUNCTIONS
    lowest = largest = 0.0
    for example in evaluator.split(piece, 1) if evaluator.additive else [piece]:
        outputs, targets = tensor_outputs(evaluator, theta, example)
        outputs = outputs.detach()
        sure = sure or closed_form(criterion, outputs, targets, 1.0) is not None
        here = _curvatures(criterion, outputs, targets)
        if here is not None:
            lowest = min(lowest, float(here.min()))
        elsewhere = [_curvatures(criterion, c * outputs, targets) for c in ELSEWHERE]
        sizes = [float(c.abs().max()) for c in (here, *elsewhere) if c is not None]
        largest = max(largest, *sizes, 0.0)
    return lowest, largest, sure


def _curvatures(criterion: CriterionLoss, outputs: Tensor, targets: Any) -> Tensor | None:
    # Eigenvalues of the Hessian over the outputs, or random quadratic forms.
    product = curvature(criterion, outputs, targets, 1.0)
    if product is None:
        return None
    if outputs.numel() <= DENSE:
        eye = torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device)
        rows = [product(e.reshape(outputs.shape)).reshape(-1) for e in eye]
        H = torch.stack(rows).to(torch.promote_types(outputs.dtype, torch.float32))
        if not bool(torch.isfinite(H).all()):  # a logarithm of zero
            return None
        values: Tensor = torch.linalg.eigvalsh((H + H.T) / 2)
        return values
    generator = torch.Generator(device="cpu").manual_seed(4)
    forms = []
    for _ in range(FORMS):
        u = torch.randn(outputs.shape, generator=generator, device="cpu", dtype=torch.float64)
        u = (u / u.norm()).to(outputs.device, outputs.dtype)
        forms.append((u * product(u)).sum())
    values = torch.stack(forms)
    return values if bool(torch.isfinite(values).all()) else None
