"""Directions to look along."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpkit.errors import MeasureError
from sharpkit.objective import Objective

__all__ = ["filter_normalized"]


def filter_normalized(objective: Objective, *, seed: int = 0) -> Tensor:
    r"""Return a random direction ``[P]`` with the scale of the weights (Li et al. 2018).

    .. math:: d_f \leftarrow d_f\,\|w_f\|_2 / \|d_f\|_2, \qquad d \sim N(0, I)

    for each filter f: a slice of the first axis of a tensor with two or more axes (a
    convolution's output channel, a linear layer's row). Biases and norm parameters (one
    axis) do not move, as in the paper's figures.

    Args:
        objective: Where, and in which parameters.
        seed: Of the random draw.

    Raises:
        MeasureError: If no selected parameter has two axes.

    Reference: arXiv:1712.09913.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> data = (torch.zeros(1, 3), torch.zeros(1, 2))
        >>> objective = Objective(model, torch.nn.MSELoss(), data)
        >>> d = objective.space.unflatten(filter_normalized(objective))
        >>> torch.allclose(d["weight"].norm(dim=1), model.weight.norm(dim=1))
        True
        >>> d["bias"].tolist()
        [0.0, 0.0]
    """
    space = objective.space
    generator = torch.Generator(space.device).manual_seed(seed)
    noise = torch.randn(space.dim, generator=generator, dtype=space.dtype, device=space.device)
    weights, parts = space.unflatten(objective.theta), space.unflatten(noise)
    if all(w.ndim <= 1 for w in weights.values()):
        raise MeasureError(
            "Expected at least one parameter with two axes to normalise by filter. The"
            f" selection has {', '.join(space.names[:5])}. Select weights too."
        )
    direction = {}
    for name, w in weights.items():
        if w.ndim <= 1:
            direction[name] = torch.zeros_like(w)
            continue
        rows, target = parts[name].flatten(1), w.flatten(1).norm(dim=1)
        scale = target / rows.norm(dim=1).clamp(min=torch.finfo(w.dtype).tiny)
        direction[name] = (rows * scale[:, None]).view_as(w)
    return space.flatten(direction)
