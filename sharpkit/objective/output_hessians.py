"""Hessians of the usual losses with respect to the outputs, in closed form.

Each knows its products and how to draw from the model's own predictions: a drawn slope r
has the mean zero and the covariance H, so that products with r r^T give H in the mean.
For diagonals they also fall into a sum of outer products of columns, ``H = sum w c c^T``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpkit.objective.losses import CriterionLoss

__all__ = ["Columns", "OutputHessian", "closed_form"]


@dataclass(frozen=True)
class Columns:
    """Outer products that a Hessian over outputs is the sum of, row by row of the outputs.

    Attributes:
        weights: ``[R, K]``: in row r, ``H = sum_k weights[r, k] c_rk c_rk^T``.
        make: Maps a slice of rows and numbers of columns ``[k]`` to the c of these,
            ``[rows, k, *shape of a row]``.
    """

    weights: Tensor
    make: Callable[[slice, Tensor], Tensor]


class OutputHessian(Protocol):
    """The Hessian of a batch's sum of loss terms, over all its outputs.

    Attributes:
        numbers_a_draw: How many outputs share one random number.
    """

    numbers_a_draw: int

    def product(self, u: Tensor) -> Tensor:
        """Return ``H u``, of the shape of the outputs."""

    def slope(self, uniform: Tensor) -> Tensor:
        """Return the slope r at targets drawn by uniform numbers: ``E[r r^T] = H``."""

    def columns(self, *, rows: bool) -> Columns:
        """Return H as outer products, for each row of the outputs or (one row) for all."""


class _Softmax:
    # s (diag p - p p^T) at each position, where s is the mass of its targets.
    def __init__(self, outputs: Tensor, mass: Tensor):
        self._axis = 1 if outputs.ndim > 1 else 0
        self.numbers_a_draw = outputs.shape[self._axis]
        self._p = torch.softmax(outputs.to(mass.dtype), self._axis)
        self._mass = mass.unsqueeze(self._axis)

    def product(self, u: Tensor) -> Tensor:
        pu = self._p * u
        return self._mass * (pu - self._p * pu.sum(self._axis, keepdim=True))

    def slope(self, uniform: Tensor) -> Tensor:
        total = self._p.double().cumsum(self._axis)
        u = uniform.reshape(self._mass.shape) * total.narrow(self._axis, -1, 1)
        drawn = (total <= u).sum(self._axis, keepdim=True).clamp_max(self._p.shape[self._axis] - 1)
        residual = self._p.scatter_add(self._axis, drawn, -torch.ones_like(self._mass))
        return self._mass.sqrt() * residual

    def columns(self, *, rows: bool) -> Columns:
        # diag p - p p^T = sum_c p_c (e_c - p)(e_c - p)^T at each position.
        classes = self.numbers_a_draw
        p, shape = torch.movedim(self._p, self._axis, -1), self._p.shape
        last, axis = p.shape[:-1], self._axis
        if rows:
            last, axis = last[1:], axis - 1
        count = shape[0] if rows else 1
        p = p.reshape(count, -1, classes)
        mass = self._mass.reshape(count, -1, 1)

        def make(part: slice, index: Tensor) -> Tensor:
            k = torch.arange(len(index), device=index.device)
            place, own = index // classes, index % classes
            block = -p[part][:, place]
            block[:, k, own] = 0
            block[:, k, own] = -block.sum(dim=-1)  # 1 - p_c, with all its digits
            whole = p.new_zeros(len(block), len(index), p.shape[1], classes)
            whole[:, k, place] = block
            whole = whole.reshape(len(block), len(index), *last, classes)
            return torch.movedim(whole, -1, 2 + axis)

        return Columns((mass * p).flatten(1), make)


class _Sigmoid:
    # s p (1 - p) for each element.
    numbers_a_draw = 1

    def __init__(self, outputs: Tensor, mass: Tensor):
        self._p, self._mass = torch.sigmoid(outputs.to(mass.dtype)), mass

    def product(self, u: Tensor) -> Tensor:
        return self._mass * self._p * (1 - self._p) * u

    def slope(self, uniform: Tensor) -> Tensor:
        drawn = (uniform.reshape(self._p.shape) < self._p).to(self._p.dtype)
        return self._mass.sqrt() * (self._p - drawn)

    def columns(self, *, rows: bool) -> Columns:
        return _of_elements(self._mass * self._p * (1 - self._p), rows)


class _Square:
    # 2 s for each element, as the loss has no factor 1/2.
    numbers_a_draw = 1

    def __init__(self, outputs: Tensor, mass: Tensor):
        self._outputs, self._mass = outputs, mass

    def product(self, u: Tensor) -> Tensor:
        return 2 * self._mass * u

    def slope(self, uniform: Tensor) -> Tensor:
        # 2 (f - y) for y from N(f, 1/2).
        eps = torch.finfo(torch.float64).eps / 4
        normal: Tensor = torch.special.ndtri(uniform.clamp(eps, 1 - 2 * eps))
        return (2 * self._mass).sqrt() * normal.reshape(self._outputs.shape).to(self._mass.dtype)

    def columns(self, *, rows: bool) -> Columns:
        return _of_elements((2 * self._mass).expand(self._outputs.shape), rows)


def _of_elements(weights: Tensor, rows: bool) -> Columns:
    # Unit vectors: each element is a loss term of its own.
    shape = weights.shape[1:] if rows else weights.shape
    weights = weights.reshape(weights.shape[0] if rows else 1, -1)

    def make(part: slice, index: Tensor) -> Tensor:
        count = len(weights[part])
        unit = torch.zeros(len(index), weights.shape[1], dtype=weights.dtype, device=weights.device)
        unit[torch.arange(len(index), device=index.device), index] = 1
        return unit.expand(count, -1, -1).reshape(count, len(index), *shape)

    return Columns(weights, make)


def closed_form(
    loss: CriterionLoss, outputs: Tensor, targets: object, num_terms: float
) -> OutputHessian | None:
    """Return the Hessian of a batch's share of L over its outputs; None if not known.

    Args:
        loss: The criterion.
        outputs: Of the network, without graph.
        targets: As the criterion takes them.
        num_terms: What L divides by.
    """
    criterion = loss.criterion
    if not isinstance(targets, Tensor) or not outputs.is_floating_point():
        return None
    same = targets.shape == outputs.shape
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    scale = loss.stretch(outputs, targets) / num_terms
    if type(criterion) is nn.CrossEntropyLoss or criterion is F.cross_entropy:
        mass = _class_mass(criterion, outputs, targets, dtype)
        return None if mass is None else _Softmax(outputs, scale * mass)
    if not same:
        return None
    mass = torch.full((), scale, dtype=dtype, device=outputs.device)
    if type(criterion) is nn.MSELoss or criterion is F.mse_loss:
        return _Square(outputs, mass)
    if type(criterion) is nn.BCEWithLogitsLoss or criterion is F.binary_cross_entropy_with_logits:
        weight, positive = (getattr(criterion, n, None) for n in ("weight", "pos_weight"))
        if positive is not None:
            mass = mass * (positive * targets + 1 - targets)
        if weight is not None:
            mass = mass * weight
        return _Sigmoid(outputs, mass.to(dtype).expand(outputs.shape))
    return None


def _class_mass(
    criterion: object, outputs: Tensor, targets: Tensor, dtype: torch.dtype
) -> Tensor | None:
    # The factor of log-sum-exp at each position: all of its targets, with their weights.
    axis = 1 if outputs.ndim > 1 else 0
    if outputs.ndim == 0:
        return None
    classes = outputs.shape[axis]
    smoothing = float(getattr(criterion, "label_smoothing", 0.0))
    weight = getattr(criterion, "weight", None)
    if weight is None:
        weight = torch.ones(classes, device=outputs.device)
    weight = weight.to(outputs.device, dtype)
    if targets.shape == outputs.shape:
        if not targets.is_floating_point():
            return None
        smooth = targets.to(dtype) * (1 - smoothing) + smoothing / classes
        mass: Tensor = torch.movedim(smooth, axis, -1) @ weight
        return mass
    if targets.is_floating_point() or targets.shape != outputs.select(axis, 0).shape:
        return None
    valid = targets != getattr(criterion, "ignore_index", -100)
    own = weight[torch.where(valid, targets, 0)]
    return valid * ((1 - smoothing) * own + smoothing / classes * weight.sum())
