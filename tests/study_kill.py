"""Runs of one study in forked processes that are killed at random; see test_study_kill.py.

    python tests/study_kill.py FOLDER RUNNERS KILLS SEED

Prints the number of kills that hit a running process. Torch is loaded once: a new process for
each run would take most of the time.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from sharpkit.study import work
from sharpkit.study.run import run_study

MEASURES = ["hessian_trace", "top_eigenvalues:k=2", "sam_sharpness", "parameter_norm"]


def run(folder: Path) -> None:
    """Score the folder's checkpoints, with a line in the log before each measure."""
    usual = work.measure_all

    def noted(analysis, parsed, **named):
        with (folder / "log.txt").open("a") as log:
            for measure, _ in parsed:
                log.write(f"{analysis.objective.value():.17g} {measure.name}\n")
        return usual(analysis, parsed, **named)

    work.measure_all = noted
    files = sorted(folder.glob("*.pt"))
    run_study(folder / "study.db", files, folder / "recipe.py", MEASURES)


def fork(folder: Path) -> int:
    """Return the number of a process that runs the study."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            run(folder)
            status = 0
        finally:
            os._exit(status)
    return pid


def main(folder: Path, runners: int, kills: int, seed: int) -> None:
    """Kill one of the runners at random moments, start it again, and let it end at last."""
    torch.set_num_threads(1)
    draw, hits = random.Random(seed), 0
    running = [fork(folder) for _ in range(runners)]
    for _ in range(kills):
        time.sleep(draw.uniform(0.0, 0.25))
        victim = draw.randrange(runners)
        os.kill(running[victim], signal.SIGKILL)
        _, status = os.waitpid(running[victim], 0)
        hits += os.WIFSIGNALED(status)
        running[victim] = fork(folder)
    for pid in running:
        _, status = os.waitpid(pid, 0)
        if status:
            sys.exit(f"a runner failed: {status}")
    print(hits)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
