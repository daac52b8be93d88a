"""What objectives made from one share: counts, and what was already said."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from sharpkit.errors import SharpkitWarning

__all__ = ["Tally", "UnusedWarning"]


@dataclass
class Tally:
    """What was spent, shared by all objectives made from one."""

    hvps: int = 0
    gradients: int = 0
    forwards: int = 0


class UnusedWarning:
    """Warns once of parameters that the loss does not use, over all points of an objective."""

    def __init__(self, names: tuple[str, ...]):
        self._names, self._said = names, False

    def __call__(self, used: list[bool]) -> None:
        """Take which parameters a whole pass used."""
        if self._said or all(used):
            return
        self._said = True
        unused = [n for n, flag in zip(self._names, used, strict=True) if not flag]
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" * (len(unused) > 5))
        warnings.warn(
            f"The loss does not depend on {shown}: their gradient and curvature are zero."
            " Leave them out with params=... if this is not meant.",
            SharpkitWarning,
            stacklevel=4,
        )
