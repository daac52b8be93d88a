"""Optimizers where a wrong number would not be seen: dtypes, scales, schedules, interruptions."""

import pytest
import torch
from test_optim import F64, closure_of, data, network, sgd
from torch import nn

from sharpkit.optim import GSAM, LookSAM, SAFLoss

X, Y = data(12, seed=3)

# -- records of SAF ------------------------------------------------------------------------


def test_saf_has_no_record_of_the_epoch_before_the_first():
    term = SAFLoss(3, 2, epochs_back=1, start_epoch=0)
    z = torch.tensor([[3.0, -1.0], [0.5, 0.0]])
    assert term(z, torch.tensor([0, 2])).item() == 0.0
    term.set_epoch(1)
    assert term(-z, torch.tensor([0, 2])).item() > 0.0


# -- dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [GSAM, LookSAM])
@pytest.mark.parametrize(("narrow", "wide"), [("bfloat16", "bfloat16"), ("float32", "float64")])
def test_a_scalar_parameter_keeps_its_dtype(make, narrow, wide):
    """A scalar times a scalar tensor is of the wider dtype, unlike a vector."""
    ends = []
    for dtypes in ((narrow, wide), ("float64", "float64")):
        scale = nn.Parameter(torch.tensor(1.5, dtype=getattr(torch, dtypes[0])))
        w = nn.Parameter(torch.tensor([0.5, 1.0], dtype=getattr(torch, dtypes[1])))
        opt = make(torch.optim.SGD([scale, w], lr=0.05), rho=0.1, alpha=0.5)

        def closure(scale=scale, w=w):
            loss = (scale.to(F64) * w.to(F64) - 1).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            opt.step(closure)
        ends.append(torch.stack([scale.detach().to(F64), *w.detach().to(F64)]))
    torch.testing.assert_close(*ends, rtol=2e-2 if narrow == "bfloat16" else 1e-6, atol=0)


def test_look_sam_goes_on_in_a_narrower_dtype():
    wide, narrow = network(dtype=torch.float32), network(dtype=torch.bfloat16)
    opt, other = LookSAM(sgd(wide)), LookSAM(sgd(narrow))
    opt.step(closure_of(wide, opt, X.float(), Y))
    other.load_state_dict(opt.state_dict())
    other.step(closure_of(narrow, other, X.bfloat16(), Y))
    assert all(p.grad.dtype == torch.bfloat16 for p in narrow.parameters())
