"""Checks that every measure, operator and symmetry has to pass; for third parties too.

A registered measure makes claims: what leaves it unchanged, how it scales with the loss,
whether it can be negative. :func:`check_measure` proves each claim on random networks and
shows that every symmetry it does not claim changes it.
"""

from sharpkit.testing.battery import check_measure, check_together, find_claims
from sharpkit.testing.operators import check_operator
from sharpkit.testing.pairs import (
    check_symmetry,
    initial_of,
    symmetric_pair,
    trained_with_adam,
)

__all__ = [
    "check_measure",
    "check_operator",
    "check_symmetry",
    "check_together",
    "find_claims",
    "initial_of",
    "symmetric_pair",
    "trained_with_adam",
]
