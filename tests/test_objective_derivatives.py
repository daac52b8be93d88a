"""Second derivatives that are missing, cut or wrong; gradients that are lost."""

import warnings

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
    direction,
    masked_tokens,
    mlp,
    normal,
    plain,
    relative,
    seeded,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import sharpkit as sk
from sharpkit.errors import ObjectiveError


class HalfCut(torch.autograd.Function):
    """A square whose backward forgets that it depends on x: symmetric, and wrong."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.x * grad


class ForwardCut(torch.autograd.Function):
    """A square whose backward has no derivative with respect to the incoming gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad.detach()


class Squares(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 5), nn.Linear(5, 3), function

    def forward(self, x):
        return self.b(self.function(self.a(x)))


def pair(function, data=RAGGED, **options):
    """Return the objective with a function, and the right one."""
    wrong, right = seeded(lambda: Squares(function)), seeded(lambda: Squares(torch.square))
    right.load_state_dict(wrong.state_dict())
    return sk.Objective(wrong, CE, data, **options), sk.Objective(right, CE, data, **options)


@pytest.mark.parametrize("function", [HalfCut.apply, ForwardCut.apply])
@pytest.mark.parametrize("params", ["*", "a.*", "b.*"])
def test_wrong_double_backward_is_found_by_differences(function, params):
    objective, right = pair(function, params=params)
    v = direction(right)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SharpkitWarning)
        assert relative(objective.hvp(v), right.hvp(v)) < 1e-6
    expected = "kept" if params == "b.*" else "central_difference"
    assert objective.hvp_mode == expected


@pytest.mark.parametrize("mode", ["kept", "streamed", "forward_over_reverse"])
def test_a_way_that_is_asked_for_and_wrong_is_refused(mode):
    objective, _ = pair(HalfCut.apply, hvp_mode=mode)
    with pytest.raises(ObjectiveError, match="Use hvp_mode='auto'"):
        objective.hvp(direction(objective))


def test_ggn_through_a_cut_backward():
    objective, right = pair(HalfCut.apply)
    v = direction(right)
    assert relative(objective.ggnvp(v), right.ggnvp(v)) < 1e-12  # linear in what is cut
    objective, _ = pair(ForwardCut.apply)
    with pytest.raises(ObjectiveError, match="as the GGN needs it"):
        objective.ggnvp(v)


def test_weight_norm_of_torch_is_asymmetric_and_so_not_used():
    class Normed(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.v, self.g, self.fused = (
                nn.Parameter(torch.randn(5, 4)),
                nn.Parameter(torch.ones(5, 1)),
                fused,
            )
            self.out = nn.Linear(5, 3)

        def forward(self, x):
            if self.fused:
                weight = torch._weight_norm(self.v, self.g, 0)
            else:
                weight = self.v * (self.g / self.v.norm(dim=1, keepdim=True))
            return self.out(torch.tanh(x @ weight.T))

    fused, by_hand = (
        sk.Objective(seeded(lambda f=f: Normed(f)), CE, RAGGED) for f in (True, False)
    )
    v = direction(by_hand)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SharpkitWarning)  # where torch is right, none comes
        assert relative(fused.hvp(v), by_hand.hvp(v)) < 1e-6


def test_a_wrong_way_is_found_where_the_loss_is_almost_zero():
    # No second derivative can be told from rounding there, but a wrong way is wrong anywhere.
    wrong = seeded(lambda: Squares(HalfCut.apply))
    with torch.no_grad():
        wrong.b.weight.mul_(100)
        wrong.b.bias.mul_(100)
    logits = wrong(X)
    sure = logits.topk(2, dim=1).values.diff(dim=1)[:, 0].abs() > 12
    data = [(X[sure], logits[sure].argmax(dim=1))]
    objective = sk.Objective(wrong, CE, data)
    assert 0 < float(objective.value()) < 1e-4
    with pytest.warns(sk.SharpkitWarning, match="Double backward does not work"):
        way = objective._hessian._choose_way()
    assert way == "central_difference"


class Checkpointed(nn.Module):
    def __init__(self, reentrant, part=slice(0, 5)):
        super().__init__()
        self.body, self.reentrant, self.part = mlp(), reentrant, part

    def forward(self, x):
        before, after = self.body[: self.part.start], self.body[self.part.stop :]
        x = checkpoint(self.body[self.part], before(x), use_reentrant=self.reentrant)
        return after(x)


@pytest.mark.parametrize("mode", ["auto", "kept", "streamed", "central_difference"])
def test_activation_checkpoints_run_again_at_the_right_point(mode):
    model = seeded(lambda: Checkpointed(False))
    objective = sk.Objective(model, CE, RAGGED, hvp_mode=mode)
    there, right = objective.at(objective.theta * 1.5), plain().at(plain().theta * 1.5)
    v = direction(right)
    assert relative(there.gradient(), right.gradient()) < 1e-12
    assert relative(there.hvp(v), right.hvp(v)) < (1e-6 if "central" in mode else 1e-12)
    assert relative(there.ggnvp(v), right.ggnvp(v)) < 1e-12
    assert relative(there.fisher_vp(v), right.fisher_vp(v)) < 1e-12


@pytest.mark.parametrize("part", [slice(0, 5), slice(0, 3), slice(2, 5)])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:Double backward does not work")
def test_reentrant_checkpoints_are_refused(part):
    objective = sk.Objective(seeded(lambda: Checkpointed(True, part)), CE, RAGGED)
    for work in (objective.gradient, lambda: objective.hvp(direction(objective))):
        with pytest.raises(ObjectiveError, match="use_reentrant=False"):
            work()


def test_gradients_that_are_lost_are_refused():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = mlp(outputs=4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.body(x).detach())

    objective = sk.Objective(seeded(Detached), CE, RAGGED)
    with pytest.raises(ObjectiveError, match="its gradient does not reach there"):
        objective.gradient()
    head = sk.Objective(seeded(Detached), CE, RAGGED, "head.*")
    assert float(head.gradient().norm()) > 0


class WithPooler(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.pooler = mlp(), nn.Linear(2, 2)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("mode", ["auto", "streamed", "forward_over_reverse"])
def test_a_selection_that_the_loss_never_uses_is_flat(mode):
    objective = sk.Objective(seeded(WithPooler), CE, RAGGED, "pooler.*", hvp_mode=mode)
    with pytest.warns(sk.SharpkitWarning, match="does not depend on pooler"):
        assert not bool(objective.gradient().any())
    assert not bool(objective.hvp(direction(objective)).any())
    assert not bool(objective.ggnvp(direction(objective)).any())
    assert not bool(objective.fisher_vp(direction(objective)).any())


def test_a_batch_that_says_nothing_about_the_selection():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = mlp(), mlp()

        def forward(self, x, which):
            return (self.a if bool(which[0]) else self.b)(x)

    which = torch.tensor([1] * 8 + [0] * 3)
    data = [((x, w), y) for (x, y), w in zip(RAGGED, which.split([8, 3]), strict=True)]
    objective = sk.Objective(seeded(Experts), CE, data, "b.*")
    alone = sk.Objective(seeded(Experts).b, CE, [RAGGED[1]])
    v = direction(alone)
    for a, b in (
        (objective.gradient(), alone.gradient()),
        (objective.hvp(v), alone.hvp(v)),
        (objective.ggnvp(v), alone.ggnvp(v)),
    ):
        assert relative(a * 11 / 3, b) < 1e-12


def test_a_first_batch_without_terms():
    targets = masked_tokens()
    targets[:4] = -100
    batches = [(TOKENS[:4], targets[:4]), (TOKENS[4:], targets[4:])]
    objective = sk.Objective(seeded(TiedModel), CE, batches)
    whole = sk.Objective(seeded(TiedModel), CE, [(TOKENS, targets)])
    v = direction(whole)
    assert relative(objective.hvp(v), whole.hvp(v)) < 1e-12
    assert relative(objective.ggnvp(v), whole.ggnvp(v)) < 1e-12
    assert objective._hessian._bytes_per_example > 0  # by the batch that has terms


def test_sparse_embeddings():
    class Sparse(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.embed, self.out = nn.Embedding(7, 4, sparse=sparse), nn.Linear(4, 3)

        def forward(self, tokens):
            return self.out(torch.tanh(self.embed(tokens)))

    sparse, dense = (
        sk.Objective(seeded(lambda s=s: Sparse(s)), CE, [(TOKENS[:, 0], Y)]) for s in (True, False)
    )
    v = direction(dense)
    assert relative(sparse.gradient(), dense.gradient()) < 1e-12
    assert relative(sparse.hvp(v), dense.hvp(v)) < 1e-12


def test_losses_that_differentiate_by_themselves():
    def residual(model, points):
        points = points.requires_grad_()
        u = model(points)
        (du,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        return ((du - u) ** 2).sum(), len(points)

    def by_hand(model, points):
        (a, _, c) = model
        hidden = torch.tanh(a(points))
        du = ((1 - hidden**2) * a.weight[:, 0]) @ c.weight.T
        return ((du - c(hidden)) ** 2).sum(), len(points)

    points = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]
    model = seeded(lambda: nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)))
    objective, right = (
        sk.Objective.from_batch_loss(model, loss, [points]) for loss in (residual, by_hand)
    )
    v = direction(right)
    assert float(objective.value()) == pytest.approx(float(right.value()))
    assert relative(objective.hvp(v), right.hvp(v)) < 1e-12
    assert not points.requires_grad


def test_class_weights_follow_the_dtype():
    weight = torch.tensor([1.0, 2.0, 3.0])
    objective = sk.Objective(
        seeded(mlp).float(), nn.CrossEntropyLoss(weight=weight), [(X, Y)], dtype=torch.float64
    )
    right = sk.Objective(
        seeded(mlp).float().double(), nn.CrossEntropyLoss(weight=weight.double()), [(X, Y)]
    )
    assert relative(objective.gradient(), right.gradient()) < 1e-12
    assert weight.dtype == torch.float32


def test_central_differences_have_no_room_in_bfloat16():
    objective = sk.Objective(
        seeded(mlp).bfloat16(), CE, [(X.bfloat16(), Y)], hvp_mode="central_difference"
    )
    with pytest.raises(ObjectiveError, match=r"Pass dtype=torch\.float32"):
        objective.hvp(objective.theta)


def test_ggn_needs_one_output_tensor():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return self.body(x), x

    objective = sk.Objective(seeded(Two), lambda z, y: F.cross_entropy(z[0], y), RAGGED)
    v = direction(objective)
    assert relative(objective.hvp(v), plain().hvp(v)) < 1e-12
    with pytest.raises(ObjectiveError, match="one output tensor"):
        objective.ggnvp(v)


def test_odd_vectors():
    objective = plain()
    for product in (objective.hvp, objective.ggnvp, objective.fisher_vp):
        assert product(torch.zeros(objective.space.dim, 0)).shape == (objective.space.dim, 0)
        with pytest.raises(sk.SharpkitError, match="Expected real vectors"):
            product(torch.zeros(objective.space.dim, dtype=torch.complex64))
    assert torch.equal(
        objective.hvp(torch.ones(objective.space.dim, dtype=torch.int64)),
        objective.hvp(torch.ones(objective.space.dim)),
    )
    assert (
        relative(
            objective.hvp(normal(objective.space.dim, 2).T.contiguous().T),
            objective.hvp(normal(objective.space.dim, 2)),
        )
        == 0
    )


def test_half_precision_is_refused_also_as_a_wish():
    with pytest.raises(ObjectiveError, match=r"Got torch\.float16"):
        sk.Objective(seeded(mlp), CE, RAGGED, dtype=torch.float16)
