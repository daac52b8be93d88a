"""Read trained weights from files, and fit them to a model or say why they do not fit."""

from __future__ import annotations

import glob
import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sharpkit.errors import CheckpointError

__all__ = [
    "CheckpointInfo",
    "find_checkpoints",
    "fit_state_dict",
    "load_checkpoint",
    "read_state_dict",
]

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
CONTAINER_KEYS = ("state_dict", "model_state_dict", "model", "net", "module", "weights", "ema")
PREFIXES = re.compile(r"(?:(?:module|_orig_mod|model|net|state_dict)\.)*")
INNER_COMPILED = re.compile(r"(?<=\.)_orig_mod\.")
HARMLESS = re.compile(r"(^|\.)(num_batches_tracked|position_ids)$")
TORCH_MARK = bytes.fromhex("6cfc9c46f9206aa85019")  # in files from before torch used archives
SHOWN = 5
_Names: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class CheckpointInfo:
    """Where weights came from and what was done to make them fit.

    Attributes:
        path: The file.
        format: ``"safetensors"`` or ``"torch"``.
        sha256: Hash of names, dtypes, shapes and contents of the file's tensors.
        num_tensors: Tensors in the file's state dict.
        stripped_prefix: Prefix taken off the file's names.
        ignored: Names in the file that the model does not have.
        kept: Names in the model that the file does not have; they stay as they were.
        notes: Sentences on what else was done, such as a conversion of the dtype.
    """

    path: Path
    format: str
    sha256: str
    num_tensors: int
    stripped_prefix: str
    ignored: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_checkpoints(paths: Sequence[str | Path]) -> list[Path]:
    """Return the checkpoint files that names, globs and folders stand for.

    Folders are searched recursively for ``.pt .pth .ckpt .bin .safetensors``; the order is
    natural (``epoch2`` before ``epoch10``) within each entry, without duplicates.

    Raises:
        CheckpointError: If an entry stands for nothing.
    """
    found: dict[str, Path] = {}
    for entry in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(entry)
        hits = [path] if path.exists() else map(Path, glob.glob(str(entry), recursive=True))
        files = [f for hit in hits for f in (_in_folder(hit) if hit.is_dir() else [hit])]
        if not files:
            where = f"in the folder {path}, by their endings" if path.is_dir() else f"at {entry}"
            raise CheckpointError(
                f"Expected checkpoints ({' '.join(SUFFIXES)}), a folder of them, or a glob."
                f" Nothing is {where}. Check the spelling and the working directory."
            )
        for file in sorted(files, key=_natural):
            found.setdefault(os.path.abspath(file), file)
    if not found:
        raise CheckpointError("Expected at least one checkpoint. Got none. Name a file.")
    return list(found.values())


def _in_folder(folder: Path) -> list[Path]:
    return [f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file()]


def _natural(path: Path) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", str(path))
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces]


def read_state_dict(
    path: str | Path, *, map_location: str | torch.device = "cpu", trust_pickle: bool = False
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by name, on ``map_location``.

    A file that holds more (optimizer, epoch) is searched for its weights under
    ``state_dict``, ``model_state_dict``, ``model``, ``net``, ``module``, ``weights``,
    ``ema``, in this order; entries that are no tensors are left out.

    Args:
        path: A ``.safetensors`` file, or anything that ``torch.save`` wrote.
        map_location: Where the tensors go, whatever device they were saved on.
        trust_pickle: Allow files that hold arbitrary Python objects. Loading them can run
            any code, so do this only for files whose origin you know.

    Raises:
        CheckpointError: If the file cannot be read, or holds no weights, or NaN or inf.
    """
    tensors = _read(Path(path), map_location, trust_pickle)
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise _diverged(path, name)
    return tensors


def _read(path: Path, map_location: str | torch.device, trust_pickle: bool) -> dict[str, Tensor]:
    head = _head(path)
    try:
        device = torch.empty(0, device=map_location).device
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"Expected a usable device. {str(map_location)!r} is not here. Try 'cpu'."
        ) from error
    if path.suffix.lower() != ".safetensors":
        return _weights(path, _torch_load(path, head, device, trust_pickle))
    try:
        return _weights(path, safetensors.torch.load_file(path, device=str(device)))
    except (SafetensorError, OSError, ValueError) as error:
        hint = "torch.save wrote it: name it .pt" if head[:4] == b"PK\3\4" else _line(error)
        raise CheckpointError(
            f"Expected a safetensors file. {path} is damaged or of another format ({hint})."
            " Save or download it again."
        ) from error


def _head(path: Path) -> bytes:
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is no regular file"
            what = what if path.exists() else "does not exist"
            raise CheckpointError(f"Expected a checkpoint file. {path} {what}. Name another.")
        with path.open("rb") as file:
            head = file.read(64)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Expected a readable file. {path}: {_line(error)}.") from error
    if not head:
        raise CheckpointError(f"Expected a checkpoint file. {path} is empty. Save it again.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"Expected weights in {path}. It is a Git LFS pointer. Run `git lfs pull` first."
        )
    return head


def _torch_load(path: Path, head: bytes, device: torch.device, trust_pickle: bool) -> Any:
    safe = True  # at first even if trusted: a file of nothing but tensors runs no code
    while True:
        try:
            with warnings.catch_warnings():  # on pickle protocols, no matter to the reader
                warnings.simplefilter("ignore")
                return torch.load(path, map_location=device, weights_only=safe)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # bytes of any kind make the unpickler fail in any way
            wrote = TORCH_MARK in head or zipfile.is_zipfile(path)
            foreign = isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower()
            if "TorchScript" in str(error):
                problem = "is a TorchScript program"
            elif not safe and isinstance(error, (ImportError, AttributeError)):
                problem = f"needs Python classes that are not here ({_line(error)})"
            elif not (safe and wrote and foreign):
                raise _damaged(path, head, error) from error
            elif not trust_pickle:
                problem = (
                    "holds arbitrary Python objects, and loading them runs code. If you trust its"
                    " origin, use --trust-pickle (trust_pickle=True). If not, ask for weights only"
                )
            else:
                safe = False
                continue
            raise CheckpointError(
                f"Expected a checkpoint of tensors. {path} {problem}. Save model.state_dict()."
            ) from error


def _damaged(path: Path, head: bytes, error: Exception) -> CheckpointError:
    hint = _line(error) or type(error).__name__
    if head[8:9] == b"{":
        hint = "it looks like safetensors: name it .safetensors"
    elif head[:4] == b"PK\3\4" and not zipfile.is_zipfile(path):
        hint = "the end of the archive is missing"
    elif all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        hint = f"it is a text that starts with {head[:20].decode()!r}"
    elif head[:1] == b"\x80" and TORCH_MARK not in head:
        hint = "it may come from pickle.dump"
    return CheckpointError(
        f"Expected a file that torch.save wrote. {path} is damaged, cut off or of another"
        f" format ({hint}). Save or download it again."
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120].rstrip(".")


def _tensors(content: Any) -> dict[str, Tensor]:
    content = content.state_dict() if isinstance(content, nn.Module) else content
    items = content.items() if isinstance(content, Mapping) else ()
    found = {str(k): v.detach() for k, v in items if isinstance(v, Tensor) and not v.is_meta}
    return {k: v if v.layout == torch.strided else v.to_dense() for k, v in found.items()}


def _weights(path: Path, content: Any) -> dict[str, Tensor]:
    content = content.state_dict() if isinstance(content, nn.Module) else content
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"Expected a dict of tensors in {path}. Got {type(content).__name__}. Save"
            " model.state_dict()."
        )
    tensors = _tensors(content)
    if len(tensors) != len(content) or not tensors:
        inside = {k: _tensors(v) for k, v in content.items()}
        known = next((inside[k] for k in CONTAINER_KEYS if inside.get(k)), None)
        if known is None and (not tensors or any(inside.values())):
            keys = ", ".join(map(str, list(content)[:8])) or "nothing"
            raise CheckpointError(
                f"Expected weights in {path}, as a dict of tensors or under one of"
                f" {', '.join(CONTAINER_KEYS)}. It holds: {keys}. Save model.state_dict()."
            )
        tensors = known or tensors
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no isfinite
    return bool(torch.isfinite(wide).all())


def _diverged(path: str | Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"Expected finite weights in {path}. {name!r} holds NaN or inf: the training diverged."
        " Use an earlier checkpoint."
    )


def fit_state_dict(
    state: Mapping[str, Tensor],
    model: nn.Module,
    *,
    ignore_unexpected: bool = False,
    ignore_missing: str | Sequence[str] = (),
) -> dict[str, Tensor]:
    """Return a state dict under all of the model's names, ready for ``load_state_dict``.

    Prefixes of wrappers (``module.``, ``_orig_mod.``, ``model.``, ``net.``,
    ``state_dict.``) are taken off on either side if more names match for it, ``_orig_mod.``
    inside names too. A tied tensor may be missing if its twin is there.
    ``num_batches_tracked`` and ``position_ids`` may be on one side only.

    Args:
        state: Tensors by name.
        model: Gives the names and shapes.
        ignore_unexpected: Leave out names that the model does not have.
        ignore_missing: Globs of the model's names that ``state`` may lack; the model's own
            tensors stand in.

    Raises:
        CheckpointError: Naming the missing, unexpected and mis-shaped entries.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> state = {f"module.{k}": v for k, v in model.state_dict().items()}
        >>> sorted(fit_state_dict(state, model))
        ['bias', 'weight']
    """
    return _fit(state, model, ignore_unexpected, ignore_missing)[0]


def _fit(
    state: Mapping[str, Tensor], model: nn.Module, lenient: bool, optional: str | Sequence[str]
) -> tuple[dict[str, Tensor], str, _Names, _Names]:
    own = _own_tensors(model)
    matched, extra, prefix = _align(state, list(own))
    anything = bool(matched) or not own
    _share(matched, own)
    ignored = tuple(k for k in extra if lenient or HARMLESS.search(k))
    globs = [optional] if isinstance(optional, str) else optional
    absent = [k for k in own if k not in matched]
    kept = tuple(k for k in absent if HARMLESS.search(k) or any(fnmatchcase(k, g) for g in globs))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    both = [(k, matched[k], own[k]) for k in own if k in matched]
    shapes = [
        f"{k} {tuple(a.shape)} for {tuple(b.shape)}" for k, a, b in both if a.shape != b.shape
    ]
    kinds = [  # an integer would load as a number that it does not stand for
        f"{k} {a.dtype} for {b.dtype}"
        for k, a, b in both
        if (a.is_complex() and not b.is_complex())
        or (k in parameters and b.is_floating_point() and not a.is_floating_point())
    ]
    problems = [
        f"{label}: {', '.join(names[:SHOWN])}"
        + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for label, names in (
            ("missing", [k for k in absent if k not in kept]),
            ("not in the model", [k for k in extra if k not in ignored]),
            ("of another shape", shapes),
            ("of another kind", kinds),
        )
        if names
    ]
    if problems or not anything:
        raise CheckpointError(
            f"Expected the {len(own)} tensors of {type(model).__name__}."
            f" {'; '.join(problems) or 'No name matches'}. Build the model that was trained."
        )
    return {**model.state_dict(), **matched}, prefix, ignored, kept


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    for name, tensor in own.items():
        if tensor.is_meta or is_lazy(tensor):
            raise CheckpointError(
                f"Expected a model whose tensors have values. {name!r} has none yet. Build it off"
                " the meta device, and run a lazy model once."
            )
    return own


def _share(matched: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    groups: dict[object, list[str]] = {}
    for name, t in own.items():
        if t.numel():
            key = (t.device, t.dtype, t.data_ptr(), t.shape, t.stride())
            groups.setdefault(key, []).append(name)
    for names in groups.values():
        there = [k for k in names if k in matched]
        for name in there[1:]:
            a, b = matched[there[0]], matched[name]
            if a.shape == b.shape and not torch.equal(a.nan_to_num(), b.to(a).nan_to_num()):
                raise CheckpointError(
                    f"Expected {there[0]!r} and {name!r} to be equal: the model ties them. They"
                    " differ in the checkpoint. Build the model without the tie."
                )
        matched.update({k: matched[there[0]] for k in names if there and k not in matched})


def _align(
    state: Mapping[str, Tensor], wanted: Sequence[str]
) -> tuple[dict[str, Tensor], list[str], str]:
    # A wrapper in a wrapper matches nothing until both are off, and the model may be wrapped
    # too: try all pairs of prefixes. Most matches win, then the least taken off.
    exact = {k: k for k in wanted if k in state}
    options = [(-len(exact), 0, "", exact)]
    for ours in (p for p in _prefixes(wanted) if all(k.startswith(p) for k in wanted)):
        targets = {INNER_COMPILED.sub("", k.removeprefix(ours)): k for k in wanted}
        for theirs in _prefixes(state):
            names = {INNER_COMPILED.sub("", k.removeprefix(theirs)): k for k in state}
            pairs = {targets[n]: k for n, k in names.items() if n in targets}
            if len(names) == len(state) and len(targets) == len(wanted):
                taken = theirs.count(".") + ours.count(".")
                options.append((-len(pairs), taken, theirs, pairs))
    options.sort(key=lambda option: option[:3])
    count, taken, prefix, pairs = options[0]
    used = set(pairs.values())
    for rival in options:
        if taken and rival[0] == count and set(rival[3].values()) != used:
            raise CheckpointError(
                f"Expected one set of weights for the model. As many names match under"
                f" {prefix!r} as under {rival[2]!r}. Save the state_dict of one of them."
            )
    return {k: state[v] for k, v in pairs.items()}, [k for k in state if k not in used], prefix


def _prefixes(names: Iterable[str]) -> set[str]:
    chains = {match.group() for match in map(PREFIXES.match, names) if match}
    return {""} | {c[: i + 1] for c in chains for i, letter in enumerate(c) if letter == "."}


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    *,
    map_location: str | torch.device | None = None,
    trust_pickle: bool = False,
    ignore_unexpected: bool = False,
    ignore_missing: str | Sequence[str] = (),
) -> CheckpointInfo:
    """Load a checkpoint's weights into a model, all of them or none.

    A buffer may hold inf, as masks do, where the model's own does.

    Args:
        path: The file.
        model: Keeps its dtype and device.
        map_location: Where the file's tensors go first; ``None`` for the model's device.
        trust_pickle: See :func:`read_state_dict`.
        ignore_unexpected: See :func:`fit_state_dict`.
        ignore_missing: See :func:`fit_state_dict`.

    Raises:
        CheckpointError: If the file cannot be read or does not fit; the model is as before.
    """
    path, own = Path(path), _own_tensors(model)
    device = map_location or next((t.device for t in own.values()), "cpu")
    state = _read(path, device, trust_pickle)
    fitted, prefix, ignored, kept = _fit(state, model, ignore_unexpected, ignore_missing)
    masks = {k for k, b in model.named_buffers() if not _is_finite(b)}
    fresh = {k: fitted[k] for k in own if k not in kept}
    for name, tensor in fresh.items():
        if not _is_finite(tensor) and (name not in masks or bool(tensor.isnan().any())):
            raise _diverged(path, name)
        if _is_finite(tensor) and not _is_finite(tensor.to(own[name].dtype)):
            raise CheckpointError(
                f"Expected weights within the range of the model's {own[name].dtype}. {name!r} in"
                f" {path} is beyond it. Build the model in {tensor.dtype}."
            )
    changes = {
        (t.dtype, own[k].dtype): None
        for k, t in fresh.items()
        if t.is_floating_point() and own[k].is_floating_point() and t.dtype != own[k].dtype
    }
    notes = tuple(f"Weights converted from {a} to {b}." for a, b in changes)
    before = {k: t.clone() for k, t in own.items()}
    try:
        model.load_state_dict(fitted)
    except Exception as error:  # a module's own hook may refuse what was checked here
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(before[name])
        raise CheckpointError(
            f"Expected {type(model).__name__} to take the weights of {path}. load_state_dict"
            f" failed ({_line(error)})."
        ) from error
    kind = "safetensors" if path.suffix.lower() == ".safetensors" else "torch"
    sha256 = _digest(state.items())
    return CheckpointInfo(path, kind, sha256, len(state), prefix, ignored, kept, notes)


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
