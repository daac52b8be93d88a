"""Cut the data of an objective into shards of so many examples, whatever the batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sharpkit.objective import batches as trees
from sharpkit.objective.evaluator import Evaluator

__all__ = ["shards_of"]


def shards_of(evaluator: Evaluator, size: int | None) -> Iterator[list[Any]]:
    """Yield shards in the order of the data, each as pieces of the batches that it spans.

    Args:
        evaluator: The loss of batches, additive over examples unless size is None.
        size: Examples of a shard, the last may have fewer; None: the batches as they are.
    """
    pieces: list[Any] = []
    room = size or 0
    for batch in evaluator.batches():
        total = trees.batch_size(batch)
        if size is None or not total:
            yield [batch]
            continue
        start = 0
        while start < total:
            stop = min(start + room, total)
            whole = (start, stop) == (0, total)
            pieces.append(batch if whole else trees.ranged(batch, start, stop, evaluator.shared))
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces
