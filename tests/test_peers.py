"""Other packages as witnesses, on the same model and data."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, X, Y, mlp, normal, seeded
from torch import nn

import sharpkit as sk

CE = nn.CrossEntropyLoss()
BATCHES = [(X[:8], Y[:8]), (X[8:], Y[8:])]
NAMES = ["mlp, cross-entropy", "relu, mse", "batch norm in eval"]


def conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    )


IMAGES = normal(11, 36)


def pairs():
    for name in NAMES:
        case = next(c for c in CASES if c.name == name)
        yield pytest.param(case.model(), case.criterion, case.batches(8, 3), id=name)
    images = [(IMAGES[:8], Y[:8]), (IMAGES[8:], Y[8:])]
    yield pytest.param(seeded(conv), CE, images, id="convolution")


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture
def curvlinops():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        return pytest.importorskip(
            "curvlinops", reason="curvlinops is missing: run benchmarks/install_peers.sh"
        )


@pytest.mark.parametrize(("model", "loss", "data"), list(pairs()))
def test_curvlinops_agrees(curvlinops, model, loss, data):
    objective = sk.Objective(model, loss, data)
    params = [p for p in model.parameters() if p.requires_grad]
    V = torch.randn(objective.space.dim, 2, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forward mode inside torch warns of torch.jit
        H = curvlinops.HessianLinearOperator(model, loss, params, data)
        G = curvlinops.GGNLinearOperator(model, loss, params, data)
        HV, GV = H @ V, G @ V
        wrapped = sk.SymmetricOperator.wrap(H) @ V
    assert relative(objective.hvp(V), HV) < 1e-8
    assert relative(objective.ggnvp(V), GV) < 1e-8
    assert torch.equal(wrapped, HV)


def test_pyhessian_finds_the_same_eigenvalues():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        from pyhessian import hessian

    torch.manual_seed(0)  # its start vectors are drawn from the global state
    model, x, y = seeded(mlp).float(), X.float(), Y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # backward(create_graph=True) warns of a leak
        witness = hessian(model, CE, data=(x, y), cuda=False)
        theirs, _ = witness.eigenvalues(maxIter=2000, tol=1e-7, top_n=2)
        objective = sk.Objective(model, CE, [(x, y)])  # its .grad is stale by now
    H = sk.hessian(objective).to_dense()
    eigenvalues = torch.linalg.eigvalsh(H)
    largest = eigenvalues[eigenvalues.abs().argsort(descending=True)[:2]]
    assert theirs == pytest.approx(largest.tolist(), rel=1e-2)
    ours = sk.score(objective, ["top_eigenvalues:k=2"])[0].estimate
    found = {p.label: p.value for p in ours.parts}
    by_size = sorted(found.values(), key=abs, reverse=True)[:2]
    assert by_size == pytest.approx(largest.tolist(), rel=1e-4)


def test_a_second_pyhessian_object_doubles_its_hessian_but_not_ours():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports, and of the leak
        from pyhessian import hessian

        model, x = seeded(mlp).float(), X.float()
        objective = sk.Objective(model, CE, [(x, Y)])
        before = sk.hessian(objective).to_dense()
        # Each constructor adds to .grad what the former left there.
        witnesses = [hessian(model, CE, data=(x, Y), cuda=False) for _ in range(2)]
        tops = []
        for witness in witnesses:
            torch.manual_seed(0)
            tops.append(witness.eigenvalues(maxIter=500, tol=1e-6)[0][0])
    assert tops[1] == pytest.approx(2 * tops[0], rel=1e-2)
    assert torch.equal(sk.hessian(objective).to_dense(), before)
    again = sk.Objective(model, CE, [(x, Y)])
    assert torch.allclose(sk.hessian(again).to_dense(), before)


def eigenthings_product(model, data, v):
    from hessian_eigenthings.operators import HessianOperator

    def loss_fn(module, batch):
        x, y = batch
        return F.cross_entropy(module(x), y)

    operator = HessianOperator(model, data, loss_fn)
    return operator.matvec(v)


def test_hessian_eigenthings_takes_the_unweighted_mean_of_batches():
    pytest.importorskip("hessian_eigenthings")
    model = seeded(mlp)
    v = torch.linspace(-1, 1, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    theirs = eigenthings_product(model, BATCHES, v)
    ours = sk.Objective(model, CE, BATCHES).hvp(v)
    parts = [sk.Objective(model, CE, [batch]).hvp(v) for batch in BATCHES]
    assert relative(theirs, (parts[0] + parts[1]) / 2) < 1e-8
    assert relative(ours, (8 * parts[0] + 3 * parts[1]) / 11) < 1e-12
    assert relative(theirs, ours) > 0.01
    equal = [(X[:5], Y[:5]), (X[5:10], Y[5:10])]
    same = sk.Objective(model, CE, equal).hvp(v)
    assert relative(eigenthings_product(model, equal, v), same) < 1e-8
