"""Differences of two checkpoints: what pairing cancels, and what it must not hide."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from cases import normal
from torch import nn

import sharpkit as sk
from sharpkit.errors import SettingsError, UnknownMeasureError

INPUTS = normal(60, 5)
TARGETS = INPUTS[:, :3].argmax(dim=1)
CE = nn.CrossEntropyLoss()


@functools.cache
def checkpoints():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).double()
        optimizer = torch.optim.Adam(first.parameters(), 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            CE(first(INPUTS), TARGETS).backward()
            optimizer.step()
        second = copy.deepcopy(first)
        with torch.no_grad():
            for p in second.parameters():
                p.add_(0.01 * torch.randn_like(p))
    return first, second


def objective(model, x=INPUTS, y=TARGETS, **options):
    return sk.Objective(model, CE, [(x, y)], **options)


@pytest.fixture(scope="module")
def pair():
    return tuple(objective(model) for model in checkpoints())


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(
    "request_",
    [
        "hessian_trace",
        ("frobenius_norm", {"num_probes": 8}),
        "top_eigenvalues:k=1",
        "gradient_norm",
    ],
    ids=str,
)
def test_the_value_is_the_difference_of_two_scores(pair, request_, paired):
    found = sk.compare(*pair, request_, paired=paired, seed=3)
    scores = [
        sk.score(o, [request_], seed=s)[0].estimate
        for o, s in zip(pair, (3, 3 if paired else 4), strict=True)
    ]
    a, b = scores
    assert found.value == a.value - b.value
    assert (found.details["first"], found.details["second"]) == (a.value, b.value)
    assert found.details["paired"] is paired
    assert found.details["unpaired_probe_error"] == math.hypot(a.probe_error, b.probe_error)
    assert found.cost.hvps == a.cost.hvps + b.cost.hvps
    assert found.error_kind == a.error_kind
    if not paired and a.error_kind == "stderr":
        assert found.probe_error == math.hypot(a.probe_error, b.probe_error)
        assert found.data_error == math.hypot(a.data_error, b.data_error)
        assert found.draws == found.data_draws == ()
    if a.error_kind != "stderr":  # what is certain may add up
        assert found.probe_error == a.probe_error + b.probe_error


@pytest.mark.parametrize(
    "name", ["hessian_trace", "frobenius_norm", "stable_rank", "renyi_sharpness", "log_det"]
)
def test_pairing_cancels_what_both_share(pair, name):
    found = sk.compare(*pair, name)
    assert 0 < found.probe_error < 0.4 * found.details["unpaired_probe_error"]
    assert 0 < found.data_error < 0.4 * found.details["unpaired_data_error"]
    assert np.mean(found.draws) == pytest.approx(found.value, abs=1e-9)
    assert np.mean(found.data_draws) == pytest.approx(found.value, abs=1e-9)
    assert found.dof == len(found.draws) - 1


@pytest.mark.slow
def test_paired_errors_are_calibrated(pair):
    truths = [float(sk.hessian(o).to_dense().trace()) for o in pair]
    z = []
    for seed in range(200):
        found = sk.compare(*pair, "hessian_trace:num_probes=8", seed=seed, num_groups=0)
        z.append((found.value - truths[0] + truths[1]) / found.probe_error)
    z = np.array(z)
    print(f"paired trace: z {z.mean():.2f} +- {z.std():.2f}")
    assert abs(z.mean()) < 4 * z.std() / math.sqrt(200)
    assert 0.85 < z.std() / math.sqrt(7 / 5) < 1.2


@pytest.mark.slow
def test_paired_data_errors_are_calibrated():
    # Small enough to be exact: only the data are random.
    with torch.random.fork_rng():
        torch.manual_seed(2)
        first = nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2)).double()
        second = copy.deepcopy(first)
        with torch.no_grad():
            for p in second.parameters():
                p.add_(0.05 * torch.randn_like(p))

    def found(n, seed, num_groups):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 3, generator=g, dtype=torch.float64)
        y = (x[:, 0] + torch.randn(n, generator=g, dtype=torch.float64) > 0).long()
        return sk.compare(
            objective(first, x, y), objective(second, x, y), "hessian_trace", num_groups=num_groups
        )

    truth = found(50_000, 10**6, 0).value
    several = [found(96, seed, 8) for seed in range(100)]
    values, errors = (np.array([getattr(e, n) for e in several]) for n in ("value", "data_error"))
    ratio = values.std() / math.sqrt((errors**2).mean())
    z = (values - truth) / errors
    print(f"paired data error: {ratio:.2f}, z {z.mean():.2f} +- {z.std():.2f}")
    assert 0.8 < ratio < 1.25
    assert abs(z.mean()) < 0.5
    apart = np.mean([e.details["unpaired_data_error"] for e in several])
    assert errors.mean() < 0.5 * apart


def test_pairs_that_have_nothing_in_common_are_refused(pair):
    first, second = checkpoints()
    other_data = objective(second, INPUTS.flip(1))
    fewer = objective(second, params="2.*")
    for other, match in ((other_data, "same data"), (fewer, "same parameters")):
        with pytest.raises(SettingsError, match=f"Expected the {match}.*paired=False"):
            sk.compare(pair[0], other, "hessian_trace")
        found = sk.compare(pair[0], other, "hessian_trace", paired=False)
        assert found.probe_error > 0
    with pytest.raises(SettingsError, match="Expected an Objective"):
        sk.compare(first, second, "hessian_trace")
    with pytest.raises(UnknownMeasureError):
        sk.compare(*pair, "no_such_measure")


def test_the_same_examples_in_another_order_may_be_paired(pair):
    order = torch.arange(59, -1, -1)
    shuffled = objective(checkpoints()[1], INPUTS[order], TARGETS[order])
    found, other = (sk.compare(pair[0], b, "frobenius_norm") for b in (pair[1], shuffled))
    assert found.value == pytest.approx(other.value, rel=1e-6)
    assert found.probe_error == pytest.approx(other.probe_error, rel=1e-6)


def test_a_random_error_makes_the_difference_random(pair):
    # The second is small enough to be exact; its rounding is no bound of the whole.
    small = objective(checkpoints()[1], params="2.*")
    for one, other in ((pair[0], small), (small, pair[0])):
        found = sk.compare(one, other, "hessian_trace", paired=False)
        assert found.error_kind == "stderr"
        low, high = found.interval(0.999)
        assert high - low > 6 * found.probe_error


def test_the_difference_of_lower_bounds_bounds_nothing_from_one_side(pair):
    found = sk.compare(*pair, "sam_sharpness")
    parts = [sk.score(o, ["sam_sharpness"])[0].estimate for o in pair]
    assert {p.error_kind for p in parts} == {"lower_bound"}
    assert found.error_kind == "bound"
    assert found.probe_error == parts[0].probe_error + parts[1].probe_error
    low, high = found.interval()
    assert low < found.value < high < math.inf


def test_one_checkpoint_against_itself(pair):
    for name in ("hessian_trace", "renyi_sharpness", "gradient_norm", "top_eigenvalues:k=1"):
        found = sk.compare(pair[0], pair[0], name)
        assert found.value == 0
        assert found.data_error in (None, 0)
        low, high = found.interval()
        assert low <= 0 <= high


def test_rounding_of_coarse_dtypes_does_not_cancel():
    first, second = (copy.deepcopy(m).to(torch.bfloat16) for m in checkpoints())
    x = INPUTS.to(torch.bfloat16)
    exact = [objective(copy.deepcopy(m).double(), x.double()) for m in (first, second)]
    truth = [float(sk.hessian(o).to_dense().trace()) for o in exact]
    a, b = objective(first, x), objective(second, x)
    for seed in range(5):
        found = sk.compare(a, b, "hessian_trace", seed=seed, num_groups=0)
        assert found.probe_error > 0.005 * abs(found.details["first"])
        low, high = found.interval(0.99)
        assert low < truth[0] - truth[1] < high
