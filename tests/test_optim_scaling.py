"""Optimizers in mixed precision: scales, overflows, autocast."""

import re

import numpy as np
import pytest
import torch
from test_optim import BATCHES, CASES, closure_of, flat, network, sgd
from test_optim_training import X, Y, loss_of

from sharpkit.errors import SettingsError
from sharpkit.optim import SAM, MicroBatchSAM

# -- GradScaler ----------------------------------------------------------------------------


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)


def scaled(model, opt, scale, x, y, poison=()):
    """A closure for `opt`, which counts its passes and makes those in `poison` overflow."""
    count = []

    def closure(i=0):
        count.append(i)
        loss = loss_of(model, x, y)
        factor = float("inf") if len(count) - 1 in poison else 1.0
        scale.scale(loss * factor).backward()
        return loss

    return closure, count


SCALED = ["sam", "asam", "monge", "gsam", "look", "wsam", "friendly", "momentum", "sparse"]


@pytest.mark.parametrize("case", SCALED)
def test_a_power_of_two_scale_changes_nothing(case):
    make, _ = CASES[case]
    models = network(dtype=torch.float32), network(dtype=torch.float32)
    plain, with_scale = (make(sgd(m), m) for m in models)
    scale = scaler()
    for x, y in BATCHES[:6]:
        plain.step(closure_of(models[0], plain, x.float(), y))
        closure, _ = scaled(models[1], with_scale, scale, x.float(), y)
        with_scale.step(closure, scaler=scale)
        scale.update()
        assert np.array_equal(flat(models[0]), flat(models[1]))


@pytest.mark.parametrize("case", sorted(set(SCALED) - {"momentum"}))
def test_the_scale_by_hand_is_the_scale_in_the_closure(case):
    make, _ = CASES[case]
    models = network(dtype=torch.float32), network(dtype=torch.float32)
    opts = [make(sgd(m), m) for m in models]
    scales = scaler(), scaler()
    for number, (x, y) in enumerate(BATCHES[:6]):
        closure, _ = scaled(models[0], opts[0], scales[0], x.float(), y)
        opts[0].step(closure, scaler=scales[0])
        closure, _ = scaled(models[1], opts[1], scales[1], x.float(), y)
        opts[1].zero_grad()
        closure()
        if opts[1].first_step(scaler=scales[1]):
            closure()
        if number % 2:
            scales[1].unscale_(opts[1])  # as for clipping
        scales[1].step(opts[1])
        for scale in scales:
            scale.update()
        np.testing.assert_allclose(flat(models[0]), flat(models[1]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("case", ["sam", "monge", "gsam", "look", "wsam", "friendly"])
def test_an_overflow_in_either_pass_skips_the_whole_step(case, bad, by_hand):
    make, _ = CASES[case]
    model = network(dtype=torch.float32)
    opt, scale = make(sgd(model), model), scaler()
    before = flat(model)
    closure, count = scaled(model, opt, scale, X.float(), Y, poison={bad})
    if by_hand:
        closure()
        if opt.first_step(scaler=scale):
            closure()
        scale.step(opt)
    else:
        opt.step(closure, scaler=scale)
    scale.update()
    assert len(count) == bad + 1
    assert np.array_equal(flat(model), before)
    assert not opt.state
    assert not opt.memory
    assert scale.get_scale() == 2.0**7
    fresh = network(dtype=torch.float32)
    other, other_scale = make(sgd(fresh), fresh), scaler()
    for m, o, s in ((model, opt, scale), (fresh, other, other_scale)):
        closure, _ = scaled(m, o, s, X.float(), Y)
        o.step(closure, scaler=s)
    assert np.array_equal(flat(model), flat(fresh))  # as if the step had not been


def test_an_overflow_of_one_micro_batch_skips_the_step():
    model = network(dtype=torch.float32)
    opt, scale = MicroBatchSAM(sgd(model), num_micro_batches=3), scaler()
    before = flat(model)
    closure, count = scaled(model, opt, scale, X.float(), Y, poison={2})
    opt.step(closure, scaler=scale)
    scale.update()
    assert count == [0, 0, 1]
    assert np.array_equal(flat(model), before)
    assert scale.get_scale() == 2.0**7


def test_the_scaler_itself_cannot_take_a_closure():
    model = network(dtype=torch.float32)
    opt, scale = SAM(sgd(model)), scaler()
    closure, _ = scaled(model, opt, scale, X.float(), Y)
    closure()
    with pytest.raises(SettingsError, match=re.escape("opt.step(closure, scaler=scaler)")):
        scale.step(opt, closure)
    opt.zero_grad()
    before = flat(model)
    opt.step(closure, scaler=scale)  # nothing of the refused call is left
    assert not np.array_equal(flat(model), before)


def test_an_exception_in_the_scalers_step_leaves_nothing_behind():
    model = network(dtype=torch.float32)
    opt, scale = SAM(sgd(model), rho=1.0), scaler()
    closure, _ = scaled(model, opt, scale, X.float(), Y)
    before = flat(model)

    def stop(*_):
        raise RuntimeError("stop")

    hook = opt.base.register_step_pre_hook(stop)
    closure()
    opt.first_step(scaler=scale)
    closure()
    with pytest.raises(RuntimeError, match="stop"):
        scale.step(opt)
    hook.remove()
    assert np.array_equal(flat(model), before)
    opt.zero_grad()
    loss_of(model, X.float()).backward()
    opt.first_step()
    loss_of(model, X.float()).backward()
    opt.step()  # without a scaler: nothing is unscaled or skipped
    fresh = network(dtype=torch.float32)
    other = SAM(sgd(fresh), rho=1.0)
    other.step(closure_of(fresh, other, X.float(), Y))
    assert np.array_equal(flat(model), flat(fresh))


# -- autocast ------------------------------------------------------------------------------


def test_autocast_around_the_step_sees_the_perturbed_weights():
    losses = [], []
    for around in (True, False):
        model = network(dtype=torch.float32)
        opt = SAM(sgd(model), rho=2.0)

        def forward(model=model):
            return loss_of(model, X.float())

        def closure(forward=forward, around=around):
            if around:
                loss = forward()
            else:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = forward()
            losses[around].append(loss.item())
            loss.backward()

        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            for _ in range(3):
                opt.step(closure)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6
