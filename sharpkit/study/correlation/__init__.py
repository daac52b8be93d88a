"""How sharpness and generalization go together over a set of models."""

from sharpkit.study.correlation.granulated import GranulatedTau, granulated_tau
from sharpkit.study.correlation.multiple import adjust
from sharpkit.study.correlation.partial import partial_correlation
from sharpkit.study.correlation.sign_error import SignError, hoeffding_weights, sign_error
from sharpkit.study.correlation.simple import Correlation, correlate, kendall, null_deviation
from sharpkit.study.correlation.study import StudyCorrelation, correlate_study
from sharpkit.study.correlation.study_frame import Filter

__all__ = [
    "Correlation",
    "Filter",
    "GranulatedTau",
    "SignError",
    "StudyCorrelation",
    "adjust",
    "correlate",
    "correlate_study",
    "granulated_tau",
    "hoeffding_weights",
    "kendall",
    "null_deviation",
    "partial_correlation",
    "sign_error",
]
