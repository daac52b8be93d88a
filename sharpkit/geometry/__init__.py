"""What distance means on the parameters."""

from sharpkit.geometry.metrics import (
    ElementwiseMetric,
    EuclideanMetric,
    Metric,
    MongeMetric,
    Scaling,
    asam_scale,
    fisher_metric,
    scale_of,
)

__all__ = [
    "ElementwiseMetric",
    "EuclideanMetric",
    "Metric",
    "MongeMetric",
    "Scaling",
    "asam_scale",
    "fisher_metric",
    "scale_of",
]
