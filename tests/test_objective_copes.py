"""What users bring: batches of any kind, wrapped, frozen, tied, fused, compiled, too large."""

import collections
import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, TiedModel, X, Y, mlp, normal, seeded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sharpkit as sk

CE = nn.CrossEntropyLoss()
Pair = collections.namedtuple("Pair", ["inputs", "targets"])


def reference():
    return sk.Objective(seeded(mlp), CE, [(X, Y)])


def same(objective, other=None, rtol=1e-9):
    other = other or reference()
    v = torch.linspace(-1, 1, other.space.dim, dtype=torch.float64)
    assert float(objective.value()) == pytest.approx(float(other.value()), rel=1e-10)
    assert torch.allclose(objective.gradient(), other.gradient(), rtol=1e-9, atol=1e-12)
    assert torch.allclose(objective.hvp(v), other.hvp(v), rtol=rtol, atol=rtol * 1e-3)


# -- batches -----------------------------------------------------------------------------


class Named(nn.Module):
    """A model called by keywords, as those of transformers are, with .logits outputs."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, features, scale):
        output = collections.namedtuple("Output", ["logits", "hidden"])
        return output(self.body(features) * scale, features)


class BatchEncoding(collections.UserDict):
    """Like the batches of transformers' collators."""

    def to(self, *args, **kwargs):
        raise AssertionError("moved leaf by leaf")


class Graph:
    """A batch object that moves itself, like those of graph libraries."""

    def __init__(self, x, y):
        self.x, self.y, self.moved = x, y, 0

    def to(self, device):
        self.moved += 1
        return self


def two(make):
    return [make(X[:8], Y[:8]), make(X[8:], Y[8:])]


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        two(lambda x, y: (x, y)),
        two(lambda x, y: [x, y]),
        two(Pair),
        two(lambda x, y: ((x,), y)),
        DataLoader(TensorDataset(X, Y), batch_size=4),
        DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
        TensorDataset(X, Y),
    ],
    ids=["pair", "tuples", "lists", "namedtuples", "tuple inputs", "loader", "shuffled", "dataset"],
)
def test_batches_of_inputs_and_targets(data):
    same(sk.Objective(seeded(mlp), CE, data))


@pytest.mark.parametrize("kind", [dict, BatchEncoding, collections.OrderedDict])
def test_mappings_go_by_keywords(kind):
    scale = torch.tensor(1.0, dtype=torch.float64)  # shared by all examples
    data = two(lambda x, y: kind({"features": x, "scale": scale, "labels": y}))
    model = seeded(Named)
    objective = sk.Objective(model, CE, data)
    plain = sk.Objective(model.body, CE, (X, Y))
    same(objective, plain)


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_custom_batch_loss_sees_the_batch_as_it_is(kind):
    seen = set()

    def batch_loss(model, batch):
        seen.add(type(batch))
        z = model(batch["x"])
        return F.cross_entropy(z, batch["y"], reduction="sum"), len(batch["y"])

    same(sk.Objective.from_batch_loss(seeded(mlp), batch_loss, two(lambda x, y: kind(x=x, y=y))))
    assert seen == {kind}


def test_objects_move_themselves():
    graphs = two(Graph)

    def batch_loss(model, batch):
        return F.cross_entropy(model(batch.x), batch.y, reduction="sum"), len(batch.y)

    same(sk.Objective.from_batch_loss(seeded(mlp), batch_loss, graphs))
    assert all(g.moved for g in graphs)


def test_a_model_without_forward_and_a_batch_loss_that_calls_methods():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def classify(self, x):
            return self.body(x)

    def batch_loss(model, batch):
        x, y = batch
        return F.cross_entropy(model.classify(x), y, reduction="sum"), len(y)

    model = seeded(Parts)
    objective = sk.Objective.from_batch_loss(model, batch_loss, [(X, Y)])
    same(objective, sk.Objective(model.body, CE, [(X, Y)]))


def test_num_terms_of_an_unusual_criterion():
    def twice(outputs, targets):  # divides by half the examples
        return F.cross_entropy(outputs, targets, reduction="sum") / (len(targets) / 2)

    objective = sk.Objective(
        seeded(mlp), twice, two(lambda x, y: (x, y)), num_terms=lambda z, y: len(y) / 2
    )
    assert float(objective.value()) == pytest.approx(2 * float(reference().value()))


def test_numpy_doubles_in_a_single_precision_model():
    model = seeded(mlp).float()
    objective = sk.Objective(model, CE, [(X, Y)], dtype=torch.float64)
    exact = copy.deepcopy(model).double()
    same(objective, sk.Objective(exact, CE, [(X, Y)]))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert objective.theta.dtype == torch.float64


# -- parameters --------------------------------------------------------------------------


def test_frozen_parameters_stay_fixed():
    model = seeded(mlp)
    model[0].requires_grad_(False)
    objective = sk.Objective(model, CE, [(X, Y)])
    assert objective.space.names == ("2.weight", "2.bias", "4.weight", "4.bias")
    same(objective, reference().restrict(["2.*", "4.*"]))
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize(
    "params", ["4.*", ["4.weight", "4.bias"], lambda name: name.startswith("4")]
)
def test_selections(params):
    same(sk.Objective(seeded(mlp), CE, [(X, Y)], params), reference().restrict("4.*"))


def test_tied_parameters_count_once():
    case = next(c for c in CASES if c.name == "tied embedding")
    objective = case.objective()
    assert objective.space.names == ("embed.weight", "body.weight", "body.bias")
    assert objective.space.dim == sum(p.numel() for p in seeded(TiedModel).parameters())


def test_unused_parameters_are_zero_rows_and_one_warning_names_them():
    model = nn.Sequential(*seeded(mlp), nn.Identity())
    model.pooler = nn.Linear(2, 2).double()

    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.pooler = seeded(mlp), nn.Linear(2, 2).double()

        def forward(self, x):
            return self.used(x)

    objective = sk.Objective(Skipping(), CE, [(X, Y)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        objective.at(objective.theta).gradient()
        g = objective.gradient()
        H = sk.hessian(objective).to_dense()
        objective.gradient()
    assert len(caught) == 1
    assert "pooler.weight, pooler.bias" in str(caught[0].message)
    assert not bool(g[-6:].any())
    assert not bool(H[-6:].any())
    assert not bool(H[:, -6:].any())
    assert torch.allclose(H[:-6, :-6], sk.hessian(reference()).to_dense())


# -- modules -----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_wrappers_are_taken_off(depth):
    model = seeded(mlp)
    wrapped = model
    for _ in range(depth):
        wrapped = nn.DataParallel(wrapped)
    objective = sk.Objective(wrapped, CE, [(X, Y)])
    assert objective.space.names[0] == "0.weight"
    same(objective)


def test_ddp_is_taken_off(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        same(sk.Objective(nn.parallel.DistributedDataParallel(seeded(mlp)), CE, [(X, Y)]))
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_modules_run_eagerly():
    # The eager backend needs no compiler; a compiled module has no double backward.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile's own imports
        whole = torch.compile(seeded(mlp), backend="aot_eager")
        inner = seeded(mlp)
        inner[0] = torch.compile(inner[0], backend="aot_eager")
        whole(X)
        inner(X)
        assert sk.Objective(whole, CE, [(X, Y)]).space.names[0] == "0.weight"
        same(sk.Objective(whole, CE, [(X, Y)]))
        same(sk.Objective(inner, CE, [(X, Y)]))


def test_recurrent_networks():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, x):
            return self.out(self.rnn(x)[0][:, -1])

    sequences = normal(11, 5, 4)
    model = seeded(Recurrent)
    pieces = sk.Objective(model, CE, list(zip(sequences.split(4), Y.split(4), strict=True)))
    H = sk.hessian(pieces).to_dense()
    assert torch.allclose(H, H.T, atol=1e-12)
    v = torch.linspace(-1, 1, pieces.space.dim, dtype=torch.float64)
    h = 1e-5
    ends = [pieces.at(pieces.theta + s * h * v).gradient() for s in (1, -1)]
    assert torch.allclose(pieces.hvp(v), (ends[0] - ends[1]) / (2 * h), atol=1e-8)
    model(sequences)  # the module still runs by itself


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad_and_inference_mode(context):
    with context():
        objective = sk.Objective(seeded(mlp), CE, [(X, Y)])
        v = torch.linspace(-1, 1, objective.space.dim, dtype=torch.float64)
        g, Hv, at = objective.gradient(), objective.hvp(v), objective.at(v).gradient()
    expected = reference()
    assert torch.allclose(g, expected.gradient())
    assert torch.allclose(Hv, expected.hvp(v))
    assert torch.allclose(at, expected.at(v).gradient())


def test_bfloat16_models_have_single_precision_vectors():
    model = seeded(mlp).bfloat16()
    objective = sk.Objective(model, CE, [(X.bfloat16(), Y)])
    assert objective.theta.dtype == torch.float32
    Hv = objective.hvp(objective.theta)
    assert Hv.dtype == torch.float32
    expected = reference().hvp(objective.theta)
    assert float((Hv.double() - expected).norm() / expected.norm()) < 0.2


# -- no trace ----------------------------------------------------------------------------


class Fragile(nn.Module):
    """Fails at a given call; has buffers and dropout, in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
        )
        self.fail_at, self.calls = None, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fail_at:
            raise ValueError("no more")
        return self.body(x)


def random_states():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )


def everything(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("fail_at", [None, 1, 2, 3])
@pytest.mark.parametrize("mode", ["kept", "streamed", "forward_over_reverse", "central_difference"])
def test_nothing_of_the_users_is_touched(fail_at, mode):
    model = seeded(Fragile)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(123)  # states that no pass over the data leaves behind
    rng = random_states()
    objective = sk.Objective(
        model, CE, loader, hvp_mode=mode, memory_budget=None if mode == "kept" else 0
    )
    assert random_states() == rng
    state = everything(model)
    model.calls, model.fail_at = 0, fail_at
    v = objective.theta
    for work in (
        objective.value,
        objective.gradient,
        lambda: objective.hvp(v),
        lambda: objective.ggnvp(v),
    ):
        model.calls = 0
        if fail_at is None:
            work()
        else:
            with pytest.raises(ValueError, match="no more"):
                work()
    assert random_states() == rng
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert not model.training
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    model.fail_at = None
    rtol = 1e-5 if mode == "central_difference" else 1e-9
    same(objective, sk.Objective(model, CE, [(X, Y)]), rtol=rtol)  # and the objective still works


def test_shuffling_is_the_same_in_every_pass_and_leaves_the_seed():
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    objective = sk.Objective(seeded(mlp), CE, loader, memory_budget=0)
    assert not objective._evaluator.cached
    before = random_states()
    first = objective.gradient()
    assert random_states() == before
    assert torch.equal(objective.gradient(), first)


def test_further_training_does_not_move_the_objective():
    model = seeded(mlp)
    objective = sk.Objective(model, CE, [(X, Y)])
    v = torch.linspace(-1, 1, objective.space.dim, dtype=torch.float64)
    before = objective.hvp(v)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    CE(model(X), Y).backward()
    optimizer.step()
    assert torch.equal(objective.hvp(v), before)
    same(objective)


def test_a_stale_gradient_counts_for_nothing():
    model = seeded(mlp)
    CE(model(X), Y).backward()
    same(sk.Objective(model, CE, [(X, Y)]))


# -- derivatives that are hard to get ----------------------------------------------------


class Once(torch.autograd.Function):
    """A square whose author did not think of second derivatives."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Cut(torch.autograd.Function):
    """A square whose backward loses the graph without a word."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.as_tensor(2 * x.detach().numpy() * grad.detach().numpy())


class Squares(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 5), nn.Linear(5, 3), function

    def forward(self, x):
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize("function", [Once.apply, Cut.apply], ids=["once", "cut"])
def test_missing_second_derivatives_fall_back_and_say_so(function):
    model = seeded(lambda: Squares(function))
    objective = sk.Objective(model, CE, [(X, Y)])
    v = torch.linspace(-1, 1, objective.space.dim, dtype=torch.float64)
    with pytest.warns(sk.SharpkitWarning, match="Double backward does not work"):
        Hv = objective.hvp(v)
    plain = seeded(lambda: Squares(torch.square))
    plain.load_state_dict(model.state_dict())
    expected = sk.Objective(plain, CE, [(X, Y)]).hvp(v)
    assert objective.hvp_mode == "central_difference"
    assert torch.allclose(Hv, expected, rtol=1e-5, atol=1e-7)
    score = sk.score(objective, ["hessian_trace:num_probes=4"])[0]
    assert score.provenance["hvp_mode"] == "central_difference"
    assert 0 < float(score.provenance["hvp_relative_error"]) < 1e-2


class HalfCut(torch.autograd.Function):
    """A product whose backward loses the graph of one factor's gradient only."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.T, x.detach().T @ grad


def test_a_partly_lost_graph_is_seen_by_its_asymmetry():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w = nn.Linear(4, 5), nn.Parameter(normal(5, 3))

        def forward(self, x):
            return HalfCut.apply(torch.tanh(self.a(x)), self.w)

    objective = sk.Objective(seeded(Layer), CE, [(X, Y)])
    v = torch.linspace(-1, 1, objective.space.dim, dtype=torch.float64)
    with pytest.warns(sk.SharpkitWarning, match="not symmetric"):
        Hv = objective.hvp(v)
    h = 1e-5
    ends = [objective.at(objective.theta + s * h * v).gradient() for s in (1, -1)]
    assert torch.allclose(Hv, (ends[0] - ends[1]) / (2 * h), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_that_is_sure_of_itself_keeps_double_backward(dtype):
    # Its Hessian is close to rounding, and so not symmetric to many digits.
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))).to(dtype)
    x = X.to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(3000 if dtype == torch.float64 else 600):
        optimizer.zero_grad()
        CE(model(x), Y).backward()
        optimizer.step()
    for p in model[2].parameters():
        p.data.mul_(3)
    objective = sk.Objective(model, CE, [(x, Y)])
    assert float(objective.value()) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.hvp(objective.theta)
    assert objective.hvp_mode == "kept"


def test_central_differences_refuse_kinks():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 3)
    )
    x, y = torch.randn(64, 20), torch.randint(3, (64,))
    objective = sk.Objective(model, CE, [(x, y)], hvp_mode="central_difference")
    v = torch.randn(objective.space.dim)
    with pytest.raises(sk.SharpkitError, match="two step sizes to agree"):
        objective.hvp(v)


def test_a_linear_loss_has_no_curvature():
    model = nn.Linear(4, 1, bias=False).double()

    def batch_loss(model, batch):
        return model(batch).sum(), len(batch)

    objective = sk.Objective.from_batch_loss(model, batch_loss, [X])
    assert not bool(objective.hvp(objective.theta).any())
    assert objective.hvp_mode == "kept"
