"""The Hessian's products over a whole data set: which way, what is kept, what is streamed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpkit.errors import ObjectiveError, SharpkitWarning
from sharpkit.objective import batches as trees
from sharpkit.objective import products
from sharpkit.objective.admission import HvpMode
from sharpkit.objective.evaluator import Evaluator, OrderChanged
from sharpkit.objective.isolation import is_out_of_memory
from sharpkit.objective.probing import gradient_graph, try_way
from sharpkit.objective.products import GradientGraph, Named

__all__ = ["HessianProducts"]

COARSE = 1e-4  # the eps of a dtype (bfloat16) that has no room for differences


@dataclass
class _Kept:
    # The graph of a piece, what it takes, and which piece it is of.
    graph: GradientGraph
    size: float
    mark: int | None


class HessianProducts:
    """Hessian-vector products at one point, by the best way that works.

    Args:
        evaluator: The loss of batches.
        leaves: The parameters to differentiate at; they must not change while graphs live.
        dtype: The dtype of vectors.
        mode: The way asked for.
        budget: Bytes that kept graphs may take.
        note_used: Told which parameters the loss uses, after a whole pass.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        leaves: Named,
        dtype: torch.dtype,
        mode: HvpMode,
        budget: int,
        note_used: Callable[[list[bool]], None],
    ):
        self._evaluator, self._leaves, self._dtype = evaluator, leaves, dtype
        self.point = leaves
        self._requested, self._note_used = mode, note_used
        self._budget = math.inf if mode == "kept" else float(budget)
        self._given_budget = budget
        self.mode: str | None = None
        self.error = 0.0  # largest relative disagreement of central differences
        self._way: str | None = None
        self._bytes_per_example = 0.0
        self._kept: list[_Kept] = []
        self.reset()
        evaluator.holders.add(self)

    def at(self, leaves: Named) -> HessianProducts:
        """Return the products at other leaves, with the way already chosen."""
        other = HessianProducts(
            self._evaluator,
            leaves,
            self._dtype,
            self._requested,
            self._given_budget,
            self._note_used,
        )
        other.mode, other._way, other._budget = self.mode, self._way, self._budget
        other._bytes_per_example = self._bytes_per_example
        return other

    @property
    def held(self) -> float:
        """The bytes that the kept graphs take."""
        return sum(kept.size for kept in self._kept)

    def reset(self) -> None:
        """Let go of the kept graphs."""
        self._kept.clear()
        self._built = False
        self._built_for: int | None = None
        self._streams = True

    def give_up(self) -> bool:
        """Free the kept graphs because memory ran out, and keep fewer from now on."""
        if not self._kept:
            return False
        self._budget = min(self._budget, self.held) / 2
        self.reset()
        return True

    def __call__(self, V: Tensor) -> Tensor:
        """Return ``H V [P, K]``."""
        if V.shape[1] == 0:
            return torch.zeros_like(V)
        self.choose()  # a collective: not for the first time inside another one
        if self._way == "forward_over_reverse":
            self.mode = self._way
            return self._forward_over_reverse(V)
        if self._way == "central_difference":
            self.mode = self._way
            return self._central(V)
        return self._double_backward(V)

    def of_piece(self, batch: Any, V: Tensor) -> Tensor:
        """Return what a piece of the data contributes to ``H V``, inside a pass over them.

        Not by central differences, which are taken of whole gradients.
        """
        if self._way == "forward_over_reverse":
            return products.forward_over_reverse(
                lambda theta: self._loss(theta, batch), self._leaves, V
            )
        graph = products.gradient_graph(self._loss(self._leaves, batch), self._leaves)
        return products.double_backward([graph], self._leaves, V, keep=False)

    @property
    def by_differences(self) -> bool:
        """Whether central differences are the chosen way."""
        return self._way == "central_difference"

    def choose(self) -> None:
        """Choose the way of computing products, if that was not done; the same on all ranks."""
        if self._way is None:
            self._way = self._evaluator.team.first(self._choose_way)

    def _loss(self, theta: Named, batch: Any) -> Tensor:
        return self._evaluator.share(theta, batch)

    def _sum(
        self, term: Callable[[Any], Tensor], V: Tensor, seen: list[int | None] | None = None
    ) -> Tensor:
        total = torch.zeros_like(V)

        def add(part: Tensor) -> None:
            total.add_(part)

        self._evaluator.each(term, add, grad=True, theta=self._leaves, seen=seen or ())
        return total

    # -- double backward -------------------------------------------------------------

    def _double_backward(self, V: Tensor) -> Tensor:
        while True:
            self._build()
            total = self._of_graphs(V)
            if total is None:  # memory ran out: fewer graphs are kept now
                continue
            if not self._streams:
                self.mode = "kept"
                return total
            seen = [kept.mark for kept in self._kept]
            self.mode = f"kept {len(seen)} batches, streamed the rest" if seen else "streamed"
            try:
                return total + self._streamed(V, seen)
            except OrderChanged:
                self.reset()
                self._budget = 0.0
                warnings.warn(
                    "The data come in another order in every pass, so no part of the"
                    " gradient graphs can be kept. The result is the same, only slower;"
                    " use shuffle=False.",
                    SharpkitWarning,
                    stacklevel=5,
                )

    def _of_graphs(self, V: Tensor) -> Tensor | None:
        if not self._kept:
            return torch.zeros_like(V)

        def work(_: object) -> Tensor:
            graphs = [kept.graph for kept in self._kept]
            return products.double_backward(graphs, self._leaves, V, keep=True)

        try:
            with self._evaluator.context(grad=True):
                return self._evaluator.bound(self._leaves, work)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self.give_up()
        warnings.warn(
            "Memory ran out with all gradient graphs kept: fewer are kept from now on. The"
            " result is the same, only slower.",
            SharpkitWarning,
            stacklevel=5,
        )
        return None

    def _streamed(self, V: Tensor, seen: list[int | None]) -> Tensor:
        used = [False] * len(self._leaves)

        def one(batch: Any) -> tuple[Tensor, list[bool]]:
            graph = products.gradient_graph(self._loss(self._leaves, batch), self._leaves)
            return products.double_backward([graph], self._leaves, V, keep=False), graph.used

        total = torch.zeros_like(V)
        for kept in self._kept:
            _note(used, kept.graph.used)

        def add(result: tuple[Tensor, list[bool]]) -> None:
            total.add_(result[0])
            _note(used, result[1])

        self._evaluator.each(one, add, grad=True, theta=self._leaves, seen=seen)
        self._note_used(used)
        return total

    def _build(self) -> None:
        # Graphs belong to one way of cutting the batches: when that changed, build anew.
        while not self._built or self._built_for != self._evaluator.micro_batch:
            self.reset()
            if self._requested == "streamed":
                self._built, self._built_for = True, self._evaluator.micro_batch
                return
            self._built_for = self._evaluator.micro_batch
            self._build_once()

    def _build_once(self) -> None:
        # Keep the graphs of leading batches while the budget lasts; the rest is streamed.
        evaluator = self._evaluator
        self._built = True  # unless memory runs out: give_up() takes it back
        room = self._budget - evaluator.held_beside(self)
        overhead = sum(t.numel() for t in self._leaves.values()) * self._dtype.itemsize
        used = [False] * len(self._leaves)
        full = False

        def one(batch: Any) -> _Kept | None:
            need = (trees.batch_size(batch) or 1) * self._bytes_per_example + overhead
            if need > room:
                return None
            graph, size = gradient_graph(evaluator, self._leaves, batch)
            # The data of a batch may stay the same; their order need not.
            mark = None if evaluator.cached else trees.fingerprint(batch)
            return _Kept(graph, size + overhead, mark)  # some batches are longer than others

        def add(kept: _Kept | None) -> bool:
            nonlocal room, full
            if not self._built:
                return True
            if kept is None or kept.size > room:
                full = True
                return True
            self._kept.append(kept)
            room -= kept.size
            _note(used, kept.graph.used)
            return False

        own = not evaluator.cached  # graphs live longer than a loader's batches
        evaluator.each(one, add, grad=True, theta=self._leaves, own=own)
        self._streams = full or not self._built
        if self._built and not full:
            self._note_used(used)

    # -- other ways ------------------------------------------------------------------

    def _forward_over_reverse(self, V: Tensor) -> Tensor:
        def one(batch: Any) -> Tensor:
            return products.forward_over_reverse(
                lambda theta: self._loss(theta, batch), self._leaves, V
            )

        try:
            return self._sum(one, V)
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            text = " ".join(str(error).split())[:160]
            raise ObjectiveError(
                "Expected forward-mode derivatives of every operation of the model. One has"
                f" none ({text}). Use hvp_mode='auto'."
            ) from error

    def _central(self, V: Tensor) -> Tensor:
        like = list(self._leaves.values())
        coarsest = self._evaluator.coarsest_dtype(self._leaves)
        if torch.finfo(coarsest).eps > COARSE:
            raise ObjectiveError(
                "Expected at least float32 for central differences, the only way to second"
                f" derivatives here. Got {str(coarsest).removeprefix('torch.')}, in which"
                " small steps vanish. Pass dtype=torch.float32."
            )
        start = products.flat(like, like, self._dtype)
        result = []
        for v in V.unbind(dim=1):
            product, error = products.central_difference(self._gradient_at, start, v)
            self.error = max(self.error, error)
            result.append(product)
        return torch.stack(result).T

    def _gradient_at(self, point: Tensor) -> Tensor:
        (column,) = products.columns(point[:, None], self._leaves)
        theta = {
            name: part.clone().requires_grad_()
            for name, part in zip(self._leaves, column, strict=True)
        }
        total = torch.zeros_like(point)
        used = [False] * len(self._leaves)

        def one(batch: Any) -> tuple[Tensor, list[bool]]:
            return products.flat_gradient(self._loss(theta, batch), theta, self._dtype)

        def add(result: tuple[Tensor, list[bool]]) -> None:
            total.add_(result[0])
            _note(used, result[1])

        def work() -> list[Tensor]:
            self._evaluator.each(one, add, grad=True, theta=theta)
            self._note_used(used)
            return [total]

        team = self._evaluator.team
        if not team.shares_data:
            return work()[0]
        return team.sum(work, [(total.shape, total.dtype)], total.device, same=[point])[0]

    # -- choice ----------------------------------------------------------------------

    def _choose_way(self) -> str:
        if self._requested == "central_difference":
            return self._requested
        wanted = "forward_over_reverse" if self._requested == "forward_over_reverse" else "kept"
        trial = try_way(self._evaluator, self._leaves, self._dtype, wanted)
        if trial.reason is None:
            self._bytes_per_example = trial.bytes_per_example
            return wanted
        reason = trial.reason.rstrip(".")
        if self._requested != "auto":
            what = "forward-mode" if wanted != "kept" else "second"
            raise ObjectiveError(
                f"Expected {what} derivatives of every operation of the model. Here"
                f" hvp_mode={self._requested!r} does not work ({reason}). Use hvp_mode='auto'."
            )
        other = try_way(self._evaluator, self._leaves, self._dtype, "forward_over_reverse")
        way = "forward_over_reverse" if other.reason is None else "central_difference"
        warnings.warn(
            f"Double backward does not work for this model ({reason}); Hessian-vector"
            f" products use {way.replace('_', '-')} instead.",
            SharpkitWarning,
            stacklevel=4,
        )
        return way


def _note(used: list[bool], flags: list[bool]) -> None:
    used[:] = [a or b for a, b in zip(used, flags, strict=True)]
