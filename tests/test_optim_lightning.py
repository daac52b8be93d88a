"""SAM and its family in Lightning's Trainer: the same bits as a plain loop."""

import copy
import logging

import numpy as np
import pytest
import torch
from recipes import classes_of
from test_optim import F64, flat
from torch import nn

from sharpkit import optim
from sharpkit.errors import SettingsError

lightning = pytest.importorskip("lightning", reason="lightning is not installed")
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

pytestmark = [
    # Lightning 2.6.6 calls what torch 2.13 deprecates.
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
    # Advice for large data: these have 24 rows.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # It asks for a GPU on machines that have one; these runs compare bits on the CPU.
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

G = torch.Generator().manual_seed(4)
X, Y = torch.randn(24, 4, generator=G, dtype=F64), torch.randint(0, 2, (24,), generator=G)
BATCHES = list(zip(X.split(8), Y.split(8), strict=True))
CE = nn.functional.cross_entropy


def network(dtype=F64, dropout=0.0, seed=1):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 2)]
    return nn.Sequential(*layers).to(dtype)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


METHODS = {
    "sam": lambda model: optim.SAM(sgd(model.parameters()), rho=0.3, model=model),
    "adaptive": lambda model: optim.ASAM(adamw(model.parameters()), rho=0.3, model=model),
    "clipped": lambda model: optim.GSAM(
        sgd(model.parameters()), rho=0.3, model=model, max_grad_norm=0.05
    ),
    "friendly": lambda model: optim.FriendlySAM(adamw(model.parameters()), rho=0.3, model=model),
    "look": lambda model: optim.LookSAM(sgd(model.parameters()), rho=0.3, every=2, model=model),
    "momentum": lambda model: optim.MomentumSAM(sgd(model.parameters()), rho=0.3, model=model),
    "eigen": lambda model: optim.EigenSAM(sgd(model.parameters()), every=4, model=model),
}
SCHEDULES = {
    "epoch": lambda opt: torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5),
    "step": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=12),
}

RUNS = [*((name, "epoch") for name in METHODS), ("sam", "step"), ("look", "step")]


class Module(lightning.LightningModule):
    """The recipe of the docs, with the method and the network of a test."""

    def __init__(self, method, net, schedule=None):
        super().__init__()
        self.net, self.method, self.schedule = net, method, schedule
        self.logged, self.outputs = [], []

    def training_step(self, batch, index):
        inputs, targets = batch
        loss = CE(self.net(inputs), targets)
        if self.optimizers().first_pass:
            self.log("loss", loss, on_step=False, on_epoch=True)
            self.logged.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs, batch, index):
        self.outputs.append(outputs["loss"].item())

    def configure_optimizers(self):
        opt = self.method(self)
        if self.schedule is None:
            return opt
        scheduler = {"scheduler": SCHEDULES[self.schedule](opt), "interval": self.schedule}
        return [opt], [scheduler]


def trainer_of(folder=None, **options):
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def loader(x=X, y=Y, size=8):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=size)


def plain(method, net, epochs, schedule=None, autocast=None, scaler=None):
    """The same training without a trainer; returns the first losses of all steps."""
    opt, losses = method(net), []
    scheduler = None if schedule is None else SCHEDULES[schedule](opt)
    for _ in range(epochs):
        for x, y in BATCHES:

            def closure(x=x, y=y):
                with torch.autocast(
                    "cpu", autocast or torch.bfloat16, autocast is not None, cache_enabled=False
                ):
                    loss = CE(net(x.to(net[0].weight)), y)
                (loss if scaler is None else scaler.scale(loss)).backward()
                return loss

            losses.append(opt.step(closure, scaler=scaler).item())
            if scaler is not None:
                scaler.update()
            if schedule == "step":
                scheduler.step()
        if schedule == "epoch":
            scheduler.step()
    return losses


def same(left, right):
    """Whether parameters and buffers have the same bits."""
    states = left.state_dict(), right.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[1])


# -- automatic optimization ----------------------------------------------------------------


@pytest.mark.parametrize(("method", "schedule"), RUNS)
def test_a_run_is_the_plain_loop(method, schedule):
    module, net = Module(METHODS[method], network(), schedule), network()
    losses = plain(METHODS[method], net, 3, schedule)
    trainer = trainer_of(max_epochs=3)
    trainer.fit(module, loader())
    assert same(module.net, net)
    assert not same(module.net, network())
    assert trainer.global_step == 9
    assert module.optimizers(use_pl_optimizer=False).steps == 9
    assert module.logged == losses
    assert trainer.callback_metrics["loss"].item() == pytest.approx(np.mean(losses[-3:]))


def test_the_loss_that_callbacks_get_is_that_of_the_last_pass():
    module = Module(METHODS["sam"], network())
    trainer_of(max_epochs=1).fit(module, loader())
    assert len(module.outputs) == len(module.logged) == 3
    assert all(last > first for last, first in zip(module.outputs, module.logged, strict=True))


@pytest.mark.parametrize(("method", "schedule"), RUNS)
def test_a_run_goes_on_from_its_checkpoint(method, schedule, tmp_path):
    whole = Module(METHODS[method], network(), schedule)
    trainer_of(max_epochs=4).fit(whole, loader())
    half = Module(METHODS[method], network(), schedule)
    trainer = trainer_of(max_epochs=2)
    trainer.fit(half, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert not same(half, whole)
    again = Module(METHODS[method], network(seed=9), schedule)
    trainer = trainer_of(max_epochs=4)
    trainer.fit(again, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same(again, whole)
    assert trainer.global_step == 12
    assert again.optimizers(use_pl_optimizer=False).steps == 12


def test_dropout_masks_agree_and_the_stream_goes_on():
    module, net = Module(METHODS["sam"], network(dropout=0.5)), network(dropout=0.5)
    torch.manual_seed(0)
    trainer = trainer_of(max_epochs=1)
    trainer.fit(module, loader())
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()  # the loader draws a seed for its workers
    plain(METHODS["sam"], net, 1)
    assert same(module.net, net)
    assert torch.equal(torch.get_rng_state(), after)


def test_clipping_by_the_trainer_is_that_of_the_optimizer_only_for_directions():
    def ends(method, **options):
        nets = network(), network()
        module = Module(lambda m: method(sgd(m.parameters()), rho=0.3, model=m), nets[0])
        trainer_of(max_epochs=2, gradient_clip_val=0.05).fit(module, loader())
        plain(
            lambda m: method(sgd(m.parameters()), rho=0.3, model=m, max_grad_norm=0.05), nets[1], 2
        )
        return np.abs(flat(nets[0]) - flat(nets[1])).max()

    assert ends(optim.SAM) < 1e-6  # torch adds 1e-6 to the norm that it clips by
    assert ends(optim.MongeSAM) > 1e-4


def test_batches_accumulated_by_the_trainer_are_refused():
    module = Module(METHODS["sam"], network())
    before = flat(module)
    with pytest.raises(SettingsError, match="would be lost"):
        trainer_of(max_epochs=1, accumulate_grad_batches=2).fit(module, loader())
    assert np.array_equal(flat(module), before)


def test_a_step_that_fails_leaves_the_weights():
    class Stops(Module):
        def training_step(self, batch, index):
            if not self.optimizers().first_pass:
                raise RuntimeError("stop")
            return super().training_step(batch, index)

    module = Stops(METHODS["sam"], network())
    before = flat(module)
    with pytest.raises(RuntimeError, match="stop"):
        trainer_of(max_epochs=1).fit(module, loader())
    assert np.array_equal(flat(module), before)


# -- mixed precision -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sam", "clipped", "friendly", "look"])
def test_bfloat16_is_the_plain_loop_under_autocast(method):
    module, net = Module(METHODS[method], network(torch.float32)), network(torch.float32)
    trainer_of(max_epochs=2, precision="bf16-mixed").fit(module, loader(X.float()))
    plain(METHODS[method], net, 2, autocast=torch.bfloat16)
    assert same(module.net, net)


def half(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    return scaler, MixedPrecision("16-mixed", "cpu", scaler)


@pytest.fixture(scope="module")
def recipe():
    names = {"__name__": "page", "nn": nn, "torch": torch, "optim": optim, "criterion": CE}
    return classes_of("lightning", names)


@pytest.mark.parametrize("scale", [2.0**8, 2.0**127])
@pytest.mark.parametrize("method", ["sam", "clipped", "friendly", "look"])
def test_float16_with_the_hook_of_the_recipe_is_the_plain_loop(method, scale, recipe):
    class Hooked(Module):
        optimizer_step = recipe["HalfPrecision"].optimizer_step

    module, net = Hooked(METHODS[method], network(torch.float32)), network(torch.float32)
    mine, plugin = half(scale)
    trainer_of(max_epochs=4, plugins=[plugin]).fit(module, loader(X.float()))
    theirs, _ = half(scale)
    plain(METHODS[method], net, 4, autocast=torch.float16, scaler=theirs)
    assert same(module.net, net)
    assert mine.state_dict() == theirs.state_dict()
    assert (mine.get_scale() < scale) == (scale > 2.0**100)  # steps were skipped


def test_float16_without_the_hook_is_refused():
    module = Module(METHODS["sam"], network(torch.float32))
    before = flat(module)
    with pytest.raises(SettingsError, match=r"Expected `step\(closure\)`"):
        trainer_of(max_epochs=1, plugins=[half(2.0**8)[1]]).fit(module, loader(X.float()))
    assert np.array_equal(flat(module), before)


# -- the classes of the recipe -------------------------------------------------------------


def rows(n=96):
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, 8, generator=g), torch.randint(0, 3, (n,), generator=g)


def recipe_loop(net, step, make, schedule=True):
    """Two epochs of three batches of 32 by hand, as the recipe's own."""
    opt = make(torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), net)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=2)
    x, y = rows()
    for _ in range(2):
        for batch in zip(x.split(32), y.split(32), strict=True):
            step(opt, net, *batch)
        if schedule:
            scheduler.step()


def clipped_sam(base, net):
    return optim.SAM(base, rho=0.05, model=net, max_grad_norm=1.0)


def fit_recipe(cls):
    torch.manual_seed(3)
    module = cls()
    net = copy.deepcopy(module.net)
    trainer = trainer_of(max_epochs=2)
    trainer.fit(module, loader(*rows(), size=32))
    assert trainer.global_step == 6
    return module, net, trainer.callback_metrics


def test_the_classifier_of_the_recipe(recipe):
    module, net, logged = fit_recipe(recipe["Classifier"])
    losses = []

    def step(opt, net, x, y):
        losses.append(opt.step(lambda: _backward(CE(net(x), y))).item())

    recipe_loop(net, step, clipped_sam)
    assert same(module.net, net)
    assert logged["loss"].item() == losses[-1]  # of the first pass


def _backward(loss):
    loss.backward()
    return loss


def test_the_accumulation_of_the_recipe(recipe):
    module, net, _ = fit_recipe(recipe["Accumulated"])

    def step(opt, net, x, y):
        def closure():
            for a, b in zip(x.split(8), y.split(8), strict=True):
                (CE(net(a), b) * len(b) / len(y)).backward()

        opt.step(closure)

    recipe_loop(net, step, clipped_sam)
    assert same(module.net, net)


def test_the_micro_batches_of_the_recipe(recipe):
    module, net, _ = fit_recipe(recipe["MicroBatched"])

    def step(opt, net, x, y):
        parts = list(zip(x.chunk(4), y.chunk(4), strict=True))
        opt.step(lambda i: _backward(CE(net(parts[i][0]), parts[i][1])))

    def make(base, net):
        return optim.MicroBatchSAM(base, num_micro_batches=4, model=net)

    recipe_loop(net, step, make, schedule=False)
    assert same(module.net, net)


# -- the object of self.optimizers() ---------------------------------------------------------


def test_methods_reach_the_optimizer_inside_lightnings():
    seen = {}

    class Manual(Module):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.automatic_optimization = False

        def training_step(self, batch, index):
            outer, inner = self.optimizers(), self.optimizers(use_pl_optimizer=False)
            before = flat(self)
            seen["state"] = outer.state_dict()["sharpkit"]["method"]
            self.manual_backward(CE(self.net(batch[0]), batch[1]))
            assert outer.first_step()
            assert not outer.first_pass
            assert not np.array_equal(flat(self), before)
            outer.restore()
            assert outer.first_pass
            assert np.array_equal(flat(self), before)
            outer.load_state_dict({**inner.state_dict(), "sharpkit": {**SAVED, "steps": 40}})
            seen["steps"] = inner.steps

        def on_train_batch_end(self, outputs, batch, index):
            pass

    SAVED = METHODS["sam"](network()).state_dict()["sharpkit"]
    trainer_of(max_epochs=1, limit_train_batches=1).fit(Manual(METHODS["sam"], network()), loader())
    assert seen == {"state": "SAM", "steps": 40}
