r"""The balanced gauge of all pairs of a network, and the group element that leads to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit.errors import MeasureError
from sharpkit.geometry.layouts import Factorization, FactorPair
from sharpkit.geometry.quotient import Pair, balance_any
from sharpkit.objective.states import State

__all__ = ["Gauge", "canonical_state"]


def canonical_state(state: State, factorization: Factorization) -> dict[str, Tensor]:
    r"""Return the state with every pair balanced and every shift at zero.

    Real pairs get :math:`G^\top G = H^\top H = \Sigma`, the singular values of
    :math:`GH^\top` in descending order, with the signs of
    :func:`~sharpkit.geometry.quotient.balance`. Complex pairs (one column of complex numbers,
    on which a acts as :math:`(g/\bar a, ah)`) get

    .. math::
        |g| = |h|,\qquad g_k > 0 \text{ where } k = \arg\max_j |g_j|.

    The result depends on the products alone, so that it is the same for all equivalent
    states. Where singular values are equal it is so up to a rotation of their columns, and
    where they are nearly equal rounding is magnified by the inverse of their distance. A head
    whose product has a rank below h gets columns of zeros, and one of product zero becomes
    zero: the function is the same, but such a state is only a limit of equivalent ones.

    Computed in float64 and rounded to the dtype of each parameter.

    Args:
        state: Parameters and buffers.
        factorization: The pairs, as :func:`~sharpkit.geometry.layouts.find_pairs` finds them.

    Cost: two thin QR and one SVD a head.

    Raises:
        MeasureError: If a factor is not finite.

    Source: the quotient by GL(h) is that of da Silva, Dangel and Oore
    (arXiv:2505.05409); that any measure becomes invariant at this representative is ours.
    """
    return Gauge(state, factorization).state


@dataclass(frozen=True)
class _Balanced:
    # A pair, its balanced factors, and the A that leads there; None without full rank.
    at: FactorPair
    factors: Pair
    rank: Tensor
    element: Tensor | None


class Gauge:
    """What leads a state to its canonical form.

    Args:
        given: Parameters and buffers.
        factorization: The pairs.
    """

    def __init__(self, given: State, factorization: Factorization):
        self._given = _contiguous(given)
        with torch.no_grad():
            self._found = [_balanced(pair, self._given) for pair in factorization.pairs]

    @property
    def deficient(self) -> int:
        """How many heads have a product of a rank below h: no element leads to their form."""
        return sum(int((found.rank < found.at.h).sum()) for found in self._found)

    @property
    def state(self) -> dict[str, Tensor]:
        """The canonical state; tensors that no pair has entries of are the given ones."""
        moved = dict(self._given)
        with torch.no_grad():
            for found in self._found:
                pair = found.at
                for name in pair.names:
                    moved[name] = moved[name].clone(memory_format=torch.contiguous_format)
                pair.write(moved, found.factors)
                for block in pair.shift:
                    block.view(moved[block.name]).zero_()
        return moved

    def move(self, other: State) -> dict[str, Tensor]:
        """Return another state after the group element that makes the given one canonical.

        So move the parameters before training, whose distance from the trained ones is then
        that of equivalent networks. Key biases move by what takes the given ones to zero.

        Args:
            other: Parameters and buffers of the same network.

        Raises:
            MeasureError: If a head is deficient, for which there is no such element.
        """
        for found in self._found:
            if found.element is None:
                pair = found.at
                raise MeasureError(
                    f"Expected heads of full rank {pair.h}, to move other parameters as the"
                    f" canonical form moves these. Got rank {int(found.rank.min())} in"
                    f" {pair.kind} of {pair.module!r}. What needs the parameters before training"
                    " can be measured without the canonical form."
                )
        moved = _contiguous(other)
        with torch.no_grad():
            for found in self._found:
                pair, element = found.at, found.element
                assert element is not None
                shifts = tuple(
                    -(block.read(self._given[block.name]).double() @ element.mT)
                    for block in pair.shift
                )
                moved = pair.act(moved, element, shifts)
        return moved

    def undo(self, other: State) -> dict[str, Tensor]:
        """Return another state after the inverse of that group element.

        ``undo(state)`` are the given parameters. Key biases move by what takes zero to the
        given ones, so that of equivalent networks they become the same.

        Args:
            other: Parameters and buffers of the same network.

        Raises:
            MeasureError: If a head is deficient, for which there is no such element.
        """
        if self.deficient:
            raise MeasureError(
                "Expected heads of full rank, to undo what made them canonical. Got"
                f" {self.deficient} of less. Leave those pairs out."
            )
        moved = _contiguous(other)
        with torch.no_grad():
            for found in self._found:
                pair, element = found.at, found.element
                assert element is not None
                shifts = tuple(block.read(self._given[block.name]).double() for block in pair.shift)
                moved = pair.act(moved, torch.linalg.inv(element), shifts)
        return moved


def _contiguous(state: State) -> dict[str, Tensor]:
    # Blocks are places in contiguous parameters.
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _balanced(pair: FactorPair, state: State) -> _Balanced:
    factors = Pair(*(part.double() for part in pair.read(state)))
    if pair.field == "complex":
        return _balanced_complex(pair, factors)
    found = balance_any(*factors)
    return _Balanced(pair, found.pair, found.rank, found.element if found.full else None)


def _balanced_complex(pair: FactorPair, factors: Pair) -> _Balanced:
    g, h = (torch.view_as_complex(part.contiguous()) for part in factors)  # [heads, n]
    if not bool(torch.isfinite(factors.G).all() & torch.isfinite(factors.H).all()):
        raise MeasureError(
            "Expected finite factors. Got an infinite entry or NaN. Check the parameters."
        )
    sizes = g.norm(dim=-1, keepdim=True), h.norm(dim=-1, keepdim=True)
    live = (sizes[0] > 0) & (sizes[1] > 0)
    largest = g.gather(-1, g.abs().argmax(-1, keepdim=True))
    # a = r u with |g| / r = r |h|, and g / conj(a) = g u / r has its largest entry positive.
    size = torch.where(live, sizes[0] / sizes[1], 1).sqrt()
    turn = torch.where(live, largest.conj() / largest.abs(), 1)
    a = size * turn
    moved = (torch.where(live, part, 0) for part in (g / a.conj(), h * a))
    balanced = Pair(*(torch.view_as_real(part) for part in moved))
    element = a[..., None] if bool(live.all()) else None
    return _Balanced(pair, balanced, live[..., 0].long(), element)
