"""Weights from files: what fits is loaded, what does not is named, the model stays whole."""

import copy
import pickle
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

from sharpkit.errors import CheckpointError
from sharpkit.study.checkpoints import (
    find_checkpoints,
    fit_state_dict,
    load_checkpoint,
    read_state_dict,
)


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
    assert info.stripped_prefix == prefix
    assert info.num_tensors == len(source.state_dict())
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "key", ["state_dict", "model_state_dict", "model", "net", "module", "weights", "ema"]
)
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
    assert info.stripped_prefix == "model."
    assert torch.equal(target[2].bias, source[2].bias)


def test_compiled_submodules(tmp_path):
    source, target = make_model(1), make_model(2)
    state = {k.replace("0.", "0._orig_mod.", 1): v for k, v in source.state_dict().items()}
    load_checkpoint(save(state, tmp_path / "a.pt"), target)
    assert torch.equal(target[0].weight, source[0].weight)


def test_a_model_whose_own_names_carry_a_prefix(tmp_path):
    source, target = (nn.ModuleDict({"model": make_model(s)}) for s in (1, 2))
    info = load_checkpoint(save(source.state_dict(), tmp_path / "a.pt"), target)
    assert info.stripped_prefix == ""
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
    info = load_checkpoint(save(state, tmp_path / "a.pt"), target)
    assert target[0].weight.dtype == torch.float32
    assert info.notes == ("Weights converted from torch.float64 to torch.float32.",)


class Stranger:
    """A class that weights_only refuses."""


def broken_files(folder):
    good = make_model(1).state_dict()
    renamed = {k.replace("2.", "head."): v for k, v in good.items()}
    narrow = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).state_dict()
    nan = {k: v.clone() for k, v in good.items()}
    nan["0.weight"][0, 0] = float("nan")
    whole = save(good, folder / "whole.pt").read_bytes()
    stored = save(good, folder / "whole.safetensors").read_bytes()
    integers = {k: v.to(torch.int8) for k, v in good.items()}
    compl = {k: v.to(torch.complex64) for k, v in good.items()}
    large = {f"layer{i}": torch.zeros(1) for i in range(9)}
    both = {**prefixed(good, "model."), **prefixed(good, "net.")}
    program = folder / "program.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), program)
    torch.save(good, folder / "old.pt", _use_new_zipfile_serialization=False)
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
        "end of the archive is missing": _write(folder / "cut2.pt", whole[:-30]),
        "unexpected EOF": _write(folder / "old_cut.pt", (folder / "old.pt").read_bytes()[:-40]),
        "a text that starts with '<!DOCTYPE html>": _write(
            folder / "page.bin", b"<!DOCTYPE html><html>not found</html>"
        ),
        "may come from pickle.dump": _write(folder / "dump.pt", pickle.dumps(good)),
        "name it .safetensors": _write(folder / "st.bin", stored),
        "name it .pt": _write(folder / "zip.safetensors", whole),
        "not fully covered": _write(folder / "cut.safetensors", stored[:-9]),
        "TorchScript program": program,
        "It holds: generator, discriminator": save(
            {"generator": good, "discriminator": good}, folder / "gan.pt"
        ),
        "It holds: step, encoder": save(
            {"step": torch.tensor(3), "encoder": good}, folder / "part.pt"
        ),
        "0.weight torch.int8 for torch.float32": save(integers, folder / "int8.pt"),
        "0.weight torch.complex64 for torch.float32": save(compl, folder / "complex.pt"),
        "layer3, layer4 and 4 more": save(large, folder / "many.pt"),
        "under 'model.' as under 'net.'": save(both, folder / "both.pt"),
    }


def _write(path, content):
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return broken_files(tmp_path_factory.mktemp("broken"))


BROKEN = [
    "does not exist", "is a folder", "is empty", "Git LFS pointer",
    "damaged, cut off or of another", "of another format", "damaged or of another format",
    "use --trust-pickle", "Got list", "It holds: epoch, loss", "It holds: nothing",
    "'0.weight' holds NaN or inf",
    "missing: 2.weight, 2.bias; not in the model: head.weight, head.bias",
    "of another shape: 2.weight (3, 4) for (2, 4)",
    "end of the archive is missing", "unexpected EOF", "a text that starts with '<!DOCTYPE html>",
    "may come from pickle.dump", "name it .safetensors", "name it .pt", "not fully covered",
    "TorchScript program", "It holds: generator, discriminator", "It holds: step, encoder",
    "0.weight torch.int8 for torch.float32", "0.weight torch.complex64 for torch.float32",
    "layer3, layer4 and 4 more", "under 'model.' as under 'net.'",
]  # fmt: skip


@pytest.mark.parametrize("message", sorted(BROKEN))
def test_what_does_not_fit_is_named_and_the_model_stays(broken, message):
    assert set(broken) == set(BROKEN)
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(broken[message], model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_whole_pickled_model_needs_consent(tmp_path):
    source, target = make_model(1), make_model(2)
    path = save(source, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        read_state_dict(path)
    load_checkpoint(path, target, trust_pickle=True)
    assert torch.equal(target[0].weight, source[0].weight)


def test_trust_runs_no_code_where_none_is_needed(tmp_path, monkeypatch):
    path = save(make_model(1).state_dict(), tmp_path / "a.pt")
    asked, load = [], torch.load

    def spy(*args, **kwargs):
        asked.append(kwargs["weights_only"])
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", spy)
    read_state_dict(path, trust_pickle=True)
    assert asked == [True]


def test_a_class_that_is_gone_is_said(tmp_path, monkeypatch):
    path = save({"w": Stranger()}, tmp_path / "a.pt")
    monkeypatch.delattr(f"{__name__}.Stranger")
    with pytest.raises(CheckpointError, match="needs Python classes that are not here"):
        read_state_dict(path, trust_pickle=True)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


class Masked(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"scale": 1}

    def set_extra_state(self, state):
        assert state == {"scale": 1}


class Grumpy(nn.Linear):
    """Takes its weight and then fails, as a hook may."""

    def _load_from_state_dict(self, state, prefix, *args):
        super()._load_from_state_dict(state, prefix, *args)
        raise ValueError("not today")


def refused(path, model, message, **options):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, model, **options)
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor)


def test_values_that_the_model_cannot_hold_are_refused(tmp_path):
    apart = {"a.weight": torch.zeros(3, 3), "b.weight": torch.ones(3, 3)}
    refused(save(apart, tmp_path / "apart.pt"), Tied(), "the model ties them")
    huge = {"weight": torch.full((2, 2), 1e9), "bias": torch.zeros(2)}
    path = save(huge, tmp_path / "huge.pt")
    refused(path, nn.Linear(2, 2).half(), "within the range of the model's torch.float16")
    load_checkpoint(path, nn.Linear(2, 2).bfloat16())


def test_a_failure_inside_load_state_dict_is_undone(tmp_path):
    path = save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    refused(path, Grumpy(2, 2), "load_state_dict failed .not today")


@pytest.mark.parametrize("device", ["tpu9", "nowhere:3"])
def test_a_device_that_is_not_here_is_not_called_damage(tmp_path, device):
    path = save(make_model(1).state_dict(), tmp_path / "a.pt")
    refused(path, make_model(), f"'{device}' is not here", map_location=device)


@pytest.mark.parametrize("layer", [nn.LazyLinear(4), nn.Linear(3, 4, device="meta")])
def test_a_model_without_values_is_refused(tmp_path, layer):
    path = save(nn.Linear(3, 4).state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="'weight' has none yet"):
        load_checkpoint(path, layer)


def test_masks_may_be_infinite_and_weights_may_not(tmp_path):
    source, target = Masked(), Masked()
    load_checkpoint(save(source.state_dict(), tmp_path / "a.pt"), target)
    assert torch.equal(target.weight, source.weight)
    bad = {**source.state_dict(), "mask": torch.full((2, 2), float("nan"))}
    refused(save(bad, tmp_path / "b.pt"), target, "'mask' holds NaN")
    with pytest.raises(CheckpointError, match="'mask' holds NaN or inf"):
        read_state_dict(tmp_path / "a.pt")  # it knows no model


@pytest.mark.parametrize("change", ["to_sparse", "float8"])
def test_unusual_tensors_are_read(tmp_path, change):
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        source.weight.fill_(0.5)
        source.bias.fill_(0.25)
    state = {
        k: v.to_sparse() if change == "to_sparse" else v.to(torch.float8_e4m3fn)
        for k, v in source.state_dict().items()
    }
    load_checkpoint(save(state, tmp_path / "a.pt"), target)
    assert torch.equal(target.weight, source.weight)


def test_extra_state_stays_with_the_model(tmp_path):
    source, target = Stateful(2, 2), Stateful(2, 2)
    load_checkpoint(save(source.state_dict(), tmp_path / "a.pt"), target)
    assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize("ours", ["module", "_orig_mod"])
@pytest.mark.parametrize("theirs", ["", "module.", "_orig_mod.module."])
def test_a_wrapped_model_takes_names_of_any_wrapping(tmp_path, ours, theirs):
    source, target = make_model(1), nn.Module()
    target.add_module(ours, make_model(2))
    load_checkpoint(save(prefixed(source.state_dict(), theirs), tmp_path / "a.pt"), target)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[f"{ours}.{name}"], tensor)


def test_what_may_be_absent_or_left_over_is_said(tmp_path):
    source, target = make_model(1), make_model(2)
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("2.")}
    path = save({**state, "loss.weight": torch.ones(2)}, tmp_path / "a.pt")
    head = target[2].weight.clone()
    refused(path, target, "not in the model: loss.weight", ignore_missing="2.*")
    refused(path, target, "missing: 2.weight, 2.bias", ignore_unexpected=True)
    info = load_checkpoint(path, target, ignore_unexpected=True, ignore_missing=["2.*"])
    assert info.ignored == ("loss.weight",)
    assert info.kept == ("2.weight", "2.bias")
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[2].weight, head)
    other = save({"x": torch.ones(1)}, tmp_path / "b.pt")
    refused(other, target, "No name matches", ignore_unexpected=True, ignore_missing="*")


def test_fit_leaves_the_model_and_the_state_alone():
    source, target = make_model(1), make_model(2)
    state = prefixed(source.state_dict(), "module.")
    before = copy.deepcopy(target.state_dict())
    fitted = fit_state_dict(state, target)
    assert list(fitted) == list(before)
    assert next(iter(state)) == "module.0.weight"
    assert fitted["0.weight"] is state["module.0.weight"]
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())


def test_find_takes_one_name_a_folder_by_glob_and_any_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run1").mkdir()
    for name in ("run1/a².PT", "run1/a2.pt"):
        (tmp_path / name).write_bytes(b"x")
    assert len(find_checkpoints("run1")) == 2
    assert len(find_checkpoints(["run*", tmp_path / "run1", "./run1/a2.pt"])) == 2


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
