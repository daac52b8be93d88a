"""Measure and analyse the sharpness of trained PyTorch networks, with error bars.

>>> import torch, sharpkit as sk
>>> model = torch.nn.Linear(2, 1, bias=False)
>>> data = (torch.eye(2), torch.zeros(2, 1))
>>> objective = sk.Objective(model, torch.nn.MSELoss(), data)
>>> scores = sk.score(objective, ["hessian_trace", "top_eigenvalues:k=1"], seed=0)
>>> round(scores["hessian_trace"].estimate.value, 4)
2.0
"""

from importlib.metadata import version

from sharpkit import distributed
from sharpkit.analysis import Analysis
from sharpkit.auditing import AuditResult, audit
from sharpkit.errors import SharpkitError, SharpkitWarning
from sharpkit.geometry.canonical import canonicalize
from sharpkit.logits import LogitNormalized
from sharpkit.objective import Objective
from sharpkit.operators import SymmetricOperator, empirical_fisher, ggn, hessian, mc_fisher
from sharpkit.overview import SpectrumSummary, compare, spectrum
from sharpkit.parameters import ParameterSpace
from sharpkit.results import Cost, Curve, Estimate, Part, Score, Scores, Spectrum
from sharpkit.scoring import score

__all__ = [
    "Analysis",
    "AuditResult",
    "Cost",
    "Curve",
    "Estimate",
    "LogitNormalized",
    "Objective",
    "ParameterSpace",
    "Part",
    "Score",
    "Scores",
    "SharpkitError",
    "SharpkitWarning",
    "Spectrum",
    "SpectrumSummary",
    "SymmetricOperator",
    "audit",
    "canonicalize",
    "compare",
    "distributed",
    "empirical_fisher",
    "ggn",
    "hessian",
    "mc_fisher",
    "score",
    "spectrum",
]

__version__ = version("sharpkit")
