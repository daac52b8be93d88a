r"""Renumber and turn what a network holds, until it is as near to another one as it can be.

Every coordinate is a group that leaves the function alone: hidden units that may be renumbered,
attention heads, and the rotations of balanced factors. For each the best element, all others
held, has a closed form; what is maximised is the inner product with the other network, which is
to minimise the distance, for no coordinate changes a norm.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sharpkit.geometry.layouts import FactorPair
from sharpkit.geometry.quotient import Pair
from sharpkit.geometry.symmetries.kinds import Element, Part
from sharpkit.geometry.symmetries.permutation import UnitGroup
from sharpkit.objective.states import State

__all__ = ["Coordinate", "HeadOrder", "Matched", "Rotation", "UnitOrder", "inner", "match"]

SWEEPS = 200
GAIN = 1e-12  # of the norms' product: what is less is rounding, and no reason to move


class Coordinate(Protocol):
    """One group, and its best element."""

    @property
    def label(self) -> str:
        """What it is, for a reader."""

    @property
    def units(self) -> int:
        """How many things can change places; 0 for a rotation."""

    @property
    def tensors(self) -> Collection[str]:
        """The parameters and buffers that it moves."""

    def best(self, a: State, b: State) -> tuple[dict[str, Tensor], np.ndarray | None]:
        """Return b moved by the best element, and the order in which its units now are."""

    def shuffled(self, b: State, order: np.ndarray) -> dict[str, Tensor]:
        """Return b with its units in another order."""


@dataclass(frozen=True)
class UnitOrder:
    r"""Hidden units: a linear assignment.

    .. math:: \max_\pi \sum_i C_{i\pi(i)},\qquad C_{ij} = \sum_{\text{places}} \langle
        a_i, b_j \rangle

    with what belongs to unit i of one network and to unit j of the other, everywhere
    (Ainsworth et al., arXiv:2209.04836, algorithm 1).

    Attributes:
        group: The units.
        names: The parameters whose entries count.
    """

    group: UnitGroup
    names: Collection[str]

    @property
    def label(self) -> str:
        """The first tensor that they lie in."""
        return self.group.tensors[0]

    @property
    def units(self) -> int:
        """How many."""
        return self.group.units

    @property
    def tensors(self) -> tuple[str, ...]:
        """What moves with them."""
        return self.group.tensors

    def best(self, a: State, b: State) -> tuple[dict[str, Tensor], np.ndarray | None]:
        """Return b in the best order."""
        value = np.zeros((self.units, self.units))
        for place, touch in enumerate(self.group.touches):
            if touch.name in self.names:
                value += (self.group.rows(a, place) @ self.group.rows(b, place).mT).cpu().numpy()
        _, order = linear_sum_assignment(value, maximize=True)
        return self.group.act(b, order), order

    def shuffled(self, b: State, order: np.ndarray) -> dict[str, Tensor]:
        """Return b in another order."""
        return self.group.act(b, order)


@dataclass(frozen=True)
class Rotation:
    r"""The factors of products in the balanced gauge: orthogonal Procrustes, head by head.

    Of GL(h) only O(h) keeps a pair balanced. From :math:`G^\top G = H^\top H = M` and
    :math:`A^{-\top}MA^{-1} = AMA^\top` follows :math:`SMS = M` for :math:`S = A^\top A`, whose
    only positive definite solution is I: the root of :math:`(M^{1/2}SM^{1/2})^2 = M^2` is
    unique. Then with :math:`Q = A^{-1} = A^\top`

    .. math::
        \max_Q\ \langle G_A, G_BQ\rangle + \langle H_A, H_BQ\rangle = \|Z\|_*,\qquad
        Z = G_B^\top G_A + H_B^\top H_A = USV^\top,\quad Q = UV^\top.

    A plane of rotary embedding has a phase instead, :math:`\bar z/|z|` with
    :math:`z = g_A^* g_B + h_A^* h_B`. Derived for this package.

    Attributes:
        pair: The pair, balanced in both networks.
    """

    pair: FactorPair

    @property
    def label(self) -> str:
        """What it is, and where."""
        return f"{self.pair.kind} of {self.pair.module}"

    @property
    def units(self) -> int:
        """None."""
        return 0

    @property
    def tensors(self) -> tuple[str, ...]:
        """The parameters that it has entries of."""
        return self.pair.names

    def best(self, a: State, b: State) -> tuple[dict[str, Tensor], np.ndarray | None]:
        """Return b in the best rotation."""
        first, second = self.pair.read(a), self.pair.read(b)
        if self.pair.field == "complex":
            z = _overlap(first, second, complex_=True)
            phase = torch.where(z.abs() > 0, z.conj() / z.abs().clamp(min=1e-300), 1)
            return self.pair.act(b, phase[:, None, None]), None
        U, _, Vh = torch.linalg.svd(_overlap(first, second, complex_=False))
        return self.pair.act(b, (U @ Vh).mT.contiguous()), None

    def shuffled(self, b: State, order: np.ndarray) -> dict[str, Tensor]:
        """Return b: there is no order."""
        del order
        return dict(b)


@dataclass(frozen=True)
class HeadOrder:
    r"""The heads of one attention layer: a linear assignment, each pair of heads at its best.

    Where factors may turn, head j of one network at the place of head i of the other has the
    value :math:`\|Z^{qk}_{ij}\|_* + \|Z^{vo}_{ij}\|_*` of :class:`Rotation`, otherwise the
    plain inner product. Heads that share keys move as the group that they are.

    Attributes:
        pairs: All pairs of the layer.
        turn: Whether both networks are balanced, and factors turn.
    """

    pairs: tuple[FactorPair, ...]
    turn: bool

    @property
    def label(self) -> str:
        """Where."""
        return f"heads of {self.pairs[0].module}"

    @property
    def units(self) -> int:
        """How many groups of heads with keys of their own."""
        return self.pairs[0].G[0].size[0]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The parameters that they have entries of."""
        return tuple(dict.fromkeys(name for pair in self.pairs for name in pair.names))

    def best(self, a: State, b: State) -> tuple[dict[str, Tensor], np.ndarray | None]:
        """Return b with its heads in the best order, turned if they may be."""
        value = np.zeros((self.units, self.units))
        for pair in self.pairs:
            value += self._values(pair, a, b)
        _, order = linear_sum_assignment(value, maximize=True)
        moved = self.shuffled(b, order)
        if self.turn:
            for pair in self.pairs:
                moved, _ = Rotation(pair).best(a, moved)
        return moved, order

    def _values(self, pair: FactorPair, a: State, b: State) -> np.ndarray:
        # The value of each head of b at each place of a, planes of one head summed. What can be
        # shifted counts where it is not zero in both, as it is where factors turn.
        first, second = pair.read(a), pair.read(b)
        A, B = (Pair(*(_by_group(f, self.units) for f in factors)) for factors in (first, second))
        rows = []
        for i in range(self.units):
            here = Pair(*(f[i].expand_as(f) for f in A))
            z = _overlap(here, B, complex_=pair.field == "complex")
            if pair.field == "complex":
                worth = z.abs() if self.turn else z.real
            elif self.turn:
                worth = torch.linalg.svdvals(z).sum(-1)
            else:
                worth = z.diagonal(dim1=-2, dim2=-1).sum(-1)
            rows.append(worth.sum(-1))
        found = torch.stack(rows)
        for block in pair.shift if not self.turn else ():
            mine, theirs = (block.read(s[block.name]).reshape(self.units, -1) for s in (a, b))
            found = found + mine @ theirs.mT
        value: np.ndarray = found.cpu().numpy()
        return value

    def shuffled(self, b: State, order: np.ndarray) -> dict[str, Tensor]:
        """Return b with its heads in another order."""
        moved = dict(b)
        for name in self.tensors:
            moved[name] = b[name].clone(memory_format=torch.contiguous_format)
        for pair in self.pairs:
            for block in pair.blocks:
                rows = _by_group(block.read(b[block.name]), self.units)
                where = torch.as_tensor(order, device=rows.device)
                block.write(moved[block.name], rows[where].flatten(0, 1))
        return moved

    def part(self) -> Part:
        """Return it as a symmetry to be verified."""

        def draw(generator: torch.Generator) -> Element:
            order = torch.randperm(self.units, generator=generator, device="cpu").numpy()
            if (order == np.arange(self.units)).all():
                order = np.roll(order, 1)
            return lambda state: self.shuffled(state, order)

        return Part(self.units, self.tensors, draw)


@dataclass(frozen=True)
class Matched:
    """Where the descent ended.

    Attributes:
        state: The state that was moved.
        orders: For each coordinate that has one, which unit is now where.
        before: The inner product at the start.
        after: The inner product now.
        ends: That of every start, the given order first.
    """

    state: dict[str, Tensor]
    orders: Mapping[int, np.ndarray]
    before: float
    after: float
    ends: tuple[float, ...]


def inner(a: State, b: State, names: Collection[str]) -> float:
    """Return the inner product of two states over some of the parameters."""
    return math.fsum(float((a[n].double() * b[n].double()).sum()) for n in names)


def match(
    a: State,
    b: State,
    coordinates: Sequence[Coordinate],
    names: Collection[str],
    *,
    restarts: int,
    generator: torch.Generator,
) -> Matched:
    """Return b moved by coordinate ascent, from its own order and from random ones.

    A step is taken only if the inner product grows, so that the result is never farther away
    than b, and b itself where nothing is nearer.

    Args:
        a: The state to be near to.
        b: The state to move.
        coordinates: What may move.
        names: The parameters that count.
        restarts: Random starts beside the given one.
        generator: Of starts and of the order of steps.
    """
    before = inner(a, b, names)
    found: list[tuple[float, dict[str, Tensor], dict[int, np.ndarray]]] = []
    for start in range(1 + restarts):
        state = dict(b)
        orders = {i: np.arange(c.units) for i, c in enumerate(coordinates) if c.units}
        if start > 0:
            for i, at in orders.items():
                orders[i] = torch.randperm(len(at), generator=generator, device="cpu").numpy()
                state = coordinates[i].shuffled(state, orders[i])
        state = _ascend(a, state, coordinates, names, orders, generator)
        found.append((inner(a, state, names), state, orders))
    ends = tuple(value for value, _, _ in found)
    best = max(range(len(found)), key=lambda i: ends[i] - (GAIN * abs(ends[0]) if i else 0))
    value, state, orders = found[best]
    return Matched(state, orders, before, value, ends)


def _ascend(
    a: State,
    b: dict[str, Tensor],
    coordinates: Sequence[Coordinate],
    names: Collection[str],
    orders: dict[int, np.ndarray],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    for _ in range(SWEEPS):
        moved = False
        for i in torch.randperm(len(coordinates), generator=generator, device="cpu").tolist():
            coordinate = coordinates[i]
            counted = [n for n in coordinate.tensors if n in names]
            other, order = coordinate.best(a, b)
            size = math.sqrt(inner(a, a, counted) * inner(b, b, counted))
            if inner(a, other, counted) - inner(a, b, counted) > GAIN * size:
                b, moved = other, True
                if order is not None:
                    orders[i] = orders[i][order]
        if not moved:
            break
    return b


def _by_group(t: Tensor, groups: int) -> Tensor:
    return t.reshape(groups, -1, *t.shape[1:])


def _overlap(first: Pair, second: Pair, *, complex_: bool) -> Tensor:
    # Z [..., h, h], or z [...] of complex columns.
    if complex_:
        parts = (
            (torch.view_as_complex(x.contiguous()).conj() * torch.view_as_complex(y.contiguous()))
            for x, y in zip(first, second, strict=True)
        )
        g, h = (part.sum(-1) for part in parts)
        return g + h
    return second.G.mT @ first.G + second.H.mT @ first.H
