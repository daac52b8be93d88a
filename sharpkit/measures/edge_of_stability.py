"""How near the curvature is to where the optimizer's steps become unstable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sharpkit.analysis import Analysis
from sharpkit.errors import MeasureError, SettingsError
from sharpkit.estimators.protocol import check_positive
from sharpkit.measures.preconditioned_eigenvalue import preconditioned_eigenvalue
from sharpkit.measures.registry import register
from sharpkit.measures.top_eigenvalues import top_eigenvalues
from sharpkit.results import Estimate


@register(
    "edge_of_stability",
    symbol="lambda_max / threshold",
    reference="Cohen et al. 2021, arXiv:2103.00065; Cohen et al. 2022, arXiv:2207.14484",
    cost="about 20-120 HVPs, those of the eigenvalue",
    invariant_to={"permutation", "key_bias_shift"},
    degree=1,
    nonnegative=False,
    needs={"optimizer"},
)
def edge_of_stability(
    analysis: Analysis,
    *,
    learning_rate: float | None = None,
    momentum: float | None = None,
    nesterov: bool | None = None,
    tol: float = 1e-3,
    max_matvecs: int = 400,
) -> Estimate:
    r"""Largest eigenvalue as a fraction of that at which the optimizer's steps become unstable.

    .. math:: \frac{\lambda_{\max}}{\lambda^*}, \qquad \lambda^* =
        \frac{2}{\eta},\quad \frac{2 + 2\beta}{(1 - \tau)\,\eta},\quad
        \frac{2 + 2\beta}{(1 + 2\beta)\,\eta},\quad
        \frac{2 + 2\beta_1}{(1 - \beta_1)\,\eta}

    for gradient descent; with heavy-ball momentum beta and dampening tau; with Nesterov's; and
    for Adam, of whose preconditioned Hessian the eigenvalue then is. The first is
    :math:`\lambda_{\max}\eta/2`. Above 1 a step along the top eigenvector of a quadratic is
    answered by a larger one. Full-batch training tends to 1 and hovers there ("edge of
    stability"); small batches stay below. The optimizer's weight decay is no part of the
    measured loss, and a note says so. A diagnostic of training:
    it follows the learning rate, and does not predict generalization (Kaur et al. 2023).

    With Adam the symmetries of ``preconditioned_eigenvalue`` hold, otherwise those of
    ``top_eigenvalues``, which is unchanged by rotations of the parameters too.

    Args:
        analysis: What is measured; it needs ``optimizer`` (SGD, Adam or AdamW) unless
            ``learning_rate`` is given.
        learning_rate: eta of gradient descent, whatever the optimizer; None: the optimizer's.
        momentum: beta, from 0 to less than 1; None: the optimizer's SGD momentum, and 0 where
            ``learning_rate`` is given.
        nesterov: Whether the momentum is Nesterov's; None: as the optimizer's, and not where
            ``learning_rate`` is given.
        tol: Relative error at which the pair has converged; at most 0.01.
        max_matvecs: Budget of Hessian-vector products.

    Raises:
        MeasureError: If neither a learning rate nor an optimizer with one for all was given,
            or its steps have no known threshold.
    """
    if learning_rate is not None:
        check_positive("learning_rate", learning_rate)
    if momentum is not None and not 0 <= momentum < 1:
        raise SettingsError(f"Expected `momentum` from 0 to less than 1. Got {momentum!r}.")
    notes: tuple[str, ...] = ()
    dampening = 0.0
    if learning_rate is None:
        optimizer = analysis.optimizer
        if optimizer.adam:
            if momentum is not None or nesterov is not None:
                raise SettingsError(
                    "Expected no `momentum` and no `nesterov` for Adam, which has beta1 of its own."
                    " Got one. Give `learning_rate` too, to ask about gradient descent."
                )
            return _of_adam(analysis, tol, max_matvecs)
        groups = optimizer.groups
        if any("momentum" not in g or "nesterov" not in g for g in groups):
            raise MeasureError(
                f"Expected SGD, Adam or AdamW, whose thresholds are known. Got {optimizer.kind}."
                " Give `learning_rate` and `momentum` to ask about gradient descent."
            )
        learning_rate = float(optimizer.setting("lr"))
        momentum = float(optimizer.setting("momentum")) if momentum is None else momentum
        nesterov = bool(optimizer.setting("nesterov")) if nesterov is None else nesterov
        dampening = float(optimizer.setting("dampening")) if momentum else 0.0
        decay = _decay(groups)
        if decay:
            notes = (
                f"The optimizer's weight decay of {decay:g} adds as much to every eigenvalue of"
                " what it descends; it is left out here.",
            )
        if learning_rate <= 0:
            raise MeasureError(
                f"Expected a positive learning rate. The optimizer has {learning_rate:g}. Give"
                " `learning_rate`."
            )
    threshold = sgd_threshold(
        learning_rate, momentum=momentum or 0.0, nesterov=bool(nesterov), dampening=dampening
    )
    eigenvalue = top_eigenvalues(analysis, k=1, which="largest", tol=tol, max_matvecs=max_matvecs)
    details = {
        "learning_rate": learning_rate,
        "momentum": momentum or 0.0,
        "nesterov": bool(nesterov),
    }
    return _ratio(eigenvalue, threshold, details, notes)


def sgd_threshold(
    learning_rate: float, *, momentum: float = 0.0, nesterov: bool = False, dampening: float = 0.0
) -> float:
    r"""Return the curvature above which steps on a quadratic grow.

    With :math:`s = \eta\lambda`, heavy-ball momentum steps by
    :math:`x^2 - (1 + \beta - (1-\tau)s)\,x + \beta = 0`, whose roots leave the unit circle at
    :math:`(1-\tau)s = 2 + 2\beta`; Nesterov's as torch steps, with the determinant
    :math:`\beta(1 - s)` and the trace :math:`1 + \beta - (1+\beta)s`, at
    :math:`s(1 + 2\beta) = 2 + 2\beta`.
    """
    share = 1 + 2 * momentum if nesterov else 1 - dampening
    return (2 + 2 * momentum) / (share * learning_rate)


def _of_adam(analysis: Analysis, tol: float, max_matvecs: int) -> Estimate:
    eigenvalue = preconditioned_eigenvalue(analysis, tol=tol, max_matvecs=max_matvecs)
    if "threshold" not in eigenvalue.details:
        raise MeasureError(eigenvalue.notes[-1])
    details = {"learning_rate": float(analysis.optimizer.setting("lr"))}
    decay = _decay(analysis.optimizer.groups)
    note = (f"The optimizer's weight decay of {decay:g} pulls too; it is left out here.",)
    threshold = float(eigenvalue.details["threshold"])
    return _ratio(eigenvalue, threshold, details, note if decay else ())


def _decay(groups: Sequence[Mapping[str, Any]]) -> float:
    return max(float(g["weight_decay"]) for g in groups)


def _ratio(
    eigenvalue: Estimate, threshold: float, details: Mapping[str, object], notes: tuple[str, ...]
) -> Estimate:
    data = eigenvalue.data_error
    return replace(
        eigenvalue,
        value=eigenvalue.value / threshold,
        probe_error=(eigenvalue.probe_error or 0.0) / threshold,
        data_error=None if data is None else data / threshold,
        data_draws=tuple(d / threshold for d in eigenvalue.data_draws),
        parts=(),
        details={
            **details,
            "threshold": threshold,
            "eigenvalue": eigenvalue.value,
            "second_start": eigenvalue.details["second_start"],
        },
        notes=(*eigenvalue.notes, *notes),
    )
