"""Curvature matrices, known through their products with vectors."""

from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.curvature import empirical_fisher, ggn, hessian, mc_fisher

__all__ = ["SymmetricOperator", "empirical_fisher", "ggn", "hessian", "mc_fisher"]
