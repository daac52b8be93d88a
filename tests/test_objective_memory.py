"""Memory: nothing leaks, and when it runs out the number stays the same."""

import gc
import os
import resource
import warnings
import weakref

import pytest
import torch
from cases import SelfAttention, X, Y, mlp, normal, seeded
from torch import nn

import sharpkit as sk

CE = nn.CrossEntropyLoss()


def singles():
    return list(zip(X.split(1), Y.split(1), strict=True))


def same(objective, other):
    v = torch.linspace(-1, 1, other.space.dim, dtype=torch.float64)
    assert float(objective.value()) == pytest.approx(float(other.value()), rel=1e-10)
    assert torch.allclose(objective.gradient(), other.gradient(), rtol=1e-9, atol=1e-12)
    assert torch.allclose(objective.hvp(v), other.hvp(v), rtol=1e-9, atol=1e-12)


class Limited(nn.Module):
    """Runs out of memory on large batches, as a GPU would."""

    def __init__(self, limit):
        super().__init__()
        self.body, self.limit, self.armed = mlp(), limit, False

    def forward(self, x):
        if self.armed and len(x) > self.limit:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 20.00 GiB")
        return self.body(x)


@pytest.mark.parametrize("armed", ["from the start", "later"])
@pytest.mark.parametrize("mode", ["auto", "streamed"])
@pytest.mark.parametrize("sizes", [(11,), (2, 9), (8, 3)])
def test_out_of_memory_halves_the_batches_and_changes_nothing(armed, mode, sizes):
    model = seeded(lambda: Limited(2))
    batches = list(zip(X.split(sizes), Y.split(sizes), strict=True))
    plain = sk.Objective(model.body, CE, [(X, Y)])
    model.armed = armed == "from the start"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        objective = sk.Objective(model, CE, batches, hvp_mode=mode)
        model.armed = True
        same(objective, plain)
        same(objective, plain)
    texts = [str(w.message) for w in caught]
    assert texts
    assert all("going on with micro-batches" in t or "they are freed" in t for t in texts)
    assert objective._evaluator.micro_batch <= 2


def test_graphs_kept_before_memory_ran_out_are_not_counted_twice():
    model = seeded(lambda: Limited(2))
    plain = sk.Objective(model.body, CE, [(X, Y)])
    objective = sk.Objective(model, CE, list(zip(X.split(4), Y.split(4), strict=True)))
    v = torch.linspace(-1, 1, plain.space.dim, dtype=torch.float64)
    objective.hvp(v)  # three graphs of 4, 4 and 3
    model.armed = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        objective.gradient()  # the graphs are freed, which does not help: now pieces of 2
    assert "they are freed" in str(caught[0].message)
    assert "micro-batches of 2" in str(caught[1].message)
    assert torch.allclose(objective.hvp(v), plain.hvp(v), rtol=1e-9, atol=1e-12)


def test_a_single_example_that_is_too_large_gives_one_clear_error():
    model = seeded(lambda: Limited(0))
    objective = sk.Objective(model, CE, [(X, Y)])
    model.armed = True
    with (
        pytest.warns(sk.SharpkitWarning, match="micro-batches"),
        pytest.raises(sk.SharpkitError, match="cannot be cut further"),
    ):
        objective.gradient()


@pytest.mark.parametrize("mode", ["kept", "streamed"])
def test_memory_is_flat_over_fifty_products(mode):
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10))
    x, y = torch.randn(512, 64), torch.randint(10, (512,))
    objective = sk.Objective(
        model, CE, list(zip(x.split(128), y.split(128), strict=True)), hvp_mode=mode
    )
    v = torch.randn(objective.space.dim)
    for _ in range(5):
        objective.hvp(v)
    gc.collect()
    before, peak = live_tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.disable()  # what is left must not wait for the collector
    try:
        for _ in range(50):
            objective.hvp(v)
        after = live_tensors()
    finally:
        gc.enable()
    assert after <= before
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 30_000 if os.uname().sysname == "Linux" else True  # KiB


def live_tensors():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_an_objective_is_freed_without_the_collector():
    objective = sk.Objective(seeded(mlp), CE, [(X, Y)])
    objective.hvp(objective.theta)  # what is made only once is made here
    del objective
    gc.collect()
    before = live_tensors()
    gc.disable()
    try:
        objective = sk.Objective(seeded(mlp), CE, [(X, Y)])
        objective.hvp(objective.theta)
        sk.score(objective, ["gradient_norm", "sam_sharpness:steps=3"])
        del objective
        assert live_tensors() <= before  # kept graphs of many checkpoints must not pile up
    finally:
        gc.enable()


def test_release_frees_the_graphs():
    objective = sk.Objective(seeded(SelfAttention), CE, [(normal(11, 5, 4), Y)])
    objective.hvp(objective.theta)
    kept = live_tensors()
    objective.release()
    gc.collect()
    assert live_tensors() < kept


# -- graphs that fill the memory ---------------------------------------------------------


class Ticket:
    """Lives as long as the graph of one forward pass."""


class Ticketed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ticket):
        ctx.ticket = ticket
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.0, None


class Crowded(nn.Module):
    """Runs out of memory when more than a few graphs are alive, whatever the batch."""

    def __init__(self, most):
        super().__init__()
        self.body, self.most, self.tickets = mlp(), most, weakref.WeakSet()

    def forward(self, x):
        if torch.is_grad_enabled() and len(self.tickets) >= self.most:
            raise torch.OutOfMemoryError("out of memory")
        ticket = Ticket()
        self.tickets.add(ticket)
        return Ticketed.apply(self.body(x), ticket)


@pytest.mark.parametrize("most", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["auto", "kept"])
def test_kept_graphs_give_way_before_batches_are_cut(most, mode):
    model = seeded(lambda: Crowded(most))
    objective = sk.Objective(model, CE, singles(), hvp_mode=mode)
    plain = sk.Objective(model.body, CE, [(X, Y)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same(objective, plain)
        same(objective, plain)
    assert caught
    assert all("they are freed" in str(w.message) for w in caught)
    assert objective._evaluator.micro_batch is None
    assert "streamed" in objective.hvp_mode


def test_kept_graphs_of_another_point_give_way():
    model = seeded(lambda: Crowded(11))
    objective = sk.Objective(model, CE, singles())
    plain = sk.Objective(model.body, CE, [(X, Y)])
    v = torch.linspace(-1, 1, plain.space.dim, dtype=torch.float64)
    objective.hvp(v)
    assert objective.hvp_mode == "kept"
    there = objective.at(objective.theta * 1.5)
    with pytest.warns(sk.SharpkitWarning, match="they are freed"):
        Hv = there.hvp(v)
    assert torch.allclose(Hv, plain.at(plain.theta * 1.5).hvp(v), rtol=1e-9, atol=1e-12)


class BackwardLimited(torch.autograd.Function):
    """Runs out of memory in the backward pass."""

    @staticmethod
    def forward(ctx, x, model):
        ctx.model = model
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.model.armed and len(grad) > ctx.model.limit:
            raise torch.OutOfMemoryError("out of memory")
        return grad * 1.0, None


class LimitedBackward(Limited):
    def forward(self, x):
        return BackwardLimited.apply(self.body(x), self)


@pytest.mark.parametrize("mode", ["auto", "streamed"])
def test_out_of_memory_in_the_backward_pass(mode):
    model = seeded(lambda: LimitedBackward(3))
    objective = sk.Objective(model, CE, [(X[:8], Y[:8]), (X[8:], Y[8:])], hvp_mode=mode)
    model.armed = True
    with pytest.warns(sk.SharpkitWarning, match="micro-batches of"):
        same(objective, sk.Objective(model.body, CE, [(X, Y)]))


def test_too_large_from_the_start_is_one_clear_error():
    model = seeded(lambda: Limited(0))
    model.armed = True
    with pytest.raises(sk.SharpkitError, match="cannot be cut further"):
        sk.Objective(model, CE, [(X, Y)])


def test_longer_batches_are_charged_for_what_they_take():
    sequences = [normal(2, n, 4, seed=n) for n in (3, 40, 40, 40)]
    batches = [(s, Y[:2]) for s in sequences]
    objective = sk.Objective(seeded(SelfAttention), CE, batches)
    objective.hvp(objective.theta)
    short, long = objective._hessian._kept[0].size, objective._hessian._kept[1].size
    assert long > 3 * short
    budget = int(short + 1.5 * long)
    objective = sk.Objective(seeded(SelfAttention), CE, batches, memory_budget=budget)
    objective.hvp(objective.theta)
    assert objective.hvp_mode == "kept 2 batches, streamed the rest"
