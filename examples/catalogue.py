"""Measure an MLP, a CNN and an attention model with every measure, and write the table.

    python examples/catalogue.py [-o docs/catalogue.md]

Three networks of the demo's kind, trained with Adam on scikit-learn's digits to a loss of
0.05; every measure with its default settings, in float32, on the 900 training images, with
the parameters before training and the optimizer at hand.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

import sharpkit as sk
from sharpkit.demo.zoo import Digits, ModelSpec, build, digits

SPECS = (
    ModelSpec("mlp", 32, 1, lr=3e-3, batch_size=32, weight_decay=0.0, seed=0),
    ModelSpec("cnn", 8, 1, lr=3e-3, batch_size=32, weight_decay=0.0, seed=0),
    ModelSpec("attention", 16, 1, lr=5e-3, batch_size=32, weight_decay=0.0, seed=0),
)
TARGET_LOSS = 0.05


def train(
    spec: ModelSpec, data: Digits
) -> tuple[torch.nn.Module, dict[str, torch.Tensor], torch.optim.Optimizer]:
    """Return the trained network, its initial parameters and its optimizer."""
    torch.manual_seed(spec.seed)
    model = build(spec)
    initial = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=spec.lr)
    count = len(data.train_labels)
    for _ in range(spec.max_epochs):
        for rows in torch.randperm(count).split(spec.batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train_images[rows]), data.train_labels[rows])
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            if F.cross_entropy(model(data.train_images), data.train_labels) < TARGET_LOSS:
                break
    return model.eval(), initial, optimizer


def cell(score: sk.Score | None) -> str:
    """Return the value with its errors, or why there is none."""
    if score is None:
        return "-"
    if score.estimate is None:
        return f"none: {score.error}"
    estimate = score.estimate
    text = str(estimate)
    if estimate.data_error is not None:
        text += f" (data {estimate.data_error:.2g})"
    return text


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/catalogue.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", sk.SharpkitWarning)  # failures stand in the table
    data, columns, heads, seconds = digits(), [], [], []
    for spec in SPECS:
        model, initial, optimizer = train(spec, data)
        objective = sk.Objective(
            model, torch.nn.CrossEntropyLoss(), (data.train_images, data.train_labels)
        )
        start = time.perf_counter()
        scores = sk.score(objective, initial=initial, optimizer=optimizer)
        seconds.append(time.perf_counter() - start)
        columns.append({score.measure: score for score in scores})
        heads.append(f"{spec.family}, P = {objective.space.dim:,}")
        print(f"{heads[-1]}: {len(scores)} measures in {seconds[-1]:.0f} s", flush=True)
    names = sorted({name for column in columns for name in column})
    rows = [
        f"| `{name}` | " + " | ".join(cell(column.get(name)) for column in columns) + " |"
        for name in names
    ]
    detail = (__doc__ or "").split("\n\n")[-1]
    text = "\n".join(
        [
            "# Every measure on three networks",
            "",
            "Made by `python examples/catalogue.py`. " + " ".join(detail.split()),
            "Values are given with the error that each measure states (a standard error, a bound,"
            ' or a rounding level; maxima as what was attained); "data" is the error from the data'
            " being a sample.",
            "",
            "| measure | " + " | ".join(heads) + " |",
            "|---|" + "---|" * len(heads),
            *rows,
            "",
        ]
    )
    options.output.write_text(text)


if __name__ == "__main__":
    main()
