"""Read trained weights from files, and fit them to a model or say why they do not fit."""

from __future__ import annotations

import glob
import hashlib
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sharpkit.errors import CheckpointError

__all__ = [
    "CheckpointInfo",
    "find_checkpoints",
    "fit_state_dict",
    "load_checkpoint",
    "read_state_dict",
]

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
CONTAINER_KEYS = ("state_dict", "model_state_dict", "model", "net", "module", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "state_dict.")
IGNORED = re.compile(r"(^|\.)(num_batches_tracked|position_ids)$")
SHOWN = 5


@dataclass(frozen=True)
class CheckpointInfo:
    """Where weights came from and what was done to make them fit.

    Attributes:
        path: The file.
        format: ``"safetensors"`` or ``"torch"``.
        sha256: Hash of names, dtypes, shapes and contents of the tensors.
        num_tensors: Tensors in the file's state dict.
        stripped: Prefix taken off the names.
        ignored: Buffers of the file that the model does not have.
    """

    path: Path
    format: str
    sha256: str
    num_tensors: int
    stripped: str
    ignored: tuple[str, ...]


def find_checkpoints(patterns: Sequence[str | Path]) -> list[Path]:
    """Return the checkpoint files that names, globs and folders stand for.

    Folders are searched recursively for ``.pt .pth .ckpt .bin .safetensors``; the order is
    natural (``epoch2`` before ``epoch10``) within each pattern, without duplicates.

    Raises:
        CheckpointError: If a pattern stands for nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = [f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file()]
            if not files:
                raise CheckpointError(
                    f"Expected checkpoints in the folder {path}. It holds no"
                    f" {' '.join(SUFFIXES)} file."
                )
        elif path.exists():
            files = [path]
        else:
            files = [Path(f) for f in glob.glob(str(pattern), recursive=True)]
            files = [f for f in files if f.is_file()]
            if not files:
                raise CheckpointError(
                    f"Expected a checkpoint file, folder or glob. Nothing is at {pattern}."
                )
        found.update(dict.fromkeys(sorted(files, key=_natural)))
    if not found:
        raise CheckpointError("Expected at least one checkpoint. Got none.")
    return list(found)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", str(path))
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in pieces]


def read_state_dict(
    path: str | Path,
    *,
    map_location: str | torch.device = "cpu",
    trust_pickle: bool = False,
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by name, on ``map_location``.

    A file that holds more (optimizer, epoch) is searched for its weights under
    ``state_dict``, ``model_state_dict``, ``model``, ``net``, ``module``, ``weights``, in
    this order.

    Args:
        path: A ``.safetensors`` file, or anything that ``torch.save`` wrote.
        map_location: Where the tensors go, whatever device they were saved on.
        trust_pickle: Allow files that hold arbitrary Python objects. Loading them can run
            any code, so do this only for files whose origin you know.

    Raises:
        CheckpointError: If the file cannot be read or holds no weights.
    """
    path = Path(path)
    _refuse_unreadable(path)
    if path.suffix == ".safetensors":
        try:
            content: Any = safetensors.torch.load_file(path, device=str(map_location))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"Expected a safetensors file. {path} is damaged or of another format"
                f" ({' '.join(str(error).split())[:120]})."
            ) from error
    else:
        content = _torch_load(path, map_location, trust_pickle)
    return _weights(path, content)


def _refuse_unreadable(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"Expected a checkpoint file. {path} is a folder.")
    if not path.exists():
        raise CheckpointError(f"Expected a checkpoint file. {path} does not exist.")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"Expected a readable file. {path}: {error.strerror}.") from error
    if not start:
        raise CheckpointError(f"Expected a checkpoint file. {path} is empty.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"Expected weights in {path}. It is a Git LFS pointer. Run `git lfs pull` first."
        )


def _torch_load(path: Path, map_location: Any, trust_pickle: bool) -> Any:
    try:
        return torch.load(path, map_location=map_location, weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "weights_only" in text.lower() and "global" in text.lower():
            raise CheckpointError(
                f"Expected a checkpoint of tensors. {path} holds other Python objects, and"
                " loading them can run code. If you trust its origin, use --trust-pickle"
                " (trust_pickle=True), or save model.state_dict() instead."
            ) from error
        raise _damaged(path, error) from error
    except (ImportError, AttributeError) as error:  # a pickle of classes not at hand
        raise CheckpointError(
            f"{path} needs Python classes that are not here ({error}). Save"
            " model.state_dict() instead of the whole model."
        ) from error
    except Exception as error:  # bytes of any kind make the unpickler fail in any way
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"Expected a file that torch.save wrote. {path} is damaged, cut off or of another"
        f" format ({' '.join(str(error).split())[:120]})."
    )


def _weights(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"Expected a dict of tensors in {path}. Got {type(content).__name__}. Save"
            " model.state_dict()."
        )
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if len(tensors) != len(content) or not tensors:
        for key in CONTAINER_KEYS:
            inner = content.get(key)
            if isinstance(inner, nn.Module):
                inner = inner.state_dict()
            if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
                tensors = {str(k): v for k, v in inner.items() if isinstance(v, Tensor)}
                break
    if not tensors:
        keys = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise CheckpointError(
            f"Expected weights in {path}, as a dict of tensors or under one of"
            f" {', '.join(CONTAINER_KEYS)}. It holds: {keys}."
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"Expected finite weights in {path}. {name!r} holds NaN or inf: the training"
                " diverged."
            )
    return tensors


def fit_state_dict(
    state: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Return the state dict under the model's names, the prefix stripped, what was ignored.

    Prefixes of wrappers (``module.``, ``_orig_mod.``, Lightning's ``model.``, ...) are taken
    off while more names match for it; ``_orig_mod.`` inside names too. A tied parameter may
    be missing if its twin is there.

    Raises:
        CheckpointError: Naming the missing, unexpected and mis-shaped entries.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> state = {f"module.{k}": v for k, v in model.state_dict().items()}
        >>> fitted, stripped, ignored = fit_state_dict(state, model)
        >>> sorted(fitted), stripped
        (['bias', 'weight'], 'module.')
    """
    wanted = model.state_dict()
    state, stripped = _strip(state, set(wanted))
    ignored = tuple(k for k in state if k not in wanted and IGNORED.search(k))
    fitted = {k: v for k, v in state.items() if k not in ignored}
    twins = _twins(wanted)
    for name in wanted:
        if name not in fitted:
            twin = next((t for t in twins.get(name, ()) if t in fitted), None)
            if twin:
                fitted[name] = fitted[twin]
            elif IGNORED.search(name):
                fitted[name] = wanted[name]
    missing = [k for k in wanted if k not in fitted]
    unexpected = [k for k in fitted if k not in wanted]
    shapes = [
        f"{k} {tuple(fitted[k].shape)} for {tuple(wanted[k].shape)}"
        for k in wanted
        if k in fitted and fitted[k].shape != wanted[k].shape
    ]
    problems = [
        f"{label}: {', '.join(names[:SHOWN])}"
        + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for label, names in (
            ("missing", missing),
            ("not in the model", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"Expected the {len(wanted)} tensors of {type(model).__name__}."
            f" {'; '.join(problems)}. Build the model that was trained."
        )
    return fitted, stripped, ignored


def _strip(state: Mapping[str, Tensor], wanted: set[str]) -> tuple[dict[str, Tensor], str]:
    current, stripped = dict(state), ""
    plain = {k.replace("_orig_mod.", ""): v for k, v in current.items()}
    bare = {w.replace("_orig_mod.", ""): w for w in wanted}
    if len(plain) == len(current) and len(set(plain) & set(bare)) > len(set(current) & wanted):
        stripped = "_orig_mod."
        current = {bare.get(k, k): v for k, v in plain.items()}
    while True:
        matches = len(set(current) & wanted)
        options = []
        for prefix in PREFIXES:
            if any(k.startswith(prefix) for k in current):
                shorter = {k.removeprefix(prefix): v for k, v in current.items()}
                if len(shorter) == len(current):
                    options.append((len(set(shorter) & wanted), prefix, shorter))
        # A wrapper in a wrapper matches nothing until both are off: take the prefix that
        # all names share even when it does not help yet.
        shared = [o for o in options if all(k.startswith(o[1]) for k in current)]
        best = max(options, key=lambda o: o[0], default=None)
        if best and best[0] > matches:
            current, stripped = best[2], stripped + best[1]
        elif shared and matches == 0:
            current, stripped = shared[0][2], stripped + shared[0][1]
        else:
            return current, stripped


def _twins(wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    groups: dict[tuple[int, torch.Size, tuple[int, ...]], list[str]] = {}
    for name, tensor in wanted.items():
        if tensor.numel():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())
            groups.setdefault(key, []).append(name)
    return {n: names for names in groups.values() if len(names) > 1 for n in names}


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    *,
    map_location: str | torch.device = "cpu",
    trust_pickle: bool = False,
) -> CheckpointInfo:
    """Load a checkpoint's weights into a model, all of them or none.

    Args:
        path: The file.
        model: Keeps its dtype and device.
        map_location: Where the file's tensors go first.
        trust_pickle: See :func:`read_state_dict`.

    Raises:
        CheckpointError: If the file cannot be read or does not fit; the model is as before.
    """
    path = Path(path)
    state = read_state_dict(path, map_location=map_location, trust_pickle=trust_pickle)
    fitted, stripped, ignored = fit_state_dict(state, model)
    model.load_state_dict(fitted)
    kind = "safetensors" if path.suffix == ".safetensors" else "torch"
    return CheckpointInfo(path, kind, _digest(state.items()), len(state), stripped, ignored)


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
