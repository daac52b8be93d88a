"""Numbers of a matrix or of a function over a ball; nothing here sees a network."""

from sharpkit.estimators.ascent import (
    Ascent,
    maximize_in_ball,
    project,
    random_in_ball,
    steepest,
)
from sharpkit.estimators.average import average_rise, perturbation
from sharpkit.estimators.basis import Storage
from sharpkit.estimators.block_traces import BlockTraces, block_sums, block_traces
from sharpkit.estimators.deflation import (
    Locked,
    Probes,
    Probing,
    deflated_trace,
    frobenius_norm,
    lock,
)
from sharpkit.estimators.density import spectral_density
from sharpkit.estimators.diagonal import Diagonal, exact_diagonal, hutchinson_diagonal
from sharpkit.estimators.eigenpairs import Eigenpairs
from sharpkit.estimators.exchangeable import SketchedDiagonal, xdiag, xtrace
from sharpkit.estimators.functions import (
    SpectrumPart,
    density_of,
    effective_rank,
    log_det,
    negative_mass,
    renyi_entropy,
    renyi_entropy_of_probes,
)
from sharpkit.estimators.krylov import Krylov
from sharpkit.estimators.lanczos import Which, lanczos
from sharpkit.estimators.noise_level import NoiseLevel, noise_level
from sharpkit.estimators.protocol import random_signs
from sharpkit.estimators.quadrature import Quadrature, QuadratureRuns, deflated_quadrature
from sharpkit.estimators.sketched import hutch_plus_plus
from sharpkit.estimators.trace import hutchinson_trace
from sharpkit.estimators.worst_radius import WorstRadius, worst_radius

__all__ = [
    "Ascent",
    "BlockTraces",
    "Diagonal",
    "Eigenpairs",
    "Krylov",
    "Locked",
    "NoiseLevel",
    "Probes",
    "Probing",
    "Quadrature",
    "QuadratureRuns",
    "SketchedDiagonal",
    "SpectrumPart",
    "Storage",
    "Which",
    "WorstRadius",
    "average_rise",
    "block_sums",
    "block_traces",
    "deflated_quadrature",
    "deflated_trace",
    "density_of",
    "effective_rank",
    "exact_diagonal",
    "frobenius_norm",
    "hutch_plus_plus",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "lanczos",
    "lock",
    "log_det",
    "maximize_in_ball",
    "negative_mass",
    "noise_level",
    "perturbation",
    "project",
    "random_in_ball",
    "random_signs",
    "renyi_entropy",
    "renyi_entropy_of_probes",
    "spectral_density",
    "steepest",
    "worst_radius",
    "xdiag",
    "xtrace",
]
