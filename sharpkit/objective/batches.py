"""Batches of any shape: tensors, tuples, dicts, named tuples, ``BatchEncoding``, objects.

A batch is treated as a tree with tensors at its leaves. Nothing here knows what the
leaves mean, except that the first axis of the first tensor counts the examples.
"""

from __future__ import annotations

import hashlib
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sharpkit.errors import ObjectiveError

__all__ = [
    "as_batches",
    "batch_bytes",
    "batch_size",
    "fingerprint",
    "leaves",
    "move",
    "split",
]

DATASET_BATCH_SIZE = 256  # for a bare map-style Dataset, which has no batches of its own


def as_batches(data: Any) -> Iterable[Any]:
    """Return a re-iterable of batches for what a user calls "the data".

    A pair of tensors and a mapping of tensors are one batch; a map-style ``Dataset``
    without a loader is batched in order; anything else must be a re-iterable of batches.

    Raises:
        ObjectiveError: If the data can be read only once, or not at all.

    Example:
        >>> x, y = torch.zeros(4, 2), torch.zeros(4)
        >>> len(as_batches((x, y)))
        1
    """
    if isinstance(data, Tensor):
        raise ObjectiveError(
            "Expected an iterable of batches such as a DataLoader, or one pair (inputs,"
            f" targets). Got one tensor of shape {tuple(data.shape)}. Pass [(inputs,"
            " targets)]."
        )
    if isinstance(data, (Mapping, UserDict)):
        return [data]
    pair = isinstance(data, tuple) and len(data) == 2
    if pair and all(isinstance(t, Tensor) for t in data):
        return [data]
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(
        data, torch.utils.data.IterableDataset
    ):
        return torch.utils.data.DataLoader(data, batch_size=DATASET_BATCH_SIZE)
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise ObjectiveError(
            "Expected an iterable of batches such as a DataLoader or a list of (inputs,"
            f" targets). Got {type(data).__name__}."
        )
    if hasattr(data, "__next__"):
        raise ObjectiveError(
            "Expected data that can be read many times. Got a one-shot iterator"
            f" ({type(data).__name__}). Pass list(...) of it, or the DataLoader itself."
        )
    return data  # type: ignore[no-any-return]


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return the tree with a function applied to its tensors; the type of nodes is kept."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, UserDict):
        mapped = {k: map_tensors(v, function) for k, v in tree.items()}
        try:
            return type(tree)(mapped)
        except TypeError:  # a subclass with another constructor
            return mapped
    if isinstance(tree, Mapping):
        mapped = {k: map_tensors(v, function) for k, v in tree.items()}
        return mapped if type(tree) is dict else _rebuild(type(tree), mapped)
    if isinstance(tree, tuple):
        parts = [map_tensors(v, function) for v in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        return [map_tensors(v, function) for v in tree]
    return tree


def _rebuild(kind: type, mapped: dict[Any, Any]) -> Any:
    try:
        return kind(mapped)
    except TypeError:
        return mapped


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of every leaf, tensors and other things alike."""
    if isinstance(tree, (Mapping, UserDict)):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(tree, (tuple, list)):
        for i, value in enumerate(tree):
            yield from leaves(value, f"{path}.{i}")
    else:
        yield path, tree


def batch_size(batch: Any) -> int | None:
    """Return the length of the first axis of the first tensor; None if there is none."""
    for _, leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    return None


def batch_bytes(batch: Any) -> int:
    """Return the memory of the batch's tensors."""
    return sum(
        leaf.numel() * leaf.element_size() for _, leaf in leaves(batch) if isinstance(leaf, Tensor)
    )


def move(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return the batch on a device, its floating tensors in a dtype if one is given."""

    def moved(t: Tensor) -> Tensor:
        t = t.clone() if t.is_inference() else t  # autograd cannot save inference tensors
        return t.to(device, dtype if dtype and t.is_floating_point() else t.dtype)

    known = (Tensor, Mapping, UserDict, tuple, list, str, bytes, int, float, type(None))
    if not isinstance(batch, known) and callable(getattr(batch, "to", None)):
        return batch.to(device)  # a graph batch or another object that can move itself
    return map_tensors(batch, moved)


def split(batch: Any, size: int) -> list[Any]:
    """Return pieces of at most ``size`` examples, in order.

    Every tensor (and list) whose first axis counts the examples is cut; the rest is
    shared by all pieces.

    Example:
        >>> [len(y) for _, y in split((torch.zeros(5, 2), torch.zeros(5)), 2)]
        [2, 2, 1]
    """
    total = batch_size(batch)
    if total is None or total <= size:
        return [batch]

    return [_cut(batch, total, start, size) for start in range(0, total, size)]


def _cut(tree: Any, total: int, start: int, size: int) -> Any:
    # A function of its own: a nested one that calls itself would keep the batch in a cycle.
    if isinstance(tree, Tensor):
        whole = tree.ndim == 0 or tree.shape[0] != total
        return tree if whole else tree[start : start + size]
    if isinstance(tree, (Mapping, UserDict)):
        mapped = {k: _cut(v, total, start, size) for k, v in tree.items()}
        return mapped if type(tree) is dict else _rebuild(type(tree), mapped)
    if isinstance(tree, tuple):
        parts = [_cut(v, total, start, size) for v in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        plain = not any(isinstance(v, (Tensor, list, tuple, Mapping)) for v in tree)
        if len(tree) == total and plain:
            return tree[start : start + size]
        return [_cut(v, total, start, size) for v in tree]
    return tree


def fingerprint(batch: Any) -> int:
    """Return a 128-bit sum of example hashes: the order and the batches do not matter.

    Add the fingerprints of all batches, modulo 2^128, to get that of a data set.
    """
    total = batch_size(batch)
    rows = [hashlib.blake2b(digest_size=16) for _ in range(total or 0)]
    whole = hashlib.blake2b(digest_size=16)
    for path, leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == total:
            flat = leaf.detach().cpu().contiguous().reshape(total, -1)
            if flat.shape[1] == 0:
                continue
            kind = f"{path}{leaf.dtype}{tuple(leaf.shape[1:])}".encode()
            for row, content in zip(rows, flat.view(torch.uint8).numpy(), strict=True):
                row.update(kind)
                row.update(content.tobytes())
        elif isinstance(leaf, Tensor):
            whole.update(f"{path}{leaf.dtype}{tuple(leaf.shape)}".encode())
            flat = leaf.detach().cpu().contiguous().reshape(-1)
            whole.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, (str, bytes, int, float)):
            whole.update(f"{path}{leaf!r}".encode())
    result = sum(int.from_bytes(row.digest(), "big") for row in rows)
    return (result + int.from_bytes(whole.digest(), "big") * (not rows)) % 2**128
