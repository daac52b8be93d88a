"""The tracker: what it measures, what it leaves alone, and what it survives."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from sharpkit.errors import ObjectiveError, SettingsError
from sharpkit.objective import Objective
from sharpkit.tracking import Tracker, stability_line

F64 = torch.float64
CE = nn.functional.cross_entropy
G = torch.Generator().manual_seed(4)
X, Y = torch.randn(48, 4, generator=G, dtype=F64), torch.randint(0, 3, (48,), generator=G)


def network(dtype=F64, seed=1, dropout=0.3):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)]
    return nn.Sequential(*layers).to(dtype)


def sgd(net, **settings):
    return torch.optim.SGD(net.parameters(), **{"lr": 0.2, "momentum": 0.9, **settings})


def train(net, steps=12, tracker=None, opt=None, seed=5):
    opt = opt or sgd(net)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    net.train()
    losses = []
    for step in range(steps):
        rows = torch.randint(48, (16,))
        opt.zero_grad()
        loss = CE(net(X[rows].to(net[0].weight.dtype)), Y[rows])
        loss.backward()
        opt.step()
        losses.append(loss.item())
        if tracker is not None:
            tracker.step(step, loss=loss)
    return opt, losses, (torch.get_rng_state(), random.random(), np.random.random())


def bits(net, opt):
    tensors = [*net.state_dict().values(), *(p.grad for p in net.parameters())]
    state = [t for s in opt.state_dict()["state"].values() for t in s.values()]
    return [t.clone() for t in tensors + [t for t in state if isinstance(t, torch.Tensor)]]


def dense_hessian(net, data=(X, Y)):
    """By double backward of torch's own, in evaluation mode."""
    own = copy.deepcopy(net).double().eval()
    names = [n for n, _ in own.named_parameters()]
    shapes = [p.shape for p in own.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in own.parameters()])

    def loss(theta):
        parts = torch.split(theta, [s.numel() for s in shapes])
        named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return CE(functional_call(own, named, (data[0].double(),)), data[1])

    return torch.autograd.functional.hessian(loss, flat)


# -- what it leaves alone --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"trace_probes": 4, "eigenvalues": 2}])
def test_training_is_the_same_bit_for_bit(options):
    with_it, without = network(), network()
    tracker = Tracker(with_it.train(), CE, (X, Y), every=3, **options)
    a, b = train(with_it, tracker=tracker), train(without)
    assert all(
        torch.equal(s, t) for s, t in zip(bits(with_it, a[0]), bits(without, b[0]), strict=True)
    )
    assert a[1] == b[1]
    assert torch.equal(a[2][0], b[2][0])
    assert a[2][1:] == b[2][1:]
    assert len(tracker.frame) == 4
    assert all(module.training for module in with_it.modules())
    assert tracker.frame.loss.tolist() == a[1][::3]


def test_modes_of_single_modules_stay():
    net = network().train()
    net[1].eval()
    tracker = Tracker(net, CE, (X, Y))
    tracker.measure()
    assert [m.training for m in net] == [True, False, True, True, True]
    assert all(p.grad is None for p in net.parameters())


class Interrupted:
    """A criterion that raises at its n-th call."""

    def __init__(self, at, error):
        self.left, self.error = at, error

    def __call__(self, outputs, targets):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return CE(outputs, targets)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("boom")])
def test_what_is_interrupted_leaves_everything(error):
    net = network().train()
    loss = Interrupted(10**6, error)
    tracker = Tracker(net, loss, (X, Y), num_terms=lambda outputs, targets: len(targets))
    tracker.measure()
    before, state = bits_of(net), torch.get_rng_state()
    for at in (1, 2):
        loss.left = at
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            tracker.measure()
        assert all(module.training for module in net.modules())
        assert all(torch.equal(a, b) for a, b in zip(before, bits_of(net), strict=True))
        assert torch.equal(state, torch.get_rng_state())
    loss.left = 10**6
    row = tracker.measure()
    assert row["converged"]
    assert (
        abs(row["lambda_max"] - float(torch.linalg.eigvalsh(dense_hessian(net))[-1]))
        <= (row["lambda_max_error"])
    )


def bits_of(net):
    return [t.clone() for t in net.state_dict().values()]


def test_the_flags_are_put_back_when_it_cannot_be_made():
    net = network().train()
    with pytest.raises(ObjectiveError):
        Tracker(net, CE, iter([(X, Y)]))
    assert all(module.training for module in net.modules())


# -- what it measures ------------------------------------------------------------------------


def test_every_row_is_the_dense_hessian_of_its_step():
    net = network()
    tracker = Tracker(net, CE, (X, Y), every=4, eigenvalues=3, trace_probes=200)
    seen = []

    class Spy:
        def step(self, step, loss):
            if tracker.step(step, loss=loss):
                seen.append(dense_hessian(net))

    train(net, steps=25, tracker=Spy())
    frame = tracker.frame
    assert frame.step.tolist() == [0, 4, 8, 12, 16, 20, 24]
    assert frame.warm.tolist() == [False] + 6 * [True]
    assert frame.converged.all()
    for (_, row), H in zip(frame.iterrows(), seen, strict=True):
        true = torch.linalg.eigvalsh(H).flip(0).tolist()
        for i, name in enumerate(["lambda_max", "lambda_2", "lambda_3"]):
            assert abs(row[name] - true[i]) <= row[f"{name}_error"] + 1e-9
        assert row.lambda_max_error <= 0.01 * row.lambda_max
        assert abs(row.trace - float(H.trace())) <= 5 * row.trace_error
        assert 0 < row.trace_error < 0.2 * row.trace
    assert frame.data_loss.iloc[-1] == pytest.approx(CE(net.eval()(X), Y).item(), rel=1e-12)


def test_frozen_parameters_and_buffers_are_followed():
    net = network(dropout=0.0)
    net[0].requires_grad_(False)
    tracker = Tracker(net.train(), CE, (X, Y), params="4.*")
    tracker.measure()
    with torch.no_grad():
        net[0].weight.mul_(2)
        net[1].running_var.mul_(3)
        net[1].running_mean.add_(0.5)
        net[4].bias.add_(1)
    row = tracker.measure()
    fresh = Tracker(net, CE, (X, Y), params="4.*").measure()
    assert row["lambda_max"] == pytest.approx(fresh["lambda_max"], rel=0.02)
    assert row["data_loss"] == pytest.approx(fresh["data_loss"], rel=1e-12)


def test_the_same_seed_gives_the_same_bits():
    frames = []
    for _ in range(2):
        net = network()
        tracker = Tracker(net, CE, (X, Y), every=3, trace_probes=2, seed=3)
        train(net, tracker=tracker)
        frames.append(tracker.frame.drop(columns="seconds"))
    assert frames[0].equals(frames[1])


def test_traces_share_their_signs():
    """Of a network that stays, the trace stays too, however few the probes."""
    tracker = Tracker(network(), CE, (X, Y), trace_probes=2)
    first, second = tracker.measure(0), tracker.measure(1)
    assert first["trace"] == second["trace"]
    assert first["trace_error"] > 0


def test_the_data_are_checked_once(monkeypatch):
    from sharpkit.objective import hessian, objective

    counts = {"checks": 0, "trials": 0}
    first_pass, try_way = objective.first_pass, hessian.try_way

    def counted(name, function):
        def call(*args, **more):
            counts[name] += 1
            return function(*args, **more)

        return call

    monkeypatch.setattr(objective, "first_pass", counted("checks", first_pass))
    monkeypatch.setattr(hessian, "try_way", counted("trials", try_way))
    tracker = Tracker(network(), CE, (X, Y))
    for _ in range(3):
        tracker.measure()
    assert counts == {"checks": 1, "trials": 1}


def test_products_are_those_of_the_objective(monkeypatch):
    products = []
    hvp = Objective.hvp

    def counted(self, V):
        products.append(V.shape[1] if V.ndim == 2 else 1)
        return hvp(self, V)

    monkeypatch.setattr(Objective, "hvp", counted)
    tracker = Tracker(network(), CE, (X, Y), trace_probes=3)
    rows = [tracker.measure() for _ in range(2)]
    assert sum(row["hvps"] for row in rows) == sum(products)


def test_a_batch_loss():
    def batch_loss(model, batch):
        return CE(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"])

    net = network()
    data = [{"x": X[:30], "y": Y[:30]}, {"x": X[30:], "y": Y[30:]}]
    ours = Tracker.from_batch_loss(net, batch_loss, data).measure()
    plain = Tracker(net, CE, (X, Y)).measure()
    assert ours["lambda_max"] == pytest.approx(plain["lambda_max"], rel=1e-9)


def test_another_precision_and_autocast_around():
    net = network(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        row = Tracker(net, CE, (X.float(), Y), dtype=F64, tolerance=1e-4).measure()
    true = float(torch.linalg.eigvalsh(dense_hessian(net, (X.float(), Y)))[-1])
    assert abs(row["lambda_max"] - true) <= row["lambda_max_error"] <= 1e-4 * true


# -- when it measures ------------------------------------------------------------------------


def steps_of(every, steps, **options):
    tracker = Tracker(network(), CE, (X, Y), every=every, **options)
    found = [tracker.step(s) for s in steps]
    return [row["step"] for row in found if row]


def test_steps():
    assert steps_of(3, [None] * 8) == [0, 3, 6]
    assert steps_of(3, range(100, 108)) == [100, 103, 106]
    assert steps_of(4, [0, 2, 5, 6, 9]) == [0, 5, 9]
    assert steps_of(3, [0, 1, 2, 3, 1, 2, 3, 4]) == [0, 3, 1, 4]  # training was taken up again


def test_a_measurement_at_once_is_at_the_present_step():
    tracker = Tracker(network(), CE, (X, Y), every=5)
    assert tracker.measure()["step"] == 0
    for step in range(1, 3):
        assert tracker.step(step) is None
    assert tracker.measure(loss=2.5)["step"] == 2
    assert [tracker.step() is None for _ in range(5)] == [True, True, True, True, False]
    assert tracker.frame.loss.tolist()[1] == 2.5
    assert tracker.frame.loss[0] == tracker.frame.data_loss[0]


def test_overhead(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("sharpkit.tracking.tracker.time.perf_counter", lambda: clock[0])
    tracker = Tracker(network(), CE, (X, Y), every=10, max_overhead=0.1)
    assert tracker.overhead == 0
    measure = tracker._fill

    def slow(row):
        clock[0] += 9.0
        measure(row)

    monkeypatch.setattr(tracker, "_fill", slow)
    for step in range(301):
        tracker.step(step)
        clock[0] += 1.0
    # 9 s of measuring for 81 s of training are 0.1: each 81 steps, in multiples of 10.
    assert tracker.frame.step.tolist() == [0, 10, 100, 190, 280]
    assert tracker.frame.interval.tolist() == [10, 90, 90, 90, 90]
    assert tracker.overhead == pytest.approx(45 / (301 + 45))


# -- what it survives ------------------------------------------------------------------------


def test_a_step_that_diverged_is_a_row_with_a_note():
    net = network()
    tracker = Tracker(net, CE, (X, Y), every=1)
    tracker.step()
    good = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net[4].weight.fill_(math.nan)
    row = tracker.step(loss=math.nan)
    assert math.isnan(row["lambda_max"])
    assert math.isnan(row["lambda_max_error"])
    assert not row["converged"]
    assert "not finite" in row["note"]
    net.load_state_dict(good)
    again = tracker.step()
    assert again["converged"]
    assert not again["warm"]
    assert len(tracker.frame) == 3


def test_derivatives_that_overflow_are_a_row_with_a_note():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.a.abs().sqrt()

    net = Root()
    x = torch.ones(2, 3)
    tracker = Tracker(net, nn.functional.mse_loss, (x, 2 * x))
    assert tracker.step()["converged"]
    with torch.no_grad():
        net.a[0] = 0.0
    row = tracker.measure()
    assert math.isnan(row["lambda_max"])
    assert "finite" in row["note"]


def test_a_budget_that_is_too_small_is_said():
    tracker = Tracker(network(), CE, (X, Y), max_hvps=4)
    row = tracker.measure()
    assert not row["converged"]
    assert "max_hvps" in row["note"]
    assert not tracker.measure()["warm"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": 0}, "`every`"),
        ({"every": 2.5}, "`every`"),
        ({"every": True}, "`every`"),
        ({"eigenvalues": 0}, "`eigenvalues`"),
        ({"eigenvalues": 10**6}, "`eigenvalues`"),
        ({"trace_probes": 1}, "`trace_probes`"),
        ({"trace_probes": -2}, "`trace_probes`"),
        ({"tolerance": 0.0}, "`tol"),
        ({"failure_probability": 0.0}, "`failure_probability`"),
        ({"max_overhead": 1.0}, "`max_overhead`"),
        ({"writers": 3}, "writers"),
    ],
)
def test_wrong_settings(options, match):
    with pytest.raises(SettingsError, match=match):
        Tracker(network(), CE, (X, Y), **options)


def test_wrong_objects():
    with pytest.raises(ObjectiveError, match="with parameters"):
        Tracker(nn.Tanh(), CE, (X, Y))
    with pytest.raises(ObjectiveError, match="one-shot"):
        Tracker(network(), CE, iter([(X, Y)]))
    with pytest.raises(ObjectiveError, match=r"torch\.nn\.Module"):
        Tracker(lambda x: x, CE, (X, Y))
    with pytest.raises(SettingsError, match="`step`"):
        Tracker(network(), CE, (X, Y)).step(1.5)


# -- the line of stability -------------------------------------------------------------------


def grows(curvature, **settings):
    """Whether torch's own SGD grows on a quadratic of this curvature."""
    x = nn.Parameter(torch.ones(1, dtype=F64))
    opt = torch.optim.SGD([x], **settings)
    for _ in range(4000):
        opt.zero_grad()
        (0.5 * curvature * x**2).sum().backward()
        opt.step()
        if abs(x.item()) > 1e6:
            return True
    return False


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.3},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.8, "nesterov": True},
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.3},
    ],
)
def test_the_line_is_where_steps_begin_to_grow(settings):
    net = network()
    line, note = stability_line(torch.optim.SGD(net.parameters(), **settings), None)
    assert note == ""
    assert grows(1.02 * line, **settings)
    assert not grows(0.98 * line, **settings)


def test_lines_that_are_not_known():
    net = network()
    groups = [{"params": net[0].parameters()}, {"params": net[4].parameters(), "lr": 0.5}]
    for opt in (
        torch.optim.Adam(net.parameters()),
        torch.optim.RMSprop(net.parameters()),
        torch.optim.SGD(groups, lr=0.1),
    ):
        line, note = stability_line(opt, None)
        assert line is None
        assert note
        assert math.isnan(Tracker(net, CE, (X, Y), optimizer=opt).measure()["two_over_eta"])
    assert stability_line(None, None) == (None, "")
    assert stability_line(None, 0.5) == (4.0, "")
    assert stability_line(sgd(net), 0.5)[0] == pytest.approx(7.6)


def test_a_schedule_moves_the_line():
    net = network()
    opt = sgd(net, momentum=0.0)
    tracker = Tracker(net, CE, (X, Y), optimizer=opt, every=1)
    tracker.step()
    opt.param_groups[0]["lr"] = 0.5
    tracker.step()
    tracker.step(lr=1.0)
    assert tracker.frame.two_over_eta.tolist() == [10.0, 4.0, 2.0]
