"""Track sharpness during training: in a plain loop, in Lightning, in the HF Trainer."""

from sharpkit.tracking.threshold import stability_line
from sharpkit.tracking.tracker import Tracker
from sharpkit.tracking.warm import TopEigenvalues, top_eigenvalues
from sharpkit.tracking.writers import CSVWriter, TensorBoardWriter, WandbWriter

__all__ = [
    "CSVWriter",
    "TensorBoardWriter",
    "TopEigenvalues",
    "Tracker",
    "WandbWriter",
    "stability_line",
    "top_eigenvalues",
]
