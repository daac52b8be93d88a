"""Numbers of a matrix or of a function over a ball; nothing here sees a network."""

from sharpkit.estimators.ascent import Ascent, maximize_in_ball, project, steepest
from sharpkit.estimators.average import average_rise
from sharpkit.estimators.density import spectral_density
from sharpkit.estimators.diagonal import Diagonal, exact_diagonal, hutchinson_diagonal
from sharpkit.estimators.exchangeable import SketchedDiagonal, xdiag, xtrace
from sharpkit.estimators.lanczos import Eigenpairs, Which, lanczos
from sharpkit.estimators.sketched import hutch_plus_plus
from sharpkit.estimators.trace import hutchinson_trace

__all__ = [
    "Ascent",
    "Diagonal",
    "Eigenpairs",
    "SketchedDiagonal",
    "Which",
    "average_rise",
    "exact_diagonal",
    "hutch_plus_plus",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "lanczos",
    "maximize_in_ball",
    "project",
    "spectral_density",
    "steepest",
    "xdiag",
    "xtrace",
]
