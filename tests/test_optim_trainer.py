"""SAM in Hugging Face's Trainer, by the recipe of the docs: the same bits as a plain loop."""

import pytest
import torch
from recipes import classes_of
from torch import nn

from sharpkit import optim
from sharpkit.errors import SettingsError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

pytestmark = [
    # On the CPU there is nothing to pin; the trainer asks for it all the same.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ROWS = [
    {
        "input_ids": torch.randint(20, (5,), generator=torch.Generator().manual_seed(i)),
        "labels": i % 2,
    }
    for i in range(22)
]  # with 4 rows a step, the last step of an epoch has 2


@pytest.fixture(scope="module")
def recipe():
    trainer = classes_of("transformers", {"__name__": "page"})["SAMTrainer"]
    # Transformers 5.23 takes BERT's loss for one over all rows of the step; it is a mean.
    return type("Averaging", (trainer,), {"loss_is_scaled_for_ga": False})


def bert(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


METHODS = {
    "sam": lambda model, **more: optim.SAM(base_of(model), rho=0.5, model=model, **more),
    "gsam": lambda model, **more: optim.GSAM(base_of(model), rho=0.5, model=model, **more),
    "friendly": lambda model, **more: optim.FriendlySAM(
        base_of(model), rho=0.5, model=model, **more
    ),
    "look": lambda model, **more: optim.LookSAM(
        base_of(model), rho=0.5, every=2, model=model, **more
    ),
}


def base_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def trainer_of(recipe, model, opt, folder, accumulate, **options):
    settings = {
        "num_train_epochs": 3,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 4 // accumulate,
        "gradient_accumulation_steps": accumulate,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **settings)
    return recipe(model, arguments, train_dataset=ROWS, optimizers=(opt, None))


def plain(model, opt, accumulate, epochs=3, max_grad_norm=None):
    """The same training by hand; the micro-batches of a step weigh the same."""
    model.train()
    steps = 6 * epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: max(0.0, (steps - i) / steps))
    size = 4 // accumulate

    def both(parts):
        for part in parts:
            ids = torch.stack([row["input_ids"] for row in part])
            labels = torch.tensor([row["labels"] for row in part])
            (model(input_ids=ids, labels=labels).loss / len(parts)).backward()

    for _ in range(epochs):
        batches = [ROWS[i : i + size] for i in range(0, len(ROWS), size)]
        for i in range(0, len(batches), accumulate):
            parts = batches[i : i + accumulate]
            opt.zero_grad()
            both(parts)
            if opt.first_step():
                both(parts)
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            opt.step()
            scheduler.step()


def same(left, right):
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("method", "accumulate"), [("sam", 1), ("sam", 2), ("sam", 4), ("gsam", 2), ("look", 2)]
)
def test_a_run_is_the_plain_loop(method, accumulate, recipe, tmp_path):
    models = bert(), bert()
    opts = [METHODS[method](model, max_grad_norm=0.5) for model in models]
    trainer = trainer_of(recipe, models[0], opts[0], tmp_path, accumulate)
    trainer.train()
    plain(models[1], opts[1], accumulate)
    assert same(*models)
    assert not same(models[0], bert())
    assert opts[0].steps == opts[1].steps == trainer.state.global_step == 18


def test_the_trainer_clips_between_the_passes_and_the_step(recipe, tmp_path):
    models = bert(), bert()
    opts = [METHODS["sam"](model) for model in models]
    trainer_of(recipe, models[0], opts[0], tmp_path, 2, max_grad_norm=0.1).train()
    plain(models[1], opts[1], 2, max_grad_norm=0.1)
    assert same(*models)


@pytest.mark.parametrize("method", ["friendly", "look"])
def test_a_run_goes_on_from_its_checkpoint(method, recipe, tmp_path):
    """From the middle of an epoch, with dropout: random states come back too."""
    whole, again = bert(dropout=0.2), bert(seed=9, dropout=0.2)
    trainer_of(
        recipe, whole, METHODS[method](whole), tmp_path, 2, save_strategy="steps", save_steps=8
    ).train()
    opt = METHODS[method](again)
    trainer = trainer_of(recipe, again, opt, tmp_path / "again", 2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert same(whole, again)
    assert opt.steps == trainer.state.global_step == 18


def test_a_trainer_without_the_second_pass_is_refused(tmp_path):
    model = bert()
    with pytest.raises(SettingsError, match=r"Expected `step\(closure\)`"):
        trainer_of(transformers.Trainer, model, METHODS["sam"](model), tmp_path, 1).train()
