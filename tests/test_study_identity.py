"""What counts as the same measurement, and what does not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import sharpkit as sk
from sharpkit.errors import SettingsError
from sharpkit.study.identity import Options, identify, settings_text
from sharpkit.study.source import source_hash


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()


X, Y = torch.randn(10, 3, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 2


def key(model=None, data=None, recipe="code", options=None, **beside):
    objective = sk.Objective(model or net(), nn.CrossEntropyLoss(), data or [(X, Y)])
    return identify(objective, recipe, beside, options or Options()).key


def test_the_same_content_has_the_same_key():
    assert key() == key()
    assert key(data=[(X[:3], Y[:3]), (X[3:], Y[3:])]) == key()  # batches are a way to sum
    adam = torch.optim.Adam(net().parameters())
    assert key(optimizer=adam) == key(optimizer=adam.state_dict())
    assert key(initial=net(1)) == key(initial=net(1).state_dict())
    assert key(options=Options(seed=3, trust_pickle=True)) == key()  # the seed is kept apart


def test_everything_that_numbers_depend_on_changes_the_key():
    moved, counted = net(), net()
    with torch.no_grad():
        moved[0].weight[0, 0] += 1e-6
        counted[1].running_mean += 1
    keys = [
        key(),
        key(model=moved),
        key(model=counted),  # buffers
        key(data=[(X + 1e-6, Y)]),
        key(data=[(X, 1 - Y)]),
        key(recipe="other code"),
        key(initial=net(1)),
        key(initial=net(2)),
        key(optimizer=torch.optim.Adam(net().parameters(), lr=1e-3)),
        key(optimizer=torch.optim.Adam(net().parameters(), lr=1e-2)),
        key(options=Options(dtype="float64")),
        key(options=Options(params=("0.*",))),
        key(options=Options(num_groups=0)),
        key(options=Options(max_basis=20)),
        key(options=Options(canonical=True)),
    ]
    assert len(set(keys)) == len(keys)


def test_the_version_changes_the_key():
    objective = sk.Objective(net(), nn.CrossEntropyLoss(), [(X, Y)])
    subject = identify(objective, "code", {}, Options())
    assert subject.version == sk.__version__
    assert replace(subject, version="0.0.0").key != subject.key


def test_only_the_kind_of_device_counts():
    assert Options(device="cuda:1").text() == Options(device="cuda:0").text()
    assert Options(device="cpu").text() != Options(device="cuda").text()


def test_settings_are_the_same_in_any_order():
    assert settings_text({"a": 1, "b": (1, 2)}) == settings_text({"b": [1, 2], "a": 1})
    assert settings_text({"a": 1}) != settings_text({"a": 2})


@pytest.mark.parametrize("dtype", ["float31", "int64", "Tensor"])
def test_a_dtype_that_is_none_is_refused(dtype):
    with pytest.raises(SettingsError, match="dtype such as"):
        Options(dtype=dtype).torch_dtype()


# -- the recipe's code -------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "nets.py").write_text("import numpy\nfrom parts.layers import width\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("")
    (tmp_path / "parts" / "layers.py").write_text("from . import sizes\nwidth = 3\n")
    (tmp_path / "parts" / "sizes.py").write_text("small = 1\n")
    (tmp_path / "unused.py").write_text("x = 1\n")
    path = tmp_path / "recipe.py"
    path.write_text(
        "def model():\n    import nets\n    return nets\n\n\n"
        "def metadata(checkpoint):\n    return {'gap': 1}\n\n\nlast = 1\n"
    )
    return path


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("nets.py", True),
        ("parts/__init__.py", True),
        ("parts/layers.py", True),
        ("parts/sizes.py", True),
        ("unused.py", False),
    ],
)
def test_imported_neighbours_count(recipe, file, counts):
    before = source_hash(recipe)
    path = recipe.parent / file
    path.write_text(path.read_text() + "changed = 1\n")
    assert (source_hash(recipe) != before) is counts


def test_metadata_can_be_corrected_and_nothing_else(recipe):
    before = source_hash(recipe)
    text = recipe.read_text()
    recipe.write_text(text.replace("'gap': 1", "'gap': 2, 'more': 3"))
    assert source_hash(recipe) == before
    recipe.write_text(text.replace("last = 1", "last = 2"))
    assert source_hash(recipe) != before


def test_metadata_that_builds_the_network_count(recipe):
    text = recipe.read_text().replace("return nets", "return nets, metadata(None)['gap']")
    recipe.write_text(text)
    before = source_hash(recipe)
    recipe.write_text(text.replace("'gap': 1", "'gap': 2"))
    assert source_hash(recipe) != before


def test_what_stands_before_and_inside_metadata_is_told_apart(recipe):
    # Form feeds and other breaks that are no ends of lines for the parser.
    text = "\f\nx = '\u2028\x1c'\n\f\nwidth = 3\n" + recipe.read_text()
    recipe.write_text(text)
    before = source_hash(recipe)
    recipe.write_text(text.replace("'gap': 1", "'gap': 2"))
    assert source_hash(recipe) == before
    for old in ("width = 3", "last = 1", "return nets"):
        recipe.write_text(text.replace(old, old + "0"))
        assert source_hash(recipe) != before


def test_only_the_recipe_s_own_metadata_is_left_out(recipe):
    text = recipe.read_text() + "\nclass Net:\n    def metadata(self):\n        return 1\n"
    recipe.write_text(text)
    before = source_hash(recipe)
    recipe.write_text(text.replace("return 1\n", "return 2\n"))
    assert source_hash(recipe) != before


def test_a_recipe_that_moved_is_the_same(recipe, tmp_path):
    before = source_hash(recipe)
    recipe.rename(recipe.with_name("other.py"))
    assert source_hash(recipe.with_name("other.py")) == before


def test_a_circle_of_imports_ends(recipe):
    (recipe.parent / "nets.py").write_text("import recipe, nets\n")
    assert source_hash(recipe) == source_hash(recipe)
