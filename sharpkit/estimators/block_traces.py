"""The traces of many diagonal blocks from one set of probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.estimators.deflation import Locked
from sharpkit.estimators.protocol import Matrix, RunningMoments, block_size, random_signs

__all__ = ["BlockTraces", "block_sums", "block_traces"]

Cuts = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class BlockTraces:
    """Traces of blocks, probe by probe.

    Attributes:
        samples: ``[m, B]``, float64, on the CPU: what each probe says of each block.
        scatter: ``[B]``: the sum of the variances of each block's entries, for one probe.
        sizes: ``[B]``: the number of entries of each block.
    """

    samples: Tensor
    scatter: Tensor
    sizes: Tensor

    @property
    def num_probes(self) -> int:
        """The number m of probes."""
        return len(self.samples)

    @property
    def values(self) -> Tensor:
        """The estimated traces, ``[B]``."""
        return self.samples.mean(dim=0)

    @property
    def largest_variances(self) -> Tensor:
        r"""Twice the entries' variances: what :math:`\operatorname{Var}\sum_B w_B t_B` is at most.

        That is, at most :math:`\sum_B w_B^2` times these, for any weights w of the blocks'
        traces t. A single trace has at least half as much.
        """
        return 2 * self.scatter / self.num_probes

    @property
    def errors(self) -> Tensor:
        """One standard error of each trace: its scatter, within what the entries' allow."""
        variances = self.samples.var(dim=0) / self.num_probes
        most = self.largest_variances
        return torch.minimum(torch.maximum(variances, most / 2), most).sqrt()

    def merged(self, labels: Tensor) -> BlockTraces:
        """Return the traces of unions of blocks.

        Args:
            labels: ``[B]``: the number of the union that each block goes to, from 0 on.
        """
        count = int(labels.max()) + 1

        def gather(x: Tensor) -> Tensor:
            return torch.zeros(*x.shape[:-1], count, dtype=x.dtype, device="cpu").index_add_(
                -1, labels, x
            )

        return BlockTraces(gather(self.samples), gather(self.scatter), gather(self.sizes))


def block_sums(vector: Tensor, cuts: Cuts) -> Tensor:
    """Return the sums of consecutive pieces of a vector, in float64 on the CPU.

    Args:
        vector: ``[P]``.
        cuts: Sizes of the vector's sections, and into how many equal pieces each is cut.

    Example:
        >>> block_sums(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), [(4, 2), (1, 1)]).tolist()
        [3.0, 7.0, 5.0]
    """
    sections = torch.split(vector, [size for size, _ in cuts])
    sums = [
        section.double().view(pieces, -1).sum(dim=1)
        for section, (_, pieces) in zip(sections, cuts, strict=True)
    ]
    return torch.cat(sums).cpu()


def block_traces(
    matrix: Matrix,
    locked: Locked,
    cuts: Cuts,
    *,
    num_probes: int,
    generator: torch.Generator,
) -> BlockTraces:
    r"""Estimate the traces of consecutive diagonal blocks with random signs.

    Entry i of :math:`z \odot A'z` has mean :math:`A'_{ii}`, with :math:`A'` the matrix
    without the known pairs, whose part of the diagonal is exact. Unbiased for every block.

    Args:
        matrix: The matrix ``A``.
        locked: Pairs that are known and projected out.
        cuts: The blocks, as for :func:`block_sums`.
        num_probes: Number m of products, at least 2.
        generator: Source of the signs.

    Raises:
        SettingsError: If ``num_probes < 2``.
    """
    if num_probes < 2:
        raise SettingsError(
            f"Expected `num_probes` to be at least 2, to give errors. Got {num_probes}."
        )
    known = torch.zeros(matrix.dim, dtype=torch.float64, device=matrix.device)
    for vector, value in zip(locked.vectors.unbind(dim=1), locked.values, strict=True):
        known += float(value) * vector.double().square()
    if locked.cross is not None:
        known += locked.cross.double()
    entries = RunningMoments(matrix)
    samples: list[Tensor] = []
    while len(samples) < num_probes:
        count = min(block_size(matrix), num_probes - len(samples))
        Z = random_signs(matrix, count, generator)
        AZ = locked.project(matrix @ locked.project(Z))
        for z, Az in zip(Z.unbind(dim=1), AZ.unbind(dim=1), strict=True):
            products = z * Az
            entries.add(products[:, None])
            samples.append(block_sums(products, cuts))
    ones = torch.ones(matrix.dim, dtype=torch.float64, device=matrix.device)
    return BlockTraces(
        torch.stack(samples) + block_sums(known, cuts),
        block_sums(entries.variances, cuts),
        block_sums(ones, cuts),
    )
