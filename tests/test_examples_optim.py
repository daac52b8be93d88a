"""The comparisons of optimizers: their parts against oracles, and each once in short."""

import importlib
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import nn

from sharpkit import optim

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
monge_sam_toys, sam_common, sam_flatness, sam_variants = map(
    importlib.import_module, ("monge_sam_toys", "sam_common", "sam_flatness", "sam_variants")
)
adam_label_noise, figures, tables, lab, nets = map(
    importlib.import_module,
    (
        "adam_label_noise", "label_noise_figures", "label_noise_tables", "label_noise_runs",
        "label_noise_nets",
    ),
)  # fmt: skip
sys.path.remove(str(EXAMPLES))


def run(example, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", [example.__name__, "--quick", "-o", str(page)])
    example.main()
    assert page.with_suffix(".png").stat().st_size > 20_000
    text = page.read_text()
    assert not re.search(r"\b(nan|inf)\b", text)
    assert "(page.png)" in text
    return text


def test_the_toys_in_short(tmp_path, monkeypatch):
    text = run(monge_sam_toys, tmp_path, monkeypatch)
    assert "| 0.66 | 0.339 | 0.192 | 6 of 6 |" in text


@pytest.mark.slow
@pytest.mark.parametrize("example", [sam_flatness, sam_variants], ids=lambda e: e.__name__)
def test_the_comparisons_in_short(example, tmp_path, monkeypatch):
    run(example, tmp_path, monkeypatch)


def test_ends_are_counted_by_hand():
    points = np.array([[0.1, 0.2], [1.1, 0.9], [-1, -1.2], [2, 0.5], [2, 2]])
    assert monge_sam_toys.counts(points) == {"saddle": 1, "flat": 2, "valley": 1, "other": 1}


@pytest.mark.slow
def test_the_banana_as_the_reference_has_it():
    """Endpoints and counts of the reference: 10, 32 and 16 of 100 at the saddle."""
    line = np.linspace(-3, 3, 10)
    starts = np.array([(a, b) for a in line for b in line])
    expected = {"descent": (10, 10), "SAM": (32, 68), "Monge SAM": (16, 84)}
    for method, (saddle, flat) in expected.items():
        found = monge_sam_toys.counts(
            monge_sam_toys.ends(monge_sam_toys.banana, method, starts, 1.0, 0.01, 200)
        )
        assert (found["saddle"], found["flat"]) == (saddle, flat), method


def test_the_ring_is_a_minimum_of_the_hill():
    x = torch.tensor([monge_sam_toys.RING, 0.0], dtype=torch.float64, requires_grad=True)
    value = monge_sam_toys.hill(x)
    (slope,) = torch.autograd.grad(value, x)
    s = monge_sam_toys.RING**2
    assert value.item() == pytest.approx(5 * np.sin(s) / s)
    assert slope.norm() < 1e-8


def test_an_interval_holds_the_mean_as_often_as_it_says():
    x = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    inside = sum(abs(m - 3.0) <= h for m, h in map(sam_common.interval, x))
    assert scipy.stats.binomtest(inside, len(x), 0.95).pvalue > 1e-3


def test_equal_differences_have_no_interval():
    assert sam_variants.signed(*sam_common.interval([0.5, 0.5, 0.5])) == "+0.50 in every seed"
    assert sam_variants.signed(*sam_common.interval([0.5, 0.6, 0.7])) == "**+0.60 ± 0.25**"
    assert sam_variants.signed(*sam_common.interval([-0.5, 0.6, 0.7])) == "+0.27 ± 1.65"


def test_ratios_are_paired():
    old = [1.0, 10.0, 100.0]
    mean, low, high = sam_common.ratio_interval([2 * v for v in old], old)
    np.testing.assert_allclose([mean, low, high], 2.0)
    mean, low, high = sam_common.ratio_interval([2.0, 10.0, 50.0], old)
    assert (mean, low < 1 < high) == (pytest.approx(1.0), True)


@pytest.fixture(scope="module")
def data():
    return sam_common.split(200)


def trained(data, make, epochs=2, **settings):
    model = sam_common.network("norm", 0)
    return model, sam_common.train(
        model, data.train, make, epochs=epochs, lr=0.1, seed=0, **settings
    )


def test_train_and_test_are_disjoint_and_whole(data):
    assert (len(data.train[0]), len(data.test[0])) == (200, 1597)
    rows = torch.cat([data.train[0], data.test[0]]).flatten(1)
    everything = sam_common.digits()
    other = torch.cat([everything.train_images, everything.test_images]).flatten(1)
    assert torch.equal(rows, other)


def test_sam_without_a_radius_is_sgd_here_too(data):
    one, _ = trained(data, lambda _, base: base)
    other, _ = trained(data, lambda m, base: optim.SAM(base, rho=0.0, model=m))
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    moved, _ = trained(data, lambda m, base: optim.SAM(base, rho=0.1, model=m))
    assert not torch.equal(one[-1].weight, moved[-1].weight)


@pytest.mark.parametrize(
    ("make", "gradients"),
    [
        (lambda _, base: base, 1.0),
        (lambda m, base: optim.SAM(base, model=m), 2.0),
        (lambda m, base: optim.MicroBatchSAM(base, num_micro_batches=5, model=m), 2.0),
        (lambda m, base: optim.LookSAM(base, every=2, model=m), 1.5),
        # a mask an epoch of two steps: 16 single examples, or one batch
        (lambda m, base: optim.FisherSparseSAM(base, model=m), 2.08),
        (lambda m, base: optim.DynamicSparseSAM(base, model=m), 2.5),
    ],
    ids=["sgd", "sam", "micro", "look", "fisher mask", "grown mask"],
)
def test_gradients_are_counted(data, make, gradients):
    assert trained(data, make)[1].passes == pytest.approx(gradients)


def test_the_weights_at_the_target_are_kept(data):
    model, run = trained(data, lambda _, base: base, epochs=12, target=1.5)
    assert run.target_epoch == 1 + next(i for i, v in enumerate(run.losses) if v <= 1.5)
    assert run.target_epoch < 12
    final = sam_common.evaluate(model, data.train)[0]
    model.load_state_dict(run.at_target)
    assert sam_common.evaluate(model, data.train)[0] == pytest.approx(
        run.losses[run.target_epoch - 1]
    )
    assert final == pytest.approx(run.losses[-1])
    assert final < 1.5


@pytest.mark.parametrize("term", [sam_variants.saf, sam_variants.mesa])
def test_trajectory_terms_change_the_training_after_their_first_epochs(data, term):
    def network(weight, epochs):
        model = sam_common.network("norm", 0)
        sam_common.train(
            model, data.train, lambda _, base: base, epochs=epochs, lr=0.1, seed=0,
            term=term(model, 200, weight),
        )  # fmt: skip
        return model[-1].weight

    assert torch.equal(network(0.0, 5), network(1.0, 5))
    assert not torch.equal(network(0.0, 7), network(1.0, 7))


def test_attacks_on_a_linear_classifier_find_its_margin():
    """FGSM and PGD are exact there: an image falls if its margin is below epsilon |w|_1."""
    generator = torch.Generator().manual_seed(0)
    images = 0.1 + 0.8 * torch.rand(500, 6, generator=generator)
    model = nn.Linear(6, 2)
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, 6, generator=generator))
        model.bias.copy_(-model.weight.sum(dim=1) / 2)
    across = (model.weight[1] - model.weight[0]).detach()
    scores = (images @ across + model.bias[1] - model.bias[0]).detach()
    labels = (scores > 0).long()
    expected = (scores.abs() > sam_variants.EPSILON * across.abs().sum()).double().mean().item()
    assert 0.1 < expected < 0.9
    for steps in (1, 40):
        got = sam_variants.attacked(model, (images, labels), steps, generator)
        assert got == pytest.approx(expected, abs=1e-9)


def test_attacked_images_stay_in_the_box():
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(x.detach().clone())
            return torch.stack([x.sum(1), -x.sum(1)], dim=1)

    images = torch.tensor([[0.0, 1.0, 0.5]])
    sam_variants.attacked(Watch(), (images, torch.tensor([1])), 10, torch.Generator())
    moved = torch.cat(seen)
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert (moved - images).abs().max() <= sam_variants.EPSILON + 1e-6
    np.testing.assert_allclose(moved[-1], [0.1, 1.0, 0.6], atol=1e-6)


def signs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(2, shape, generator=generator).double() - 1


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


SETTINGS = (
    nets.Setting(0.02), nets.Setting(0.05), nets.Setting(0.01, 0.5, 0.99),
    nets.Setting(0.003, 0.5, 0.9996), nets.Setting(0.01, 0.25), nets.Setting(0.002, 0.75, 0.99),
)  # fmt: skip


def draws(seed, n, steps, every, batch):
    """The rows and the noise of one seed, as the training draws them."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for _ in range(steps // every):
        rows = torch.randint(n, (every, batch), generator=generator)
        noise = torch.randn(every, batch, generator=generator)
        yield from zip(rows, noise.double(), strict=True)


@pytest.mark.parametrize("kind", ["diagonal", "factored"])
def test_vectorised_training_takes_the_steps_of_torch(kind):
    """Every seed and setting against a module, autograd and torch's own optimizer."""
    seeds, n, steps, every, batch = 2, 7, 60, 20, 3
    if kind == "diagonal":
        inputs, shape, loss = signs(seeds, n, 5), (10,), nets.half_square
        module, gradient = nets.Diagonal, nets.diagonal_gradient
    else:
        inputs, shape, loss = normal(seeds, n, 3, 3), (3, 3, 3), nn.MSELoss()
        module = nets.Factored

        def gradient(theta, x, y):
            return nets.factored_gradient(theta.unflatten(-1, shape), x, y).flatten(2)

    data = nets.Data(inputs, normal(seeds, n, seed=1), torch.empty(0))
    start = 0.5 * normal(seeds, *shape, seed=2)
    groups = nets.groups(start.flatten(1), SETTINGS)
    looked = []
    nets.train(groups, data, gradient, lambda step, _: looked.append(step),
               steps=steps, batch=batch, noise=0.3, every=every)  # fmt: skip
    assert looked == [0, 20, 40, 60]
    assert [len(g.settings) for g in groups] == [2, 2, 1, 1]
    for group, seed in itertools.product(groups, range(seeds)):
        for k, setting in enumerate(group.settings):
            if setting.power not in (0, 0.5):
                continue
            net = module(start[seed])
            make = torch.optim.SGD if setting.power == 0 else torch.optim.Adam
            more = {} if setting.power == 0 else {"betas": (0.9, setting.beta2)}
            optimizer = make(net.parameters(), lr=setting.lr, **more)
            for rows, noise in draws(seed, n, steps, every, batch):
                optimizer.zero_grad()
                outputs = net(data.inputs[seed, rows])
                loss(outputs, data.targets[seed, rows] + 0.3 * noise).backward()
                optimizer.step()
            end = torch.cat([p.detach().flatten() for p in net.parameters()])
            moved = (end - start[seed].flatten()).norm()
            assert (group.theta[seed, k] - end).norm() < 1e-10 * moved, setting
            assert moved > 1e-3


def test_adame_by_hand():
    """m and v with torch's corrections, divided by v^lambda + eps."""
    for power in (0.25, 0.5, 0.75):
        setting = nets.Setting(0.01, power, 0.99)
        run = nets.Descent(torch.zeros(1, 1, 3).double(), [setting])
        theta, m, v = np.zeros(3), np.zeros(3), np.zeros(3)
        for t, g in enumerate(normal(20, 3).numpy(), start=1):
            run.step(torch.from_numpy(g)[None, None])
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
            theta -= 0.01 * m / (1 - 0.9**t) / ((v / (1 - 0.99**t)) ** power + 1e-8)
        np.testing.assert_allclose(run.theta[0, 0], theta, rtol=1e-10)


def hessian(module, loss, inputs, targets):
    """The dense Hessian of a module's loss."""
    names = [name for name, _ in module.named_parameters()]
    shapes = [p.shape for p in module.parameters()]
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])

    def value(theta):
        pieces = theta.split([s.numel() for s in shapes])
        weights = {n: x.view(s) for n, x, s in zip(names, pieces, shapes, strict=True)}
        return loss(torch.func.functional_call(module, weights, (inputs,)), targets)

    return torch.func.hessian(value)(flat)


def test_the_diagonal_network_has_its_closed_forms():
    theta, inputs = normal(12), signs(4, 6)
    fitted = inputs @ nets.predictor(theta)
    for targets in (fitted, fitted + normal(4, seed=3)):
        H = hessian(nets.Diagonal(theta), nets.half_square, inputs, targets)
        numbers = nets.diagonal_numbers(
            theta[None, None], inputs[None], nets.predictor(theta)[None]
        )
        assert numbers["train loss"].item() < 1e-20
        assert numbers["tr H"].item() == pytest.approx(H.trace().item(), rel=1e-12)  # anywhere
        exact = torch.allclose(H.diag(), 4 * theta.square())
        assert exact == (targets is fitted)  # the entries only on the minimizers
        if exact:
            for e, name in ((1.0, "tr H"), (0.5, "tr diag(H)^1/2")):
                power = nets.diagonal_power(theta, e).item()
                assert power == pytest.approx(H.diag().pow(e).sum().item(), rel=1e-12)
                assert numbers[name].item() == pytest.approx(power, rel=1e-12)
    w = nets.predictor(theta)
    assert numbers["l1"].item() == pytest.approx(w.norm(1).item())
    assert numbers["l0.5"].item() == pytest.approx(w.norm(0.5).item())


def test_the_test_loss_is_the_expected_one():
    theta, teacher = normal(12), normal(6, seed=1)
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6))).double()
    said = nets.diagonal_numbers(theta[None, None], every[None], teacher[None])
    expected = nets.half_square(nets.Diagonal(theta)(every), every @ teacher).item()
    assert said["test loss"].item() == pytest.approx(expected, rel=1e-12)
    assert said["train loss"].item() == pytest.approx(expected, rel=1e-12)


def test_the_regularizer_prefers_the_smallest_norm():
    """Brute force over the minimizers of a small problem: tr diag(H)^e against the l_e norm."""
    X, w0 = signs(6, 7, seed=35), normal(7, seed=6)
    kernel = torch.linalg.svd(X).Vh[-1]
    t = torch.cat([torch.linspace(-8, 8, 2001).double(), -w0 / kernel])
    w = w0 + t[:, None] * kernel
    assert torch.allclose(X @ w.mT, (X @ w0)[:, None].expand(6, len(t)))
    slack = torch.tensor(list(itertools.product((0.0, 0.3), repeat=7))).double()
    u = (w.clamp(min=0)[:, None] + slack).sqrt()  # all (u, v) with u*u - v*v = w are such
    theta = torch.cat([u, (w.neg().clamp(min=0)[:, None] + slack).sqrt()], dim=-1)
    best = {}
    for e in (1.0, 0.5, 0.25):
        power = nets.diagonal_power(theta, e)
        least = divmod(int(power.argmin()), len(slack))
        norms = w.abs().pow(e).sum(-1)
        best[e] = int(norms.argmin())
        assert least == (best[e], 0)  # the smallest l_e norm, and u_i v_i = 0
        assert power.min().item() == pytest.approx(4**e * norms.min().item(), rel=1e-12)
    assert best[1.0] != best[0.5]  # or the test would not tell them apart
    found = nets.least_l1(X, X @ w0)
    assert torch.allclose(found, w[best[1.0]], atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_least_norm_is_that_of_the_best_vertex(seed):
    X, y = normal(3, 7, seed=seed), normal(3, seed=9 + seed)
    vertices = [X[:, list(c)] for c in itertools.combinations(range(7), 3)]
    norms = [torch.linalg.solve(A, y).norm(1) for A in vertices]
    found = nets.least_l1(X, y)
    assert torch.allclose(X @ found, y, atol=1e-6)
    assert found.norm(1).item() == pytest.approx(min(norms).item(), rel=1e-6)


def test_the_noise_floor_solves_its_equation():
    """P H C + C H P = lr P (noise) P for the scatter C of the weights, noise = c H."""
    theta, inputs = normal(8), signs(30, 4)
    grads = torch.cat([2 * theta[:4] * inputs, -2 * theta[4:] * inputs], dim=1)
    H, c = grads.T @ grads / 30, 0.7**2 / 5
    assert torch.allclose(H.diag(), 4 * theta.square())
    assert torch.linalg.matrix_rank(H) == 4
    for setting in SETTINGS[1::2]:
        P = torch.diag((c * H.diag()) ** -setting.power)
        # In the range of P^1/2 H P^1/2, where the equation has one solution.
        A = P.sqrt() @ H @ P.sqrt()
        Q = torch.linalg.eigh(A).eigenvectors[:, -4:]
        small = Q.T @ A @ Q
        forcing = setting.lr * c * Q.T @ P.sqrt() @ H @ P.sqrt() @ Q
        C = torch.from_numpy(scipy.linalg.solve_continuous_lyapunov(small.numpy(), forcing.numpy()))
        excess = (small @ C).trace().item() / 2
        power = nets.diagonal_power(theta, setting.exponent)
        floor = nets.noise_floor(setting, power, 0.7, 5).item()
        assert floor == pytest.approx(excess, rel=1e-10), setting


@pytest.mark.parametrize("depth", [2, 3])
def test_the_factored_matrix_has_its_closed_forms(depth):
    factors, inputs = normal(depth, 3, 3), normal(8, 3, 3, seed=1)
    product = torch.linalg.multi_dot(list(factors.flip(0)))
    net = nets.Factored(factors)
    fitted = torch.einsum("nij,ij->n", inputs, product)
    assert torch.allclose(net(inputs), fitted)
    closed = nets.factored_diagonal(factors, inputs).flatten()
    for targets in (fitted, fitted + 3.0):  # f is linear in every weight: also with residuals
        H = hessian(net, nn.MSELoss(), inputs, targets)
        assert torch.allclose(H.diag(), closed)
    teacher = normal(3, 3, seed=2)
    numbers = nets.factored_numbers(factors[None, None], inputs[None], teacher[None])
    assert numbers["tr H"].item() == pytest.approx(H.trace().item())
    assert numbers["tr diag(H)^1/2"].item() == pytest.approx(H.diag().sqrt().sum().item())
    error = (product - teacher).square().sum() / teacher.square().sum()
    assert numbers["test error"].item() == pytest.approx(error.item())
    train = (fitted - torch.einsum("nij,ij->n", inputs, teacher)).square().mean()
    assert numbers["train loss"].item() == pytest.approx(train.item())


def test_the_interval_of_a_median_holds_it():
    x = np.random.default_rng(0).exponential(size=(4000, 10))
    true = np.log(2)
    found = [figures.median_interval(row) for row in x]
    inside = sum(low <= true <= high for _, low, high in found)
    exact = 1 - 2 * scipy.stats.binom.cdf(1, 10, 0.5)  # the second from both ends: 97.9%
    assert scipy.stats.binomtest(inside, len(x), exact).pvalue > 1e-3
    for n in range(6, 30):
        middle, low, high = figures.median_interval(range(n))
        k = int(low) + 1
        assert (middle, high) == ((n - 1) / 2, n - k)
        assert 1 - 2 * scipy.stats.binom.cdf(k - 1, n, 0.5) >= 0.95
        assert 1 - 2 * scipy.stats.binom.cdf(k, n, 0.5) < 0.95
    assert figures.median_interval(range(5))[1:] == (-np.inf, np.inf)


def test_rises_are_later_over_earlier():
    falls = [{"tr H": [2.0 - k / 200, 1.0 + k / 100]} for k in range(100)]
    one, other = tables.rises(falls)
    assert one == 1.0
    assert other == pytest.approx(1.97 / 1.02, rel=1e-3)


def test_a_run_that_moves_is_not_settled():
    assert lab.settled(1.0, 1.04)
    assert not lab.settled(1.0, 1.06)
    assert not lab.settled(1.0, 0.94)
    assert lab.settled(0.01, 0.02, scale=1.0)


def test_what_counts_as_converged():
    part = lab.Sparse(40, 2, (8,), 1, 4, 1000, (nets.Setting(0.1), nets.Setting(0.1, 0.5)))
    row = {
        "drift": 0.01, "over the floor": 1.1, "recovered": False, "test loss": 1.0,
        "test loss of the mean": 0.9,
    }  # fmt: skip
    assert lab.converged(row, 1.01, 0.04)
    assert not lab.converged(row, 1.1, 0.04)
    assert not lab.converged(row | {"drift": -0.06}, 1.01, 0.04)
    assert not lab.converged(row | {"over the floor": 2.1}, 1.01, 0.04)
    good = row | {"recovered": True, "test loss": 0.02, "test loss of the mean": 0.001}
    assert lab.converged(good, 0.03, 0.04)  # noise
    assert not lab.converged(good | {"test loss of the mean": 0.011}, 0.02, 0.04)

    runs = [row | {"n": 8, "seed": 0, "name": s.name, "converged": True} for s in part.settings]
    lab.strict(part, runs, [{"n": 8, "seed": 0, "recovered": False}])
    assert [r["converged"] for r in runs] == [True, True]
    lab.strict(part, runs, [{"n": 8, "seed": 0, "recovered": True}])
    assert [r["converged"] for r in runs] == [False, True]  # only SGD must go there


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    threads = torch.get_num_threads()
    page = folder / "page.md"
    adam_label_noise.main(["--quick", "-o", str(page), "--keep", str(folder)])
    torch.set_num_threads(threads)
    return folder


def test_the_label_noise_page_in_short(noisy):
    text = (noisy / "page.md").read_text()
    assert not re.search(r"\b(nan|inf)\b", text)
    for name in ("page.png", "page-matrix.png"):
        assert (noisy / name).stat().st_size > 20_000
        assert f"({name})" in text
    before = text
    adam_label_noise.main(["--quick", "-o", str(noisy / "page.md"), "--keep", str(noisy)])
    assert (noisy / "page.md").read_text() == before  # from the numbers that were kept


def test_sharpkit_measures_the_closed_forms_at_the_end_points(noisy):
    for part in ("scaled", "large", "matrix"):
        (result,) = json.loads((noisy / f"{part}.json").read_text())
        rows = (
            [row for depth in ("2", "5") for row in result[depth]["measured"]]
            if part == "matrix"
            else result["measured"]
        )
        for row in rows:
            assert row["trace"] == pytest.approx(row["closed tr H"], rel=1e-9)
            assert row["ggn"] == pytest.approx(row["closed tr diag(H)^1/2"], rel=1e-6)
            if part == "scaled":  # the Hessian's own diagonal has the residuals in it
                assert row["exact"] > 1.02 * row["ggn"]


def test_sgd_stays_at_its_noise_floor(noisy):
    """With examples enough for one minimizer, where the floor is all there is."""
    (result,) = json.loads((noisy / "scaled.json").read_text())
    ratios = [r["over the floor"] for r in result["runs"] if r["n"] == 24 and "SGD" in r["name"]]
    assert 0.7 < np.median(ratios) < 1.5
    assert all(r["recovered"] for r in result["runs"] if r["n"] == 24 and "SGD" in r["name"])
