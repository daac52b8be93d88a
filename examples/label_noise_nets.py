"""Networks with closed forms for the comparison of Adam and SGD under label noise.

Many runs take their steps at once. A group of runs shares an optimizer's kind; its weights are
``[seeds, settings, P]``, and all groups of a seed see the same examples and the same noise.

diagonal   w = u*u - v*v, f(z) = <z, w>, loss 1/2 mean (f - y)^2, inputs of signs. Then
           tr H = 4 |theta|^2 everywhere, and diag H = 4 theta*theta where no residual is left.
factored   W = W_L ... W_1, f(A) = <A, W>, loss mean (f - b)^2. As f is linear in every single
           weight, diag H is that of the Gauss-Newton matrix everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn

BETA1, EPS = 0.9, 1e-8


@dataclass(frozen=True)
class Setting:
    """One optimizer with its numbers; ``power`` is AdamE's lambda, and 0 says plain SGD."""

    lr: float
    power: float = 0.0
    beta2: float = 0.999

    @property
    def name(self) -> str:
        if self.power == 0:
            return f"SGD, lr {self.lr:g}"
        kind = "Adam" if self.power == 0.5 else f"AdamE-{self.power:g}"
        return f"{kind}, lr {self.lr:g}, 1 - β₂ = {1 - self.beta2:.2g}"

    @property
    def exponent(self) -> float:
        """e of the implicit regularizer tr(diag(H)^e)."""
        return 1 - self.power


class Descent:
    """Steps of SGD, Adam or AdamE for many settings of one kind at once.

    Adam's are torch's, with its correction of the first steps; AdamE divides by v^lambda + eps.
    """

    def __init__(self, theta: Tensor, settings: Sequence[Setting]) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).to(theta.dtype)[:, None]

        (self.power,) = {s.power for s in settings}
        self.theta, self.settings, self.steps = theta, tuple(settings), 0
        self.lr = column([s.lr for s in settings])
        if self.power:
            self.beta2 = torch.tensor([s.beta2 for s in settings], dtype=torch.float64)[:, None]
            self.rate2 = (1 - self.beta2).to(theta.dtype)
            self.m, self.v, self.buffer = (torch.zeros_like(theta) for _ in range(3))

    def step(self, gradient: Tensor) -> None:
        """Move the weights ``[seeds, settings, P]`` in place."""
        if not self.power:
            self.theta.addcmul_(gradient, self.lr, value=-1)
            return
        self.steps += 1
        self.m.lerp_(gradient, 1 - BETA1)
        torch.mul(gradient, gradient, out=self.buffer)
        self.v.lerp_(self.buffer, self.rate2)
        second = (1 - self.beta2**self.steps) ** -self.power
        if self.power == 0.5:
            torch.sqrt(self.v, out=self.buffer)
        else:
            torch.pow(self.v, self.power, out=self.buffer)
        self.buffer.mul_(second.to(self.v.dtype)).add_(EPS)
        torch.div(self.m, self.buffer, out=self.buffer)
        self.theta.addcmul_(self.buffer, self.lr / (1 - BETA1**self.steps), value=-1)


def groups(theta: Tensor, settings: Sequence[Setting]) -> list[Descent]:
    """Return one `Descent` for each lambda, all from the same weights ``[seeds, P]``."""
    made = []
    for power in dict.fromkeys(s.power for s in settings):
        mine = [s for s in settings if s.power == power]
        made.append(Descent(theta[:, None].repeat(1, len(mine), 1), mine))
    return made


# The diagonal network.


def predictor(theta: Tensor) -> Tensor:
    """Return u*u - v*v ``[..., d]`` of ``[..., 2d]``."""
    u, v = theta.chunk(2, dim=-1)
    return u.square() - v.square()


def diagonal_gradient(theta: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient ``[seeds, settings, 2d]`` of 1/2 mean (f - y)^2.

    Inputs ``[seeds, B, d]`` and targets ``[seeds, B]``.
    """
    error = predictor(theta) @ inputs.mT - targets[:, None]
    pull = error @ inputs * (2 / inputs.shape[1])
    return torch.cat([pull, -pull], dim=-1).mul_(theta)


def diagonal_numbers(theta: Tensor, inputs: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Return losses, traces and norms ``[seeds, settings]`` by name, in double precision.

    The test loss is exact: inputs of independent signs make it |w - w*|^2 / 2.
    """
    theta = theta.double()
    w = predictor(theta)
    off = w - teacher.double()[:, None]
    return {
        "train loss": (off.to(inputs.dtype) @ inputs.mT).double().square().mean(-1) / 2,
        "test loss": off.square().sum(-1) / 2,
        "tr H": 4 * theta.square().sum(-1),
        "tr diag(H)^1/2": 2 * theta.abs().sum(-1),
        "l1": w.abs().sum(-1),
        "l0.5": w.abs().sqrt().sum(-1).square(),
    }


def noise_floor(setting: Setting, power: Tensor, noise: float, batch: int) -> Tensor:
    """Return the train loss that the noise keeps up on the minimizers, for small steps.

    Gradients there have the covariance c H with c = noise^2 / batch, and the optimizer's
    matrix is P = (c diag H)^-lambda. Weights then scatter with the covariance lr c P / 2,
    and 1/2 tr(H lr c P / 2) = lr / 4 c^e tr(diag(H)^e), of which ``power`` is the last factor.
    """
    return setting.lr / 4 * (noise**2 / batch) ** setting.exponent * power


def diagonal_power(theta: Tensor, exponent: float) -> Tensor:
    """Return tr(diag(H)^e) ``[...]`` on the minimizers: sum (4 theta^2)^e."""
    return (4 * theta.double().square()).pow(exponent).sum(-1)


class Diagonal(nn.Module):
    """The same network as a module."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.u, self.v = (nn.Parameter(part.detach().clone()) for part in theta.chunk(2))

    def forward(self, z: Tensor) -> Tensor:
        return z @ (self.u.square() - self.v.square())


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1/2 mean (f - y)^2, the loss of the diagonal network."""
    return (outputs - targets).square().mean() / 2


def least_l1(inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the interpolating w ``[d]`` of the smallest l1 norm, by linear programming."""
    X = inputs.double().numpy()
    found = scipy.optimize.linprog(
        np.ones(2 * X.shape[1]),
        A_eq=np.hstack([X, -X]),
        b_eq=targets.double().numpy(),
        method="highs-ipm",
    )
    if found.status != 0:
        raise SystemExit(f"The linear program was not solved: {found.message}")
    p, q = np.split(found.x, 2)
    return torch.from_numpy(p - q)


# The factored matrix.


def ends(factors: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return what stands left and right of each factor, and the product.

    ``factors`` are ``[..., L, d, d]``, W_1 first; W = left[l] W_l right[l].
    """
    layers = factors.unbind(-3)
    eye = torch.eye(factors.shape[-1], dtype=factors.dtype).expand_as(layers[0])
    right, left = [eye], [eye]
    for layer in layers:
        right.append(layer @ right[-1])
    for layer in reversed(layers[1:]):
        left.append(left[-1] @ layer)
    return left[::-1], right[:-1], right[-1]


def factored_gradient(factors: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient ``[seeds, settings, L, d, d]`` of mean (f - b)^2.

    Inputs ``[seeds, B, d, d]`` and targets ``[seeds, B]``.
    """
    left, right, product = ends(factors)
    flat = inputs.flatten(2)
    error = product.flatten(2) @ flat.mT - targets[:, None]
    pull = (error @ flat * (2 / flat.shape[1])).view_as(product)
    slopes = [a.mT @ pull @ b.mT for a, b in zip(left, right, strict=True)]
    return torch.stack(slopes, dim=-3)


def factored_diagonal(factors: Tensor, inputs: Tensor) -> Tensor:
    """Return diag H ``[..., L, d, d]`` for factors ``[..., L, d, d]``, inputs ``[n, d, d]``."""
    left, right, _ = ends(factors)
    parts = []
    for a, b in zip(left, right, strict=True):
        slopes = torch.einsum("...ij,nik,...lk->...njl", a, inputs, b)
        parts.append(2 * slopes.square().mean(-3))
    return torch.stack(parts, dim=-3)


def factored_numbers(factors: Tensor, inputs: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Return losses and traces ``[seeds, settings]`` by name, in double precision.

    The test error is |W - M|_F^2 / |M|_F^2: the expected squared error of a new measurement
    over that of predicting 0.
    """
    factors, inputs, teacher = factors.double(), inputs.double(), teacher.double()
    off = ends(factors)[2] - teacher[:, None]
    diagonal = torch.stack(
        [factored_diagonal(f, a) for f, a in zip(factors, inputs, strict=True)]
    ).flatten(2)
    return {
        "train loss": (off.flatten(2) @ inputs.flatten(2).mT).square().mean(-1),
        "test error": off.flatten(2).square().sum(-1)
        / teacher.flatten(1).square().sum(-1)[:, None],
        "tr H": diagonal.sum(-1),
        "tr diag(H)^1/2": diagonal.sqrt().sum(-1),
    }


class Factored(nn.Module):
    """The same network as a module."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.layers = nn.ParameterList([f.detach().clone() for f in factors])

    def forward(self, inputs: Tensor) -> Tensor:
        product = self.layers[0]
        for layer in list(self.layers)[1:]:
            product = layer @ product
        return torch.einsum("nij,ij->n", inputs, product)


# Training.


@dataclass(frozen=True)
class Data:
    """Noiseless examples of every seed, and what they come from."""

    inputs: Tensor  # [seeds, n, ...]
    targets: Tensor  # [seeds, n]
    teacher: Tensor  # [seeds, ...]


def diagonal_data(seeds: int, n: int, d: int, kappa: int) -> Data:
    """Return signs as inputs and a teacher of ``kappa`` signs; fewer examples are the first."""
    inputs, teacher = torch.empty(seeds, n, d), torch.zeros(seeds, d)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        where = torch.randperm(d, generator=generator)[:kappa]
        teacher[seed, where] = 2.0 * torch.randint(2, (kappa,), generator=generator) - 1
        inputs[seed] = 2.0 * torch.randint(2, (n, d), generator=generator) - 1
    return Data(inputs, (inputs @ teacher[:, :, None])[..., 0], teacher)


def factored_data(seeds: int, n: int, d: int, rank: int) -> Data:
    """Return Gaussian measurements of matrices with ``rank`` singular values of 1."""
    inputs, teacher = torch.empty(seeds, n, d, d), torch.empty(seeds, d, d)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(2, d, rank, generator=generator))[0]
        teacher[seed] = q[0] @ q[1].T
        inputs[seed] = torch.randn(n, d, d, generator=generator)
    return Data(inputs, torch.einsum("snij,sij->sn", inputs, teacher), teacher)


Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]
Look = Callable[[int, list[Descent]], None]


def train(
    runs: list[Descent], data: Data, gradient: Gradient, look: Look, *,
    steps: int, batch: int, noise: float, every: int,
) -> None:  # fmt: skip
    """Train all runs with noise drawn anew for every label of every step.

    Args:
        runs: Groups, trained in place.
        data: Examples; each step takes ``batch`` of each seed, with replacement.
        gradient: Of the loss, by weights, inputs and targets.
        look: Called with the step and the groups before the first step and after every
            ``every`` of them.
        steps: How many, a multiple of ``every``.
        batch: Examples a step.
        noise: Standard deviation of the noise on labels.
        every: See ``look``.
    """
    seeds, n = data.targets.shape
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in range(seeds)]
    which = torch.arange(seeds)[:, None]
    look(0, runs)
    for start in range(0, steps, every):
        rows = torch.stack([torch.randint(n, (every, batch), generator=g) for g in generators], 1)
        jitter = torch.stack([torch.randn(every, batch, generator=g) for g in generators], 1)
        jitter = jitter.to(data.targets.dtype) * noise
        for k in range(every):
            inputs = data.inputs[which, rows[k]]
            targets = data.targets[which, rows[k]] + jitter[k]
            for run in runs:
                run.step(gradient(run.theta, inputs, targets))
        look(start + every, runs)
