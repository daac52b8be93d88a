"""The Hessian's products over a whole data set: which way, what is kept, what is streamed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharpkit.errors import ObjectiveError, SharpkitWarning
from sharpkit.objective import batches as trees
from sharpkit.objective import products
from sharpkit.objective.admission import HvpMode
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.isolation import evaluation, is_out_of_memory
from sharpkit.objective.products import GradientGraph, LossOf, Named

__all__ = ["HessianProducts"]

PROBE_SHARE = 8  # the way to differentiate is tried on an eighth of the first batch
DISAGREEMENT = 0.1  # of a product: what a lost part of the graph costs at least
RESIDENT_PER_SAVED = 1.5  # a kept graph takes more than the tensors that it saves


class HessianProducts:
    """Hessian-vector products at one point, by the best way that works.

    Args:
        evaluator: The loss of batches.
        leaves: The parameters to differentiate at; they must not change while graphs live.
        dtype: The dtype of vectors.
        mode: The way asked for.
        budget: Bytes that kept graphs may take.
        warn_unused: Told which parameters the loss uses, after a whole pass.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        leaves: Named,
        dtype: torch.dtype,
        mode: HvpMode,
        budget: int,
        warn_unused: Callable[[list[bool]], None],
    ):
        self._evaluator, self._leaves, self._dtype = evaluator, leaves, dtype
        self._requested, self._budget, self._warn_unused = mode, budget, warn_unused
        self.mode: str | None = None
        self.error = 0.0  # largest relative disagreement of central differences
        self._bytes_per_example = 0.0
        self.reset()

    def at(self, leaves: Named) -> HessianProducts:
        """Return the products at other leaves, with the way already chosen."""
        other = HessianProducts(
            self._evaluator,
            leaves,
            self._dtype,
            self._requested,
            self._budget,
            self._warn_unused,
        )
        other.mode = self.mode
        other._bytes_per_example = self._bytes_per_example
        return other

    def reset(self) -> None:
        """Let go of the kept graphs."""
        self._graphs: list[GradientGraph] | None = None
        self._graphs_cut: int | None = None
        self._streams = True

    def __call__(self, V: Tensor) -> Tensor:
        """Return ``H V [P, K]``."""
        if self.mode is None:
            self.mode = self._choose_mode()
        if self.mode == "forward_over_reverse":
            return self._forward_over_reverse(V)
        if self.mode == "central_difference":
            return self._central(V)
        return self._double_backward(V)

    def _loss(self, theta: Named, batch: Any) -> Tensor:
        return self._evaluator.share(theta, batch)

    def _sum(self, term: Callable[[Any], Tensor], V: Tensor, skip: int = 0) -> Tensor:
        total = torch.zeros_like(V)

        def add(part: Tensor) -> None:
            total.add_(part)

        self._evaluator.each(term, add, grad=True, skip=skip)
        return total

    # -- double backward -------------------------------------------------------------

    def _double_backward(self, V: Tensor) -> Tensor:
        graphs = self._current_graphs()
        total = torch.zeros_like(V)
        if graphs:
            try:
                with evaluation(self._evaluator.model, grad=True):
                    total += products.double_backward(graphs, self._leaves, V, keep=True)
            except Exception as error:
                if not is_out_of_memory(error) or self._requested == "kept":
                    raise
                self.mode = "streamed"
        if self.mode == "streamed" and graphs:  # memory ran out just now: start again
            total.zero_()
            self.reset()
            graphs = self._current_graphs()
        if self._streams:

            def one(batch: Any) -> Tensor:
                graph = products.gradient_graph(self._loss(self._leaves, batch), self._leaves)
                return products.double_backward([graph], self._leaves, V, keep=False)

            total += self._sum(one, V, skip=len(graphs))
        return total

    def _current_graphs(self) -> list[GradientGraph]:
        # Graphs belong to one way of cutting the batches: when that changed, build anew.
        while self._graphs is None or self._graphs_cut != self._evaluator.micro_batch:
            self.reset()
            self._graphs_cut = self._evaluator.micro_batch
            self._graphs = self._build_graphs()
        return self._graphs

    def _build_graphs(self) -> list[GradientGraph]:
        # Keep the graphs of leading batches while the budget lasts; the rest is streamed.
        self._streams = True
        if self.mode == "streamed":
            return []
        room = float("inf") if self._requested == "kept" else float(self._budget)
        overhead = sum(t.numel() for t in self._leaves.values()) * self._dtype.itemsize
        graphs: list[GradientGraph] = []
        used = [False] * len(self._leaves)
        full = False

        def one(batch: Any) -> tuple[GradientGraph, float] | None:
            need = (trees.batch_size(batch) or 1) * self._bytes_per_example + overhead
            if need > room:
                return None
            loss = self._loss(self._leaves, batch)
            return products.gradient_graph(loss, self._leaves), need

        def add(result: tuple[GradientGraph, float] | None) -> bool:
            nonlocal room, full
            if result is None:
                full = True
                return True
            graph, need = result
            graphs.append(graph)
            room -= need
            used[:] = [a or b for a, b in zip(used, graph.used, strict=True)]
            return False

        self._evaluator.each(one, add, grad=True)
        if full:
            self.mode = f"kept {len(graphs)} batches, streamed the rest" if graphs else "streamed"
            return graphs
        self._warn_unused(used)
        self.mode, self._streams = "kept", False
        return graphs

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
        start = products.flat(like, like, self._dtype)
        result = []
        for v in V.unbind(dim=1):
            product, error = products.central_difference(self._gradient_at, start, v)
            self.error = max(self.error, error)
            result.append(product)
        return torch.stack(result, dim=1)

    def _gradient_at(self, point: Tensor) -> Tensor:
        theta = self._named(point)
        total = torch.zeros_like(point)

        def add(part: Tensor) -> None:
            total.add_(part)

        self._evaluator.each(
            lambda batch: products.flat_gradient(self._loss(theta, batch), theta, self._dtype)[0],
            add,
            grad=True,
        )
        return total

    def _named(self, point: Tensor) -> Named:
        (column,) = products.columns(point[:, None], self._leaves)
        parts = zip(self._leaves, column, strict=True)
        return {name: part.clone().requires_grad_() for name, part in parts}

    # -- choice ----------------------------------------------------------------------

    def _choose_mode(self) -> str:
        if self._requested in ("forward_over_reverse", "central_difference", "streamed"):
            return self._requested
        reason = self._try("kept")
        if reason is None or self._requested == "kept":
            return "kept"
        if self._try("forward_over_reverse") is None:
            mode = "forward_over_reverse"
        else:
            mode = "central_difference"
        warnings.warn(
            f"Double backward does not work for this model ({reason}); Hessian-vector"
            f" products use {mode.replace('_', '-')} instead.",
            SharpkitWarning,
            stacklevel=4,
        )
        return mode

    def _try(self, mode: str) -> str | None:
        # Return why a mode does not work on a slice of the first batch; None if it does.
        generator = torch.Generator().manual_seed(0)
        shape = (sum(t.numel() for t in self._leaves.values()), 2)
        V = torch.randn(shape, generator=generator).to(self._evaluator.device, self._dtype)

        def one(batch: Any) -> tuple[float, str | None]:
            size = trees.batch_size(batch) or 1
            piece = batch
            if self._evaluator.additive:
                piece = trees.split(batch, max(1, size // PROBE_SHARE))[0]
            count = trees.batch_size(piece) or 1

            def loss_of(theta: Named) -> Tensor:
                return self._loss(theta, piece)

            if mode == "forward_over_reverse":
                HV = products.forward_over_reverse(loss_of, self._leaves, V)
                return 0.0, self._asymmetry(loss_of, V, HV)
            owned = [*self._leaves.values(), *self._evaluator._fixed.values()]
            with products.saved_bytes(owned) as saved:
                graph = products.gradient_graph(loss_of(self._leaves), self._leaves)
                HV = products.double_backward([graph], self._leaves, V, keep=True)
            per_example = RESIDENT_PER_SAVED * saved.total / count
            if len(graph.index) < sum(graph.used):  # a constant gradient, or a cut graph?
                moved = {
                    n: (t.detach() * 1.01 + 1e-3).requires_grad_() for n, t in self._leaves.items()
                }
                if not self._constant_gradients(loss_of, graph, moved):
                    return per_example, "the backward pass of an operation is not differentiable"
            return per_example, self._asymmetry(loss_of, V, HV)

        found: list[tuple[float, str | None]] = []

        def take(result: tuple[float, str | None]) -> bool:
            found.append(result)
            return True

        try:
            self._evaluator.each(one, take, grad=True)
        except ObjectiveError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            return " ".join(str(error).split())[:160]
        per_example, reason = found[0]
        self._bytes_per_example = max(self._bytes_per_example, per_example)
        return reason

    def _asymmetry(self, loss_of: LossOf, V: Tensor, HV: Tensor) -> str | None:
        # A backward pass that lost a part of its graph gives products that are not symmetric.
        # So does the Hessian of a loss near 0, which is mostly rounding; there differences of
        # the gradient do not agree among themselves, and nothing is held against the products.
        M = (V.T @ HV).double()
        scale = (V.norm(dim=0).max() * HV.norm(dim=0).max()).double()
        slack = min(1e3 * torch.finfo(self._evaluator.coarsest_dtype(self._leaves)).eps, 0.2)
        if bool((M[0, 1] - M[1, 0]).abs() <= slack * scale):
            return None

        def gradient_at(point: Tensor) -> Tensor:
            theta = self._named(point)
            return products.flat_gradient(loss_of(theta), theta, self._dtype)[0]

        try:
            like = list(self._leaves.values())
            theta = products.flat(like, like, self._dtype)
            difference, _ = products.central_difference(gradient_at, theta, V[:, 0])
        except ObjectiveError:
            return None
        gap = float((difference - HV[:, 0]).norm()) / float(difference.norm())
        return "its products are not symmetric" if gap > DISAGREEMENT else None

    def _constant_gradients(self, loss_of: LossOf, graph: GradientGraph, moved: Named) -> bool:
        here = torch.autograd.grad(
            loss_of(self._leaves), list(self._leaves.values()), allow_unused=True
        )
        there = torch.autograd.grad(loss_of(moved), list(moved.values()), allow_unused=True)
        for i, (a, b) in enumerate(zip(here, there, strict=True)):
            if a is None or b is None or i in graph.index:
                continue
            if not torch.allclose(a, b, rtol=1e-3, atol=1e-6 * float(a.abs().max())):
                return False
        return True
