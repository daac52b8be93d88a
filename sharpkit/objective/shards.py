"""Cut the data of an objective into shards of so many examples, whatever the batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sharpkit.objective import batches as trees
from sharpkit.objective.evaluator import Evaluator

__all__ = ["shards_of"]


def shards_of(evaluator: Evaluator, size: int | None) -> Iterator[list[Any]]:
    """Yield shards in the order of all data, each as pieces of the batches that it spans.

    Of several ranks each yields its own part of every shard, which may be empty.

    Args:
        evaluator: The loss of batches, additive over examples unless size is None.
        size: Examples of a shard, the last may have fewer; None: the batches as they are.
    """
    places, count = _places(evaluator, size)
    batches = evaluator.batches()
    held: tuple[Any, int, int] | None = None  # a batch, where it is, and what is taken of it
    read = 0
    for shard in range(count):
        pieces: list[Any] = []
        while True:
            if held is None:
                batch = next(batches, None)
                if batch is None:
                    break
                held = (batch, places[read], 0)
                read += 1
            batch, place, start = held
            if size is None:
                if place == shard:
                    pieces, held = [batch], None
                break
            end, total = (shard + 1) * size - place, trees.batch_size(batch) or 0
            if start >= end:
                break
            stop = min(total, end)
            whole = (start, stop) == (0, total)
            pieces.append(batch if whole else trees.ranged(batch, start, stop, evaluator.shared))
            held = None if stop == total else (batch, place, stop)
        yield pieces


def _places(evaluator: Evaluator, size: int | None) -> tuple[list[int], int]:
    # Where each of this rank's batches begins in all data, in examples (in batches if the
    # batches are the shards), and how many shards there are.
    team, before, own = evaluator.team, 0, []
    for rank, number in evaluator.order:
        if rank == team.rank or not team.shares_data:
            own.append(before)
        before += 1 if size is None else evaluator.sizes[rank][number] or 0
    return own, -(-before // (size or 1))
