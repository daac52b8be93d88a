"""The callbacks of Lightning and of Hugging Face's Trainer: the numbers of the plain loop."""

import logging
from typing import ClassVar

import pytest
import torch
from test_tracking import CE, F64, X, Y, network, sgd
from torch import nn

from sharpkit.tracking import Tracker

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]

BATCHES = list(zip(X.split(16), Y.split(16), strict=True))
OPTIONS = {"every": 3, "trace_probes": 3}


def comparable(frame):
    return frame.drop(columns=["seconds", "loss"])


def lightning_run(dropout=0.0, accumulate=1, **options):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    from lightning.pytorch.loggers.logger import DummyLogger

    from sharpkit.tracking.lightning import SharpnessCallback

    class Logger(DummyLogger):
        logged: ClassVar = []

        def log_metrics(self, metrics, step=None):
            self.logged.append((step, metrics))

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network(dropout=dropout)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            return CE(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return sgd(self)

    module, callback = Module(), SharpnessCallback(CE, (X, Y), **{**OPTIONS, **options})
    logger = Logger()
    logger.logged = []
    lightning.Trainer(
        callbacks=[callback], max_epochs=4, accelerator="cpu", logger=logger, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=accumulate, num_sanity_val_steps=0,
    ).fit(module, torch.utils.data.DataLoader(list(zip(X, Y, strict=True)), batch_size=16))  # fmt: skip
    return module, callback, [(s, m) for s, m in logger.logged if any("sharp" in n for n in m)]


def plain_run():
    net = network(dropout=0.0)
    opt = sgd(net)
    tracker = Tracker(net.train(), CE, (X, Y), optimizer=opt, **OPTIONS)
    losses, step = [], 0
    for _ in range(4):
        for x, y in BATCHES:
            step += 1
            opt.zero_grad()
            loss = CE(net(x), y)
            loss.backward()
            opt.step()
            if tracker.step(step, loss=loss):
                losses.append(loss.item())
    return net, tracker, losses


@pytest.mark.parametrize("network_of", [None, lambda module: module.net])
def test_lightning_is_the_plain_loop(network_of):
    module, callback, logged = lightning_run(network=network_of)
    net, tracker, losses = plain_run()
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.net.state_dict().values(), net.state_dict().values(), strict=True)
    )
    frame = callback.tracker.frame
    assert frame.step.tolist() == [1, 4, 7, 10]
    assert comparable(frame).equals(comparable(tracker.frame))
    assert frame.loss.tolist() == losses
    assert frame.two_over_eta.tolist() == [pytest.approx(19.0)] * 4
    assert [step for step, _ in logged] == [1, 4, 7, 10]
    assert [m["sharpness/lambda_max"] for _, m in logged] == frame.lambda_max.tolist()


def test_lightning_counts_steps_of_the_optimizer():
    _, callback, logged = lightning_run(accumulate=3, log=False)
    assert callback.tracker.frame.step.tolist() == [1, 4]
    assert logged == []


def test_lightning_with_a_batch_loss():
    def batch_loss(module, batch):
        return CE(module(batch[0]), batch[1], reduction="sum"), len(batch[1])

    _, callback, _ = lightning_run(batch_loss=batch_loss)
    _, tracker, _ = plain_run()
    ours, plain = callback.tracker.frame.lambda_max, tracker.frame.lambda_max
    assert ours.tolist() == pytest.approx(plain.tolist(), rel=1e-9)


ROWS = [
    {
        "input_ids": torch.randint(20, (5,), generator=torch.Generator().manual_seed(i)),
        "labels": i % 2,
    }
    for i in range(24)
]
DATA = {
    "input_ids": torch.stack([r["input_ids"] for r in ROWS]),
    "labels": torch.tensor([r["labels"] for r in ROWS]),
}


def bert(transformers):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.1,
    )
    return transformers.BertForSequenceClassification(config).to(F64)


def trainer_run(tmp_path, callbacks):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = bert(transformers)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, save_strategy="no", use_cpu=True,
        per_device_train_batch_size=4, report_to=[], disable_tqdm=True, seed=0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    torch.manual_seed(1)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=ROWS, callbacks=callbacks,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.05), None),
    )  # fmt: skip
    trainer.train()
    return trainer


def test_the_trainer_is_the_same_with_the_callback_and_tells_the_plain_numbers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from sharpkit.tracking.hf import SharpnessCallback

    states = []

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **given):
            states.append({n: t.clone() for n, t in model.state_dict().items()})

    callback = SharpnessCallback(nn.functional.cross_entropy, DATA, **{**OPTIONS, "every": 5})
    with_it = trainer_run(tmp_path / "a", [callback, Keep()]).model
    without = trainer_run(tmp_path / "b", []).model
    assert all(
        torch.equal(a, b) for a, b in zip(with_it.parameters(), without.parameters(), strict=True)
    )
    frame = callback.tracker.frame
    assert frame.step.tolist() == [1, 6, 11]
    assert frame.two_over_eta.tolist() == [pytest.approx(40.0)] * 3
    model = bert(transformers).train()
    plain = Tracker(model, nn.functional.cross_entropy, DATA, **{**OPTIONS, "every": 5})
    for step, state in enumerate(states, start=1):
        model.load_state_dict(state)
        plain.step(step)
    dropped = ["seconds", "two_over_eta"]
    assert frame.drop(columns=dropped).equals(plain.frame.drop(columns=dropped))


def test_the_trainer_with_a_batch_loss(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from sharpkit.tracking.hf import SharpnessCallback

    def batch_loss(model, batch):
        return model(**batch).loss * len(batch["labels"]), len(batch["labels"])

    callback = SharpnessCallback(None, [DATA], batch_loss=batch_loss, every=100, optimizer=None)
    trainer_run(tmp_path, [callback])
    assert callback.tracker.frame.converged.tolist() == [True]
    assert callback.tracker.frame.two_over_eta.isna().all()
