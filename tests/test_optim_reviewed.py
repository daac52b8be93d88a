"""Optimizers where a wrong number would not be seen: dtypes, scales, schedules, interruptions."""

from contextlib import contextmanager

import numpy as np
import oracles_optim as oracles
import pytest
import torch
from test_optim import F64, closure_of, data, flat, network, sgd
from torch import nn

from sharpkit.errors import SettingsError
from sharpkit.optim import (
    ASAM,
    ESAM,
    GSAM,
    RSAM,
    SAM,
    WSAM,
    DynamicSparseSAM,
    FisherSparseSAM,
    LookSAM,
    MicroBatches,
    MicroBatchSAM,
    MomentumSAM,
    MongeSAM,
    SAFLoss,
)
from sharpkit.optim import _tensors as tensors

X, Y = data(12, seed=3)

# -- records of SAF ------------------------------------------------------------------------


def test_saf_has_no_record_of_the_epoch_before_the_first():
    term = SAFLoss(3, 2, epochs_back=1, start_epoch=0)
    z = torch.tensor([[3.0, -1.0], [0.5, 0.0]])
    assert term(z, torch.tensor([0, 2])).item() == 0.0
    term.set_epoch(1)
    assert term(-z, torch.tensor([0, 2])).item() > 0.0


# -- dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [GSAM, LookSAM])
@pytest.mark.parametrize(("narrow", "wide"), [("bfloat16", "bfloat16"), ("float32", "float64")])
def test_a_scalar_parameter_keeps_its_dtype(make, narrow, wide):
    """A scalar times a scalar tensor is of the wider dtype, unlike a vector."""
    ends = []
    for dtypes in ((narrow, wide), ("float64", "float64")):
        scale = nn.Parameter(torch.tensor(1.5, dtype=getattr(torch, dtypes[0])))
        w = nn.Parameter(torch.tensor([0.5, 1.0], dtype=getattr(torch, dtypes[1])))
        opt = make(torch.optim.SGD([scale, w], lr=0.05), rho=0.1, alpha=0.5)

        def closure(scale=scale, w=w):
            loss = (scale.to(F64) * w.to(F64) - 1).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            opt.step(closure)
        ends.append(torch.stack([scale.detach().to(F64), *w.detach().to(F64)]))
    torch.testing.assert_close(*ends, rtol=2e-2 if narrow == "bfloat16" else 1e-6, atol=0)


def test_look_sam_goes_on_in_a_narrower_dtype():
    wide, narrow = network(dtype=torch.float32), network(dtype=torch.bfloat16)
    opt, other = LookSAM(sgd(wide)), LookSAM(sgd(narrow))
    opt.step(closure_of(wide, opt, X.float(), Y))
    other.load_state_dict(opt.state_dict())
    other.step(closure_of(narrow, other, X.bfloat16(), Y))
    assert all(p.grad.dtype == torch.bfloat16 for p in narrow.parameters())


# -- steps with one pass -------------------------------------------------------------------


class Local(nn.Module):
    """Says of every pass whether it ran inside `no_sync`, as DistributedDataParallel has it."""

    def __init__(self):
        super().__init__()
        self.inner, self.inside, self.passes = network(), False, []

    @contextmanager
    def no_sync(self):
        self.inside = True
        yield
        self.inside = False

    def forward(self, x):
        self.passes.append(self.inside)
        return self.inner(x)


def test_a_single_pass_is_synchronised_though_the_perturbation_is_per_rank():
    model = Local()
    opt = RSAM(sgd(model), model=model, synchronize=False, warm_up=2)
    for _ in range(3):
        opt.step(closure_of(model, opt, X, Y))
    assert model.passes == [False, False, True, False]


class MicroBatchRSAM(MicroBatches, RSAM):
    """RSAM by micro-batches."""


def test_micro_batches_warm_up_too():
    models = network(), network()
    opt = MicroBatchRSAM(sgd(models[0]), num_micro_batches=2, rho=0.5, warm_up=2)
    plain, passes = RSAM(sgd(models[1]), rho=0.5, warm_up=2), []
    shards = opt.shards(X, Y)

    def closure(i):
        passes.append(i)
        loss = nn.functional.cross_entropy(models[0](shards[i][0]), shards[i][1])
        loss.backward()
        return loss

    for _ in range(2):
        opt.step(closure)
        plain.step(closure_of(models[1], plain, X, Y))
        np.testing.assert_allclose(*map(flat, models), rtol=0, atol=1e-14)
    opt.step(closure)
    assert passes == [0, 1, 0, 1, 0, 0, 1, 1]


def test_micro_batches_of_a_warm_up_are_unscaled_once():
    ends = []
    for scale in (1.0, 2.0**8):
        model = network(dtype=torch.float32)
        opt = MicroBatchRSAM(sgd(model), num_micro_batches=2, warm_up=1)
        shards, scaler = opt.shards(X.float(), Y), torch.amp.GradScaler("cpu", init_scale=scale)

        def closure(i, model=model, shards=shards, scaler=scaler):
            loss = nn.functional.cross_entropy(model(shards[i][0]), shards[i][1])
            scaler.scale(loss).backward()

        for _ in range(2):
            opt.step(closure, scaler=scaler)
            scaler.update()
        ends.append(flat(model))
    assert np.array_equal(*ends)


def test_micro_batches_of_a_warm_up_are_synchronised():
    model = Local()
    opt = MicroBatchRSAM(sgd(model), num_micro_batches=1, model=model, synchronize=False, warm_up=1)

    def closure(i):
        nn.functional.cross_entropy(model(X), Y).backward()

    for _ in range(2):
        opt.step(closure)
    assert model.passes == [False, True, False]


# -- GradScaler by hand --------------------------------------------------------------------


def scaled_by_hand(make, misuse=None, scale=2.0**12):
    """One step by hand; returns how far the weights went, or raises."""
    model = network(dtype=torch.float32)
    opt, scaler = make(sgd(model)), torch.amp.GradScaler("cpu", init_scale=scale)
    before = flat(model)

    def half():
        scaler.scale(nn.functional.cross_entropy(model(X.float()), Y)).backward()

    try:
        half()
        if misuse in ("unscale", "unscale base"):
            scaler.unscale_(opt if misuse == "unscale" else opt.base)
        if opt.first_step(scaler=None if misuse == "forget" else scaler):
            half()
        if misuse == "unscale base after":
            scaler.unscale_(opt.base)
        opt.step() if misuse == "past it" else scaler.step(opt)
    except SettingsError:
        assert np.array_equal(flat(model), before)
        assert not opt.state
        opt.restore()
        raise
    scaler.update()
    return flat(model) - before


@pytest.mark.parametrize("make", [SAM, GSAM, MongeSAM])
@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        ("unscale", "still scaled"),
        ("unscale base", "still scaled"),
        ("unscale base after", "still scaled"),
        ("past it", r"scaler.step\(opt\)"),
        ("forget", r"first_step\(scaler=scaler\)"),
    ],
)
def test_gradients_are_neither_unscaled_twice_nor_never(make, misuse, message):
    assert np.abs(scaled_by_hand(make)).max() < 1
    with pytest.raises(SettingsError, match=message):
        scaled_by_hand(make, misuse)


def test_unscaling_before_the_step_of_one_pass_is_fine():
    """LookSAM asks for no second pass: the gradient of the first may be unscaled and clipped."""
    model = network(dtype=torch.float32)
    opt, scaler = LookSAM(sgd(model), every=2), torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(2):
        opt.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(X.float()), Y)).backward()
        if number == 1:
            scaler.unscale_(opt)
        if opt.first_step(scaler=scaler):
            scaler.scale(nn.functional.cross_entropy(model(X.float()), Y)).backward()
        scaler.step(opt)
        scaler.update()
    assert opt.steps == 2


# -- what is wrapped -----------------------------------------------------------------------


def test_a_base_that_maximises_is_refused():
    """The worst point of a loss is uphill; that of a gain is not."""
    model = network()
    with pytest.raises(SettingsError, match="maximize"):
        SAM(torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))
    opt = SAM(torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(SettingsError, match="maximize"):
        opt.add_param_group({"params": model[2].parameters(), "maximize": True})
    assert len(opt.param_groups) == 1


# -- interruptions -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SAM, lambda base: MongeSAM(base, neighbours=1, spread=0.5)])
def test_an_interruption_while_the_weights_move_restores_them(make, monkeypatch):
    model = network()
    opt, before = make(sgd(model)), flat(model)
    moved = []

    def interrupts(usual):
        def interrupted(*given, **more):
            usual(*given, **more)
            moved.append(flat(model))
            raise KeyboardInterrupt

        return interrupted

    for name in ("_foreach_add_", "_foreach_addcdiv_"):  # whichever moves them
        monkeypatch.setattr(torch, name, interrupts(getattr(torch, name)))
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure_of(model, opt, X, Y))
    assert not np.array_equal(moved[0], before)
    assert np.array_equal(flat(model), before)


def test_running_statistics_are_watched_again_after_a_refusal():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).to(F64)
    opt = SAM(sgd(model))
    for _ in range(2):
        with pytest.raises(SettingsError, match="running statistics"):
            opt.step(closure_of(model, opt, X, Y))
    other, calls = SAM(sgd(model)), []

    def closure():
        calls.append(0)
        loss_of(model).backward()
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other.step(closure)
    loss_of(model).backward()
    other.first_step()
    other.restore()  # nothing was seen yet
    other.zero_grad()
    with pytest.raises(SettingsError, match="running statistics"):
        other.step(closure)


def loss_of(model, x=X, y=Y):
    return nn.functional.cross_entropy(model(x), y)


# -- checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize(("saved", "fresh"), [(3, 1), (1, 3), (3, 2)])
def test_the_metric_of_monge_goes_on_with_its_number_of_gradients(saved, fresh):
    model = network()
    opt, other = (MongeSAM(sgd(model, lr=0.0), rho=0.5, average_over=n) for n in (saved, fresh))
    for seed in range(3):
        opt.step(closure_of(model, opt, *data(seed=seed)))
    other.load_state_dict(opt.state_dict())
    points = [], []
    for o, seen in zip((opt, other), points, strict=True):
        o.step(closure_of(model, o, X, Y, seen))
        model.zero_grad()
    assert np.array_equal(points[0][1], points[1][1])
    assert len(other.memory) == saved - 1


@pytest.mark.parametrize("now", [1, 2])
def test_the_metric_of_monge_forgets_when_it_is_told_to(now):
    model = network()
    opt = MongeSAM(sgd(model), rho=0.5, average_over=3)
    for seed in range(3):
        opt.step(closure_of(model, opt, *data(seed=seed)))
    opt.average_over = now
    w = flat(model)
    rows = [oracles.Net(X, Y)(w)]
    if now == 2:
        rows.append(torch.cat([opt.memory["gradient 0"][p].flatten() for p in opt.parameters()]))
    wanted = oracles.monge_delta(0.5, rows[0], [np.asarray(row) for row in rows])
    seen = []
    opt.step(closure_of(model, opt, X, Y, seen))
    np.testing.assert_allclose(seen[1] - w, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (SAM, {"norm": "linf"}),
        (ASAM, {"norm": "linf", "scaling": "filter"}),
        (LookSAM, {"norm": "linf"}),
        (WSAM, {"norm": "linf", "decouple": False}),
    ],
)
def test_a_radius_comes_back_with_the_norm_it_is_of(make, changed):
    model = network()
    opt, other = make(sgd(model), rho=0.03, **changed), make(sgd(model))
    other.load_state_dict(opt.state_dict())
    assert {name: getattr(other, name) for name in changed} == changed
    points = [], []
    for o, seen in zip((opt, other), points, strict=True):
        model.load_state_dict(network().state_dict())
        model.zero_grad()
        o.step(closure_of(model, o, X, Y, seen))
    assert np.array_equal(*map(np.stack, points))


# -- groups added later, sparse gradients, buffers -----------------------------------------


def test_buffers_that_repeat_memory_are_no_obstacle():
    model = network()
    model.register_buffer("positions", torch.arange(4).expand(3, -1))
    opt = SAM(sgd(model), model=model)
    opt.step(closure_of(model, opt, X, Y))
    assert torch.equal(model.positions, torch.arange(4).expand(3, -1))


def test_clipping_of_sparse_gradients_is_that_of_dense_ones():
    ends = []
    for sparse in (False, True):
        table = nn.Embedding(5, 2, sparse=sparse, dtype=F64)
        with torch.no_grad():
            table.weight.copy_(torch.arange(10.0).reshape(5, 2))
        opt = SAM(torch.optim.SGD(table.parameters(), lr=0.1), rho=0.3, max_grad_norm=0.5)

        def closure(table=table):
            table(torch.tensor([1, 3, 3])).square().sum().backward()

        for _ in range(2):
            opt.step(closure)
        ends.append(table.weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["dynamic", "fisher"])
def test_masks_of_groups_added_later(kind):
    model = network()
    base = torch.optim.SGD(model[0].parameters(), lr=0.1)
    if kind == "dynamic":
        opt = DynamicSparseSAM(base, sparsity=0.5)
    else:
        opt = FisherSparseSAM(base, sparsity=0.5)
        opt.update_mask(lambda i: loss_of(model).backward(), 1)
    first = {p: mask.clone() for p, mask in opt.memory["mask"].items()}
    opt.add_param_group({"params": list(model[2].parameters())})
    model.zero_grad()
    if kind == "fisher":
        with pytest.raises(SettingsError, match="update_mask"):
            opt.step(closure_of(model, opt, X, Y))
        opt.update_mask(lambda i: loss_of(model).backward(), 1)
    else:
        assert all(torch.equal(opt.memory["mask"][p], mask) for p, mask in first.items())
        assert sum(int(opt.memory["mask"][p].sum()) for p in model[2].parameters()) == 4
    before, seen = flat(model), []
    opt.step(closure_of(model, opt, X, Y, seen))
    mask = torch.cat([opt.memory["mask"][p].flatten() for p in model.parameters()]).numpy()
    assert np.array_equal(seen[1] != before, mask)
    if kind == "dynamic":
        opt.update_mask(lambda: loss_of(model).backward(), progress=0.0)
        kept = sum(int(part.sum()) for part in opt.memory["mask"].values())
        assert kept == mask.sum()


# -- schedules, refusals -------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "wanted"), [(0.0, 0.1), (0.05, 0.1), (0.3, 0.3), (0.9, 0.5)])
def test_the_radius_of_gsam_stays_between_its_ends(rate, wanted):
    """Warm-up starts below ``lr_min``: a radius on the line through both ends may be negative."""
    opt = GSAM(sgd(network(), lr=rate), rho=0.5, rho_min=0.1, lr_max=0.4, lr_min=0.2)
    assert opt.radius() == pytest.approx(wanted, rel=1e-12)


class MicroBatchESAM(MicroBatches, ESAM):
    """Its closure returns losses of examples, that of micro-batches calls backward."""


class MicroBatchMomentumSAM(MicroBatches, MomentumSAM):
    """It has one pass."""


@pytest.mark.parametrize("kind", [MicroBatchESAM, MicroBatchMomentumSAM])
def test_methods_with_passes_of_their_own_are_not_cut(kind):
    with pytest.raises(SettingsError, match="cannot be cut into micro-batches"):
        kind(sgd(network()), num_micro_batches=2)


def test_a_loss_of_a_micro_batch_is_a_number():
    model = network()
    opt, before = MicroBatchSAM(sgd(model), num_micro_batches=2), flat(model)

    def closure(i):
        loss = loss_of(model)
        loss.backward()
        return loss, "more"

    with pytest.raises(SettingsError, match="closure that returns the loss"):
        opt.step(closure)
    assert np.array_equal(flat(model), before)


def test_one_tensor_is_no_list_of_parameters():
    model = network()
    for option in ("unscaled", "perturb"):
        with pytest.raises(SettingsError, match=f"`{option}`"):
            ASAM(sgd(model), **{option: model[0].bias})


def test_a_base_that_raises_leaves_no_vector_behind():
    model = network()
    opt = WSAM(sgd(model))

    def stop(*_):
        raise RuntimeError("stop")

    opt.base.register_step_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        opt.step(closure_of(model, opt, X, Y))
    assert not opt._sharpness


# -- formulas with groups, parts, clipping and narrow dtypes -------------------------------


def two_groups(model, **more):
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}]
    return torch.optim.SGD(groups, lr=0.2, **more)


RATES = np.array([0.2] * 15 + [0.01] * 8)


@pytest.mark.parametrize("decouple", [True, False])
def test_wsam_descends_every_group_at_its_own_rate(decouple):
    model = network()
    w, grad = flat(model), oracles.Net(X, Y)
    g = grad(w)
    p = grad(w + 0.3 * g / np.linalg.norm(g))
    opt = WSAM(two_groups(model), rho=0.3, gamma=0.75, decouple=decouple)
    opt.step(closure_of(model, opt, X, Y))
    np.testing.assert_allclose(flat(model), w - RATES * (g + 3 * (p - g)), rtol=0, atol=1e-12)


def test_the_radius_of_gsam_is_by_the_rate_of_the_first_group():
    opt = GSAM(two_groups(network()), rho=0.5, rho_min=0.1, lr_max=0.4)
    assert opt.radius() == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("scaling", ["elementwise", "filter", "layer"])
def test_eta_is_added_to_every_kind_of_size(scaling, norm):
    model = network()
    w, grad = flat(model), oracles.Net(X, Y)
    opt = ASAM(sgd(model), rho=0.2, eta=0.5, scaling=scaling, norm=norm)
    seen = []
    opt.step(closure_of(model, opt, X, Y, seen))
    t, g = oracles.sizes_of(w, scaling) + 0.5, grad(w)
    wanted = t * np.sign(g) if norm == "linf" else t**2 * g / np.linalg.norm(t * g)
    np.testing.assert_allclose(seen[1] - w, 0.2 * wanted, rtol=0, atol=1e-12)


def test_look_sam_measures_the_whole_gradient_though_a_part_is_perturbed():
    model = network()
    opt = LookSAM(
        sgd(model, momentum=0, decay=0), rho=0.3, alpha=0.5, perturb=model[2].parameters()
    )
    w, grad = flat(model), oracles.Net(X, Y)
    g = grad(w)
    part = np.where(np.arange(len(g)) < 15, 0.0, g)
    h = grad(w + 0.3 * part / np.linalg.norm(part))
    v = h - (h @ g) / (g @ g) * g
    w = w - 0.1 * h
    g = grad(w)
    w = w - 0.1 * (g + 0.5 * np.linalg.norm(g) / np.linalg.norm(v) * v)
    for _ in range(2):
        opt.step(closure_of(model, opt, X, Y))
    np.testing.assert_allclose(flat(model), w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [GSAM, lambda b, **more: WSAM(b, decouple=False, **more)])
def test_clipping_is_of_the_combined_gradient_of_all_parameters(make):
    grads = []
    for limit in (None, 0.02):
        model = network()
        opt = make(sgd(model, lr=0.0), perturb=model[0].parameters(), max_grad_norm=limit)
        opt.step(closure_of(model, opt, X, Y))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert grads[0].norm() > 0.04
    torch.testing.assert_close(grads[1], grads[0] * 0.02 / grads[0].norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("progress", [0.25, 0.75])
def test_the_rate_of_the_dynamic_mask_is_a_cosine(progress):
    w = nn.Parameter(torch.linspace(1.0, 2.0, 1000, dtype=F64))
    opt = DynamicSparseSAM(torch.optim.SGD([w], lr=0.1), sparsity=0.5, drop_rate=0.4)
    first = opt.memory["mask"][w]
    opt.update_mask(lambda: w.square().sum().backward(), progress=progress)
    dropped = int((first & ~opt.memory["mask"][w]).sum())
    assert dropped == int(500 * 0.4 * (1 + np.cos(np.pi * progress)) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_and_products_of_narrow_gradients_are_wide(dtype):
    g = torch.Generator().manual_seed(0)
    parts = [torch.rand(n, generator=g).to(dtype) for n in (30000, 7, 1000)]
    others = [torch.rand(n, generator=g).to(dtype) for n in (30000, 7, 1000)]
    a, b = (torch.cat(x).double() for x in (parts, others))
    assert tensors.norm(parts).item() == pytest.approx(a.norm().item(), rel=1e-5)
    assert tensors.dot(parts, others).item() == pytest.approx((a @ b).item(), rel=1e-5)
