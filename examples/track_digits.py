"""An MLP on scikit-learn's digits, trained to the edge of stability and watched on the way.

Full-batch gradient descent at a fixed learning rate: the largest eigenvalue rises to 2/eta and
stays near it (Cohen et al. 2021, arXiv:2103.00065). Writes ``track_digits.csv``, a row every 20
steps, which `pandas.read_csv` and ``sharpkit.plots.plot_tracking`` take.

    python examples/track_digits.py --out . --steps 800
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import nn

from sharpkit.tracking import CSVWriter, Tracker


def run(out: Path, *, steps: int, rate: float, every: int, probes: int, seed: int) -> pd.DataFrame:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))[:500]
    x = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    y = torch.tensor(digits.target)[order]
    targets = nn.functional.one_hot(y, 10).float()
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    loss_of = nn.MSELoss()
    path = out / "track_digits.csv"
    path.unlink(missing_ok=True)
    tracker = Tracker(
        model, loss_of, (x, targets), every=every, trace_probes=probes, optimizer=optimizer,
        writers=CSVWriter(path),
    )  # fmt: skip
    for step in range(steps + 1):
        loss = loss_of(model(x), targets)
        tracker.step(step, loss=loss)  # before the update: the loss and the weights belong together
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    frame = tracker.frame
    print(frame[["step", "loss", "lambda_max", "lambda_max_error", "two_over_eta"]].to_string())
    print(f"{frame.hvps.mean():.1f} HVPs a measurement, overhead {tracker.overhead:.0%}")
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    run(**arguments)


if __name__ == "__main__":
    main()
