"""How sharpness and generalization go together over a set of models."""

from sharpkit.study.correlation.simple import Correlation, correlate, kendall, null_deviation

__all__ = ["Correlation", "correlate", "kendall", "null_deviation"]
