"""Optimizers where a wrong number would not be seen: dtypes, scales, schedules, interruptions."""

import torch

from sharpkit.optim import SAFLoss

# -- records of SAF ------------------------------------------------------------------------


def test_saf_has_no_record_of_the_epoch_before_the_first():
    term = SAFLoss(3, 2, epochs_back=1, start_epoch=0)
    z = torch.tensor([[3.0, -1.0], [0.5, 0.0]])
    assert term(z, torch.tensor([0, 2])).item() == 0.0
    term.set_epoch(1)
    assert term(-z, torch.tensor([0, 2])).item() > 0.0
