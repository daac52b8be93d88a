"""Many checkpoints: load them, score them, correlate the scores with generalization."""

from sharpkit.study.identity import Options
from sharpkit.study.run import Progress, RunReport, run_study
from sharpkit.study.study import Study

__all__ = ["Options", "Progress", "RunReport", "Study", "run_study"]
