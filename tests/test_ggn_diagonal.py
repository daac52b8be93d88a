"""The exact diagonal of the GGN, against dense matrices in float64, and what asks for it."""

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CASES,
    CE,
    RAGGED,
    TOKENS,
    TiedModel,
    X,
    Y,
    classes,
    masked_tokens,
    mlp,
    normal,
    relative,
    seeded,
)
from torch import nn

import sharpkit as sk
from sharpkit.errors import ObjectiveError
from sharpkit.objective import ggn_diagonal as module

WEIGHTS = torch.tensor([0.2, 1, 3, 1, 1, 0.5, 1], dtype=torch.float64)
PROBABILITIES = torch.softmax(normal(11, 7, 5, seed=6), dim=1)


def check(objective, by_vmap=True):
    exact = sk.ggn(objective).to_dense().diagonal()
    found = objective.ggn_diagonal()
    assert objective._through.by_vmap is by_vmap
    assert float((found - exact).abs().max()) < 1e-10 * float(exact.abs().max())
    objective._through.by_vmap = False
    assert relative(objective.ggn_diagonal(), exact) < 1e-10
    return found


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_it_is_the_diagonal_of_the_dense_matrix(case):
    found = check(case.objective())
    assert relative(case.objective(3, 1, 7).ggn_diagonal(), found) < 1e-12  # any batches


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2), masked_tokens()),
        (nn.CrossEntropyLoss(ignore_index=2), classes(7, 11, 5)),
        (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1), PROBABILITIES),
        (nn.MSELoss(), normal(11, 7, 5, seed=8)),
        (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS[:, None]), PROBABILITIES),
        (nn.HuberLoss(), normal(11, 7, 5, seed=8)),  # not known: decomposed
    ],
)
def test_several_loss_terms_an_example(criterion, targets):
    check(
        sk.Objective(
            seeded(TiedModel), criterion, [(TOKENS[:8], targets[:8]), (TOKENS[8:], targets[8:])]
        )
    )


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (nn.PoissonNLLLoss(), classes(4, 11, 3).double()),
        (lambda z, y: F.cross_entropy(z, y), Y),
        (lambda z, y: torch.logsumexp(3 * z, dim=1).mean() + 0 * y.sum(), Y),
    ],
)
def test_other_convex_criteria_are_decomposed(criterion, targets):
    check(sk.Objective(seeded(mlp), criterion, [(X, targets)]))


def test_outputs_without_an_axis_of_their_own():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(outputs=1)

        def forward(self, x):
            return self.body(x)[:, 0]

    labels = classes(2, 11).double()
    check(sk.Objective(seeded(Flat), nn.BCEWithLogitsLoss(), [(X, labels)]))
    check(sk.Objective(seeded(Flat), lambda z, y: F.softplus(z - y).mean(), [(X, labels)]))


def test_losses_that_count_their_own_terms():
    check(sk.Objective(seeded(mlp), CE, RAGGED, num_terms=lambda z, _: 2 * len(z)))


def test_one_example_without_a_batch_is_looped():
    check(sk.Objective(seeded(mlp), CE, [(X[0], Y[0])]), by_vmap=False)


@pytest.mark.parametrize("budget", [0, 30_000])
def test_chunks_of_any_size_are_the_same(budget):
    whole = sk.Objective(seeded(mlp), CE, RAGGED).ggn_diagonal()
    cut = sk.Objective(seeded(mlp), CE, RAGGED, memory_budget=budget)
    assert relative(cut.ggn_diagonal(), whole) < 1e-12
    before = cut.cost.gradients
    cut.ggn_diagonal()
    assert cut.cost.gradients - before == 3  # one for each class


class Wrong(torch.autograd.Function):
    """Another function of all examples together than of each alone."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad

    @staticmethod
    def vmap(info, in_dims, x):
        return 2 * x, in_dims[0]


class Asks(nn.Module):
    """A value decides what is computed, which torch.func does not trace."""

    def forward(self, x):
        return x if float(x.detach().abs().sum()) > 0 else 2 * x


class Applies(nn.Module):
    def forward(self, x):
        return torch.tanh(Wrong.apply(x))


@pytest.mark.parametrize("tail", [Asks, Applies])
def test_what_torch_func_cannot_or_does_wrong_is_looped(tail):
    check(sk.Objective(seeded(lambda: nn.Sequential(mlp(), tail())), CE, RAGGED), by_vmap=False)


def test_batches_of_texts_are_looped():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, texts, x):
            return self.body(x + torch.tensor([[len(t)] for t in texts]).to(x))

    batch = {"texts": ["a" * (i % 3) for i in range(11)], "x": X, "labels": Y}
    check(sk.Objective(seeded(Reads), CE, [batch]), by_vmap=False)


def test_saturated_outputs_keep_their_digits():
    def head(scale):
        model = nn.Linear(3, 3, bias=False).double()
        model.weight.data = scale * torch.eye(3, dtype=torch.float64)
        return model

    x, y = torch.eye(3, dtype=torch.float64), torch.arange(3)
    found = sk.Objective(head(60.0), CE, [(x, y)]).ggn_diagonal()
    p = torch.exp(torch.tensor(-60.0, dtype=torch.float64))
    assert float(found[0] / (2 * p / 3)) == pytest.approx(1, rel=1e-10)


def test_in_bfloat16_and_float32():
    full = sk.Objective(seeded(mlp), CE, RAGGED).ggn_diagonal()
    single = sk.Objective(seeded(mlp).float(), CE, [(X.float(), Y)]).ggn_diagonal()
    half = sk.Objective(seeded(mlp).bfloat16(), CE, [(X.bfloat16(), Y)]).ggn_diagonal()
    assert single.dtype == half.dtype == torch.float32
    assert relative(single.double(), full) < 1e-5
    assert relative(half.double(), full) < 0.05


def test_what_it_refuses(monkeypatch):
    monkeypatch.setattr(module, "DENSE", 2)
    odd = sk.Objective(seeded(mlp), nn.HuberLoss(), [(X, normal(11, 3, seed=5))])
    with pytest.raises(ObjectiveError, match=r"at most 2 outputs of an example.* Got 3\."):
        odd.ggn_diagonal()
    batch_loss = sk.Objective.from_batch_loss(
        seeded(mlp), lambda m, b: (m(b[0]).square().sum(), len(b[0])), RAGGED
    )
    with pytest.raises(ObjectiveError, match="Expected an objective with a criterion"):
        batch_loss.ggn_diagonal()
