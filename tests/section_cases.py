"""Small objectives for the tests of slices."""

import torch
from torch import nn

from sharpkit import Objective
from sharpkit.landscape import Direction, StraightSection


class Vector(nn.Module):
    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, x):
        return self.theta


def quadratic(dim=6, seed=0):
    """A quadratic objective, and its matrix, linear and constant term."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(dim, dim, generator=g, dtype=torch.float64)
    A = A + A.T
    b = torch.randn(dim, generator=g, dtype=torch.float64)
    theta = torch.randn(dim, generator=g, dtype=torch.float64)
    c = 20.0

    def batch_loss(model, batch):
        t = model(batch)
        return t @ A @ t / 2 + b @ t + c, 1.0

    data = [torch.zeros(1, 1, dtype=torch.float64)]
    return Objective.from_batch_loss(Vector(theta), batch_loss, data), A, b, c


def digits_like():
    """An MLP on three blobs, with inputs and labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    y = torch.arange(120) % 3
    x = torch.randn(120, 4, dtype=torch.float64) + 1.5 * nn.functional.one_hot(y, 4)
    return model, x, y


def objectives(batch=40):
    """Of 80 train and 40 test examples."""
    model, x, y = digits_like()
    cut = [(x[i : min(i + batch, 80)], y[i : min(i + batch, 80)]) for i in range(0, 80, batch)]
    train = Objective(model, nn.CrossEntropyLoss(), cut)
    return train, Objective(model, nn.CrossEntropyLoss(), (x[80:], y[80:]))


def plane(objective):
    """Two random directions."""
    g = torch.Generator().manual_seed(7)
    theta = objective.theta
    found = [torch.randn(theta.shape, generator=g, dtype=theta.dtype) for _ in range(2)]
    scale = float(theta.norm()) / theta.numel() ** 0.5
    return StraightSection(
        theta, [Direction(d, "tensor", "multiples of d", step=scale) for d in found]
    )
