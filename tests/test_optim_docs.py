"""Every code block of docs/optimizers.md runs, and its table names every optimizer."""

import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from recipes import OWN, PACKAGES, PAGE, blocks_of, run

from sharpkit import optim


def test_the_blocks_that_need_torch_alone_run_in_order():
    assert len(OWN) > 12
    names = run(OWN, {"__name__": "page"})
    losses = [names["criterion"](names["model"](names["x"]), names["y"]).item()]
    assert losses[0] < 1.1  # of log 3 at the start: the loops above trained it
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_the_recipes_run(package):
    pytest.importorskip(package, reason=f"{package} is not installed; its recipe is not run")
    blocks = blocks_of(package)
    assert blocks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages
        run([*OWN, *blocks], {"__name__": "page"})


def test_the_table_has_every_optimizer():
    table = PAGE[PAGE.index("## All of them") : PAGE.index("## Schedulers")]
    listed = {
        name
        for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    public = {name for name in optim.__all__ if inspect.isclass(getattr(optim, name))}
    assert listed == public - {"SharpnessAware", "MicroBatches"}


def test_the_links_lead_somewhere():
    docs = Path(__file__).parents[1] / "docs"
    for target in re.findall(r"\]\((?!https://)([^)#]+)", PAGE):
        assert (docs / target).exists(), target


def test_the_tests_of_known_faults_exist():
    section = PAGE.split("## Known faults", 1)[1]
    named = set(re.findall(r"`(test_\w+)`", section))
    assert len(named) > 30
    here = Path(__file__).parent
    text = "".join(file.read_text() for file in here.glob("test_optim*.py"))
    assert named <= set(re.findall(r"^def (test_\w+)\(", text, re.MULTILINE))
