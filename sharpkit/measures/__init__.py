"""Sharpness measures: one file, one measure, one registered function.

Importing a module registers its measure; ``names`` and ``get`` find them.
"""

from sharpkit.measures import (
    adam_sharpness,
    adaptive_sharpness_average,
    adaptive_sharpness_worst,
    effective_rank,
    frobenius_norm,
    gradient_norm,
    hessian_trace,
    log_det,
    monge_sharpness,
    monge_sharpness_first_order,
    negative_mass,
    renyi_sharpness,
    renyi_sharpness_per_layer,
    sam_sharpness,
    sam_sharpness_one_step,
    stable_rank,
    top_eigenvalues,
)
from sharpkit.measures.registry import SYMMETRIES, Measure, get, names, register

__all__ = [
    "SYMMETRIES",
    "Measure",
    "adam_sharpness",
    "adaptive_sharpness_average",
    "adaptive_sharpness_worst",
    "effective_rank",
    "frobenius_norm",
    "get",
    "gradient_norm",
    "hessian_trace",
    "log_det",
    "monge_sharpness",
    "monge_sharpness_first_order",
    "names",
    "negative_mass",
    "register",
    "renyi_sharpness",
    "renyi_sharpness_per_layer",
    "sam_sharpness",
    "sam_sharpness_one_step",
    "stable_rank",
    "top_eigenvalues",
]
