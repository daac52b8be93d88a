"""The objective: model + loss + data + chosen parameters as one function of theta."""

from sharpkit.objective.admission import HvpMode
from sharpkit.objective.losses import BatchLoss, CriterionLoss
from sharpkit.objective.objective import Objective

__all__ = ["BatchLoss", "CriterionLoss", "HvpMode", "Objective"]
