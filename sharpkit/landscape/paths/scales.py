"""Hidden units multiplied by positive factors, until what they get and give is of one size."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from sharpkit.geometry.symmetries.kinds import Part
from sharpkit.geometry.symmetries.scaling import scaled
from sharpkit.geometry.symmetries.units import FIXED, Touch
from sharpkit.objective.states import State

__all__ = ["Scaling", "balancing"]

SWEEPS = 2000
STEADY = 1e-14  # of the logarithm of a factor


class Scaling:
    """Factors of units, and how they act.

    Args:
        touches: Where the units lie.
        members: The units, ascending.
        factors: A positive number for each.
    """

    def __init__(self, touches: Sequence[Touch], members: Sequence[int], factors: np.ndarray):
        self._touches, self._members, self.factors = touches, members, factors

    def act(self, state: State) -> dict[str, Tensor]:
        """Return the state with every unit multiplied by its factor."""
        return scaled(state, self._touches, self._members, self.factors)

    def undo(self, state: State) -> dict[str, Tensor]:
        """Return the state with every unit divided by its factor."""
        return scaled(state, self._touches, self._members, 1 / self.factors)


def balancing(
    state: State, touches: Sequence[Touch], parts: Sequence[Part], names: Collection[str]
) -> Scaling:
    r"""Return the factors that lead to the same state from all states that differ by factors.

    They minimise, over the logarithms x of all factors,

    .. math::
        \sum_e w_e^2\,e^{2 a_e^\top x} - 2\tau^\top x

    over the entries e of the parameters, with :math:`a_{eu} = 1` where unit u writes the entry,
    -1 where it reads it. This is convex, and factors of the state only shift x, so that the
    state at the minimum is the same for all of them. :math:`\tau_u = 0` for a unit that both
    writes and reads: at the minimum the sums of squares of both are equal, and the norm of the
    parameters is the smallest. A unit that only writes (before a BatchNorm, whose statistics
    move with it) has no smallest norm: :math:`\tau_u = 1` makes its sum of squares 1; one that
    only reads has -1. Each step is the closed form for the units of one part,
    :math:`x = \tfrac14\log(\text{reads} / \text{writes})`, all else held, until none moves.

    Derived for this package.

    Args:
        state: Parameters and buffers, in float64.
        touches: Where the units lie.
        parts: Units that lie in the same places, none of which is in one entry twice.
        names: The parameters that count.

    Cost: a few dozen passes over the parameters.
    """
    members = sorted(unit for part in parts for unit in part.members)
    place = {unit: i for i, unit in enumerate(members)}
    logs = np.zeros(len(members))
    counted = [t for t in touches if t.name in names and t.role in ("write", "read")]
    squares = {t.name: state[t.name].double().square() for t in counted}
    work = [_places(part, counted, place) for part in parts]
    for _ in range(SWEEPS):
        largest = 0.0
        for own, at in work:
            writes, reads = np.zeros(len(members)), np.zeros(len(members))
            for touch, index in own:
                axes = [i for i in range(squares[touch.name].ndim) if i != touch.axis]
                sums = squares[touch.name].sum(dim=axes) if axes else squares[touch.name]
                hit = index >= 0
                into = writes if touch.role == "write" else reads
                np.add.at(into, index[hit], sums.cpu().numpy()[hit])
            step = np.zeros(len(members))
            step[at] = _step(writes[at], reads[at])
            for touch, index in own:
                moved = np.where(index >= 0, step[index], 0.0)
                sign = 1 if touch.role == "write" else -1
                around = [1] * squares[touch.name].ndim
                around[touch.axis] = len(moved)
                factor = torch.as_tensor(np.exp(2 * sign * moved), device="cpu").reshape(around)
                squares[touch.name] = squares[touch.name] * factor.to(squares[touch.name].device)
            logs += step
            largest = max(largest, float(np.abs(step).max(initial=0.0)))
        if largest < STEADY:
            break
    return Scaling(touches, members, np.exp(logs))


def meets_itself(part: Part, touches: Sequence[Touch], names: Collection[str]) -> bool:
    """Return whether units of a part may share an entry, so that they cannot move one by one."""
    own = set(part.members)
    seen = [t.name for t in touches if t.name in names and own & set(t.ids.tolist())]
    return len(seen) > len(set(seen))


def _places(
    part: Part, touches: Sequence[Touch], place: dict[int, int]
) -> tuple[list[tuple[Touch, np.ndarray]], np.ndarray]:
    # The touches of a part, with the number of the unit at each position, or -1.
    own = set(part.members)
    found = []
    for touch in touches:
        index = np.array([place[u] if u in own and u != FIXED else -1 for u in touch.ids.tolist()])
        if (index >= 0).any():
            found.append((touch, index))
    return found, np.array([place[u] for u in part.members])


def _step(writes: np.ndarray, reads: np.ndarray) -> np.ndarray:
    both, into, out = (writes > 0) & (reads > 0), writes > 0, reads > 0
    safe_writes, safe_reads = np.where(into, writes, 1.0), np.where(out, reads, 1.0)
    ratio = np.log(safe_reads) - np.log(safe_writes)
    return np.where(both, ratio / 4, np.where(into | out, ratio / 2, 0.0))
