"""Curvature-based measures by other means: dense matrices, double loops, plain searches."""

import math
import warnings

import numpy as np
import scipy.optimize
import torch

from sharpkit.testing import trained_with_adam


def dense(objective):
    """Differentiate the loss twice by torch.func, all data at once."""
    evaluator = objective._evaluator
    (batch,) = list(evaluator._data)

    def loss(theta):
        return evaluator.share(objective.space.unflatten(theta), batch)

    with warnings.catch_warnings():
        # torch.func.hessian calls torch.jit.script, which warns of its own deprecation.
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.func.hessian(loss)(objective.theta).detach()


def tensors(objective):
    """Return (name, tensor, slice) of each parameter."""
    space, at, found = objective.space, 0, []
    for name, tensor in space.unflatten(objective.theta).items():
        found.append((name, tensor, slice(at, at + tensor.numel())))
        at += tensor.numel()
    return found


def weights(objective):
    found = [entry for entry in tensors(objective) if entry[1].ndim >= 2]
    return found or tensors(objective)


def last_layer(objective):
    """Return the neurons' weights ``[out, in]`` and the block ``[out, in, out, in]``."""
    _, weight, here = weights(objective)[-1]
    W = weight.flatten(1) if weight.ndim >= 2 else weight[None]
    return W, dense(objective)[here, here].reshape(*W.shape, *W.shape)


def relative_flatness(objective):
    W, H = last_layer(objective)
    total = 0.0
    for s in range(len(W)):
        for t in range(len(W)):
            total += (W[s] @ W[t]).item() * H[s, :, t, :].trace().item()
    return total


def relative_flatness_max(objective):
    W, H = last_layer(objective)
    return sum(
        W[s].square().sum().item() * torch.linalg.eigvalsh(H[s, :, s, :])[-1].item()
        for s in range(len(W))
    )


def diagonal(objective):
    return dense(objective).diagonal().clamp(min=0)


def searched_scales(h, q):
    """Minimize the price of noise over the logarithms of both scales by BFGS."""
    h, q = np.asarray(h), np.asarray(q)
    rows, columns = h.shape

    def price(x):
        e = np.exp(x[:rows, None] + x[None, rows:])
        value, slope = (e * h + q / e) / 2, (e * h - q / e) / 2
        return value.sum(), np.concatenate([slope.sum(axis=1), slope.sum(axis=0)])

    start = np.zeros(rows + columns)
    options = {"maxiter": 20000, "gtol": 1e-13}
    return scipy.optimize.minimize(price, start, jac=True, method="BFGS", options=options).fun


def normalized_flatness(objective):
    h, total = diagonal(objective), 0.0
    for _, w, here in weights(objective):
        shape = (len(w), w.numel() // len(w))
        total += searched_scales(h[here].reshape(shape), w.square().reshape(shape))
    return total


def adame(objective, exponent=0.25):
    return (diagonal(objective) ** (1 - exponent)).sum().item()


def shared_steps(objective, rows):
    H, total = dense(objective), 0.0
    for _, tensor, here in tensors(objective):
        h = H.diagonal()[here]
        pieces = h.reshape(len(tensor), -1) if rows and tensor.ndim >= 2 else h[None]
        total += sum(math.sqrt(len(p) * max(p.sum().item(), 0.0)) for p in pieces)
    return total


def adaptive_eigenvalue(objective):
    D = torch.diag(objective.theta.abs())
    return torch.linalg.eigvalsh(D @ dense(objective) @ D)[-1].item()


def preconditioned_eigenvalue(objective):
    state = trained_with_adam(objective)["state"]
    v = torch.cat([state[i]["exp_avg_sq"].flatten() for i in range(len(state))])
    P = 0.1 * ((v / 0.001).sqrt() + 1e-3)
    R = torch.diag(P.rsqrt())
    return torch.linalg.eigvalsh(R @ dense(objective) @ R)[-1].item()


EXACT = {
    "adalayer_sharpness": lambda o: shared_steps(o, rows=False),
    "adam_mini_sharpness": lambda o: shared_steps(o, rows=True),
    "adame_sharpness": adame,
    "adaptive_eigenvalue": adaptive_eigenvalue,
    "edge_of_stability": lambda o: 0.1 / 38 * preconditioned_eigenvalue(o),
    "normalized_flatness": normalized_flatness,
    "preconditioned_eigenvalue": preconditioned_eigenvalue,
    "relative_flatness": relative_flatness,
    "relative_flatness_max": relative_flatness_max,
}
