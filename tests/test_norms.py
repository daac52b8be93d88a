"""Norms, margins, Fisher-Rao, noise scale and PAC-Bayes measures: their special cases."""

import math

import numpy as np
import oracles_norms as norms
import pytest
import torch
import torch.nn.functional as F
from cases import (
    CE,
    RAGGED,
    TOKENS,
    Encoder,
    TiedModel,
    X,
    Y,
    batch_norm,
    masked_tokens,
    mlp,
    normal,
    seeded,
)
from torch import nn

import sharpkit as sk
from sharpkit import measures
from sharpkit.errors import MeasureError, SettingsError, ShapeError
from sharpkit.estimators import noise_level, worst_radius
from sharpkit.estimators.noise_scale import noise_scale
from sharpkit.results import Estimate
from sharpkit.testing import initial_of, symmetric_pair


def measure(objective, name, *, seed=0, initial=None, num_groups=8, **settings):
    analysis = sk.Analysis(objective, seed=seed, initial=initial, num_groups=num_groups)
    return measures.get(name)(analysis, **settings)


def labelled(seed=0, kind="node_scale"):
    return symmetric_pair(kind, seed, labels=True)[0]


def plain(build=mlp, criterion=CE, data=RAGGED):
    return sk.Objective(seeded(build), criterion, data)


# -- norms -------------------------------------------------------------------------------


def test_parameter_norm_of_weights_and_squared():
    o = plain()
    weights = [p for p in o.model.parameters() if p.ndim >= 2]
    square = sum(p.square().sum().item() for p in weights)
    e = measure(o, "parameter_norm", which="weights", squared=True)
    assert e.value == pytest.approx(square, rel=1e-13)
    assert [p.label for p in e.parts] == ["0", "2", "4"]
    assert sum(p.value for p in e.parts) == pytest.approx(square, rel=1e-13)
    with pytest.raises(MeasureError, match="which='all'"):
        measure(o.restrict("*bias"), "parameter_norm", which="weights")


def test_distance_needs_the_start_and_sums_in_float64():
    o = plain()
    with pytest.raises(MeasureError, match=r"Pass initial=\.\.\."):
        measure(o, "distance_from_initialization")
    start = o.theta + torch.linspace(-1, 1, o.space.dim)
    e = measure(o, "distance_from_initialization", initial=start)
    assert e.value == pytest.approx((o.theta - start).norm().item(), rel=1e-14)


def conv_net():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 2, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.BatchNorm1d(4), nn.Linear(4, 3),
    )  # fmt: skip
    for norm, size in ((model[1], 3), (model[7], 4)):
        norm.running_mean.copy_(normal(size, seed=1))
        norm.running_var.copy_(0.5 + normal(size, seed=2).square())
        norm.weight.data.copy_(normal(size, seed=3))
        norm.bias.data.copy_(normal(size, seed=4))
    return model


IMAGES = (normal(6, 2, 5, 5), torch.arange(6) % 3)


def folded(model):
    """Fold the first BatchNorm into its convolution; the second stands after pooling."""
    conv, bn = model[0], model[1]
    a = bn.weight / (bn.running_var + bn.eps).sqrt()
    return a[:, None, None, None] * conv.weight, a * (conv.bias - bn.running_mean) + bn.bias


def test_path_norm_folds_batch_norm():
    o = plain(conv_net, CE, IMAGES)
    m = o.model
    with torch.no_grad():
        W, b = folded(m)
        h = F.conv2d(torch.ones(1, 2, 5, 5).double(), W**2, b**2, stride=2, padding=1)
        h = F.conv2d(h, m[3].weight ** 2).mean(dim=(2, 3))
        a = m[7].weight / (m[7].running_var + m[7].eps).sqrt()
        h = a**2 * h + (m[7].bias - a * m[7].running_mean) ** 2
        expected = (h @ (m[8].weight ** 2).T + m[8].bias ** 2).sum().item()
    state = {n: t.clone() for n, t in m.state_dict().items()}
    assert measure(o, "path_norm", squared=True).value == pytest.approx(expected, rel=1e-12)
    assert measure(o, "path_norm").value == pytest.approx(math.sqrt(expected), rel=1e-12)
    assert all(torch.equal(state[n], t) for n, t in m.state_dict().items())
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.modules())
    # Parts of theta are measured with the rest where it is.
    part = sk.Objective(m, CE, IMAGES, params="8.*")
    assert measure(part, "path_norm", squared=True).value == pytest.approx(expected, rel=1e-12)


def test_path_norm_counts_paths_one_by_one():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    o = sk.Objective(model.double(), nn.MSELoss(), (normal(4, 2), normal(4, 1)))
    U, v = model[0].weight, model[2].weight
    paths = [(U[j, i] * v[0, j]).item() ** 2 for i in range(2) for j in range(2)]
    assert measure(o, "path_norm").value == pytest.approx(math.sqrt(sum(paths)), rel=1e-13)


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.inner, self.out = function, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.function(x, self.inner(x)))


def test_path_norm_takes_residual_and_functional_relu():
    o = plain(lambda: Functional(lambda x, y: x + F.relu(y)))
    p = {n: t.double() ** 2 for n, t in o.model.named_parameters()}
    ones = torch.ones(4).double()
    h = ones + p["inner.weight"] @ ones + p["inner.bias"]
    expected = (p["out.weight"] @ h + p["out.bias"]).sum().item()
    assert measure(o, "path_norm", squared=True).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (mlp, "'1', of kind Tanh"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), "of kind LayerNorm"),
        (lambda: Functional(lambda x, y: F.gelu(y)), "does not double"),
        (lambda: Functional(lambda x, y: F.relu(x) * F.relu(y)), "does not double"),
        (lambda: Functional(lambda x, y: x - F.relu(y)), "subtracts"),
        (lambda: Functional(lambda x, y: F.relu(y) + 1.0), "does not double"),
    ],
)
def test_path_norm_refuses_what_has_no_paths(build, words):
    with pytest.raises(MeasureError, match=words):
        measure(plain(build), "path_norm")


def test_path_norm_refuses_attention_and_tokens():
    o = plain(Encoder, CE, (normal(11, 5, 4), Y))
    with pytest.raises(MeasureError, match="of kind"):
        measure(o, "path_norm")
    with pytest.raises(MeasureError, match="of kind Embedding"):
        measure(plain(TiedModel, CE, (TOKENS, TOKENS)), "path_norm")


def dense_map(layer):
    eye = torch.eye(math.prod(layer.in_shape)).double()
    return torch.stack([layer.apply(e.reshape(1, *layer.in_shape)).reshape(-1) for e in eye], dim=1)


@pytest.mark.parametrize("options", [
    {"padding": 1}, {"stride": 2}, {"padding": 2, "padding_mode": "circular"},
    {"dilation": 2, "groups": 2},
])  # fmt: skip
def test_spectral_norm_of_a_convolution_is_that_of_its_dense_matrix(options):
    model = seeded(lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, **options), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ))  # fmt: skip
    x, y = normal(3, 2, 12, 12), torch.arange(3)
    o = sk.Objective(model, CE, (x, y))
    e = measure(o, "spectral_norms", tol=1e-6)
    W, zero = model[0].weight, torch.zeros(1, 2, 12, 12).double()
    J = torch.func.jacrev(lambda z: model[0](z))(zero).reshape(-1, zero.numel()).detach()
    exact = torch.linalg.matrix_norm(J, ord=2).item()
    (part,) = e.parts
    assert part.label == "0"
    assert abs(part.value - exact) <= part.probe_error <= 1e-4 * exact
    assert abs(e.value - 2 * math.log(exact)) <= e.probe_error
    assert (e.error_kind, e.converged) == ("bound", True)
    # The kernel as a matrix has another norm.
    assert abs(torch.linalg.matrix_norm(W.flatten(1), ord=2).item() / exact - 1) > 0.05


def test_spectral_norms_fold_batch_norm_and_see_every_matrix():
    o = plain(conv_net, CE, IMAGES)
    e = measure(o, "spectral_norms")
    assert [p.label for p in e.parts] == ["0", "3", "8"]
    assert e.details["folded"] == ["1"]
    W = folded(o.model)[0]
    zero = torch.zeros(1, 2, 5, 5).double()
    J = torch.func.jacrev(lambda z: F.conv2d(z, W, stride=2, padding=1))(zero).detach()
    exact = torch.linalg.matrix_norm(J.reshape(-1, zero.numel()), ord=2).item()
    assert e.parts[0].value == pytest.approx(exact, rel=1e-4)
    labels = [
        p.label for p in measure(plain(Encoder, CE, (normal(11, 5, 4), Y)), "spectral_norms").parts
    ]
    assert any("in_proj_weight" in label for label in labels)
    assert any("out_proj" in label for label in labels)
    assert len(set(labels)) == len(labels)


def test_spectral_norms_that_do_not_converge_or_vanish():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()))
    o = sk.Objective(model, CE, (normal(3, 1, 24, 24), torch.arange(3)))
    e = measure(o, "spectral_norms", max_matvecs=3)
    assert not e.converged
    assert "Give more `max_matvecs`" in e.notes[0]
    zero = nn.Sequential(nn.Linear(4, 3)).double()
    nn.init.zeros_(zero[0].weight)
    e = measure(sk.Objective(zero, CE, RAGGED), "spectral_norms")
    assert e.value == -math.inf
    assert "zero" in e.notes[0]
    with pytest.raises(MeasureError, match="has none"):
        measure(symmetric_pair("pair_scale", 0)[0], "spectral_norms")


# -- margins and labels ------------------------------------------------------------------


def test_margins_of_tokens_leave_ignored_ones_out():
    y = masked_tokens()
    o = plain(TiedModel, nn.CrossEntropyLoss(), [(TOKENS[:8], y[:8]), (TOKENS[8:], y[8:])])
    found, examples = o.margins()
    z = o.model(TOKENS).detach()
    expected, rows = [], []
    for n in range(len(y)):
        for t in range(y.shape[1]):
            if y[n, t] != -100:
                column = z[n, :, t].tolist()
                own = column.pop(int(y[n, t]))
                expected.append(own - max(column))
                rows.append(n)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert examples.tolist() == rows
    assert o.error_rate() == pytest.approx(np.mean(np.array(expected) <= 0))


@pytest.mark.parametrize("count", [1, 3, 11])
def test_weakest_margins_and_their_gradient(count):
    o = plain()
    before = o.cost
    value, gradient, errors = o.weakest_margins(count)
    spent = o.cost - before
    assert (spent.gradients, spent.forwards) == (1, 1)
    wrong = (o.model(X).argmax(1) != Y).double().mean().item()
    assert errors == pytest.approx(wrong)
    before = o.cost
    assert o.error_rate() == pytest.approx(wrong)
    assert (o.cost - before).forwards == 1

    def whole(theta):
        z = torch.func.functional_call(o.model, o.space.unflatten(theta), (X,))
        own = z.gather(1, Y[:, None])[:, 0]
        rest = z.masked_fill(F.one_hot(Y, 3).bool(), -math.inf).amax(1)
        return -(own - rest).sort().values[:count].clamp(min=0).sum() / count

    assert value == pytest.approx(whole(o.theta).item(), rel=1e-12)
    assert torch.allclose(gradient, torch.func.grad(whole)(o.theta), rtol=1e-10)


@pytest.mark.parametrize("nan", [False, True])
def test_ties_and_nan_are_errors(nan):
    model = nn.Linear(2, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    o = sk.Objective(model, CE, (normal(4, 2), torch.zeros(4, dtype=torch.long)))
    if nan:
        o = o.at(torch.full_like(o.theta, math.nan))
    assert o.error_rate() == 1.0


@pytest.mark.parametrize(
    ("criterion", "targets", "words"),
    [
        (nn.MSELoss(), normal(11, 3), "Got MSELoss"),
        (nn.CrossEntropyLoss(), torch.softmax(normal(11, 3), 1), "class indices"),
        (nn.BCEWithLogitsLoss(), torch.rand(11, 3).double(), "0 and 1"),
    ],
)
def test_what_has_no_labels_says_so(criterion, targets, words):
    o = plain(mlp, criterion, (X, targets))
    for name in ("margin", "pac_bayes_flatness", "sharpness_flatness"):
        with pytest.raises(MeasureError, match=words):
            measure(o, name)


def test_a_batch_loss_has_no_labels_but_a_loss():
    def batch_loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    o = sk.Objective.from_batch_loss(seeded(mlp), batch_loss, RAGGED)
    with pytest.raises(MeasureError, match="Objective\\(model, criterion, data\\)"):
        measure(o, "margin")
    assert measure(o, "pac_bayes_flatness", drop="loss", num_pairs=4).value > 0


def test_margin_quantile_and_its_data_error():
    """The standard error of the quantile is that of many samples."""

    def sample(seed, n=200, copies=1):
        x = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.ones_(model.weight)
        y = torch.ones(n, copies).double()
        # With copies, every example has several labels, all alike.
        data = (x.expand(-1, copies)[:, :, None], y[:, :, None])
        return sk.Objective(model, nn.BCEWithLogitsLoss(), data, check=False)

    for copies in (1, 3):
        truth = -1.2815515655446004
        found = [measure(sample(s, copies=copies), "margin") for s in range(150)]
        z = np.array([(e.value - truth) / e.data_error for e in found])
        assert abs(z.mean()) < 0.3, copies
        assert 0.85 < z.std() < 1.2, copies
    assert measure(sample(0), "margin", num_groups=0).data_error is None
    assert measure(sample(0), "margin", percentile=0.0).value < truth
    with pytest.raises(SettingsError, match="from 0 to 100"):
        measure(sample(0), "margin", percentile=101.0)


# -- Fisher-Rao --------------------------------------------------------------------------


@pytest.mark.parametrize("build", [mlp, lambda: Functional(lambda x, y: F.gelu(y)), batch_norm])
def test_fisher_rao_is_that_of_example_gradients(build):
    o = plain(build)
    rows = o.per_example_gradients()
    e = measure(o, "fisher_rao_norm")
    q = (rows @ o.theta).square()
    assert e.value == pytest.approx(q.mean().item(), rel=1e-11)
    assert e.data_error == pytest.approx((q.std() / len(q) ** 0.5).item(), rel=1e-9)
    v = normal(o.space.dim, seed=4)
    slopes, sizes = o.example_slopes(v)
    assert torch.allclose(slopes, rows @ v, rtol=1e-10)
    assert bool((sizes >= slopes.abs() * (1 - 1e-12)).all())
    with pytest.raises(ShapeError):
        o.example_slopes(v[1:])


def test_fisher_rao_of_tokens_and_of_batch_losses():
    o = plain(TiedModel, CE, (TOKENS, masked_tokens()))
    expected = (o.per_example_gradients() @ o.theta).square().mean().item()
    assert measure(o, "fisher_rao_norm").value == pytest.approx(expected, rel=1e-11)

    def batch_loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    looped = sk.Objective.from_batch_loss(seeded(mlp), batch_loss, RAGGED)
    assert measure(looped, "fisher_rao_norm").value == pytest.approx(
        measure(plain(), "fisher_rao_norm").value, rel=1e-11
    )
    with pytest.raises(MeasureError, match="Use fisher='empirical'"):
        measure(looped, "fisher_rao_norm", fisher="true")


def test_true_fisher_averages_over_the_models_own_labels():
    o = plain()
    p = torch.softmax(o.model(X), dim=1).detach()
    total = 0.0
    for label in range(3):
        given = sk.Objective(o.model, CE, (X, torch.full((11,), label)))
        total += (p[:, label] * (given.per_example_gradients() @ o.theta).square()).sum().item()
    for groups in (0, 4):
        e = measure(o, "fisher_rao_norm", fisher="true", num_groups=groups)
        assert e.value == pytest.approx(total / 11, rel=1e-10)
        assert (e.data_error is None) == (groups == 0)


@pytest.mark.parametrize("fisher", ["empirical", "true"])
@pytest.mark.parametrize("offset", [0.0, 300.0, 1000.0])
def test_fisher_rao_knows_what_logits_lose_to_a_common_offset(fisher, offset):
    covered = []
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
        with torch.no_grad():
            model[2].bias += offset
        x, y = torch.randn(30, 5), torch.randint(4, (30,))
        single, double = (
            measure(
                sk.Objective(model, nn.CrossEntropyLoss(), (x, y), dtype=t),
                "fisher_rao_norm",
                fisher=fisher,
            )
            for t in (torch.float32, torch.float64)
        )
        covered.append(abs(single.value - double.value) / single.probe_error)
    assert max(covered) < 1
    if not offset:
        assert single.probe_error < 1e-3 * single.value


def test_fisher_rao_of_a_homogeneous_network_is_a_closed_form():
    """Liang et al. 2019: without biases theta . grad = depth <dl/df, f>."""
    model = seeded(lambda: nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(),
        nn.Linear(5, 3, bias=False),
    ))  # fmt: skip
    o = sk.Objective(model, CE, RAGGED)
    f = model(X).detach()
    slopes = torch.softmax(f, 1) - F.one_hot(Y, 3)
    expected = 9 * (slopes * f).sum(1).square().mean().item()
    assert measure(o, "fisher_rao_norm").value == pytest.approx(expected, rel=1e-11)


# -- noise scale -------------------------------------------------------------------------


def vectors(seed, n, mean, groups=1):
    """Quadratics (theta - x)^2 / 2 around theta = 0: example gradients are -x."""
    g = torch.Generator().manual_seed(seed)
    x = mean + torch.randn(n, 5, generator=g, dtype=torch.float64) * torch.arange(1, 6)

    def batch_loss(model, batch):
        return 0.5 * ((model.w - batch) ** 2).sum(), len(batch)

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    return sk.Objective.from_batch_loss(Point(), batch_loss, [x[: n // 3], x[n // 3 :]])


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_noise_scale_is_calibrated(size):
    truth = 55 / (5 * 4.0)
    z, inside = [], 0
    for seed in range(200):
        e = measure(vectors(seed, 200, 2.0), "gradient_noise_scale", group_size=size)
        z.append((e.value - truth) / e.data_error)
        low, high = e.details["interval"]
        inside += low <= truth <= high
    z = np.array(z)
    assert abs(z.mean()) < 0.25
    assert 0.85 < z.std() < 1.25
    assert 0.9 <= inside / 200 < 0.99


def test_noise_scale_where_the_gradient_is_none():
    inside = undefined = 0
    for seed in range(40):
        e = measure(vectors(seed, 60, 0.0), "gradient_noise_scale")
        low, high = e.details["interval"]
        inside += high == math.inf  # the truth is infinite
        undefined += e.error_kind == "lower_bound"
        assert e.converged <= math.isfinite(high)
        assert math.isfinite(e.value)
        assert e.value >= 0
        if e.error_kind == "lower_bound":
            assert "undefined" in e.notes[-1]
            assert e.interval()[1] == math.inf
            assert e.value == low
    assert inside >= 36
    assert undefined > 6


def test_noise_scale_interval_near_the_border():
    # Small but not zero: the interval must hold the truth as often as it says.
    truth = 55 / (5 * 0.09)
    inside = 0
    for seed in range(80):
        e = measure(vectors(seed, 100, 0.3), "gradient_noise_scale")
        low, high = e.details["interval"]
        inside += low <= truth <= high
    assert inside / 80 > 0.9


def test_noise_scale_needs_groups():
    with pytest.raises(MeasureError, match="four groups"):
        measure(vectors(0, 9, 1.0), "gradient_noise_scale", group_size=5)
    with pytest.raises(SettingsError, match="group_size"):
        measure(vectors(0, 9, 1.0), "gradient_noise_scale", group_size=0)


def test_noise_scale_estimates_are_unbiased():
    g = np.random.default_rng(0)
    traces, squares = [], []
    for _ in range(4000):
        x = g.normal(size=(6, 3)) + 0.5
        sizes = np.array([3.0, 1.0, 2.0])
        means = np.stack([x[:3].mean(0), x[3], x[4:].mean(0)])
        # Each group a block of its own, leaving two groups: enough for the estimates.
        one = np.ones(3)
        sums = sizes[:, None] * means
        s = noise_scale(sums @ sums.T, sizes, one, sizes * (means**2).sum(1))
        traces.append(s.trace)
        squares.append(s.square)
    for values, truth in ((traces, 3.0), (squares, 0.75)):
        assert abs(np.mean(values) - truth) < 4 * np.std(values) / 4000**0.5


def test_what_is_not_defined_is_left_out_of_all_measures(monkeypatch):
    kept = {n: m for n, m in measures.registry._REGISTRY.items() if n in (
        "path_norm", "margin", "parameter_norm", "spectral_norms", "distance_from_initialization",
        "gradient_noise_scale", "fisher_rao_norm",
    )}  # fmt: skip
    monkeypatch.setattr(measures.registry, "_REGISTRY", kept)

    def asked(objective, **options):
        return {s.measure for s in sk.score(objective, **options)}

    o = labelled()
    assert asked(o, initial=initial_of(o)) == set(kept)
    assert asked(plain()) == set(kept) - {"path_norm", "distance_from_initialization"}
    product = symmetric_pair("pair_scale", 0)[0]
    assert asked(product) == {"parameter_norm", "gradient_noise_scale", "fisher_rao_norm"}
    few = plain(mlp, CE, (X[:3], Y[:3]))
    assert asked(few) == {"parameter_norm", "margin", "spectral_norms"}


# -- sigma -------------------------------------------------------------------------------


def level(seed=0, target=0.3, num_pairs=32, largest=10.0, drop=None, dim=20):
    scales = torch.linspace(0.1, 2, dim, dtype=torch.float64)
    return noise_level(
        drop or (lambda sigma, z: sigma**2 * float(scales @ z.square())),
        target=target,
        like=torch.zeros(dim, dtype=torch.float64),
        largest=largest,
        num_pairs=num_pairs,
        generator=torch.Generator().manual_seed(seed),
    )


def test_noise_level_is_calibrated_and_exact():
    truth = (0.3 / torch.linspace(0.1, 2, 20).sum().item()) ** 0.5
    for g in (lambda s: s, lambda s: 1 / s**2):
        z = []
        for seed in range(200):
            value, error, draws = level(seed).of(g)
            z.append((value - g(truth)) / error)
            assert np.mean(draws) == pytest.approx(value, rel=1e-9)
            assert np.std(draws, ddof=1) / 32**0.5 == pytest.approx(error, rel=1e-9)
        z = np.array(z)
        assert abs(z.mean()) < 0.25
        assert 0.85 < z.std() < 1.15
    constant = level(drop=lambda sigma, z: sigma**3)  # no scatter: the root itself
    assert constant.sigma == pytest.approx(0.3 ** (1 / 3), rel=1e-4)


def test_noise_level_of_steps_and_odd_terms():
    # An odd term cancels within pairs, and steps (an error rate) do no harm.
    odd = level(drop=lambda sigma, z: sigma**2 + 5 * sigma * float(z[0]))
    assert odd.sigma == pytest.approx(0.3**0.5, rel=1e-4)
    z = []
    for seed in range(60):
        found = level(seed, drop=lambda sigma, z: round(20 * min(sigma * abs(float(z[0])), 1)) / 20)
        value, error, _ = found.of(math.log)
        z.append((value, error))
    values, errors = np.array(z).T
    assert np.std(values) == pytest.approx(errors.mean(), rel=0.35)


def test_noise_level_that_is_not_reached_or_passed_at_once():
    assert not level(largest=1e-3).reached
    assert level(largest=1e-3).sigma == 1e-3
    with pytest.raises(MeasureError, match="smallest noise tried"):
        level(drop=lambda sigma, z: 1.0)
    hump = level(drop=lambda sigma, z: 0.5 * math.exp(-((math.log(sigma / 0.2)) ** 2)))
    assert hump.reached  # the drop falls again before the largest sigma
    assert hump.sigma < 0.2
    overflow = level(drop=lambda sigma, z: sigma if sigma < 2 else math.nan)
    assert overflow.sigma == pytest.approx(0.3, rel=1e-4)
    for bad in ({"num_pairs": 3}, {"target": 0.0}, {"largest": math.inf}):
        with pytest.raises(SettingsError):
            level(**bad)


@pytest.mark.parametrize("magnitude", [False, True])
def test_pac_bayes_flatness_is_that_of_very_many_draws(magnitude):
    name = "pac_bayes_magnitude_flatness" if magnitude else "pac_bayes_flatness"
    o = labelled(1)
    e = measure(o, name, num_pairs=128)
    truth = norms.sigma(o, magnitude, draws=8000) ** -2
    assert abs(e.value - truth) < 4 * e.probe_error
    assert e.probe_error < 0.25 * truth
    assert e.details["sigma"] == pytest.approx(e.value**-0.5)
    # sigma is a standard deviation: its square would be far off.
    assert abs(e.value**2 - truth) > 10 * e.probe_error


def test_pac_bayes_flatness_of_a_quadratic_loss_is_the_trace():
    # L = |w - x|^2 at w = x: the loss rises by sigma^2 P.
    model = nn.Linear(1, 40, bias=False).double()
    data = (torch.ones(1, 1).double(), model.weight.detach().T.clone())
    o = sk.Objective(model, nn.MSELoss(), data)
    e = measure(o, "pac_bayes_flatness", drop="loss", target=0.2)
    assert abs(e.value - 5) < 4 * e.probe_error < 1
    relative = measure(o, "pac_bayes_magnitude_flatness", drop="loss", target=0.2)
    truth = model.weight.square().mean().item() / 0.2
    assert abs(relative.value - truth) < 4 * relative.probe_error


def test_pac_bayes_magnitude_flatness_keeps_its_claims_exactly():
    # The same draws for both networks: what is claimed holds to rounding.
    for symmetry in ("layer_scale", "node_scale"):
        a, b = (
            measure(o, "pac_bayes_magnitude_flatness", num_pairs=4)
            for o in symmetric_pair(symmetry, 0, labels=True)
        )
        assert a.value == pytest.approx(b.value, rel=1e-9)
        c = [measure(o, "pac_bayes_flatness", num_pairs=4).value
             for o in symmetric_pair(symmetry, 0, labels=True)]  # fmt: skip
        assert abs(c[0] / c[1] - 1) > 0.2


def test_same_seed_same_bits_and_paired_draws():
    o = labelled()
    one, two = (measure(o, "pac_bayes_flatness", seed=4, num_pairs=4) for _ in range(2))
    assert (one.value, one.draws) == (two.value, two.draws)
    assert one.value != measure(o, "pac_bayes_flatness", seed=5, num_pairs=4).value
    assert np.mean(one.draws) == pytest.approx(one.value)
    assert one.dof == 3


def test_sigma_that_is_not_reached_is_a_bound():
    o = labelled()
    e = measure(o, "pac_bayes_flatness", largest=0.01, num_pairs=4)
    assert (e.value, e.error_kind, e.converged) == (pytest.approx(1e4), "bound", False)
    assert e.interval()[0] == 0.0
    assert "The accuracy does not drop by 0.1 up to sigma = 0.01" in e.notes[0]
    truth = measure(o, "pac_bayes_flatness").value
    assert e.interval()[0] <= truth <= e.value
    s = measure(o, "sharpness_flatness", largest=1e-5, drop="loss")
    assert (s.value, s.converged) == (pytest.approx(1e10), False)
    assert "The loss does not rise" in s.notes[0]


# -- bounds ------------------------------------------------------------------------------


def test_pac_bayes_bound_and_its_references():
    o = labelled(1)
    start = initial_of(o)
    sigma = measure(o, "pac_bayes_flatness").details["sigma"]
    square = (o.theta - start).square().sum().item()
    m = 5000
    e = measure(o, "pac_bayes_bound", initial=start, num_examples=m)
    assert e.value == pytest.approx(square / 4 / sigma**2 + math.log(m / sigma) + 10, rel=1e-12)
    origin = measure(o, "pac_bayes_bound", reference="origin")
    square = o.theta.square().sum().item()
    assert origin.value == pytest.approx(
        square / 4 / sigma**2 + math.log(12 / sigma) + 10, rel=1e-12
    )
    slope = square / 2 / sigma**3 + 1 / sigma
    assert origin.probe_error > slope * e.details["sigma_error"]
    assert origin.probe_error == pytest.approx(slope * e.details["sigma_error"], rel=0.4)


def test_half_the_divergence_is_the_first_term_of_the_bounds():
    g = torch.Generator().manual_seed(0)
    d = torch.randn(30, generator=g, dtype=torch.float64)
    sigma, eps = 0.3, 1e-3
    normal_at = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal_at(d, sigma), normal_at(0 * d, sigma)).sum()
    assert norms.bound(d.square().sum().item(), sigma, 1) - math.log(1 / sigma) - 10 == (
        pytest.approx(kl.item() / 2)
    )
    s = (eps**2 + sigma**2 * d**2).sqrt()

    def divergence(prior):
        return torch.distributions.kl_divergence(normal_at(d, s), normal_at(0 * d, prior)).sum()

    best = min(divergence(0.2 + 0.001 * k).item() for k in range(2000))
    top = eps**2 + (sigma**2 + 1) * d.square().mean()
    formula = 0.25 * (top / (eps**2 + sigma**2 * d**2)).log().sum().item()
    assert formula == pytest.approx(best / 2, rel=1e-5)


def test_magnitude_bound_is_the_published_formula():
    o = labelled(1)
    start = o.theta + 0.1 * normal(o.space.dim, seed=9)
    e = measure(o, "pac_bayes_magnitude_bound", initial=start, num_pairs=8)
    s = e.details["sigma"]
    for reference in ("init", "origin"):
        d = ((o.theta - start) ** 2).tolist()
        top = d if reference == "init" else (o.theta**2).tolist()
        total = sum(
            math.log((1e-6 + (s**2 + 1) * sum(top) / len(d)) / (1e-6 + s**2 * v)) for v in d
        )
        got = measure(
            o, "pac_bayes_magnitude_bound", initial=start, num_pairs=8, reference=reference
        )
        assert got.value == pytest.approx(total / 4 + math.log(12 / s) + 10, rel=1e-10)


# -- alpha -------------------------------------------------------------------------------


def quadratic_radius(a, b, target, norm="linf", **options):
    def f(z):
        value = float(b @ z + 0.5 * a @ z.square())
        return value, b + a * z, value

    return worst_radius(
        f, lambda z: f(z)[0], target=target, start_value=0.0, start_gradient=b, norm=norm,
        generator=torch.Generator().manual_seed(0),
        **{"largest": 10.0, "steps": 10, "tolerance": 0.01, **options},
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_worst_radius_of_a_separable_quadratic(seed):
    g = torch.Generator().manual_seed(seed)
    a = 0.5 + torch.rand(6, generator=g, dtype=torch.float64)
    b = torch.randn(6, generator=g, dtype=torch.float64)
    target = 0.4
    slope, bend = b.abs().sum().item(), a.sum().item()
    truth = (-slope + math.sqrt(slope**2 + 2 * bend * target)) / bend
    found = quadratic_radius(a, b, target)
    assert truth <= found.upper <= 1.011 * truth
    assert found.lower <= truth
    assert found.upper <= found.lower * 1.01 * (1 + 1e-12)
    round_ball = quadratic_radius(torch.ones(6).double(), b, target, norm="l2")
    length = b.norm().item()
    assert round_ball.upper == pytest.approx(math.sqrt(length**2 + 2 * target) - length, rel=0.011)


def test_worst_radius_that_is_not_reached_or_not_finite():
    a, b = torch.ones(3).double(), torch.ones(3).double()
    found = quadratic_radius(a, b, 0.4, largest=1e-3)
    assert (found.reached, found.upper) == (False, 1e-3)
    flat = quadratic_radius(a, 0 * b, 0.4)  # no gradient: from a random direction
    assert flat.upper == pytest.approx(math.sqrt(0.8 / 3), rel=0.05)

    def f(z):
        value = float(z.sum()) if float(z.abs().max()) < 0.1 else math.nan
        return value, torch.ones_like(z), value

    nan = worst_radius(
        f, lambda z: f(z)[0], target=5.0, start_value=0.0, start_gradient=b, norm="linf",
        largest=1.0, steps=5, tolerance=0.01, generator=torch.Generator(),
    )  # fmt: skip
    assert nan.upper == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("magnitude", [False, True])
def test_sharpness_flatness_is_what_a_search_finds(magnitude, seed):
    name = "sharpness_magnitude_flatness" if magnitude else "sharpness_flatness"
    o = labelled(seed)
    e = measure(o, name)
    searched = norms.alpha(o, magnitude, schedules=((25, 0.8), (80, 0.93), (40, 0.5))) ** -2
    assert (e.error_kind, e.converged) == ("lower_bound", True)
    # A point found proves the value; a search for every pair of labels finds up to 2.3 times
    # as much, as the docstring says.
    assert 0.4 * searched < e.value < 1.05 * searched
    assert e.value < e.value + e.probe_error < 1.05 * e.value


def test_sharpness_flatness_of_a_linear_loss_is_exact():
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64))

    def batch_loss(model, batch):
        return (model.w * torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64)).sum(), 1

    o = sk.Objective.from_batch_loss(Line(), batch_loss, [torch.zeros(1)])
    options = {"drop": "loss", "target": 0.1}
    plain_box = measure(o, "sharpness_flatness", **options).value
    assert (1 - 0.05) * (5 / 0.1) ** 2 < plain_box <= (5 / 0.1) ** 2
    relative = measure(o, "sharpness_magnitude_flatness", **options).value  # |w| g sums to 5 too
    assert (1 - 0.05) * (5 / 0.1) ** 2 < relative <= (5 / 0.1) ** 2


def test_sharpness_bounds_are_the_bounds_at_the_noise_of_the_box():
    o = labelled(1)
    start = initial_of(o)
    for kind, formula in (
        ("", lambda s: norms.bound((o.theta - start).square().sum().item(), s, 12)),
        ("magnitude_", lambda s: norms.magnitude_bound(o, s)),
    ):
        e = measure(o, f"sharpness_{kind}bound", initial=start)
        radius = measure(o, f"sharpness_{kind}flatness").value ** -0.5
        assert e.value == pytest.approx(formula(norms.in_the_box(radius, o)), rel=1e-10)
        assert e.error_kind == ("bound" if kind else "lower_bound")
        assert e.converged
    # Noise of that size stays in the box at least half of the time.
    dim, g = 200, np.random.default_rng(0)
    largest = np.abs(g.normal(size=(4000, dim))).max(axis=1) / math.sqrt(2 * math.log(2 * dim))
    assert 0.5 <= np.mean(largest <= 1) < 0.95


# -- long runs ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["node_scale", "orthogonal"])
@pytest.mark.parametrize("name", ["pac_bayes_flatness", "pac_bayes_magnitude_flatness"])
def test_sigma_of_networks_is_calibrated(kind, name):
    o = labelled(0 if kind == "orthogonal" else 1, kind)
    truth = norms.sigma(o, "magnitude" in name, draws=60000) ** -2
    z, inside = [], 0
    for seed in range(100):
        e: Estimate = measure(o, name, seed=seed, largest=10.0)
        z.append((e.value - truth) / e.probe_error)
        low, high = e.interval()
        inside += low <= truth <= high
    z = np.array(z)
    assert abs(z.mean()) < 0.45
    assert 0.8 < z.std() < 1.3
    assert inside >= 88


# -- steep curves, shares and rounding ---------------------------------------------------


@pytest.mark.parametrize("power", [12, 20, 40])
@pytest.mark.parametrize("unit", [0.011, 0.02, 0.77])
def test_noise_level_of_a_steep_drop(power, unit):
    found = level(
        drop=lambda sigma, z: (sigma / unit) ** power * float(z.square().mean()) ** (power / 2),
        target=1.0, num_pairs=8, largest=2.0, dim=200,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(8)]
    mean = np.mean([float(z.square().mean()) ** (power / 2) for z in draws])
    truth = unit * mean ** (-1 / power)
    assert found.sigma == pytest.approx(truth, rel=6e-3)
    assert abs(found.sigma - truth) < 0.5 * found.of(lambda s: s)[1]


def test_a_drop_of_exactly_the_target_is_still_allowed():
    # Margins -1, 0.1, 0.2, 0.5, ... and only the bias moves: two more of ten may be missed,
    # and 3/10 - 1/10 is more than 0.2 by rounding.
    model = nn.Linear(1, 1).double()
    model.weight.data.fill_(1.0)
    model.bias.data.zero_()
    x = torch.tensor([-1, 0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2]).double()[:, None]
    o = sk.Objective(model, nn.BCEWithLogitsLoss(), (x, torch.ones_like(x)), params="bias")
    for target, alpha in ((0.2, 0.5), (0.1, 0.2)):
        assert measure(o, "sharpness_flatness", target=target).details["alpha"] == pytest.approx(
            alpha, rel=0.02
        )
    with pytest.raises(SettingsError, match="target"):
        measure(o, "sharpness_flatness", target=math.nan)


def test_margin_knows_how_much_large_logits_lose():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    model[2].bias.data += 1000
    x, y = torch.randn(37, 6), torch.randint(3, (37,))
    model, x = model.bfloat16(), x.bfloat16()
    exact = sk.Objective(model, nn.CrossEntropyLoss(), (x, y), dtype=torch.float64)
    e = measure(sk.Objective(model, nn.CrossEntropyLoss(), (x, y)), "margin")
    gap = abs(e.value - measure(exact, "margin").value)
    assert gap > 0.1
    assert gap < e.probe_error


def test_path_norm_with_a_tied_bias_before_a_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3), nn.BatchNorm1d(3),
        nn.ReLU(), nn.Linear(3, 2),
    ).double()  # fmt: skip
    model[3].bias = model[0].bias
    with torch.no_grad():
        for norm in (model[1], model[4]):
            for t in (norm.weight, norm.bias, norm.running_mean):
                t.normal_()
    model.eval()
    h = torch.ones(3).double()
    for i in (0, 3):
        norm = model[i + 1]
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = scale * (model[i].bias - norm.running_mean) + norm.bias
        h = (scale[:, None] * model[i].weight).square() @ h + shift.square()
    truth = (model[6].weight.square() @ h + model[6].bias.square()).sum().item()
    data = (torch.randn(8, 3).double(), torch.randint(2, (8,)))
    o = sk.Objective(model, nn.CrossEntropyLoss(), data)
    assert measure(o, "path_norm", squared=True).value == pytest.approx(truth, rel=1e-12)
