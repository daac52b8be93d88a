"""What cannot be measured is refused in one clear sentence, with what to do."""

import pytest
import torch
import torch.nn.functional as F
from cases import X, Y, mlp, normal, seeded
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import sharpkit as sk
from sharpkit.errors import ObjectiveError, ShapeError

CE = nn.CrossEntropyLoss()
BATCHES = [(X[:8], Y[:8]), (X[8:], Y[8:])]


def build(model=None, loss=CE, data=BATCHES, params="*", **options):
    return sk.Objective(model if model is not None else seeded(mlp), loss, data, params, **options)


def batch_loss_of(function):
    return sk.Objective.from_batch_loss(seeded(mlp), function, BATCHES)


class Augmented(Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, i):
        return X[i] + torch.randn(4).double(), Y[i]


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x) + torch.randn(3)


class Counting(nn.Module):
    """Writes a buffer in every forward pass, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.body(x)


def dropout():
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))


def norm(**options):
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, **options), nn.Linear(6, 3))


def frozen():
    return seeded(mlp).requires_grad_(False)


def nan_weight():
    model = seeded(mlp)
    model[0].weight.data[0, 0] = float("nan")
    return model


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.complex64))


REFUSED = {
    "training mode, dropout": (lambda: build(seeded(dropout).train()), "Call model.eval()"),
    "training mode, batch norm": (
        lambda: build(seeded(norm).train()),
        "1 (BatchNorm1d) is in training",
    ),
    "batch norm without statistics": (
        lambda: build(seeded(lambda: norm(track_running_stats=False))),
        "no layer mixes examples",
    ),
    "noise in evaluation mode": (
        lambda: build(seeded(Noisy)),
        "the same loss from the same batch twice",
    ),
    "buffers written": (lambda: build(seeded(Counting)), "It wrote the buffer 'calls'"),
    "not a module": (lambda: build("model.pt"), "Got str"),
    "no parameters": (lambda: build(nn.ReLU()), "ReLU has none"),
    "all frozen": (lambda: build(frozen()), "requires_grad_(True)"),
    "complex": (lambda: build(Complex()), "'w' is torch.complex64"),
    "float16": (lambda: build(seeded(mlp).half()), "Pass dtype=torch.float32"),
    "lazy": (lambda: build(nn.LazyLinear(3)), "is lazy"),
    "nothing selected": (lambda: build(params="head.*"), "It matches none of the 6"),
    "one glob of two": (lambda: build(params=["0.*", "7.*"]), "params='7.*'"),
    "empty selection": (lambda: build(params=[]), "Got an empty selection"),
    "false function": (lambda: build(params=lambda name: False), "selects none"),
    "selection of another kind": (lambda: build(params=[3]), "Got [3]"),
    "generator": (lambda: build(data=(b for b in BATCHES)), "Got a one-shot iterator (generator)"),
    "iterator": (lambda: build(data=iter(BATCHES)), "Got a one-shot iterator (list_iterator)"),
    "no batches": (lambda: build(data=[]), "Got none"),
    "one tensor": (lambda: build(data=X), "Got one tensor of shape (11, 4)"),
    "a number": (lambda: build(data=3), "Got int"),
    "augmentation": (
        lambda: build(data=DataLoader(Augmented(), batch_size=4)),
        "Two passes differ",
    ),
    "shuffled and dropped": (
        lambda: build(
            data=DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, drop_last=True)
        ),
        "drop_last with shuffling",
    ),
    "triples": (lambda: build(data=[(X, Y, Y)]), "Got a tuple of length 3"),
    "mapping without targets": (lambda: build(data=[{"x": X}]), "Got the keys x"),
    "shapes that do not fit": (lambda: build(data=[(X[:, :3], Y)]), "(11, 3) float64, (11,) int64"),
    "dtypes that do not fit": (lambda: build(data=[(X.float(), Y)]), "failed on a batch"),
    "sum reduction": (
        lambda: build(loss=nn.CrossEntropyLoss(reduction="sum")),
        "Got reduction='sum'",
    ),
    "no reduction": (
        lambda: build(loss=nn.CrossEntropyLoss(reduction="none")),
        "Got reduction='none'",
    ),
    "sum in a function": (
        lambda: build(loss=lambda z, y: F.cross_entropy(z, y, reduction="sum")),
        "halves of a batch add up",
    ),
    "a loss per example": (
        lambda: build(loss=lambda z, y: F.cross_entropy(z, y, reduction="none")),
        "to be one number. Got (8,)",
    ),
    "a class as loss": (lambda: build(loss=nn.CrossEntropyLoss), "Write CrossEntropyLoss()"),
    "no loss": (lambda: build(loss=None), "Got NoneType"),
    "nan": (lambda: build(nan_weight()), "finite loss. It is nan on batch 0"),
    "all masked": (lambda: build(data=[(X, torch.full((11,), -100))]), "All targets are masked"),
    "bare tensor": (lambda: batch_loss_of(lambda m, b: m(b[0]).sum()), "Got Tensor"),
    "negative count": (lambda: batch_loss_of(lambda m, b: (m(b[0]).sum(), -1)), "Got -1"),
    "batch loss not callable": (lambda: batch_loss_of(3), "Got int"),
    "unknown mode": (lambda: build(hvp_mode="fast"), "Got 'fast'"),
    "integer dtype": (lambda: build(dtype=torch.int64), "Got torch.int64"),
    "negative budget": (lambda: build(memory_budget=-1), "Got -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_clear_sentence(case):
    attempt, message = REFUSED[case]
    with pytest.raises(ObjectiveError) as caught:
        attempt()
    text = str(caught.value)
    assert message in text
    assert text.endswith((".", ").", "nothing."))
    assert "\n" not in text


def test_a_plain_network_in_training_mode_is_fine():
    model = seeded(mlp).train()
    objective = build(model)
    assert model.training
    assert torch.isfinite(objective.gradient()).all()


@pytest.mark.parametrize("name", ["hvp", "ggnvp", "fisher_vp"])
@pytest.mark.parametrize("shape", [(), (3,), (68,), (3, 2), (2, 2, 2)])
def test_vectors_of_another_shape(name, shape):
    objective = build()
    assert objective.space.dim not in (3, 68)
    with pytest.raises(ShapeError, match=r"Expected vectors of shape"):
        getattr(objective, name)(torch.zeros(shape, dtype=torch.float64))


def test_points_of_another_shape():
    with pytest.raises(ShapeError, match=r"Expected a vector of shape \(83,\)"):
        build().at(torch.zeros(3))


def test_ggn_needs_outputs_and_fisher_needs_examples():
    def contrastive(model, batch):  # every example against every other
        z = model(batch[0])
        return torch.logsumexp((z @ z.T).flatten(), 0), 1

    objective = sk.Objective.from_batch_loss(seeded(mlp), contrastive, BATCHES)
    v = objective.theta
    with pytest.raises(ObjectiveError, match="Expected an objective with a criterion"):
        objective.ggnvp(v)
    with pytest.raises(ObjectiveError, match="sum over examples"):
        objective.per_example_gradients()
    H = sk.hessian(objective).to_dense()  # the batches are part of this loss, and are kept whole
    assert torch.allclose(H, H.T)


def test_check_can_be_turned_off_for_slow_data():
    class Once:
        passes = 0

        def __iter__(self):
            Once.passes += 1
            return iter(BATCHES)

    build(data=Once(), check=False)
    assert Once.passes == 1
    build(data=Once())
    assert Once.passes == 3


def test_parameter_space_refuses_what_does_not_fit():
    space = build().space
    parts = space.unflatten(torch.arange(83.0))
    assert torch.equal(space.flatten(parts), torch.arange(83.0).double())
    with pytest.raises(ShapeError, match=r"Missing: \['0\.bias'\]"):
        space.flatten({n: t for n, t in parts.items() if n != "0.bias"})
    with pytest.raises(ShapeError, match=r"Expected '0\.bias' of shape"):
        space.flatten({**parts, "0.bias": normal(2)})
