"""Hessians over the outputs in closed form, what is refused, and Fisher matrices through them."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CASES,
    CE,
    CLASS_WEIGHTS,
    RAGGED,
    TOKENS,
    TiedModel,
    X,
    Y,
    classes,
    direction,
    masked_tokens,
    mlp,
    normal,
    plain,
    relative,
    seeded,
)
from torch import nn

import sharpkit as sk
from sharpkit.errors import ObjectiveError, SettingsError
from sharpkit.objective.losses import CriterionLoss
from sharpkit.objective.output_hessians import closed_form
from sharpkit.testing import check_operator

POSITIVE = torch.tensor([0.3, 4.0], dtype=torch.float64)
PROBABILITIES = torch.softmax(normal(6, 3, seed=6), dim=1)
POSITIONS = torch.softmax(normal(2, 3, 2, 2, seed=6), dim=1)


def masked(*shape):
    targets = classes(3, *shape)
    targets.view(-1)[::3] = 1  # the ignored class is a real one here
    return targets


def forms():
    """Yield criterion, outputs and targets."""
    for weight, smoothing in itertools.product((None, CLASS_WEIGHTS), (0.0, 0.3)):
        options = {"weight": weight, "label_smoothing": smoothing}
        for ignored in (-100, 1):
            ce = nn.CrossEntropyLoss(**options, ignore_index=ignored)
            yield ce, normal(6, 3), masked(6)
            yield ce, normal(2, 3, 2, 2), masked(2, 2, 2)
        yield nn.CrossEntropyLoss(**options), normal(6, 3), PROBABILITIES
        yield nn.CrossEntropyLoss(**options), normal(6, 3), 2 * PROBABILITIES  # any mass
        yield nn.CrossEntropyLoss(**options), normal(2, 3, 2, 2), POSITIONS
        yield nn.CrossEntropyLoss(**options), normal(3), torch.tensor(2)
        yield nn.CrossEntropyLoss(**options), normal(3), PROBABILITIES[0]
    yield F.cross_entropy, normal(6, 3), classes(3, 6)
    for square in (nn.MSELoss(), F.mse_loss):
        yield square, normal(6, 2), normal(6, 2, seed=9)
        yield square, normal(6), normal(6, seed=9)
    binary = classes(2, 6, 2).double()
    for weight, positive in itertools.product(
        (None, normal(6, 2).abs(), POSITIVE), (None, POSITIVE)
    ):
        yield nn.BCEWithLogitsLoss(weight, pos_weight=positive), normal(6, 2), binary
    yield F.binary_cross_entropy_with_logits, normal(6, 2), torch.rand_like(binary)


FORMS = list(forms())


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_closed_forms_are_those_of_autograd(number):
    criterion, z, y = FORMS[number]
    loss = CriterionLoss(criterion)
    H = torch.autograd.functional.hessian(lambda z: loss.terms(z, y)[0], z)
    H = H.reshape(z.numel(), z.numel())
    known = closed_form(loss, z, y, 2.5)
    columns = [known.product(e.reshape(z.shape)).reshape(-1) for e in torch.eye(z.numel()).double()]
    assert relative(torch.stack(columns), H / 2.5) < 1e-12
    draws = z.numel() // known.numbers_a_draw
    uniform = torch.rand(4000, draws, generator=torch.Generator().manual_seed(0)).double()
    r = torch.stack([known.slope(u).reshape(-1) for u in uniform])
    products = r[:, :, None] * r[:, None, :]
    error = products.std(dim=0) / len(r) ** 0.5
    assert float(((products.mean(dim=0) - H / 2.5).abs() - 6 * error).max()) < 1e-3
    assert float((r.mean(dim=0).abs() - 6 * r.std(dim=0) / len(r) ** 0.5).max()) < 1e-12


def test_what_has_no_closed_form():
    def none(criterion, z, y):
        return closed_form(CriterionLoss(criterion), z, y, 1.0) is None

    class Own(nn.CrossEntropyLoss):
        def forward(self, z, y):
            return super().forward(z / 2, y)

    assert none(Own(), X, Y)
    assert none(nn.MSELoss(), normal(6, 2), normal(6, 1))  # broadcast
    assert none(lambda z, y: F.cross_entropy(z, y), X, Y)
    assert none(nn.L1Loss(), X, X)
    assert none(CE, X, [1, 2])
    assert none(CE, X, classes(2, 11, 4))


def test_a_divisor_of_ones_own_scales_the_ggn():
    halved = sk.Objective(seeded(mlp), CE, RAGGED, num_terms=lambda z, y: len(y))
    assert relative(halved.ggnvp(direction(halved)), plain().ggnvp(direction(halved))) < 1e-12
    model, y = seeded(lambda: mlp(outputs=2)), normal(11, 2, seed=5)
    twice = nn.MSELoss()
    by_example = sk.Objective(
        model, lambda z, t: 1 * twice(z, t), [(X, y)], num_terms=lambda z, t: len(t)
    )
    known = sk.Objective(model, twice, [(X, y)], num_terms=lambda z, t: len(t))
    v = direction(known)
    assert relative(known.ggnvp(v), by_example.ggnvp(v)) < 1e-12
    assert relative(known.mc_fisher_vp(v, num_samples=3000), known.ggnvp(v)) < 0.1


# -- what is refused ---------------------------------------------------------------------


def odd(criterion, targets=Y, outputs=3, tail=None):
    model = seeded(lambda: nn.Sequential(mlp(outputs=outputs), *([tail] if tail else [])))
    return sk.Objective(model, criterion, [(X[:8], targets[:8]), (X[8:], targets[8:])])


@pytest.mark.parametrize("name", ["ggnvp", "mc_fisher_vp"])
def test_criteria_that_are_not_convex(name):
    def saturating(z, y):
        return ((torch.sigmoid(z) - y) ** 2).mean(dim=1).mean()

    def wide(z, y):
        return -(z**2).sum(dim=1).mean()

    def one_direction(z, y):
        return (z[:, 0] ** 2 - 1e-3 * z[:, 1] ** 2).mean()

    for criterion, outputs in ((saturating, 2), (wide, 300), (wide, 2), (one_direction, 2)):
        objective = odd(criterion, normal(11, outputs, seed=5), outputs)
        with pytest.raises(ObjectiveError, match="convex in the network's outputs"):
            getattr(objective, name)(direction(objective))
        assert torch.isfinite(objective.hvp(direction(objective))).all()


def test_criteria_without_curvature():
    log_softmax = odd(nn.NLLLoss(), tail=nn.LogSoftmax(dim=1))
    with pytest.raises(ObjectiveError, match=r"NLLLoss is linear in them\. Return logits"):
        log_softmax.ggnvp(direction(log_softmax))
    absolute = odd(nn.L1Loss(), normal(11, 3, seed=5))
    with pytest.raises(ObjectiveError, match="L1Loss is linear"):
        absolute.ggnvp(direction(absolute))


def test_criteria_that_are_convex_but_unknown():
    smooth = odd(nn.SmoothL1Loss(beta=1e-9), normal(11, 3, seed=5))  # all in the flat part
    assert not bool(smooth.ggnvp(direction(smooth)).any())
    for criterion, targets in (
        (nn.PoissonNLLLoss(), classes(4, 11, 3).double()),
        (nn.HuberLoss(), normal(11, 3, seed=5)),
        (lambda z, y: F.cross_entropy(1e6 * z, y), Y),  # saturated
        (lambda z, y: F.cross_entropy(z, y), Y),
    ):
        objective = odd(criterion, targets)
        assert bool(torch.isfinite(objective.ggnvp(direction(objective))).all())


def test_a_selection_that_works_says_nothing_of_the_rest():
    from test_objective_derivatives import ForwardCut, pair

    objective, right = pair(ForwardCut.apply)
    head = objective.restrict("b.*")
    v = direction(head)
    assert relative(head.ggnvp(v), right.restrict("b.*").ggnvp(v)) < 1e-12
    with pytest.raises(ObjectiveError, match="as the GGN needs it"):
        objective.ggnvp(direction(objective))


# -- what is kept ------------------------------------------------------------------------


def test_linearised_outputs_are_kept_within_the_budget():
    batches = [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])]
    calls = []
    model = seeded(mlp)
    model.register_forward_hook(lambda *_: calls.append(1))
    free = sk.Objective(model, CE, batches)
    v = direction(free)
    first = free.ggnvp(v)
    size = free._through.held
    calls.clear()
    assert torch.equal(free.ggnvp(v), first)
    assert not calls  # nothing is run again
    free.release()
    assert free._through.held == 0
    for budget, kept in ((0, 0), (int(0.8 * size), 2), (int(1.01 * size), 3)):
        some = sk.Objective(model, CE, batches, memory_budget=budget)
        some._evaluator._data, some._evaluator.cached = batches, True  # whatever they take
        for _ in range(3):
            assert relative(some.ggnvp(v), first) < 1e-12
            assert relative(some.fisher_vp(v), free.fisher_vp(v)) < 1e-12
            assert relative(some.mc_fisher_vp(v), free.mc_fisher_vp(v)) < 1e-12
        assert len(some._through._kept) == kept
        assert relative(some.hvp(v), free.hvp(v)) < 1e-12
    moved = free.at(1.1 * free.theta)
    assert relative(moved.ggnvp(v), first) > 1e-3


def test_one_budget_is_for_all_graphs_of_a_point():
    wide = sk.Objective(seeded(mlp), CE, RAGGED)
    v = direction(wide)
    wide.ggnvp(v), wide.hvp(v)
    budget = int(1.1 * max(wide._through.held, wide._hessian.held))
    for first, second in (("ggnvp", "hvp"), ("hvp", "ggnvp")):
        objective = sk.Objective(seeded(mlp), CE, RAGGED, memory_budget=budget)
        objective._evaluator._data, objective._evaluator.cached = RAGGED, True
        getattr(objective, first)(v)
        assert relative(getattr(objective, second)(v), getattr(wide, second)(v)) < 1e-12
        held = objective._through.held, objective._hessian.held
        assert held[first == "hvp"] == pytest.approx(
            (wide._through, wide._hessian)[first == "hvp"].held
        )
        assert sum(held) <= budget


def test_memory_that_runs_out_between_products_changes_nothing():
    objective = sk.Objective(seeded(mlp), CE, [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])])
    v = direction(objective)
    ggn, drawn = objective.ggnvp(v), objective.mc_fisher_vp(v, seed=3)
    assert objective._through.give_up()
    assert not objective._through.give_up()
    objective._evaluator.micro_batch = 2
    for _ in range(2):
        assert relative(objective.ggnvp(v), ggn) < 1e-12
        assert relative(objective.mc_fisher_vp(v, seed=3), drawn) < 1e-10


# -- the empirical Fisher ----------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_the_empirical_fisher_by_rows_is_that_of_example_gradients(case):
    objective = case.objective()
    g = objective.per_example_gradients()
    before = objective.cost.gradients
    check_operator(sk.empirical_fisher(objective), g.T @ g / len(g))
    assert objective._through.by_rows is True
    assert objective.cost.gradients == before  # no loop


class Mixing(nn.Module):
    """The value of each row is its own, its derivative is not."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        z = self.body(x)
        mean = z.mean(dim=0, keepdim=True)
        return z + mean - mean.detach()


def test_a_network_that_mixes_examples_takes_the_loop():
    objective = sk.Objective(seeded(Mixing), CE, RAGGED)
    g = objective.per_example_gradients()
    check_operator(sk.empirical_fisher(objective), g.T @ g / 11)
    assert objective._through.by_rows is False


def test_the_fisher_of_a_batch_loss_takes_the_loop():
    def batch_loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    objective = sk.Objective.from_batch_loss(seeded(mlp), batch_loss, RAGGED)
    v = direction(objective)
    assert relative(objective.fisher_vp(v), plain().fisher_vp(v)) < 1e-12


# -- the Monte Carlo Fisher --------------------------------------------------------------


DRAWN = [c for c in CASES if not c.name.startswith("attention")]


@pytest.mark.parametrize("case", DRAWN, ids=[c.name for c in DRAWN])
def test_the_mean_over_draws_is_the_ggn(case):
    objective = case.objective()
    V = normal(objective.space.dim, 2, seed=11)
    u = normal(objective.space.dim, seed=12)
    n = 300
    F_V = torch.stack([objective.mc_fisher_vp(V, seed=seed) for seed in range(n)])
    forms = torch.cat([u @ F_V, (V[:, 0] @ F_V)[:, :1]], dim=1)
    GV = objective.ggnvp(V)
    exact = torch.cat([u @ GV, (V[:, 0] @ GV)[:1]])
    deviation = (forms.mean(dim=0) - exact) / (forms.std(dim=0) / n**0.5)
    assert float(deviation.abs().max()) < 5
    assert float((forms.std(dim=0) / n**0.5)[2] / exact[2]) < 0.2  # it says something


def test_one_seed_is_one_matrix_however_the_batches_are():
    whole = [sk.Objective(seeded(TiedModel), CE, [(TOKENS, masked_tokens())])]
    parts = [(TOKENS[a:b], masked_tokens()[a:b]) for a, b in ((0, 5), (5, 6), (6, 11))]
    whole.append(sk.Objective(seeded(TiedModel), CE, parts))
    whole.append(sk.Objective(seeded(TiedModel), CE, parts, hvp_mode="streamed"))
    whole.append(copy.copy(whole[0]).at(whole[0].theta))
    whole[3]._evaluator.micro_batch = 3
    matrices = [sk.mc_fisher(o, num_samples=2, seed=5).to_dense() for o in whole]
    check_operator(sk.mc_fisher(whole[0], num_samples=2, seed=5), matrices[0])
    for matrix in matrices[1:]:
        assert relative(matrix, matrices[0]) < 1e-10
    values = torch.linalg.eigvalsh(matrices[0])
    assert float(values[0]) > -1e-12 * float(values[-1])
    assert int((values > 1e-10 * values[-1]).sum()) <= 2 * 11  # one for each example and draw
    other = sk.mc_fisher(whole[0], num_samples=2, seed=6).to_dense()
    assert relative(other, matrices[0]) > 0.1
    one, two = (sk.mc_fisher(whole[0], num_samples=n, seed=5).to_dense() for n in (1, 2))
    assert relative(one, two) > 0.1


def test_terms_of_one_example_are_drawn_together():
    # The outer product of an example's summed slope, of which only the mean is diagonal.
    objective = sk.Objective(seeded(TiedModel), CE, [(TOKENS[:1], classes(7, 1, 5))])
    values = torch.linalg.eigvalsh(sk.mc_fisher(objective).to_dense())
    assert int((values > 1e-10 * values[-1]).sum()) == 1


def test_one_example_without_a_batch():
    objective = sk.Objective(seeded(mlp), CE, [(X[0], Y[0])])
    v = direction(objective)
    mean = sum(objective.mc_fisher_vp(v, seed=s) for s in range(400)) / 400
    assert relative(mean, objective.ggnvp(v)) < 0.25


def test_data_in_another_order_have_no_fixed_draws():
    equal = [(X[:4], Y[:4]), (X[4:8], Y[4:8])]
    objective = sk.Objective(seeded(mlp), CE, equal, memory_budget=0)
    v = direction(objective)
    first = objective.mc_fisher_vp(v)
    assert torch.equal(objective.mc_fisher_vp(v), first)
    objective._evaluator._data = equal[::-1]
    with pytest.raises(ObjectiveError, match="same order in every pass"):
        objective.mc_fisher_vp(v)


def test_what_the_monte_carlo_fisher_refuses():
    v = direction(plain())
    for options in ({"num_samples": 0}, {"num_samples": 1.5}, {"seed": -1}, {"seed": True}):
        with pytest.raises(SettingsError, match=r"Expected `(num_samples|seed)` to be an integer"):
            plain().mc_fisher_vp(v, **options)
    huber = odd(nn.HuberLoss(), normal(11, 3, seed=5))
    with pytest.raises(ObjectiveError, match=r"predictive distribution.* Got HuberLoss"):
        huber.mc_fisher_vp(direction(huber))
    loss = sk.Objective.from_batch_loss(seeded(mlp), lambda m, b: (m(b[0]).sum(), 1), RAGGED)
    with pytest.raises(ObjectiveError, match="Expected an objective with a criterion"):
        loss.mc_fisher_vp(direction(loss))


def test_products_through_outputs_in_bfloat16():
    half = sk.Objective(seeded(mlp).bfloat16(), CE, [(X.bfloat16(), Y)])
    full = plain()
    v = direction(full)
    for name in ("ggnvp", "fisher_vp"):
        assert relative(getattr(half, name)(v.float()).double(), getattr(full, name)(v)) < 0.1
    drawn = half.mc_fisher_vp(v.float())
    assert drawn.dtype == torch.float32
    assert bool(torch.isfinite(drawn).all())
