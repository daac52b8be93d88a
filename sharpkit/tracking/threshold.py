"""The curvature above which the steps of an optimizer grow, as training goes on."""

from __future__ import annotations

import math
from typing import Any

import torch

from sharpkit.measures.edge_of_stability import sgd_threshold

__all__ = ["stability_line"]


def stability_line(optimizer: Any, learning_rate: float | None) -> tuple[float | None, str]:
    r"""Return the curvature at which plain steps on a quadratic become unstable, and a note.

    .. math:: \frac{2}{\eta},\quad \frac{2 + 2\beta}{(1 - \tau)\eta},\quad
        \frac{2 + 2\beta}{(1 + 2\beta)\eta}

    for gradient descent, heavy-ball momentum beta with dampening tau, and Nesterov's
    (:func:`sharpkit.measures.edge_of_stability`). None for other optimizers: the line of Adam,
    :math:`(2 + 2\beta_1)/((1 - \beta_1)\eta)`, which is 38/eta for beta1 = 0.9, is one of the
    *preconditioned* Hessian, whose eigenvalue the measure ``edge_of_stability`` takes.

    Args:
        optimizer: A torch optimizer, also inside a wrapper of Lightning's or accelerate's;
            None: gradient descent of the learning rate.
        learning_rate: eta; None: the optimizer's.

    Example:
        >>> parameters = [torch.nn.Parameter(torch.zeros(1))]
        >>> stability_line(torch.optim.SGD(parameters, lr=0.5, momentum=0.5), None)
        (6.0, '')
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if optimizer is None:
        if learning_rate is None or not _positive(learning_rate):
            return None, ""
        return sgd_threshold(learning_rate), ""
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return None, "Adam's line of stability is one of its preconditioned Hessian."
    if type(optimizer) is not torch.optim.SGD:
        return None, f"No line of stability is known for {type(optimizer).__name__}."
    groups = optimizer.param_groups
    settings = [tuple(g[n] for n in ("momentum", "nesterov", "dampening")) for g in groups]
    rates = [float(g["lr"]) for g in groups] if learning_rate is None else [learning_rate]
    if len(set(settings)) > 1 or len(set(rates)) > 1 or any(g["maximize"] for g in groups):
        return None, "The optimizer's groups take different steps: no one line of stability."
    momentum, nesterov, dampening = settings[0]
    if not _positive(rates[0]):
        return None, ""
    line = sgd_threshold(
        rates[0],
        momentum=float(momentum),
        nesterov=bool(nesterov),
        dampening=float(dampening) if momentum else 0.0,
    )
    return line, ""


def _positive(rate: float) -> bool:
    return 0 < rate < math.inf
