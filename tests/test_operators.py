"""Operators made of others, and blocks: each against its dense formula in float64."""

import math
import warnings

import pytest
import torch
from cases import CASES, CE, RAGGED, X, Y, direction, mlp, normal, relative, seeded
from torch import nn

import sharpkit as sk
from sharpkit import operators
from sharpkit.errors import ObjectiveError, OperatorError, SettingsError, ShapeError
from sharpkit.operators import SymmetricOperator
from sharpkit.parameters import group_slices, groups
from sharpkit.testing import check_operator

P = 7
DENSE = normal(P, P) + normal(P, P).T
BY_NAME = {case.name: case for case in CASES}


def indices(space, by="layer"):
    """Positions of each group in a flat vector."""
    positions = torch.arange(space.dim)
    return {
        name: torch.cat([positions[part] for part in parts])
        for name, parts in group_slices(space, by).items()
    }


def operator():
    return SymmetricOperator.wrap(DENSE)


# -- simple ones -------------------------------------------------------------------------


def test_scaled_adaptive_and_preconditioned_are_the_dense_ones():
    s, d = normal(P, seed=2), normal(P, seed=3).abs() + 0.1
    s[2] = 0.0
    check_operator(operators.scaled(operator(), s), s.diag() @ DENSE @ s.diag())
    check_operator(operators.adaptive(operator(), s), s.abs().diag() @ DENSE @ s.abs().diag())
    dense = d.rsqrt().diag() @ DENSE @ d.rsqrt().diag()
    check_operator(operators.preconditioned(operator(), d), dense)
    similar = torch.linalg.eigvals(DENSE / d[:, None]).real.sort().values
    assert relative(torch.linalg.eigvalsh(dense), similar) < 1e-12


def test_shifted_and_deflated_are_the_dense_ones():
    eye = torch.eye(P, dtype=torch.float64)
    check_operator(operators.shifted(operator(), -0.7), DENSE - 0.7 * eye)
    Q = torch.linalg.qr(normal(P, 3, seed=4)).Q
    rest = eye - Q @ Q.T
    check_operator(operators.deflated(operator(), Q), rest @ DENSE @ rest)
    check_operator(operators.deflated(operator(), Q[:, :0]), DENSE)
    eigenvalues, vectors = torch.linalg.eigh(DENSE)
    left = operators.deflated(operator(), vectors[:, -2:]).to_dense()
    expected = torch.cat([eigenvalues[:-2], torch.zeros(2)]).sort().values
    assert float((torch.linalg.eigvalsh(left) - expected).abs().max()) < 1e-12


def test_products_are_counted_and_dtypes_follow():
    A = SymmetricOperator.wrap(DENSE.float())
    B = operators.adaptive(operators.shifted(A, 1.0), normal(P))
    assert (B @ torch.ones(P, 3)).dtype == torch.float32
    assert (A.num_matvecs, B.num_matvecs) == (3, 3)
    Q = torch.linalg.qr(normal(P, 2).float()).Q
    operators.deflated(A, Q)
    operators.deflated(A, Q.double())  # orthonormal as float32 can be
    with pytest.raises(OperatorError, match="orthonormal"):
        operators.deflated(operator(), Q.double())


def test_bad_vectors_and_bases():
    A, nan = operator(), torch.full((P,), math.nan)
    for function in (operators.scaled, operators.adaptive, operators.preconditioned):
        with pytest.raises(ShapeError, match=r"of shape \(7,\)\. Got \(3,\)"):
            function(A, torch.ones(3))
        with pytest.raises(OperatorError, match="NaN or inf"):
            function(A, nan)
    with pytest.raises(OperatorError, match=r"Expected a positive diagonal\. 2 of its 7"):
        operators.preconditioned(A, torch.tensor([1.0, 0, 1, -2, 1, 1, 1]))
    with pytest.raises(OperatorError, match="finite shift"):
        operators.shifted(A, math.inf)
    with pytest.raises(ShapeError, match=r"Q of shape \(7, q\)"):
        operators.deflated(A, torch.ones(P))
    with pytest.raises(OperatorError, match=r"differs from the identity by 1\.2e-01"):
        operators.deflated(A, 1.06 * torch.eye(P, dtype=torch.float64)[:, :2])
    with pytest.raises(OperatorError, match="orthonormal"):
        operators.deflated(A, torch.full((P, 2), math.nan))


# -- Adam --------------------------------------------------------------------------------


def trained(kind=torch.optim.AdamW, steps=5, model=None, **options):
    model = model or seeded(mlp)
    groups = [
        {"params": list(model[:3].parameters()), "betas": (0.8, 0.99), "eps": 1e-3},
        {"params": list(model[3:].parameters())},
    ]
    optimizer = kind(groups, lr=0.01, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        CE(model(X), Y).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adams_diagonal_is_what_its_step_divides_by(kind, amsgrad):
    model, optimizer = trained(kind, amsgrad=amsgrad, weight_decay=0.0)
    objective = sk.Objective(model, CE, RAGGED)
    diagonal = operators.adam_diagonal(objective.space, model, optimizer)
    before = objective.theta
    m = objective.space.flatten(
        {n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters()}
    )
    # The last step was theta <- theta - lr m / P, from where one step fewer leads.
    model_before, _ = trained(kind, steps=4, amsgrad=amsgrad, weight_decay=0.0)
    there = sk.Objective(model_before, CE, RAGGED)
    assert relative(there.theta - before, 0.01 * m / diagonal) < 1e-10
    H = sk.hessian(objective)
    dense = H.to_dense()
    A = operators.adam_preconditioned(H, objective.space, model, optimizer)
    check_operator(A, diagonal.rsqrt().diag() @ dense @ diagonal.rsqrt().diag())
    part = objective.restrict("2.*")
    of_part = operators.adam_diagonal(part.space, model, optimizer)
    assert torch.equal(of_part, diagonal[indices(objective.space)["2"]])


def test_adams_diagonal_by_hand():
    model, optimizer = trained()
    objective = sk.Objective(model, CE, RAGGED)
    parts = []
    for i, (_, p) in enumerate(model.named_parameters()):
        beta1, beta2, eps = (0.8, 0.99, 1e-3) if i < 4 else (0.9, 0.999, 1e-8)
        v = optimizer.state[p]["exp_avg_sq"].reshape(-1)
        parts.append((1 - beta1**5) * ((v / (1 - beta2**5)) ** 0.5 + eps))
    by_hand = torch.cat(parts)
    assert relative(operators.adam_diagonal(objective.space, model, optimizer), by_hand) < 1e-12


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_the_edge_of_stability_is_where_steps_begin_to_grow(beta1):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.03, betas=(beta1, 0.999))
    edge = operators.edge_of_stability(optimizer)
    if beta1 == 0.9:
        assert edge == pytest.approx(38 / 0.03)

    def growth(curvature):  # of (theta, m) in one step with the preconditioner 1
        m = torch.tensor([(1 - beta1) * curvature, beta1])
        return float(
            torch.linalg.eigvals(torch.stack([torch.tensor([1.0, 0.0]) - 0.03 * m, m])).abs().max()
        )

    assert growth(0.999 * edge) < 1 < growth(1.001 * edge)


def test_what_is_no_adam_of_this_model():
    model, optimizer = trained()
    space = sk.Objective(model, CE, RAGGED).space
    with pytest.raises(OperatorError, match=r"Expected a torch\.optim\.Adam or AdamW\. Got SGD"):
        operators.adam_diagonal(space, model, torch.optim.SGD(model.parameters()))
    with pytest.raises(OperatorError, match=r"this model\. It does not train 0\.weight, 0\.bias"):
        operators.adam_diagonal(space, seeded(mlp), optimizer)
    with pytest.raises(OperatorError, match=r"has none of 0\.weight.* and 1 more: it made no step"):
        operators.adam_diagonal(space, model, torch.optim.Adam(model.parameters()))
    frozen, some = trained(steps=0)
    CE(frozen[4](frozen[:4](X).detach()), Y).backward()
    some.step()
    with pytest.raises(OperatorError, match=r"has none of 0\.weight, 0\.bias, 2\.weight, 2\.bias:"):
        operators.adam_diagonal(space, frozen, some)
    head = sk.Objective(frozen, CE, RAGGED, "4.*")
    assert operators.adam_diagonal(head.space, frozen, some).shape == (head.space.dim,)
    with pytest.raises(ShapeError, match="`diagonal` of shape"):
        operators.adam_preconditioned(operator(), space, model, optimizer)
    for bad in (trained()[1], torch.optim.SGD(model.parameters())):
        with pytest.raises(OperatorError, match="Expected"):
            operators.edge_of_stability(bad)
    with pytest.raises(OperatorError, match="positive learning rate"):
        operators.edge_of_stability(torch.optim.Adam(model.parameters(), lr=0.0))


def one_group(model, **options):
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.02)
    CE(model(X), Y).backward()
    optimizer.step()
    return optimizer


def test_a_state_dict_says_the_same_as_its_optimizer():
    model = seeded(mlp)
    optimizer = one_group(model)
    space = sk.Objective(model, CE, RAGGED).space
    expected = operators.adam_diagonal(space, model, optimizer)
    state = optimizer.state_dict()
    assert torch.equal(operators.adam_diagonal(space, model, state), expected)
    for group in state["param_groups"]:  # as written by torch before 2.6
        del group["param_names"]
    assert torch.equal(operators.adam_diagonal(space, model, state), expected)
    read = operators.OptimizerState.of(state, model)
    assert (read.setting("lr"), read.adam) == (0.02, True)
    assert operators.edge_of_stability(read) == operators.edge_of_stability(optimizer)
    # Names count, not the order of the groups.
    names = dict(model.named_parameters())
    turned = torch.optim.Adam([{"params": [item]} for item in reversed(names.items())], lr=0.02)
    CE(model(X), Y).backward()
    turned.step()
    by_name = operators.adam_diagonal(space, model, turned.state_dict())
    assert torch.equal(by_name, operators.adam_diagonal(space, model, turned))
    assert not torch.equal(by_name, expected)


def test_optimizer_states_that_cannot_be_read():
    model, groups = trained()
    space = sk.Objective(model, CE, RAGGED).space
    with pytest.raises(OperatorError, match=r"2 groups, and so the order .*named_parameters"):
        operators.adam_diagonal(space, model, groups.state_dict())
    with pytest.raises(OperatorError, match="one 'betas' for all parameters"):
        operators.OptimizerState.of(groups, model).setting("betas")
    with pytest.raises(OperatorError, match=r"option 'nesterov'. This one .* has betas"):
        operators.OptimizerState.of(groups, model).setting("nesterov")
    with pytest.raises(OperatorError, match="Expected a torch optimizer or its state"):
        operators.OptimizerState.of({"lr": 1}, model)
    other = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    state = one_group(seeded(mlp)).state_dict()
    del state["param_groups"][0]["param_names"]
    with pytest.raises(OperatorError, match="which has 4 parameters"):
        operators.OptimizerState.of(state, other).adam_diagonal(space)
    swapped = {**state, "state": {i: state["state"][5 - i] for i in range(6)}}
    with pytest.raises(OperatorError, match=r"exp_avg of .* of shape"):
        operators.OptimizerState.of(swapped, model)


# -- blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["layer", "parameter", ["*.weight", "*.bias", "0.*"], "2.*"])
@pytest.mark.parametrize("name", ["mlp, cross-entropy", "masked tokens", "relu, mse"])
def test_blocks_are_those_of_the_dense_matrices(name, by):
    if name == "masked tokens" and not isinstance(by, str):
        by = ["embed*", "*.weight"]
    elif name == "masked tokens" and by == "2.*":
        by = "body.*"
    objective = BY_NAME[name].objective()
    H = BY_NAME[name].dense(objective)[2]
    G = sk.ggn(objective).to_dense()
    g = objective.per_example_gradients()
    where = indices(objective.space, by)
    dense = {"hessian": H, "ggn": G, "empirical_fisher": g.T @ g / len(g)}
    for matrix, whole in dense.items():
        found = operators.blocks(objective, by, matrix=matrix)
        assert list(found) == list(where)
        for group, block in found.items():
            i = where[group]
            assert block.dim == len(i)
            check_operator(block, whole[i][:, i])
    if isinstance(by, str) and by != "2.*" and by != "body.*":
        assert sorted(torch.cat(list(where.values())).tolist()) == list(range(objective.space.dim))


class Scattered(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x) * self.scale))


def test_groups_of_parameters():
    objective = sk.Objective(seeded(Scattered), CE, RAGGED)
    found = groups(objective.space)
    assert found == {"": ["scale"], "a": ["a.weight", "a.bias"], "b": ["b.weight", "b.bias"]}
    where = indices(objective.space, "*.bias")["*.bias"]
    assert where.tolist() == [15, 16, 17, 27, 28, 29]
    flat = objective.theta[where]
    assert torch.equal(flat, objective.restrict("*.bias").theta)
    with pytest.raises(ObjectiveError, match="nothing"):
        operators.blocks(objective, ["a.*", "nothing.*"])
    for by in ([], 3 * [1]):
        with pytest.raises(ObjectiveError, match="Expected `by` to be 'layer', 'parameter'"):
            groups(objective.space, by)
    with pytest.raises(SettingsError, match="Expected `matrix` to be one of hessian, ggn"):
        operators.blocks(objective, matrix="nothing")


def test_blocks_are_made_when_they_are_used():
    objective = sk.Objective(seeded(mlp), CE, RAGGED)
    made = operators.blocks(objective, "parameter")
    assert len(objective._evaluator.holders) == 2  # the Hessian's and the outputs' own
    made["0.bias"] @ torch.ones(6, dtype=torch.float64)
    assert len(objective._evaluator.holders) == 4


# -- a witness ---------------------------------------------------------------------------


@pytest.fixture
def curvlinops():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        return pytest.importorskip(
            "curvlinops", reason="curvlinops is missing: run benchmarks/install_peers.sh"
        )


def test_the_mean_fisher_is_that_of_curvlinops(curvlinops):
    model = seeded(mlp)
    objective = sk.Objective(model, CE, RAGGED)
    v = direction(objective)
    params = list(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forward mode inside torch warns of torch.jit
        theirs = curvlinops.EFLinearOperator(model, CE, params, RAGGED) @ v
        drawn = [
            curvlinops.FisherMCLinearOperator(model, CE, params, RAGGED, seed=s) @ v
            for s in range(30)
        ]
    assert relative(objective.fisher_vp(v), theirs) < 1e-8
    ours = torch.stack([v @ objective.mc_fisher_vp(v, seed=s) for s in range(300)])
    them = torch.stack([v @ Fv for Fv in drawn])
    error = math.hypot(float(ours.std()) / 300**0.5, float(them.std()) / 30**0.5)
    assert abs(float(ours.mean() - them.mean())) < 5 * error
