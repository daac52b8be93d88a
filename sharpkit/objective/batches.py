"""Batches of any shape: tensors, tuples, dicts, named tuples, dataclasses, objects.

A batch is treated as a tree with tensors and columns (lists of plain values) at its
leaves. Nothing here knows what the leaves mean, except that the length that most of
them share counts the examples.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections import Counter, UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from sharpkit.errors import ObjectiveError

__all__ = [
    "as_batches",
    "batch_bytes",
    "batch_size",
    "dealt",
    "doubled",
    "fingerprint",
    "generators",
    "leaves",
    "move",
    "parted",
    "ranged",
    "replaced",
    "shared_paths",
    "split",
    "tensor_bytes",
]

DATASET_BATCH_SIZE = 256  # for a bare map-style Dataset, which has no batches of its own
OBJECT_DEPTH = 5  # how deep an unknown object is searched for tensors
_HASH = 2**128
DEAL = 8081  # seed of which examples go together


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
    if isinstance(data, str) or (
        not hasattr(data, "__iter__") and not hasattr(data, "__getitem__")
    ):
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


def generators(data: Any) -> list[torch.Generator]:
    """Return the generators of its own that a ``DataLoader`` shuffles with."""
    batch_sampler = getattr(data, "batch_sampler", None)
    holders = [
        data,
        getattr(data, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    ]
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


# -- trees -------------------------------------------------------------------------------


def _children(tree: Any) -> dict[str, Any] | None:
    # The named children of an inner node; None for a leaf.
    if isinstance(tree, (Tensor, PackedSequence)):
        return None
    if isinstance(tree, (Mapping, UserDict)):
        return {str(key): value for key, value in tree.items()}
    if isinstance(tree, tuple) or (isinstance(tree, list) and not _is_column(tree)):
        return {str(i): value for i, value in enumerate(tree)}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type) and not _moves_itself(tree):
        return {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
    return None


def _is_column(values: list[Any]) -> bool:
    # A list with one plain value for each example, such as texts.
    return all(v is None or isinstance(v, (str, bytes, int, float)) for v in values)


def _moves_itself(leaf: Any) -> bool:
    return callable(getattr(leaf, "to", None))


def _map(tree: Any, function: Callable[[str, Any], Any], path: str = "") -> Any:
    # The tree with a function of path and value applied to its leaves; node types are kept.
    children = _children(tree)
    if children is None:
        return function(path, tree)
    values = [_map(v, function, f"{path}.{k}") for k, v in children.items()]
    if isinstance(tree, (Mapping, UserDict)):
        mapped = dict(zip(tree, values, strict=True))
        if type(tree) is dict:
            return mapped
        if isinstance(tree, UserDict):
            rebuilt = copy.copy(tree)  # a subclass may have a constructor of its own
            rebuilt.data = mapped
            return rebuilt
        try:
            return type(tree)(mapped)  # type: ignore[call-arg]
        except TypeError:
            return mapped
    if isinstance(tree, tuple):
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    if isinstance(tree, list):
        return values
    rebuilt = copy.copy(tree)
    for name, value in zip(children, values, strict=True):
        object.__setattr__(rebuilt, name, value)  # a dataclass, perhaps a frozen one
    return rebuilt


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of every leaf, tensors and other things alike."""
    children = _children(tree)
    if children is None:
        yield path, tree
    else:
        for key, value in children.items():
            yield from leaves(value, f"{path}.{key}")


def _length(leaf: Any) -> int | None:
    # The number of examples that a leaf would have, if its first axis counted them.
    if isinstance(leaf, Tensor):
        return leaf.shape[0] if leaf.ndim > 0 else None
    return len(leaf) if isinstance(leaf, list) else None


def batch_size(batch: Any) -> int | None:
    """Return the length that most leaves share (the first wins a tie); None without any.

    Example:
        >>> x, y, scale = torch.zeros(5, 2), torch.zeros(5), torch.zeros(3)
        >>> batch_size({"scale": scale, "x": x, "y": y})
        5
    """
    lengths = [_length(leaf) for _, leaf in leaves(batch)]
    counts = Counter(n for n in lengths if n is not None)
    return counts.most_common(1)[0][0] if counts else None


def shared_paths(batch: Any) -> set[str]:
    """Return the paths of the leaves that belong to all examples, not one part to each."""
    total = batch_size(batch)
    return {path for path, leaf in leaves(batch) if _length(leaf) not in (None, total)}


def split(batch: Any, size: int, shared: Iterable[str] = ()) -> list[Any]:
    """Return pieces of at most ``size`` examples, in order.

    Args:
        batch: The batch.
        size: Examples of a piece.
        shared: Paths of leaves that all pieces share, though their length happens to be
            the number of examples; so are all leaves of other lengths.

    Example:
        >>> [len(y) for _, y in split((torch.zeros(5, 2), torch.zeros(5)), 2)]
        [2, 2, 1]
    """
    total = batch_size(batch)
    if total is None or total <= size:
        return [batch]
    whole = set(shared)

    def piece(start: int) -> Any:
        def cut(path: str, leaf: Any) -> Any:
            parted = _length(leaf) == total and path not in whole
            return leaf[start : start + size] if parted else leaf

        return _map(batch, cut)

    return [piece(start) for start in range(0, total, size)]


def ranged(batch: Any, start: int, stop: int, shared: Iterable[str] = ()) -> Any:
    """Return the examples ``start`` to ``stop`` of a batch that has examples.

    Example:
        >>> x = torch.arange(5)
        >>> ranged((x, x), 1, 3)[0].tolist()
        [1, 2]
    """
    total, whole = batch_size(batch), set(shared)

    def cut(path: str, leaf: Any) -> Any:
        parted = _length(leaf) == total and path not in whole
        return leaf[start:stop] if parted else leaf

    return _map(batch, cut)


def dealt(batch: Any, count: int, shared: Iterable[str] = ()) -> list[Any]:
    """Return ``count`` pieces (fewer of a small batch), whose examples are drawn at random.

    The draw is the same for all batches of a size. What pieces differ by tells how much samples
    of the population differ: dealt in turn, examples that are sorted by class would give pieces
    that are more alike than samples are, and errors too small.

    Example:
        >>> x = torch.arange(5)
        >>> pieces = [piece[0].tolist() for piece in dealt((x, x), 2)]
        >>> [len(p) for p in pieces], sorted(pieces[0] + pieces[1])
        ([3, 2], [0, 1, 2, 3, 4])
    """
    total = batch_size(batch)
    if total is None or total < 2 or count < 2:
        return [batch]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(DEAL), device="cpu")
    pieces = (order[start::count].sort().values for start in range(min(count, total)))
    return [taken(batch, rows, shared) for rows in pieces]


def taken(batch: Any, rows: Tensor, shared: Iterable[str] = ()) -> Any:
    """Return some examples of a batch that has examples.

    Example:
        >>> x = torch.arange(5)
        >>> taken((x, ["a", "b", "c", "d", "e"]), torch.tensor([3, 0]))
        (tensor([3, 0]), ['d', 'a'])
    """
    total, whole = batch_size(batch), set(shared)

    def take(path: str, leaf: Any) -> Any:
        if _length(leaf) != total or path in whole:
            return leaf
        if isinstance(leaf, Tensor):
            return leaf[rows.to(leaf.device)]
        return [leaf[i] for i in rows.tolist()]

    return _map(batch, take)


def parted(batch: Any, shared: Iterable[str] = ()) -> list[str] | None:
    """Return the paths of the tensors with one part for each example.

    None if something that is no tensor has such parts too, or is of an unknown kind.
    """
    total, whole, paths = batch_size(batch), set(shared), []
    for path, leaf in leaves(batch):
        if path in whole or (isinstance(leaf, Tensor) and _length(leaf) != total):
            continue
        if isinstance(leaf, Tensor):
            paths.append(path)
        elif not (leaf is None or isinstance(leaf, (str, bytes, int, float))):
            return None
    return paths


def replaced(batch: Any, values: Mapping[str, Any]) -> Any:
    """Return the batch with the leaves at some paths replaced."""
    return _map(batch, lambda path, leaf: values.get(path, leaf))


def doubled(batch: Any) -> Any:
    """Return the batch with every example twice."""
    total = batch_size(batch)

    def twice(_: str, leaf: Any) -> Any:
        if _length(leaf) != total or total is None:
            return leaf
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf + leaf

    return _map(batch, twice)


def move(batch: Any, device: torch.device, dtype: torch.dtype | None, *, own: bool = False) -> Any:
    """Return the batch on a device, its floating tensors in a dtype if one is given.

    Args:
        batch: The batch.
        device: Where to.
        dtype: For floating tensors; ``None`` keeps theirs.
        own: Whether the tensors must be copies, whatever happens to the user's.
    """

    def moved(_: str, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            wanted = dtype if dtype and leaf.is_floating_point() else leaf.dtype
            # Autograd cannot save inference tensors.
            result = leaf.to(device, wanted, copy=own or leaf.is_inference())
            if result is leaf or not result.requires_grad:
                return result
            return result.detach().requires_grad_()
        # A graph batch or another object that can move itself.
        return leaf.to(device) if _moves_itself(leaf) else leaf

    return _map(batch, moved)


# -- what is inside ----------------------------------------------------------------------


def _tensors_inside(thing: Any, depth: int = OBJECT_DEPTH) -> Iterator[Tensor]:
    # The tensors of an object of unknown kind, as far as its attributes show them.
    if isinstance(thing, Tensor):
        yield thing
    elif depth > 0:
        children = _children(thing)
        inside: Iterable[Any] = () if children is None else children.values()
        if isinstance(thing, PackedSequence):
            inside = tuple(thing)
        elif children is None and not isinstance(thing, (type, str, bytes, int, float)):
            inside = list(getattr(thing, "__dict__", {}).values())
        for value in inside:
            yield from _tensors_inside(value, depth - 1)


def batch_bytes(batch: Any) -> int:
    """Return the memory of the batch's tensors, those inside unknown objects included."""
    found = {id(t): t.numel() * t.element_size() for t in _tensors_inside(batch)}
    return sum(found.values())


def _content(tensor: Tensor) -> tuple[bytes, Tensor]:
    # What a tensor is, and its bytes as a matrix with one row for each first index.
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    rows = flat.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
    kind = f"{tensor.dtype}{tuple(tensor.shape[1:])}".encode()
    return kind, rows.view(torch.uint8) if rows.numel() else rows.new_zeros(0, 0).byte()


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the contents of a tensor, in the order of its indices."""
    return _content(tensor)[1].numpy().tobytes()


def fingerprint(batch: Any) -> int:
    """Return a 128-bit sum of example hashes: the order and the batches do not matter.

    Add the fingerprints of all batches, modulo 2^128, to get that of a data set.
    """
    total = batch_size(batch)
    common = hashlib.blake2b(digest_size=16)
    columns: list[tuple[bytes, Any]] = []
    for path, leaf in leaves(batch):
        if _length(leaf) == total and total:
            kind, content = _content(leaf) if isinstance(leaf, Tensor) else (b"", leaf)
            if len(content):
                columns.append((path.encode() + kind, content))
        elif isinstance(leaf, (str, bytes, int, float, list)):
            common.update(f"{path}{leaf!r}".encode())
        else:
            for tensor in _tensors_inside(leaf):
                kind, content = _content(tensor)
                common.update(path.encode() + kind + content.numpy().tobytes())
    if not columns:
        return int.from_bytes(common.digest(), "big")
    rows = [common.copy() for _ in range(total or 0)]  # what all share is a part of each
    for kind, content in columns:
        values = content.numpy() if isinstance(content, Tensor) else content
        for row, value in zip(rows, values, strict=True):
            row.update(kind)
            row.update(repr(value).encode() if isinstance(content, list) else value.tobytes())
    return sum(int.from_bytes(row.digest(), "big") for row in rows) % _HASH
