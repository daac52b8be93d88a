"""Sharpness measures: one file, one measure, one registered function.

Importing a module registers its measure; ``names`` and ``get`` find them.
"""

from sharpkit.measures import (
    adam_sharpness,
    adaptive_sharpness_average,
    adaptive_sharpness_worst,
    gradient_norm,
    hessian_trace,
    monge_sharpness,
    monge_sharpness_first_order,
    sam_sharpness,
    sam_sharpness_one_step,
    top_eigenvalues,
)
from sharpkit.measures.registry import SYMMETRIES, Measure, get, names, register

__all__ = [
    "SYMMETRIES",
    "Measure",
    "adam_sharpness",
    "adaptive_sharpness_average",
    "adaptive_sharpness_worst",
    "get",
    "gradient_norm",
    "hessian_trace",
    "monge_sharpness",
    "monge_sharpness_first_order",
    "names",
    "register",
    "sam_sharpness",
    "sam_sharpness_one_step",
    "top_eigenvalues",
]
