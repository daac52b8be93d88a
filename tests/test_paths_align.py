"""Alignment: what leaves a function alone is undone, and nothing else happens."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from cases import CE, classes, normal
from networks import Classifier, FusedAttention, noisy
from torch import nn

import sharpkit as sk
from sharpkit.errors import MeasureError, SettingsError, ShapeError
from sharpkit.geometry.layouts import find_pairs
from sharpkit.geometry.quotient import Pair
from sharpkit.geometry.symmetries import find_symmetries
from sharpkit.geometry.symmetries.kinds import Observation
from sharpkit.geometry.symmetries.permutation import groups_of
from sharpkit.landscape.paths import SegmentPath, align, barrier
from sharpkit.landscape.paths.matching import HeadOrder, Rotation, UnitOrder
from sharpkit.objective.states import state_of, with_state


class Images(nn.Module):
    """Convolutions, with BatchNorm or without, and a residual sum."""

    def __init__(self, norm=False):
        super().__init__()
        make = (lambda c: nn.BatchNorm2d(c)) if norm else (lambda c: nn.Identity())
        self.first, self.one = nn.Conv2d(2, 6, 3, padding=1, bias=not norm), make(6)
        self.inner, self.two = nn.Conv2d(6, 5, 3, padding=1), make(5)
        self.back = nn.Conv2d(5, 6, 1)
        self.out = nn.Linear(6 * 4, 3)

    def forward(self, x):
        x = self.one(self.first(x)).relu()
        x = x + self.back(self.two(self.inner(x)).relu())
        return self.out(nn.functional.max_pool2d(x.relu(), 2).flatten(1))


class Sentences(nn.Module):
    """A transformer block between an embedding and a head."""

    def __init__(self, heads=3):
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.layer = nn.TransformerEncoderLayer(12, heads, 10, dropout=0.0, batch_first=True)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        return self.out(self.layer(self.embed(x)).mean(1))


class Rotary(nn.Module):
    """Attention of three heads under rotary embedding of two planes."""

    def __init__(self, d=12, heads=3):
        super().__init__()
        self.num_heads, self.head_dim = heads, d // heads
        self.q_proj, self.k_proj = nn.Linear(d, d), nn.Linear(d, d)
        self.v_proj, self.o_proj = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        where = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        angle = where * torch.tensor([1.0, 0.3], dtype=x.dtype)
        c, s = angle.cos(), angle.sin()

        def turn(t):
            a, b = t[..., :2], t[..., 2:]
            return torch.cat([a * c - b * s, b * c + a * s], -1)

        logits = turn(q) @ turn(k).mT / math.sqrt(self.head_dim)
        return self.o_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(-2))


def mlp(act=nn.ReLU):
    return nn.Sequential(nn.Linear(5, 8), act(), nn.Linear(8, 7), act(), nn.Linear(7, 3))


NETWORKS = {
    "mlp": (mlp, (12, 5)),
    "smooth": (lambda: mlp(nn.Tanh), (12, 5)),
    "cnn": (Images, (8, 2, 4, 4)),
    "batch_norm": (lambda: Images(norm=True), (8, 2, 4, 4)),
    "transformer": (Sentences, (8, 4, 5)),
    "fused": (lambda: Classifier(FusedAttention(8, 2)), (8, 4, 5)),
    "rotary": (lambda: Classifier(Rotary(), d=12), (8, 4, 5)),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4)), (8, 5)),
}


def objective_of(name, *, params="*", shake=0):
    build, shape = NETWORKS[name]
    model = noisy(build)
    generator = torch.Generator().manual_seed(shake)
    with torch.no_grad():
        for n, t in model.state_dict().items():
            if n.endswith("running_var"):
                t.add_(torch.rand(t.shape, generator=generator, dtype=t.dtype))
            elif t.is_floating_point() and shake:
                t.copy_(0.6 * torch.randn(t.shape, generator=generator, dtype=t.dtype))
    n = shape[0]
    outputs = 4 if name == "linear" else 3
    data = normal(*shape, seed=3), classes(outputs, n, seed=4)
    return sk.Objective(model, CE, data, params)


def moved(objective, kinds, seed=0):
    """The same network elsewhere, by random elements of its symmetries."""
    state = state_of(objective)
    found = find_symmetries(objective, kinds)
    assert found
    for i, symmetry in enumerate(found):
        state = symmetry.element(torch.Generator().manual_seed(100 * seed + i))(state)
    return with_state(objective, state)


def outputs(objective):
    (x, _), *_ = objective._evaluator._data
    named = state_of(objective)
    return torch.func.functional_call(objective.model, named, (x,))


SCALES = ("node_scale", "batch_norm_scale")
FACTORS = ("attention_gl", "key_bias_shift", "factor_gl")


def undone(name, kinds, how, seed, tol=1e-9, **settings):
    objective = objective_of(name)
    other = moved(objective, kinds, seed)
    found = align(objective, other, how, **settings)
    assert found.distance_before > 0.1
    assert found.distance_after < tol * found.distance_before
    assert torch.allclose(found.theta, objective.theta, atol=tol)
    home, there = state_of(objective), state_of(found.objective)
    for n, t in home.items():  # buffers too
        assert torch.allclose(there[n], t, atol=tol), n
    assert found.deviation < 1e-10
    return found


# -- what was done at random is undone -----------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["mlp", "smooth", "cnn", "batch_norm", "transformer"])
def test_renumbered_units_are_found_again(name, seed):
    found = undone(name, ("permutation",), ("permutation",), seed, tol=1e-13)
    assert sum(m.changed for m in found.moved) > 5
    assert found.inner_after == pytest.approx(float(found.theta @ found.theta))


@pytest.mark.parametrize("name", ["mlp", "cnn", "batch_norm"])
def test_scaled_units_are_scaled_back(name):
    found = undone(name, SCALES, ("scale",), 1)
    assert sum(m.changed for m in found.moved) == sum(m.units for m in found.moved) > 5


@pytest.mark.parametrize("name", ["transformer", "fused", "rotary", "linear"])
def test_turned_factors_are_turned_back(name):
    found = undone(name, FACTORS, ("gl",), 1, tol=1e-7)
    assert {(m.kind, m.units - m.changed) for m in found.moved} == {("gl", 0)}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("mlp", ("permutation", *SCALES)),
        ("cnn", ("permutation", *SCALES)),
        ("batch_norm", ("permutation", *SCALES)),
        ("transformer", ("permutation", *SCALES, *FACTORS)),
    ],
)
def test_everything_at_once_is_undone(name, kinds):
    found = undone(name, kinds, ("permutation", "scale", "gl"), 2, tol=1e-6)
    assert not any("rounds" in note for note in found.notes)
    for moved_ in found.moved:
        if moved_.kind == "scale":
            assert moved_.changed == moved_.units


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("name", ["transformer", "fused", "rotary"])
def test_heads_in_another_order_are_found_again(name, turn):
    objective = objective_of(name)
    layers = {}
    for pair in find_pairs(objective).pairs:
        layers.setdefault(pair.module, []).append(pair)
    (held,) = layers.values()
    heads = HeadOrder(tuple(held), turn)
    order = np.roll(np.arange(heads.units), 1)
    other = with_state(objective, heads.shuffled(state_of(objective), order))
    assert torch.allclose(outputs(objective), outputs(other), atol=1e-12)
    if turn:
        other = moved(other, FACTORS, 3)
    how = ("permutation", "gl") if turn else ("permutation",)
    found = align(objective, other, how)
    assert found.distance_before > 0.1
    assert found.distance_after < 1e-7
    label = next(m for m in found.moved if m.label.startswith("heads"))
    assert (label.units, label.changed) == (heads.units, heads.units)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_nothing_happens_to_a_network_and_itself(name):
    objective = objective_of(name)
    if name != "linear":
        plain = align(objective, objective, ("permutation",))
        assert torch.equal(plain.theta, objective.theta)
        assert sum(m.changed for m in plain.moved) == 0
    full = align(objective, objective)
    assert all(m.changed == 0 for m in full.moved)
    assert torch.allclose(full.theta, objective.theta, atol=1e-8)
    assert full.distance_after < 1e-8


# -- two networks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("mlp", ("permutation",)),
        ("mlp", ("permutation", "scale")),
        ("batch_norm", ("permutation", "scale")),
        ("transformer", ("gl",)),
        ("transformer", ("permutation", "scale", "gl")),
        ("rotary", ("permutation", "gl")),
    ],
)
def test_another_network_comes_nearer_and_stays_what_it_is(name, how):
    first, second = objective_of(name), objective_of(name, shake=5)
    found = align(first, second, how)
    assert torch.allclose(outputs(found.objective), outputs(second), atol=1e-9)
    assert found.balanced_after < found.balanced_before
    assert found.inner_after > found.inner_before
    assert found.inner_after == max(found.ends)
    assert found.deviation < 1e-9
    assert json.loads(json.dumps(found.to_dict()))["moved"]
    again = align(first, second, how)
    assert torch.equal(found.theta, again.theta)
    # Far away through random factors: never farther than that.
    far = moved(second, {"mlp": SCALES, "batch_norm": SCALES}.get(name, FACTORS), 4)
    back = align(first, far, how)
    assert back.balanced_after <= back.balanced_before
    if how != ("permutation",):
        assert back.distance_after < back.distance_before
        assert back.balanced_after == pytest.approx(found.balanced_after, rel=0.2)


@pytest.mark.parametrize(
    ("name", "how", "kinds"),
    [("mlp", ("scale",), SCALES), ("transformer", ("gl",), FACTORS)],
)
def test_the_barrier_does_not_depend_on_the_gauge_of_either_end(name, how, kinds):
    first, second = objective_of(name), objective_of(name, shake=5)
    here = align(first, second, how)
    far = moved(first, kinds, 5)
    there = align(far, moved(second, kinds, 6), how)
    assert float((far.theta - first.theta).norm()) > 0.1
    rises = [
        barrier(o, SegmentPath(o.theta, found.theta), t=5).loss.values
        for o, found in ((first, here), (far, there))
    ]
    assert rises[0] == pytest.approx(rises[1], rel=1e-7)
    raw = barrier(far, SegmentPath(far.theta, second.theta), t=5).loss.values
    assert raw[2] != pytest.approx(rises[0][2], rel=1e-3)


def test_the_user_model_is_left_alone():
    first, second = objective_of("batch_norm"), objective_of("batch_norm", shake=5)
    before = [copy.deepcopy(o.model.state_dict()) for o in (first, second)]
    random = torch.get_rng_state()
    align(first, second)
    for o, held in zip((first, second), before, strict=True):
        assert all(torch.equal(t, held[n]) for n, t in o.model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


# -- each step is the best one -------------------------------------------------------------


def test_an_order_is_the_best_of_all():
    first, second = objective_of("mlp"), objective_of("mlp", shake=5)
    a, b = state_of(first), state_of(second)
    group = next(g for g in groups_of(Observation.of(first, a)) if g.units == 7)
    names = first.space.names
    best, order = UnitOrder(group, names).best(a, b)

    def worth(state):
        return sum(float((a[n] * state[n]).sum()) for n in names)

    values = []
    for p in itertools.permutations(range(7)):
        p = list(p)
        gone = {**b, "2.weight": b["2.weight"][p], "2.bias": b["2.bias"][p]}
        values.append(worth({**gone, "4.weight": b["4.weight"][:, p]}))
    assert worth(best) == pytest.approx(max(values), rel=1e-12)
    assert sorted(order) == list(range(7))
    assert max(values) > values[0]


def pairs_of(name):
    objective = objective_of(name)
    return objective, find_pairs(objective).pairs


def test_a_rotation_is_the_procrustes_solution():
    first, pairs = pairs_of("transformer")
    second = objective_of("transformer", shake=5)
    a, b = state_of(first), state_of(second)
    for pair in pairs:
        best, _ = Rotation(pair).best(a, b)
        A, B, C = (pair.read(s) for s in (a, b, best))
        for head in range(pair.heads):
            stack = [np.concatenate([f[head].numpy() for f in p]) for p in (B, A)]
            Q, _ = scipy.linalg.orthogonal_procrustes(*stack)
            assert np.allclose(C.G[head].numpy(), B.G[head].numpy() @ Q, atol=1e-10)
            assert np.allclose(C.H[head].numpy(), B.H[head].numpy() @ Q, atol=1e-10)


def test_a_phase_is_the_best_of_many():
    first, pairs = pairs_of("rotary")
    second = objective_of("rotary", shake=5)
    a, b = state_of(first), state_of(second)
    (pair,) = [p for p in pairs if p.field == "complex"]

    def worth(state):
        A, B = pair.read(a), pair.read(state)
        return sum((x * y).sum((1, 2)) for x, y in zip(A, B, strict=True))

    best = worth(Rotation(pair).best(a, b)[0])
    turns = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)
    grid = [
        worth(pair.act(b, torch.polar(torch.ones(pair.heads), t.expand(pair.heads).float())
                       .to(torch.complex128)[:, None, None]))
        for t in turns
    ]  # fmt: skip
    assert torch.allclose(best, torch.stack(grid).amax(0), rtol=1e-4)
    assert bool((best >= torch.stack(grid).amax(0) - 1e-6).all())


@pytest.mark.parametrize("turn", [False, True])
def test_an_order_of_heads_is_the_best_of_all(turn):
    first, pairs = pairs_of("transformer")
    a, heads = state_of(first), HeadOrder(tuple(pairs), turn)
    b = heads.shuffled(a, np.array([1, 2, 0]))  # another order than its inverse
    for i, name in enumerate(heads.tensors):
        b[name] = b[name] + 0.1 * normal(*b[name].shape, seed=20 + i)

    def worth(state):
        return sum(float((a[n] * state[n]).sum()) for n in heads.tensors)

    table = sum(heads._values(pair, a, b) for pair in pairs)
    shift = [block for pair in pairs for block in pair.shift if turn]
    values = []
    for p in itertools.permutations(range(3)):
        state = heads.shuffled(b, np.array(p))
        for pair in pairs if turn else ():
            state, _ = Rotation(pair).best(a, state)
        beside = sum(float((s.read(a[s.name]) * s.read(state[s.name])).sum()) for s in shift)
        assert worth(state) - beside == pytest.approx(table[range(3), p].sum(), rel=1e-12)
        values.append(worth(state))
    assert worth(heads.best(a, b)[0]) == pytest.approx(max(values), rel=1e-12)
    assert heads.best(a, b)[1].tolist() == [2, 0, 1]


def test_a_balanced_pair_has_only_rotations_left():
    # What the docstring of Rotation derives: A that keeps G^T G = H^T H is orthogonal.
    G, H = (torch.linalg.qr(normal(6, 3, seed=s))[0] for s in (1, 2))
    root = torch.diag(torch.tensor([2.0, 1.0, 0.5]).double())
    pair = Pair(G @ root, H @ root)
    Q = torch.linalg.qr(normal(3, 3, seed=3))[0]
    for element, kept in ((Q, True), (Q @ torch.diag(torch.tensor([1.1, 1, 1]).double()), False)):
        there = pair.act(element)
        gap = (there.G.mT @ there.G - there.H.mT @ there.H).norm()
        assert (gap < 1e-12) == kept


def test_balanced_units_get_and_give_the_same_and_have_the_smallest_norm():
    objective = objective_of("mlp")
    other = moved(objective, SCALES, 1)
    # Aligned to a balanced network, the far one is balanced too.
    state = state_of(objective)
    for _ in range(200):
        for w, b, v in (("0.weight", "0.bias", "2.weight"), ("2.weight", "2.bias", "4.weight")):
            into = state[w].square().sum(1) + state[b].square()
            c = (state[v].square().sum(0) / into) ** 0.25
            state = {
                **state, w: state[w] * c[:, None], b: state[b] * c, v: state[v] / c,
            }  # fmt: skip
    home = with_state(objective, state)
    assert torch.allclose(outputs(home), outputs(other), atol=1e-10)
    assert float(home.theta.norm()) < float(objective.theta.norm())
    found = align(home, other, ("scale",))
    assert torch.allclose(found.theta, home.theta, atol=1e-9)


def test_units_and_factors_that_do_not_settle_are_told(monkeypatch):
    monkeypatch.setattr("sharpkit.landscape.paths.alignment.ROUNDS", 1)
    first = objective_of("transformer")
    found = align(first, first, ("scale", "gl"))
    assert any("1 rounds" in note for note in found.notes)


def test_random_starts_can_only_help():
    first, second = objective_of("cnn"), objective_of("cnn", shake=5)
    few, many = (align(first, second, ("permutation",), restarts=r) for r in (0, 12))
    assert (len(few.ends), len(many.ends)) == (1, 13)
    assert many.inner_after >= few.inner_after
    assert few.ends[0] != pytest.approx(few.inner_before)


# -- what is refused -----------------------------------------------------------------------


def test_a_move_that_changes_the_function_is_refused(monkeypatch):
    first, second = objective_of("mlp"), objective_of("mlp", shake=5)
    best = UnitOrder.best

    def wrong(self, a, b):
        found, order = best(self, a, b)
        return {**found, "2.weight": found["2.weight"] + 0.1 * a["2.weight"]}, order

    monkeypatch.setattr(UnitOrder, "best", wrong)
    with pytest.raises(MeasureError, match="same outputs"):
        align(first, second, ("permutation",))


def test_units_of_frozen_parameters_stay_in_place():
    first = objective_of("mlp", params=["2.*", "4.*"])
    second = objective_of("mlp", params=["2.*", "4.*"], shake=5)
    second = with_state(first, {**state_of(second), **{
        n: t for n, t in state_of(first).items() if n.startswith("0.")
    }})  # fmt: skip
    found = align(first, second, ("permutation", "scale"))
    assert any("fixed" in note for note in found.notes)
    assert {m.label.split(".")[0] for m in found.moved} == {"2"}
    assert torch.equal(found.state["0.weight"], state_of(first)["0.weight"])


def test_ends_can_be_thetas_and_state_dicts():
    first, second = objective_of("mlp"), objective_of("mlp", shake=5)
    thetas = [
        align(first, end, ("permutation",)).theta
        for end in (second, second.theta, second.model.state_dict())
    ]
    assert torch.equal(thetas[0], thetas[1])
    assert torch.equal(thetas[0], thetas[2])
    normed = objective_of("batch_norm")
    align(normed, normed.model.state_dict(), ("permutation",))
    with pytest.raises(MeasureError, match="running statistics"):
        align(normed, normed.theta)


def test_a_network_without_the_freedom_asked_for_is_left_as_it_is_and_told():
    first, second = objective_of("smooth"), objective_of("smooth", shake=5)
    found = align(first, second, ("scale", "gl"))
    assert torch.equal(found.theta, second.theta)
    assert [note for note in found.notes if "Nothing" in note][1].endswith("'gl' to move.")


def test_what_makes_no_alignment_is_refused():
    first = objective_of("mlp")
    state = dict(first.model.state_dict())
    for how in ((), "scale", ("turn",)):
        with pytest.raises(SettingsError, match="how"):
            align(first, first, how)
    with pytest.raises(SettingsError, match="restarts"):
        align(first, first, restarts=-1)
    with pytest.raises(ShapeError, match=r"0\.weight"):
        align(first, {n: t for n, t in state.items() if n != "0.weight"})
    with pytest.raises(ShapeError, match=r"0\.bias"):
        align(first, {**state, "0.bias": torch.zeros(3)})
    with pytest.raises(MeasureError, match="finite"):
        align(first, {**state, "0.bias": state["0.bias"] / 0})


def test_a_deficient_pair_is_left_out_and_said():
    first, second = objective_of("linear"), objective_of("linear", shake=5)
    state = state_of(first)
    state = {**state, "1.weight": state["1.weight"].clone()}
    state["1.weight"][:, 0] = 0
    found = align(with_state(first, state), second, ("gl",))
    assert any("full rank" in note for note in found.notes)
    assert found.moved == ()
    assert torch.equal(found.theta, second.theta)
