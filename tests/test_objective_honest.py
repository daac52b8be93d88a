"""What would give another number without a word: found and put right, or refused."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CE,
    RAGGED,
    TOKENS,
    TiedModel,
    X,
    Y,
    batch_norm,
    change_everything,
    direction,
    dropout,
    mlp,
    normal,
    plain,
    relative,
    seeded,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sharpkit as sk
from sharpkit.errors import ObjectiveError

# -- the objective is fixed --------------------------------------------------------------


@pytest.mark.parametrize("build", [mlp, batch_norm, dropout])
@pytest.mark.parametrize("params", ["*", "0.*"])
def test_whatever_training_does_afterwards(build, params):
    model = seeded(build)
    objective = sk.Objective(model, CE, RAGGED, params, memory_budget=0)
    v = direction(objective)
    before = [float(objective.value()), objective.gradient(), objective.hvp(v)]
    change_everything(model)
    assert float(objective.value()) == before[0]
    assert torch.equal(objective.gradient(), before[1])
    assert torch.equal(objective.hvp(v), before[2])
    assert all(module.training for module in model.modules())


def test_frozen_parameters_are_copied_too():
    model = seeded(mlp)
    model[0].requires_grad_(False)
    objective = sk.Objective(model, CE, RAGGED)
    before = objective.gradient()
    change_everything(model)
    assert torch.equal(objective.gradient(), before)


def test_the_criterion_and_the_data_are_copied():
    weight, x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), X.clone()
    objective = sk.Objective(seeded(mlp), nn.CrossEntropyLoss(weight=weight), [(x, Y)])
    before = objective.gradient()
    weight.copy_(torch.tensor([5.0, 1.0, 1.0]))
    x.zero_()
    assert torch.equal(objective.gradient(), before)


class OneBuffer:
    """A loader that fills the same tensors again and again."""

    def __init__(self):
        self.x, self.y = torch.empty(4, 4, dtype=torch.float64), torch.empty(4, dtype=torch.long)

    def __iter__(self):
        for i in (0, 4):
            self.x.numpy()[:] = X[i : i + 4].numpy()  # autograd does not see this
            self.y.copy_(Y[i : i + 4])
            yield self.x, self.y


@pytest.mark.parametrize("mode", ["auto", "kept", "streamed"])
@pytest.mark.parametrize("budget", [None, 0])
def test_loaders_that_reuse_their_memory(mode, budget):
    objective = sk.Objective(seeded(mlp), CE, OneBuffer(), hvp_mode=mode, memory_budget=budget)
    whole = sk.Objective(seeded(mlp), CE, [(X[:8], Y[:8])])
    v = direction(whole)
    assert relative(objective.gradient(), whole.gradient()) < 1e-12
    assert relative(objective.hvp(v), whole.hvp(v)) < 1e-12


class AnyOrder:
    """The same batches, in another order in every pass, from a state that nobody knows."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        batches = list(zip(X.split(2), Y.split(2), strict=True))
        return iter(batches[self.passes % 5 :] + batches[: self.passes % 5])


def part_of_the_graphs(data):
    probe = sk.Objective(seeded(mlp), CE, list(zip(X.split(2), Y.split(2), strict=True)))
    probe.hvp(probe.theta)
    budget = int(2.2 * (200 + max(kept.size for kept in probe._hessian._kept)))
    objective = sk.Objective(seeded(mlp), CE, data, memory_budget=budget)
    objective._evaluator._data, objective._evaluator.cached = data, False
    return objective


def test_another_order_in_every_pass_is_noticed():
    objective, v = part_of_the_graphs(AnyOrder()), direction(plain())
    with pytest.warns(sk.SharpkitWarning, match="another order in every pass"):
        Hv = objective.hvp(v)
    assert relative(Hv, plain().hvp(v)) < 1e-12
    assert relative(objective.hvp(v), plain().hvp(v)) < 1e-12
    assert objective.hvp_mode == "streamed"


def test_a_loader_with_a_generator_of_its_own():
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True, generator=generator)
    state = generator.get_state()
    objective, v = part_of_the_graphs(loader), direction(plain())
    assert relative(objective.hvp(v), plain().hvp(v)) < 1e-12
    assert objective.hvp_mode == "kept 2 batches, streamed the rest"
    assert torch.equal(generator.get_state(), state)


class SwitchesOff:
    """A loader that makes its batches without gradients, and yields inside."""

    def __init__(self, context):
        self.context = context

    def __iter__(self):
        with self.context():
            yield from RAGGED


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_loaders_that_switch_gradients_off(context):
    objective = sk.Objective(seeded(mlp), CE, SwitchesOff(context), memory_budget=0)
    v = direction(objective)
    assert relative(objective.hvp(v), plain().hvp(v)) < 1e-12
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_autocast_around_the_call_does_not_reach_in():
    objective = sk.Objective(seeded(mlp).float(), CE, [(X.float(), Y)])
    before = objective.gradient()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective.gradient(), before)
        inside = sk.Objective(seeded(mlp).float(), CE, [(X.float(), Y)])
    assert torch.equal(inside.gradient(), before)


# -- what the loss divides by ------------------------------------------------------------


def total(z, y):
    return F.cross_entropy(z, y, reduction="sum")


@pytest.mark.parametrize(
    "cuts", [(1, 10), (1,) * 11, (8, 3)], ids=["first of one", "all of one", "ragged"]
)
def test_sums_are_refused_for_batches_of_any_size(cuts):
    sequences = list(zip(TOKENS.split(cuts), TOKENS.split(cuts), strict=True))
    with pytest.raises(ObjectiveError, match="halves of a batch add up"):
        sk.Objective(seeded(TiedModel), total, sequences)


def test_sums_are_refused_in_bfloat16():
    with pytest.raises(ObjectiveError, match="halves of a batch add up"):
        sk.Objective(seeded(mlp).bfloat16(), total, [(X.bfloat16(), Y)])


def test_noise_is_refused_in_bfloat16():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return self.body(x) + 0.5 * torch.randn(len(x), 3).to(x.dtype)

    with pytest.raises(ObjectiveError, match="the same loss from the same batch twice"):
        sk.Objective(seeded(Noisy).bfloat16(), CE, [(X.bfloat16(), Y)])


def test_a_hidden_ignore_index_shows_where_the_padding_is():
    targets = TOKENS.clone().clamp(min=1)
    targets[9:, 2:] = 0  # only the second batch is padded, and only in its second half

    def padded(z, y):
        return F.cross_entropy(z, y, ignore_index=0)

    batches = [(TOKENS[:8], targets[:8]), (TOKENS[8:], targets[8:])]
    with pytest.raises(ObjectiveError, match="halves of a batch add up"):
        sk.Objective(seeded(TiedModel), padded, batches)
    known = sk.Objective(
        seeded(TiedModel), padded, batches, num_terms=lambda z, y: int((y != 0).sum())
    )
    whole = padded(seeded(TiedModel)(TOKENS), targets)
    assert float(known.value()) == pytest.approx(float(whole.detach()))


@pytest.mark.parametrize("cuts", [(8, 3), (1,) * 11])
def test_a_batch_loss_that_returns_the_mean_is_refused(cuts):
    def mean(model, batch):
        x, y = batch
        return F.cross_entropy(model(x), y), y.numel()

    batches = list(zip(TOKENS.split(cuts), TOKENS.split(cuts), strict=True))
    with pytest.raises(ObjectiveError, match="looks like their mean"):
        sk.Objective.from_batch_loss(seeded(TiedModel), mean, batches)


def test_a_batch_loss_of_one_term_a_batch_is_taken_as_it_is():
    def per_batch(model, batch):
        x, y = batch
        return F.cross_entropy(model(x), y), 1

    objective = sk.Objective.from_batch_loss(seeded(mlp), per_batch, RAGGED)
    means = [F.cross_entropy(seeded(mlp)(x), y) for x, y in RAGGED]
    assert float(objective.value()) == pytest.approx(float(sum(means).detach() / 2))


def test_a_loss_at_the_rounding_level_is_no_reason_to_refuse():
    model = seeded(mlp).float()
    with torch.no_grad():
        for p in model[4].parameters():
            p.mul_(60)
    x = X.float()
    y = model(x).argmax(dim=1).detach()
    objective = sk.Objective(
        model, lambda z, y: F.cross_entropy(z, y), [(x[:8], y[:8]), (x[8:], y[8:])]
    )
    assert 0 <= float(objective.value()) < 0.1


# -- how batches are cut -----------------------------------------------------------------


def test_a_shared_tensor_as_long_as_the_last_batch_is_not_cut():
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def scaled(model, batch):
        z = model(batch["x"]) * batch["scale"]
        return F.cross_entropy(z, batch["y"], reduction="sum"), len(batch["y"])

    batches = [{"scale": scale, "x": x, "y": y} for x, y in RAGGED]
    objective = sk.Objective.from_batch_loss(seeded(mlp), scaled, batches)
    assert objective.num_examples == 11
    rows = objective.per_example_gradients()
    assert rows.shape == (11, objective.space.dim)
    assert relative(rows.mean(dim=0), objective.gradient()) < 1e-12


class Opaque:
    def __init__(self, x, y):
        self.x, self.y = x, y


def opaque_loss(model, batch):
    return F.cross_entropy(model(batch.x), batch.y, reduction="sum"), len(batch.y)


def test_objects_that_cannot_be_cut_have_no_example_gradients():
    objective = sk.Objective.from_batch_loss(seeded(mlp), opaque_loss, [Opaque(X, Y)])
    v = direction(objective)
    assert relative(objective.hvp(v), plain().hvp(v)) < 1e-12
    with pytest.raises(ObjectiveError, match="sum over examples"):
        objective.fisher_vp(v)


def test_objects_count_as_memory_and_are_compared_between_passes():
    class Random:
        def __iter__(self):
            return iter([Opaque(X + torch.rand(()), Y)])

    with pytest.raises(ObjectiveError, match="Two passes differ"):
        sk.Objective.from_batch_loss(seeded(mlp), opaque_loss, Random())
    large = sk.Objective.from_batch_loss(
        seeded(mlp), opaque_loss, [Opaque(X, Y)], memory_budget=100
    )
    assert not large._evaluator.cached


def test_dataclasses_are_batches():
    @dataclasses.dataclass(frozen=True)
    class Batch:
        x: torch.Tensor
        y: torch.Tensor

    objective = sk.Objective.from_batch_loss(
        seeded(mlp).float(), opaque_loss, [Batch(x, y) for x, y in RAGGED], dtype=torch.float64
    )
    assert objective.num_examples == 11
    assert objective.per_example_gradients().shape == (11, objective.space.dim)


def test_texts_belong_to_their_examples():
    words = [f"text {i}" for i in range(11)]

    def batches(texts, *edges):
        return [
            {"text": texts[i:j], "x": X[i:j], "y": Y[i:j]} for i, j in itertools.pairwise(edges)
        ]

    def loss(model, batch):
        assert len(batch["text"]) == len(batch["y"])
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"])

    def of(data):
        return sk.Objective.from_batch_loss(seeded(mlp), loss, data)

    assert (
        of(batches(words, 0, 8, 11)).data_fingerprint == of(batches(words, 0, 11)).data_fingerprint
    )
    other = of(batches(words[::-1], 0, 11))
    assert other.data_fingerprint != of(batches(words, 0, 11)).data_fingerprint
    assert len(other.per_example_gradients()) == 11


def test_a_buffer_that_was_written_once_is_put_back():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.writing = mlp(), False
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x):
            if self.writing:
                self.scale += 1
            return self.body(x) * self.scale

    model = seeded(Writes)
    objective = sk.Objective(model, CE, RAGGED)
    before, model.writing = objective.gradient(), True
    with pytest.raises(ObjectiveError, match="It wrote the buffer 'scale'"):
        objective.gradient()
    model.writing = False
    assert torch.equal(objective.gradient(), before)
    assert float(model.scale) == 1


def test_padded_outputs_are_those_of_training():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)
            self.out = nn.Linear(4, 3)

        def forward(self, x, padding):
            return self.out(self.encoder(x, src_key_padding_mask=padding).mean(dim=1))

    padding = torch.zeros(11, 5, dtype=torch.bool)
    padding[1::2, 3:] = True
    objective = sk.Objective(seeded(Padded), CE, [((normal(11, 5, 4), padding), Y)])
    with_gradient = float(objective.value_and_gradient()[0])
    assert float(objective.value()) == pytest.approx(with_gradient, rel=1e-12)


def test_the_fingerprint_sees_what_examples_share():
    def scaled(model, batch):
        z = model(batch["x"]) * batch["scale"]
        return F.cross_entropy(z, batch["y"], reduction="sum"), len(batch["y"])

    def mark(scale, cuts=(8, 3)):
        batches = zip(X.split(cuts), Y.split(cuts), strict=True)
        data = [{"x": x, "y": y, "scale": torch.tensor(scale)} for x, y in batches]
        return sk.Objective.from_batch_loss(seeded(mlp), scaled, data).data_fingerprint

    assert mark(1.0) != mark(2.0)
    assert mark(1.0) == mark(1.0, (4, 4, 3))
