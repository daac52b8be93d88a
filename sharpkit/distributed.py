"""One measurement over several processes, under ``torchrun``.

A script is the same for one process and for many: it makes a process group, deals its batches
out with :func:`shard`, and gives ``process_group="world"`` to the objective. Sums over the
data then run over all ranks, and every rank gets the same numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from sharpkit.errors import SettingsError
from sharpkit.objective import batches as trees
from sharpkit.team import Group, Team

__all__ = ["shard"]


def shard(data: Any, process_group: Group = "world") -> Any:
    """Return this rank's batches: every so-many-th one, beginning with its rank's.

    No batch is left out, doubled or cut, so that ranks may get different numbers of batches, or
    none. The examples of a ``DataLoader`` over a map-style data set, or of such a data set, are
    read by the rank that has them; of other data every rank reads all and keeps its own. In one
    process the data come back as they are.

    Args:
        data: What :class:`sharpkit.Objective` takes, but one pair of tensors or one mapping,
            which is one batch.
        process_group: As for :class:`sharpkit.Objective`.

    Returns:
        A re-iterable of batches.

    Raises:
        SettingsError: If there is one batch only, or the loader shuffles: ranks would draw
            different orders, and some examples twice.
        ObjectiveError: If the data cannot be read many times.

    Example:
        >>> shard([1, 2, 3])
        [1, 2, 3]
    """
    team = Team(process_group)
    if team.alone:
        return data
    batches = trees.as_batches(data)
    if isinstance(batches, DataLoader):
        return _of_loader(batches, team)
    if batches is not data and not isinstance(data, list):
        raise SettingsError(
            "Expected several batches to deal out, such as a list or a DataLoader. Got one pair"
            " of tensors or one mapping, which is one batch. Split it into batches first."
        )
    if isinstance(batches, (list, tuple)):
        return list(batches[team.rank :: team.size])
    return _Dealt(batches, team.rank, team.size)


def _of_loader(loader: DataLoader[Any], team: Team) -> Any:
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, RandomSampler):
        raise SettingsError(
            "Expected a DataLoader that reads in a fixed order, so that every example goes to"
            " one rank. Got one that shuffles. Use shuffle=False."
        )
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return _Dealt(loader, team.rank, team.size)
    return DataLoader(
        loader.dataset,
        batch_sampler=_Dealt(loader.batch_sampler, team.rank, team.size),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class _Dealt:
    # Every so-many-th of what comes, each time that it is gone through.
    def __init__(self, everything: Any, start: int, step: int):
        self._all, self._start, self._step = everything, start, step

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._all), self._start, None, self._step)

    def __len__(self) -> int:
        return len(range(self._start, len(self._all), self._step))
