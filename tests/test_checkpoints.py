"""Weights from files: what fits is loaded, what does not is named, the model stays whole."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from sharpkit.errors import CheckpointError
from sharpkit.study.checkpoints import find_checkpoints, load_checkpoint, read_state_dict


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def save(content, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "net.model."]
)
def test_prefixes_of_wrappers_are_stripped(tmp_path, suffix, prefix):
    source, target = make_model(1), make_model(2)
    path = save(prefixed(source.state_dict(), prefix), tmp_path / f"a{suffix}")
    info = load_checkpoint(path, target)
    assert info.stripped == prefix
    assert info.num_tensors == len(source.state_dict())
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net"])
def test_weights_are_found_beside_the_optimizer(tmp_path, key):
    source, target = make_model(1), make_model(2)
    content = {"epoch": 3, "optimizer": {"state": {}}, key: source.state_dict()}
    load_checkpoint(save(content, tmp_path / "a.ckpt"), target)
    assert torch.equal(target[0].weight, source[0].weight)


def test_lightning_checkpoint(tmp_path):
    source, target = make_model(1), make_model(2)
    content = {
        "epoch": 1,
        "pytorch-lightning_version": "2.0",
        "state_dict": prefixed(source.state_dict(), "model."),
        "hyper_parameters": {"lr": 0.1},
    }
    info = load_checkpoint(save(content, tmp_path / "last.ckpt"), target)
    assert info.stripped == "model."
    assert torch.equal(target[2].bias, source[2].bias)


def test_compiled_submodules(tmp_path):
    source, target = make_model(1), make_model(2)
    state = {k.replace("0.", "0._orig_mod.", 1): v for k, v in source.state_dict().items()}
    load_checkpoint(save(state, tmp_path / "a.pt"), target)
    assert torch.equal(target[0].weight, source[0].weight)


def test_a_model_whose_own_names_carry_a_prefix(tmp_path):
    source, target = (nn.ModuleDict({"model": make_model(s)}) for s in (1, 2))
    info = load_checkpoint(save(source.state_dict(), tmp_path / "a.pt"), target)
    assert info.stripped == ""
    assert torch.equal(target["model"][0].weight, source["model"][0].weight)


def test_hash_speaks_of_content_not_of_the_format(tmp_path):
    state = make_model(1).state_dict()
    a = load_checkpoint(save(state, tmp_path / "a.pt"), make_model())
    b = load_checkpoint(save(state, tmp_path / "b.safetensors"), make_model())
    c = load_checkpoint(save(make_model(2).state_dict(), tmp_path / "c.pt"), make_model())
    assert a.sha256 == b.sha256 != c.sha256


def test_tied_weight_may_be_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    torch.manual_seed(1)
    source = Tied()
    target = Tied()
    path = save({"embed.weight": source.embed.weight.detach()}, tmp_path / "a.safetensors")
    load_checkpoint(path, target)
    assert torch.equal(target.head.weight, source.embed.weight)
    assert target.head.weight is target.embed.weight


def test_harmless_buffers_are_ignored_and_said(tmp_path):
    source, target = make_model(1), make_model(2)
    state = {**source.state_dict(), "embeddings.position_ids": torch.arange(4)}
    info = load_checkpoint(save(state, tmp_path / "a.pt"), target)
    assert info.ignored == ("embeddings.position_ids",)


def test_dtype_of_the_model_is_kept(tmp_path):
    state = {
        k: v.double() if v.is_floating_point() else v for k, v in make_model(1).state_dict().items()
    }
    target = make_model(2)
    load_checkpoint(save(state, tmp_path / "a.pt"), target)
    assert target[0].weight.dtype == torch.float32


class Stranger:
    """A class that weights_only refuses."""


def broken_files(folder):
    good = make_model(1).state_dict()
    renamed = {k.replace("2.", "head."): v for k, v in good.items()}
    narrow = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).state_dict()
    nan = {k: v.clone() for k, v in good.items()}
    nan["0.weight"][0, 0] = float("nan")
    whole = save(good, folder / "whole.pt").read_bytes()
    return {
        "does not exist": folder / "none.pt",
        "is a folder": folder,
        "is empty": _write(folder / "empty.pt", b""),
        "Git LFS pointer": _write(
            folder / "lfs.pt", b"version https://git-lfs.github.com/spec/v1\n"
        ),
        "damaged, cut off or of another": _write(folder / "cut.pt", whole[: len(whole) // 2]),
        "of another format": _write(folder / "text.pt", b"these are not weights at all\n"),
        "damaged or of another format": _write(folder / "text.safetensors", b"not weights" * 9),
        "use --trust-pickle": save({"w": Stranger()}, folder / "pickle.pt"),
        "Got list": save([torch.zeros(1)], folder / "list.pt"),
        "It holds: epoch, loss": save({"epoch": 1, "loss": 0.1}, folder / "no_weights.pt"),
        "It holds: nothing": save({}, folder / "nothing.pt"),
        "'0.weight' holds NaN or inf": save(nan, folder / "nan.pt"),
        "missing: 2.weight, 2.bias; not in the model: head.weight, head.bias": save(
            renamed, folder / "renamed.pt"
        ),
        "of another shape: 2.weight (3, 4) for (2, 4)": save(narrow, folder / "narrow.pt"),
    }


def _write(path, content):
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return broken_files(tmp_path_factory.mktemp("broken"))


BROKEN = list(
    {
        "does not exist", "is a folder", "is empty", "Git LFS pointer",
        "damaged, cut off or of another", "of another format", "damaged or of another format",
        "use --trust-pickle", "Got list", "It holds: epoch, loss", "It holds: nothing",
        "'0.weight' holds NaN or inf",
        "missing: 2.weight, 2.bias; not in the model: head.weight, head.bias",
        "of another shape: 2.weight (3, 4) for (2, 4)",
    }
)  # fmt: skip


@pytest.mark.parametrize("message", sorted(BROKEN))
def test_what_does_not_fit_is_named_and_the_model_stays(broken, message):
    assert set(broken) == set(BROKEN)
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(broken[message], model)
    assert message in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_whole_pickled_model_needs_consent(tmp_path):
    source, target = make_model(1), make_model(2)
    path = save(source, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        read_state_dict(path)
    load_checkpoint(path, target, trust_pickle=True)
    assert torch.equal(target[0].weight, source[0].weight)


def test_find_is_natural_recursive_and_without_duplicates(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("e10.pt", "e2.pt", "deep/x.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = find_checkpoints([tmp_path, str(tmp_path / "*.pt")])
    assert [str(f.relative_to(tmp_path)) for f in found] == [
        "deep/x.safetensors",
        "e2.pt",
        "e10.pt",
    ]


@pytest.mark.parametrize("pattern", ["none.pt", "*.pt", "."])
def test_find_refuses_nothing(tmp_path, pattern, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        find_checkpoints([pattern])
