"""What a step leaves as it was: buffers, random states, everything after a failure."""

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from test_optim import BATCHES, CASES, F64, closure_of, data, flat, network, one_step, sgd
from test_optim_training import X, Y, loss_of
from torch import nn

from sharpkit.errors import SettingsError
from sharpkit.optim import GSAM, SAM, DynamicSparseSAM, LookSAM, MongeSAM

# -- buffers -------------------------------------------------------------------------------


def with_buffers(kind):
    g = torch.Generator().manual_seed(0)
    layers = {
        "batch": lambda: nn.BatchNorm1d(6),
        "cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
        "instance": lambda: nn.Sequential(
            nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
        ),
        "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    }
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), layers[kind](), nn.Tanh(), nn.Linear(6, 2)).to(F64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64))
    return model


def buffers(model):
    return [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("case", ["sam", "gsam", "look", "monge neighbours"])
@pytest.mark.parametrize("kind", ["batch", "cumulative", "instance", "spectral"])
def test_buffers_come_from_the_unperturbed_pass(kind, case):
    model = with_buffers(kind)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = {
        "sam": lambda: SAM(base, rho=1.0, model=model),
        "gsam": lambda: GSAM(base, rho=1.0, model=model),
        "look": lambda: LookSAM(base, rho=1.0, every=2, model=model),
        "monge neighbours": lambda: MongeSAM(base, neighbours=1, spread=1.0, model=model),
    }[case]()
    for x, y in BATCHES[:3]:
        alone = copy.deepcopy(model)
        alone(x)
        opt.step(closure_of(model, opt, x, y))
        assert len(buffers(model)) > 0
        for got, wanted in zip(buffers(model), buffers(alone), strict=True):
            assert torch.equal(got, wanted)


def test_buffers_are_restored_after_an_exception():
    model, calls = with_buffers("batch"), []
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1.0, model=model)
    alone = copy.deepcopy(model)
    alone(X)

    def closure():
        calls.append(1)
        loss = loss_of(model)
        if len(calls) == 2:
            raise RuntimeError("stop")
        loss.backward()

    with pytest.raises(RuntimeError, match="stop"):
        opt.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(buffers(model), buffers(alone), strict=True))


@pytest.mark.parametrize("by_hand", [False, True])
def test_running_statistics_without_the_model_are_refused(by_hand):
    model = with_buffers("batch")
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    others = set(hooks)
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1.0)
    before = flat(model)
    closure = closure_of(model, opt, X, Y)
    if by_hand:
        closure()
        opt.first_step()
        closure()
    with pytest.raises(SettingsError, match=r"running statistics \(BatchNorm1d\)"):
        opt.step(None if by_hand else closure)
    assert np.array_equal(flat(model), before)
    assert set(hooks) == others
    given_up = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    given_up.first_step()
    assert set(hooks) != others
    del given_up
    assert set(hooks) == others
    model.eval()
    opt.zero_grad()
    frozen = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    frozen.step(closure_of(model, frozen, X, Y))  # statistics are not written in eval mode


def test_a_compiled_model_steps_as_the_plain_one():
    models = with_buffers("batch"), with_buffers("batch")
    compiled = torch.compile(models[1], backend="aot_eager")
    for model, run in ((models[0], models[0]), (models[1], compiled)):
        opt = SAM(sgd(model), rho=0.5, model=run)
        for x, y in BATCHES[:3]:
            opt.step(closure_of(run, opt, x, y))
    np.testing.assert_allclose(flat(models[0]), flat(models[1]), rtol=0, atol=1e-12)
    for a, b in zip(buffers(models[0]), buffers(models[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# -- randomness ----------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False])
def test_dropout_masks_agree_if_asked(same):
    dropout, w, masks = nn.Dropout(0.5), nn.Parameter(torch.ones(100, dtype=F64)), []
    opt = SAM(torch.optim.SGD([w], lr=0.0), rho=0.1, same_randomness=same)

    def closure():
        out = dropout(w)
        masks.append(out.detach() != 0)
        out.square().sum().backward()

    torch.manual_seed(0)
    opt.step(closure)
    after = torch.rand(3)
    assert torch.equal(*masks) == same
    torch.manual_seed(0)
    for _ in range(1 if same else 2):
        dropout(w)
    assert torch.equal(torch.rand(3), after)  # the stream goes on behind the last pass


def test_the_stream_goes_on_behind_the_first_pass():
    """Also when the second pass draws fewer numbers, or stops."""
    w, draws = nn.Parameter(torch.ones(3)), iter([5, 2, 5, 0])
    opt = SAM(torch.optim.SGD([w], lr=0.1))

    def closure():
        count = next(draws)
        if count == 0:
            raise RuntimeError("stop")
        (w.sum() + torch.rand(count).sum()).backward()

    torch.manual_seed(0)
    opt.step(closure)
    after = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"):
        opt.step(closure)
    later = torch.rand(1)
    torch.manual_seed(0)
    torch.rand(5)
    assert torch.equal(torch.get_rng_state(), after)
    torch.rand(5)
    assert torch.equal(torch.rand(1), later)


# -- giving a step up ----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_step_that_fails_anywhere_can_be_made_again(case, stop):
    """Weights, states and the random draws of the data are as if it had not been tried."""
    make, _ = CASES[case]
    models = network(), network()
    opts = [make(sgd(m), m) for m in models]
    for model, opt in zip(models, opts, strict=True):
        one_step(opt, model, X, Y)
    failing = models[1]
    calls = []

    def interrupt(*_):
        calls.append(flat(failing))
        if len(calls) == stop:
            raise KeyboardInterrupt

    before = flat(failing)
    handle = failing.register_forward_hook(interrupt)
    failed = False
    try:
        one_step(opts[1], failing, X, Y)
    except KeyboardInterrupt:
        failed = True
    handle.remove()
    if failed:
        assert np.array_equal(flat(failing), before)
        assert all(p.grad is None for p in failing.parameters())
        one_step(opts[1], failing, X, Y)
    else:
        assert len(calls) < stop
    one_step(opts[0], models[0], X, Y)
    assert np.array_equal(*map(flat, models))


def test_a_step_by_hand_can_be_given_up():
    model = network()
    opt = SAM(sgd(model), rho=1.0)
    before = flat(model)
    loss_of(model).backward()
    opt.first_step()
    assert not np.array_equal(flat(model), before)
    with pytest.raises(SettingsError, match="another `first_step"):
        opt.first_step()
    with pytest.raises(SettingsError, match="after `first_step"):
        opt.step(closure_of(model, opt, X, Y))
    opt.restore()
    assert np.array_equal(flat(model), before)
    opt.restore()
    with pytest.raises(SettingsError, match=r"Got `step\(\)` alone"):
        opt.step()


def test_a_forgotten_step_leaves_no_hook():
    hooks = nn.modules.module._global_forward_pre_hooks
    gc.collect()
    assert not hooks
    model, (x, y) = network(), data()
    opt = SAM(sgd(model))
    closure_of(model, opt, x, y)()
    opt.first_step()
    assert len(hooks) == 1
    del opt
    gc.collect()
    assert not hooks


# -- which pass it is ----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_step_has_one_first_pass_over_its_examples(case):
    make, _ = CASES[case]
    model, seen = network(), []
    opt = make(sgd(model), model)
    model.register_forward_hook(lambda _, given, __: seen.append((opt.first_pass, len(given[0]))))
    for x, y in BATCHES[:4]:
        seen.clear()
        one_step(opt, model, x, y)
        assert sum(rows for first, rows in seen if first) == len(x)
        assert seen[0][0]
    assert opt.first_pass


def test_by_hand_the_first_pass_ends_with_first_step():
    model = network()
    opt = SAM(sgd(model))
    loss_of(model).backward()
    assert opt.first_pass
    opt.first_step()
    assert not opt.first_pass
    loss_of(model).backward()
    opt.step()
    assert opt.first_pass


def test_the_passes_for_a_mask_are_none_of_a_step():
    model, seen = network(), []
    opt = DynamicSparseSAM(sgd(model))
    model.register_forward_hook(lambda *_: seen.append(opt.first_pass))
    opt.update_mask(closure_of(model, opt, X, Y), progress=0.5)
    assert seen
    assert not any(seen)
    assert opt.first_pass


# -- memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_gradients_that_a_closure_keeps_are_not_written_into(case):
    make, _ = CASES[case]
    model, kept = network(), []
    opt = make(sgd(model), model)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p: kept.append((p.grad, p.grad.clone()))
        )
    for batch in BATCHES[:4]:
        one_step(opt, model, *batch)
    assert len(kept) >= 16
    assert all(torch.equal(now, then) for now, then in kept)


def test_the_memory_of_the_old_weights_stays_and_is_no_part_of_copies():
    model = network()
    opt = SAM(sgd(model))
    one_step(opt, model, X, Y)
    addresses = {p: room.data_ptr() for p, room in opt._room.items()}
    assert set(addresses) == set(model.parameters())
    one_step(opt, model, X, Y)
    assert {p: room.data_ptr() for p, room in opt._room.items()} == addresses
    assert not copy.deepcopy(opt)._room
    assert not pickle.loads(pickle.dumps(opt))._room


@pytest.mark.parametrize("change", ["shape", "dtype", "layout"])
def test_parameters_that_change_between_steps_get_new_memory(change):
    w = nn.Parameter(torch.arange(6.0).reshape(2, 3) + 1)
    opt, seen = SAM(torch.optim.SGD([w], lr=0.0), rho=7.3), []

    def closure():
        seen.append(w.detach().clone())
        (w**2).sum().backward()

    opt.step(closure)
    opt.zero_grad()
    w.data = {
        "shape": torch.arange(8.0).reshape(4, 2),
        "dtype": w.data.double() / 3,
        "layout": w.data.t().contiguous().t(),
    }[change]
    before = w.detach().clone()
    opt.step(closure)
    assert torch.equal(w, before)
    assert torch.equal(seen[2], before)
    assert not torch.equal(seen[3], before)
