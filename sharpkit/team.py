"""The processes that measure together: sums, gathered values, and errors that reach all ranks.

Every collective of sharpkit is here. Work of a rank runs inside one of them, so that an
exception on one rank is told to the others in the same call, and none waits for ever.
"""

from __future__ import annotations

import itertools
import os
import pickle
import socket
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sharpkit import errors
from sharpkit.errors import DistributedError, SettingsError, SharpkitError

__all__ = ["SOLO", "Group", "Shape", "Share", "Team", "checksum", "interleaved"]

T = TypeVar("T")

Group: TypeAlias = "Literal['world'] | dist.ProcessGroup | None"
Share: TypeAlias = Literal["data", "probes"]
Shape: TypeAlias = "tuple[tuple[int, ...], torch.dtype]"

LIMBS = (0, 8, 16)  # 24 bits that must agree travel in bytes, which sums of any dtype hold
HEAD = 1 + 2 * len(LIMBS)
MOST_RANKS = 256  # whose bytes, squared and summed, float32 still counts exactly
_NUMBERS = itertools.count()  # teams are made in the same order on all ranks
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # by bytes


class Team:
    """The ranks of a process group, or one process alone.

    Args:
        group: ``None`` is one process alone, ``"world"`` all processes, or a group of
            ``torch.distributed``.
        share: What the ranks share out: the ``"data"``, of which each rank has its own, or
            the ``"probes"``, the columns of a block of vectors, on data that all ranks have.

    Attributes:
        rank: Of this process.
        size: How many ranks there are.
        share: As given.
        num_sums: All-reduces so far.

    Raises:
        SettingsError: If the group or the share is none, or the processes were started
            together but no group was made.
        DistributedError: If this process is no member of the group.
    """

    def __init__(self, group: Group = None, share: Share = "data"):
        if share not in ("data", "probes"):
            raise SettingsError(f"Expected `share` to be 'data' or 'probes'. Got {share!r}.")
        self.share: Share = share
        self.rank, self.size, self.num_sums = 0, 1, 0
        self._group: dist.ProcessGroup | None = None
        self._broken = ""
        self._calls, self._purpose, self._name = 0, "", ""
        self._crowd: int | None = None
        if group is None:
            return
        started = dist.is_available() and dist.is_initialized()
        if isinstance(group, str):
            if group != "world":
                raise SettingsError(
                    "Expected `process_group` to be None, 'world' or a group of"
                    f" torch.distributed. Got {group!r}."
                )
            if not started:
                if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                    raise SettingsError(
                        "Expected a process group, as several processes were started together"
                        " (WORLD_SIZE is set). None was made. Call"
                        " torch.distributed.init_process_group() first."
                    )
                return
            group = dist.group.WORLD
        elif not (started and isinstance(group, dist.ProcessGroup)):
            raise SettingsError(
                "Expected `process_group` to be None, 'world' or a group of torch.distributed"
                f" of which this process is a member. Got {type(group).__name__}."
            )
        self._group, self._name = group, f"team {next(_NUMBERS)}"
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.size > MOST_RANKS:
            raise SettingsError(f"Expected at most {MOST_RANKS} ranks. Got {self.size}.")

    def __deepcopy__(self, memo: object) -> Team:
        return self

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.size == 1

    @property
    def shares_data(self) -> bool:
        """Whether each of several ranks has its own part of the data."""
        return self.size > 1 and self.share == "data"

    @property
    def shares_probes(self) -> bool:
        """Whether several ranks take different columns of a block of vectors."""
        return self.size > 1 and self.share == "probes"

    @property
    def crowd(self) -> int:
        """The number of ranks on this machine, which share its memory."""
        if self._crowd is None:
            names = self.gather(socket.gethostname)
            self._crowd = names.count(names[self.rank])
        return self._crowd

    def begin(self, purpose: str) -> None:
        """Say what comes next: ranks that do different things are told apart by it."""
        self._purpose = purpose

    def _place(self) -> str:
        return f"{self._name}: {self._purpose}: call {self._calls}"

    # -- sums ------------------------------------------------------------------------

    def sum(
        self,
        work: Callable[[], Sequence[Tensor]],
        shapes: Sequence[Shape],
        device: torch.device,
        *,
        same: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Return the sums over ranks of the tensors that ``work()`` returns on each.

        One all-reduce for each dtype among them. An exception on a rank is raised on all. The
        result has the same bits on all ranks.

        Args:
            work: Called once.
            shapes: Shape and dtype of each tensor.
            device: Where the sums are to be.
            same: Tensors that must be the same on all ranks: by their bits, in a checksum.

        Raises:
            DistributedError: If another rank raised something that is none of sharpkit's
                errors, if the ranks went different ways, or have different ``same``.
        """
        if self.alone:
            return list(work())
        self._check()
        self._calls += 1
        failure: BaseException | None = None
        parts: list[Tensor] = []
        try:
            parts = [p.detach() for p in work()]
            mark = self._mark(same)
        except Exception as error:
            failure, mark = error, torch.zeros((), dtype=torch.int64, device=device)
        self._check(failure)  # what ran inside may have been told of a breach
        dtypes = list(dict.fromkeys(dtype for _, dtype in shapes))
        sums: dict[int, Tensor] = {}
        odd = failed = False
        for number, dtype in enumerate(dtypes):
            index = [i for i, (_, d) in enumerate(shapes) if d == dtype]
            counts = [_count(shapes[i][0]) for i in index]
            flat = torch.zeros(HEAD + sum(counts), dtype=dtype, device=device)
            if failure is None:
                torch.cat([parts[i].reshape(-1).to(flat) for i in index], out=flat[HEAD:])
            if number == 0:
                flat[:HEAD] = _head(mark, failure is not None).to(flat)
            flat = self._all_reduce(flat)
            if number == 0:
                failed, odd = _verdict(flat[:HEAD].tolist(), self.size)
            for i, piece in zip(index, torch.split(flat[HEAD:], counts), strict=True):
                sums[i] = piece.reshape(shapes[i][0])
        if failed:
            self._raise(failure)
        if odd:
            self._diverged(same)
        return [sums[i] for i in range(len(shapes))]

    def join(self, part: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the rows of all ranks, ``[sum of lengths, b]``, by one all-gather.

        Args:
            part: This rank's rows, ``[length, b]``.
            lengths: How many each rank has.
        """
        if self.alone:
            return part
        self._check()
        self._calls += 1
        mine = part.new_zeros(max(lengths), part.shape[1])
        mine[: len(part)] = part
        mine = mine.cpu() if self._through_host else mine
        found = [torch.empty_like(mine) for _ in lengths]
        try:
            dist.all_gather(found, mine, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return torch.cat([rows[:n] for rows, n in zip(found, lengths, strict=True)]).to(part.device)

    def _all_reduce(self, flat: Tensor) -> Tensor:
        self.num_sums += 1
        wire = flat.cpu() if self._through_host else flat
        try:
            dist.all_reduce(wire, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return wire.to(flat.device)

    @property
    def _through_host(self) -> bool:
        return "nccl" not in dist.get_backend(self._group)

    def _mark(self, same: Sequence[Tensor]) -> Tensor:
        # 24 bits of the call's number, its purpose, and the bits of what must be the same.
        known = zlib.crc32(self._place().encode())
        total: Any = known
        for tensor in same:
            total = total * 31 + checksum(tensor)
        if not isinstance(total, Tensor):
            total = torch.tensor(total)
        folded: Tensor = (total ^ (total >> 24) ^ (total >> 48)) & 0xFFFFFF
        return folded

    # -- values ----------------------------------------------------------------------

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Return what ``work()`` returned on each rank, in the order of ranks.

        For small things, which are pickled; tensors should be on the CPU. An exception on a
        rank is raised on all.

        Raises:
            DistributedError: As for :meth:`sum`.
        """
        if self.alone:
            return [work()]
        self._check()
        self._calls += 1
        failure: BaseException | None = None
        packed = b""
        try:
            packed = pickle.dumps(work())  # here, where what cannot be packed is told to all
        except Exception as error:
            failure = error
        self._check(failure)
        here = self._place()
        found = self._exchange((here, failure is not None, packed))
        if any(failed for _, failed, _ in found):
            self._raise(failure)
        if len({there for there, _, _ in found}) > 1:
            self._diverged(())
        return [pickle.loads(packed) for _, _, packed in found]

    def first(self, work: Callable[[], T]) -> T:
        """Return what ``work()``, called on all ranks, returned on the first: a decision."""
        return self.gather(work)[0]

    def _exchange(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, mine, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return found

    # -- what goes wrong ---------------------------------------------------------------

    def _check(self, failure: BaseException | None = None) -> None:
        if self._broken:
            raise DistributedError(self._broken) from failure

    def _lost(self, error: BaseException) -> DistributedError:
        text = " ".join(str(error).split())[:200].rstrip(".")
        self._broken = (
            f"Expected all {self.size} ranks to take part in a sum. One is gone or does"
            f" something else ({text}). Look at the other ranks' output and start again."
        )
        return DistributedError(self._broken)

    def _diverged(self, same: Sequence[Tensor]) -> None:
        sums = [int(checksum(tensor)) for tensor in same]
        found = self._exchange((self._place(), sums))
        odd = [r for r, other in enumerate(found) if other != found[0]]
        ways = len({other[0] for other in found}) > 1
        what = "do different things" if ways else "have other vectors or parameters"
        self._broken = (
            "Expected all ranks to do the same with the same numbers. Ranks"
            f" {', '.join(map(str, odd))} {what} than rank 0. Give all ranks the same arguments"
            " and seeds, the same machines and numbers of threads, and start again."
        )
        raise DistributedError(self._broken)

    def _raise(self, failure: BaseException | None) -> None:
        mine = None if failure is None else (type(failure).__name__, _sentence(failure))
        found = self._exchange(mine)
        if failure is not None and all(other == mine for other in found):
            raise failure  # all failed alike, as one process would
        rank = next(r for r, other in enumerate(found) if other is not None)
        kind, text = found[rank]
        known = getattr(errors, kind, None)
        if isinstance(known, type) and issubclass(known, SharpkitError):
            raise known(f"Rank {rank}: {text}") from failure
        if failure is not None:
            raise failure
        raise DistributedError(f"Rank {rank}: {kind}: {text}")


SOLO = Team()


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _head(mark: Tensor, failed: bool) -> Tensor:
    # Whether this rank failed, and each byte with its square.
    limbs = [(mark >> bits) & 0xFF for bits in LIMBS]
    rest = [x for limb in limbs for x in (limb, limb * limb)]
    return torch.stack([torch.full_like(mark, int(failed)), *rest])


def _verdict(head: list[float], size: int) -> tuple[bool, bool]:
    # Whether a rank failed; whether bytes differ: equal ones alone make n sum(b^2) = sum(b)^2.
    pairs = zip(head[1::2], head[2::2], strict=True)
    return head[0] > 0, any(size * squares != total**2 for total, squares in pairs)


def checksum(tensor: Tensor) -> Tensor:
    """Return a 64-bit sum of the squares of the tensor's words: of its bits, not its values.

    Example:
        >>> a, b = torch.ones(2), torch.tensor([1 + 1e-7, 1 - 1e-7])
        >>> bool(checksum(a) == checksum(a.clone())), bool(checksum(a) == checksum(b))
        (True, False)
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if tensor.numel() == 0:
        return total
    flat = tensor.detach().T if tensor.ndim == 2 else tensor.detach()  # columns lie in one piece
    words = flat.reshape(-1).contiguous().view(WORDS[tensor.element_size()])
    for piece in torch.split(words, 2**18):
        wide = piece.long()
        total = total * 1000003 + (wide * wide).sum()
    return total


def _sentence(failure: BaseException) -> str:
    return " ".join(str(failure).split())


def interleaved(lists: Sequence[Sequence[T]]) -> list[T]:
    """Return the first of each list, the second of each, and so on.

    Example:
        >>> interleaved([["a", "d"], [], ["b", "e", "f"]])
        ['a', 'b', 'd', 'e', 'f']
    """
    most = max(map(len, lists), default=0)
    return [part[i] for i in range(most) for part in lists if i < len(part)]
