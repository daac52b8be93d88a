"""Curvature matrices, known through their products with vectors."""

from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.blocks import blocks
from sharpkit.operators.congruent import congruent, gram_root
from sharpkit.operators.curvature import empirical_fisher, ggn, hessian, mc_fisher
from sharpkit.operators.optimizer_state import OptimizerState
from sharpkit.operators.transforms import (
    adam_diagonal,
    adam_preconditioned,
    adaptive,
    deflated,
    edge_of_stability,
    preconditioned,
    scaled,
    shifted,
)

__all__ = [
    "OptimizerState",
    "SymmetricOperator",
    "adam_diagonal",
    "adam_preconditioned",
    "adaptive",
    "blocks",
    "congruent",
    "deflated",
    "edge_of_stability",
    "empirical_fisher",
    "ggn",
    "gram_root",
    "hessian",
    "mc_fisher",
    "preconditioned",
    "scaled",
    "shifted",
]
