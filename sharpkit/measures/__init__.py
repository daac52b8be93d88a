"""Sharpness measures: one file, one measure, one registered function.

Importing a module registers its measure; ``names`` and ``get`` find them.
"""

from sharpkit.measures import (
    adam_sharpness,
    adaptive_sharpness_average,
    adaptive_sharpness_worst,
    asam_sharpness,
    effective_rank,
    fisher_sam_sharpness,
    frobenius_norm,
    gaussian_smoothed_sharpness,
    gradient_norm,
    hessian_trace,
    keskar_sharpness,
    log_det,
    m_sharpness,
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
from sharpkit.measures._andriushchenko import RHO_GRIDS
from sharpkit.measures.registry import SYMMETRIES, Measure, get, names, register

__all__ = [
    "RHO_GRIDS",
    "SYMMETRIES",
    "Measure",
    "adam_sharpness",
    "adaptive_sharpness_average",
    "adaptive_sharpness_worst",
    "asam_sharpness",
    "effective_rank",
    "fisher_sam_sharpness",
    "frobenius_norm",
    "gaussian_smoothed_sharpness",
    "get",
    "gradient_norm",
    "hessian_trace",
    "keskar_sharpness",
    "log_det",
    "m_sharpness",
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
