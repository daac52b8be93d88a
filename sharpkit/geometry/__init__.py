"""What distance means on the parameters."""

from sharpkit.geometry.metrics import (
    ElementwiseMetric,
    EuclideanMetric,
    Metric,
    MongeMetric,
)

__all__ = ["ElementwiseMetric", "EuclideanMetric", "Metric", "MongeMetric"]
