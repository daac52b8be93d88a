"""Optimizers in real training loops: accumulation, clipping, sharing with the base."""

import copy
import pickle

import numpy as np
import pytest
import torch
from test_optim import BATCHES, CASES, F64, closure_of, data, flat, network, one_step, sgd
from torch import nn

from sharpkit.errors import SettingsError
from sharpkit.optim import (
    ASAM,
    GSAM,
    SAM,
    WSAM,
    DynamicSparseSAM,
    FriendlySAM,
    LookSAM,
    MicroBatchSAM,
    MongeSAM,
)

X, Y = data(12, seed=3)


def loss_of(model, x=X, y=Y):
    return nn.functional.cross_entropy(model(x), y)


# -- accumulation --------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["sam", "asam", "monge", "gsam", "friendly", "look"])
def test_accumulation_in_the_closure_is_the_large_batch(case):
    make, _ = CASES[case]
    models = network(), network()
    large, small = (make(sgd(m), m) for m in models)
    for x, y in BATCHES[:4]:
        large.step(closure_of(models[0], large, x, y))

        def closure(x=x, y=y):
            total = 0.0
            for rows in (slice(0, 3), slice(3, 8)):
                part = loss_of(models[1], x[rows], y[rows]) * len(y[rows]) / len(y)
                part.backward()
                total += part.item()
            return total

        small.step(closure)
        np.testing.assert_allclose(flat(models[0]), flat(models[1]), rtol=0, atol=1e-12)


def test_micro_batches_are_not_accumulation():
    models = network(), network()
    micro = MicroBatchSAM(sgd(models[0]), num_micro_batches=2, rho=0.5)
    whole = SAM(sgd(models[1]), rho=0.5)
    one_step(micro, models[0], X, Y)
    one_step(whole, models[1], X, Y)
    assert np.abs(flat(models[0]) - flat(models[1])).max() > 1e-4


def test_gradients_accumulated_before_the_closure_are_refused():
    model = network()
    opt = SAM(sgd(model))
    loss_of(model).backward()
    before = flat(model)
    with pytest.raises(SettingsError, match="would be lost"):
        opt.step(closure_of(model, opt, X, Y))
    assert np.array_equal(flat(model), before)
    opt.zero_grad(set_to_none=False)
    opt.step(closure_of(model, opt, X, Y))  # zeros are nothing
    opt.step(closure_of(model, opt, X, Y))  # nor is what the last step left
    loss_of(model).backward()
    with pytest.raises(SettingsError, match="would be lost"):
        opt.step(closure_of(model, opt, X, Y))


def test_a_closure_may_clear_the_gradients_itself():
    models = network(), network()
    for model in models:
        opt = SAM(sgd(model))

        def closure(model=model, opt=opt, clear=model is models[0]):
            if clear:
                opt.zero_grad()
            loss_of(model).backward()

        for _ in range(3):
            opt.step(closure)
    assert np.array_equal(*map(flat, models))


# -- clipping ------------------------------------------------------------------------------


def test_clipping_is_of_the_second_gradient_alone():
    models = network(), network()
    free, clipped = SAM(sgd(models[0], lr=0.0)), SAM(sgd(models[1], lr=0.0), max_grad_norm=0.01)
    points = [], []
    for model, opt, seen in zip(models, (free, clipped), points, strict=True):
        opt.step(closure_of(model, opt, X, Y, seen))
    assert np.array_equal(points[0][1], points[1][1])
    grads = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in models]
    assert grads[0].norm() > 0.02
    torch.testing.assert_close(grads[1], grads[0] * 0.01 / grads[0].norm(), rtol=1e-4, atol=0)


# -- sparse gradients, tied weights --------------------------------------------------------


class Bag(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(7, 3, sparse=sparse, dtype=F64)
        self.head = nn.Linear(3, 2, dtype=F64)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=F64))

    def forward(self, x):
        return self.head(torch.tanh(self.table(x).mean(1)))


TOKENS = torch.tensor([[0, 1, 1], [4, 4, 0], [2, 0, 1]])
LABELS = torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    "case",
    ["sam", "sam linf", "asam", "asam filter", "asam layer", "fisher", "monge", "micro ragged"],
)
def test_sparse_gradients_step_as_dense_ones(case):
    make, _ = CASES[case]
    models = Bag(False), Bag(True)
    opts = [make(torch.optim.SGD(m.parameters(), lr=0.1), m) for m in models]
    untouched = models[1].table.weight[[3, 5, 6]].clone()
    for _ in range(3):
        for model, opt in zip(models, opts, strict=True):
            one_step(opt, model, TOKENS, LABELS)
        np.testing.assert_allclose(flat(models[0]), flat(models[1]), rtol=0, atol=1e-12)
    assert models[1].table.weight.grad.is_sparse
    assert torch.equal(models[1].table.weight[[3, 5, 6]], untouched)


def test_an_exception_restores_rows_of_a_sparse_gradient():
    model, calls = Bag(True), []
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=3.3)
    before = flat(model)

    def closure():
        calls.append(flat(model))
        if len(calls) == 2:
            raise RuntimeError("stop")
        loss_of(model, TOKENS, LABELS).backward()

    with pytest.raises(RuntimeError, match="stop"):
        opt.step(closure)
    assert not np.array_equal(calls[1], before)
    assert np.array_equal(flat(model), before)


@pytest.mark.parametrize("case", ["gsam", "look", "wsam", "friendly", "sparse", "monge averaged"])
def test_methods_that_need_dense_gradients_say_so(case):
    make = {
        "gsam": GSAM,
        "look": LookSAM,
        "wsam": WSAM,
        "friendly": FriendlySAM,
        "sparse": DynamicSparseSAM,
        "monge averaged": lambda base: MongeSAM(base, average_over=2),
    }[case]
    model = Bag(True)
    opt = make(torch.optim.SGD(model.parameters(), lr=0.1))
    before = flat(model)
    with pytest.raises(SettingsError, match="dense gradients"):
        one_step(opt, model, TOKENS, LABELS)
    assert np.array_equal(flat(model), before)


def test_tied_weights_move_once():
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model = model.to(F64)
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(4, 4, generator=g, dtype=F64))
    W = model[0].weight.detach().clone().requires_grad_()

    def loss_at(weight):
        return nn.functional.cross_entropy(torch.tanh(X @ weight.T) @ weight.T, Y)

    (first,) = torch.autograd.grad(loss_at(W), W)
    moved = (W + 0.3 * first / first.norm()).detach().requires_grad_()
    (second,) = torch.autograd.grad(loss_at(moved), moved)
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3)
    opt.step(closure_of(model, opt, X, Y))
    torch.testing.assert_close(model[0].weight, W - 0.1 * second, rtol=0, atol=1e-14)


# -- shared with the base optimizer --------------------------------------------------------


@pytest.mark.parametrize("attach", ["wrapper", "base"])
def test_schedulers_work_unchanged(attach):
    model = network()
    opt = SAM(sgd(model, lr=0.4))
    target = opt if attach == "wrapper" else opt.base
    scheduler = torch.optim.lr_scheduler.StepLR(target, step_size=1, gamma=0.5)
    seen = []
    for _ in range(3):
        opt.step(closure_of(model, opt, X, Y))
        seen.append(opt.base.param_groups[0]["lr"])
        scheduler.step()
    assert seen == [0.4, 0.2, 0.1]


def test_one_cycle_schedules_the_momentum_too():
    model = network()
    opt = SAM(sgd(model))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=4)
    for _ in range(3):
        opt.step(closure_of(model, opt, X, Y))
        scheduler.step()
    assert opt.base.param_groups[0]["momentum"] == scheduler.optimizer.param_groups[0]["momentum"]
    assert opt.base.param_groups[0]["momentum"] != 0.9


def test_groups_added_later_are_perturbed():
    model = network()
    opt = SAM(torch.optim.SGD(model[0].parameters(), lr=0.1), rho=0.5)
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.0})
    before, seen = flat(model), []
    opt.step(closure_of(model, opt, X, Y, seen))
    assert (seen[1] != before).all()
    assert np.array_equal(flat(model)[15:], before[15:])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies_step_on_their_own(how):
    model = network()
    opt = FriendlySAM(sgd(model), rho=0.3)
    one_step(opt, model, X, Y)
    other, again = how((model, opt))
    for m, o in ((other, again), (model, opt)):
        one_step(o, m, *BATCHES[1])
    assert np.array_equal(flat(model), flat(other))
    assert again.base is not opt.base


def test_the_state_of_a_plain_optimizer_starts_the_wrapper_anew():
    model = network()
    plain = sgd(model)
    loss_of(model).backward()
    plain.step()
    opt = SAM(sgd(model))
    opt.load_state_dict(plain.state_dict())
    sparse = DynamicSparseSAM(sgd(model))
    sparse.load_state_dict(plain.state_dict())
    assert len(sparse.memory["mask"]) == 4
    buffer = plain.state[model[0].weight]["momentum_buffer"]
    assert torch.equal(opt.state[model[0].weight]["momentum_buffer"], buffer)
    sgd(model).load_state_dict(opt.state_dict())  # and the other way
    with pytest.raises(SettingsError, match="state of GSAM"):
        GSAM(sgd(model)).load_state_dict(opt.state_dict())


def test_settings_come_back_with_the_state():
    model = network()
    opt = ASAM(sgd(model), rho=0.7, eta=0.2)
    other = ASAM(sgd(model))
    other.load_state_dict(opt.state_dict())
    assert (other.rho, other.eta) == (0.7, 0.2)


def test_hooks_of_the_base_run_with_the_final_gradient():
    model = network()
    opt = SAM(sgd(model), max_grad_norm=0.01)
    norms = []
    opt.base.register_step_pre_hook(
        lambda *_: norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    )
    opt.step(closure_of(model, opt, X, Y))
    assert norms[0] <= 0.01
