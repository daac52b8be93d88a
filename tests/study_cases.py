"""A folder of small checkpoints with a recipe, for the tests of studies."""

from pathlib import Path

import torch

RECIPE = """
import json
import torch

loss = torch.nn.CrossEntropyLoss()


def model():
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 4, generator=generator)
    y = torch.randint(0, 3, (24,), generator=generator)
    return [(x[:16], y[:16]), (x[16:], y[16:])]


def metadata(checkpoint):
    number = int(checkpoint.stem.removeprefix("net"))
    return {"gap": number / 10, "spec": {"width": 6 + number % 2, "family": "mlp"}}
"""


def make(folder: Path, count: int) -> list[Path]:
    """Write so many checkpoints and the recipe, and return the checkpoints."""
    paths = []
    for number in range(count):
        torch.manual_seed(number)
        net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
        paths.append(folder / f"net{number}.pt")
        torch.save(net.state_dict(), paths[-1])
    (folder / "recipe.py").write_text(RECIPE)
    return paths
