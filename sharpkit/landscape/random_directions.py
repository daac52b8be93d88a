"""Random directions with the scale of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sharpkit.errors import MeasureError, SettingsError
from sharpkit.landscape.section import Direction
from sharpkit.objective import Objective
from sharpkit.parameters import Selection, select_names

__all__ = ["Normalization", "filter_normalized", "random_direction"]

Normalization: TypeAlias = Literal["filter", "layer", "weight", "theta"]

LABELS = {
    "filter": "multiples of the filter norm",
    "layer": "multiples of the layer norm",
    "weight": "multiples of each weight",
    "theta": "multiples of ||theta||",
}
BIAS_NORM = "bias_norm"
SHOWN = 20  # names kept in the details


def random_direction(
    objective: Objective,
    normalization: Normalization = "filter",
    *,
    ignore: Selection | None = BIAS_NORM,
    seed: int = 0,
) -> Direction:
    r"""Return a random direction with the scale of the weights.

    .. math::
        \text{filter, layer:}\; d_f \leftarrow d_f\,\frac{\|w_f\|_2}{\|d_f\|_2} \qquad
        \text{weight:}\; d \leftarrow d \odot w \qquad
        \text{theta:}\; d \leftarrow d\,\frac{\|w\|_2}{\|d\|_2}, \qquad d \sim N(0, I)

    A filter f is a slice of the first axis of a tensor with two or more axes (a convolution's
    output channel, a linear layer's row); a tensor with one axis is one filter. A layer is a
    tensor. ``theta`` is all that moves together.

    Args:
        objective: Where, and in which parameters.
        normalization: As above.
        ignore: What does not move: ``"bias_norm"`` is every tensor with one axis or none
            (biases, norm parameters), as in the paper's figures; a selection of names; or None.
        seed: Of the random draw.

    Raises:
        SettingsError: If the normalization is unknown.
        MeasureError: If nothing is left to move.
        ObjectiveError: If a glob of ``ignore`` matches nothing.

    When it misleads: two directions of some thousand dimensions show little of a surface with
    P of them, and another seed shows another picture: draw several. Filter normalization makes
    pictures comparable between networks whose layers are rescaled as a whole, not between those
    whose nodes are (the next layer's columns change too).

    Reference: Li et al. 2018, arXiv:1712.09913, whose code leaves out the normalization unless
    asked, and sets tensors of one axis to the weights themselves where they are not ignored.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> data = (torch.zeros(1, 3), torch.zeros(1, 2))
        >>> objective = Objective(model, torch.nn.MSELoss(), data)
        >>> direction = random_direction(objective)
        >>> d = objective.space.unflatten(direction.vector)
        >>> torch.allclose(d["weight"].norm(dim=1), model.weight.norm(dim=1))
        True
        >>> d["bias"].tolist(), direction.label
        ([0.0, 0.0], 'multiples of the filter norm')
    """
    if normalization not in LABELS:
        raise SettingsError(
            f"Expected a normalization among {', '.join(LABELS)}. Got {normalization!r}."
        )
    space = objective.space
    generator = torch.Generator(space.device).manual_seed(seed)
    noise = torch.randn(space.dim, generator=generator, dtype=space.dtype, device=space.device)
    weights, parts = space.unflatten(objective.theta), space.unflatten(noise)
    left_out = _left_out(space.names, weights, ignore)
    if len(left_out) == len(space.names):
        raise MeasureError(
            "Expected at least one parameter that moves. The selection has"
            f" {', '.join(space.names[:5])}, all of them ignored (tensors of one axis are, unless"
            " ignore=None). Select weights too."
        )
    direction = {
        name: torch.zeros_like(w) if name in left_out else _scaled(w, parts[name], normalization)
        for name, w in weights.items()
    }
    vector = space.flatten(direction)
    if normalization == "theta":
        moving = [weights[n] for n in space.names if n not in left_out]
        length = torch.stack([w.norm() for w in moving]).norm()
        vector = vector * (length / vector.norm())
    return Direction(
        vector,
        kind=normalization,
        label=LABELS[normalization],
        seed=seed,
        details={
            "normalization": normalization,
            "ignored": left_out[:SHOWN],
            "num_ignored": len(left_out),
            "theta_norm": float(objective.theta.norm()),
        },
    )


def _left_out(
    names: Sequence[str], weights: dict[str, Tensor], ignore: Selection | None
) -> list[str]:
    if ignore is None:
        return []
    if isinstance(ignore, str) and ignore == BIAS_NORM:
        return [n for n in names if weights[n].ndim <= 1]
    return select_names(names, ignore)


def _scaled(w: Tensor, d: Tensor, normalization: Normalization) -> Tensor:
    if normalization == "theta":
        return d
    if normalization == "weight":
        return d * w
    by_filter = normalization == "filter" and w.ndim > 1
    rows = d.flatten(1) if by_filter else d.reshape(1, -1)
    target = w.flatten(1) if by_filter else w.reshape(1, -1)
    scale = target.norm(dim=1) / rows.norm(dim=1).clamp(min=torch.finfo(w.dtype).tiny)
    scaled: Tensor = (rows * scale[:, None]).view_as(w)
    return scaled


def filter_normalized(objective: Objective, *, seed: int = 0) -> Tensor:
    r"""Return the vector ``[P]`` of :func:`random_direction` by filter.

    Args:
        objective: Where, and in which parameters.
        seed: Of the random draw.

    Raises:
        MeasureError: If no selected parameter has two axes.

    Reference: arXiv:1712.09913.
    """
    return random_direction(objective, seed=seed).vector
