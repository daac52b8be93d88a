"""Products of an objective's curvature matrices, in the order of theta."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sharpkit.errors import ShapeError
from sharpkit.objective import fisher, ggn_diagonal
from sharpkit.objective.convexity import verify_criterion
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.gauss_newton import (
    OutputProducts,
    linearised,
    loss_hessian,
    through,
    verify_outputs,
)
from sharpkit.objective.groups import GroupForms, grouped_forms
from sharpkit.objective.hessian import HessianProducts
from sharpkit.objective.products import Named
from sharpkit.objective.usage import Spent, Usage
from sharpkit.parameters import ParameterSpace
from sharpkit.team import Shape, Team

__all__ = ["MatrixProducts"]


class MatrixProducts:
    """What an :class:`Objective` does with the matrices of its second derivatives.

    Attributes:
        space: The parameters that span theta.
    """

    space: ParameterSpace
    _evaluator: Evaluator
    _leaves: Named
    _hessian: HessianProducts
    _through: OutputProducts
    _shared: Spent
    _usage: Usage
    _memory_budget: int

    @property
    def team(self) -> Team:
        """The ranks that measure together."""
        return self._evaluator.team

    @torch.inference_mode(False)
    def hvp(self, vectors: Tensor) -> Tensor:
        """Return the Hessian times a vector ``[P]`` or the columns of a matrix ``[P, K]``.

        Raises:
            ShapeError: If the first axis is not P.
            ObjectiveError: If central differences are the only way and do not converge.
        """
        V = self._matrix(vectors)
        self._shared.hvps += V.shape[1]
        if V.shape[1]:
            self._hessian.choose()
        if self._hessian.by_differences:
            total = self._hessian(V)  # each gradient is a sum over ranks by itself
            shape = (len(self._leaves) + 1,)
            (noted,) = self._over_data(lambda: [self._usage.noted()], [(shape, torch.float64)])
            self._usage.report(noted)
        else:
            total = self._over_ranks(self._hessian, V)
        return total if vectors.ndim == 2 else total[:, 0]

    @torch.inference_mode(False)
    def ggnvp(self, vectors: Tensor) -> Tensor:
        r"""Return the generalised Gauss-Newton matrix times ``[P]`` or ``[P, K]``.

        .. math:: G = \frac1N \sum_n J_n^\top \nabla^2_f \ell_n J_n

        Raises:
            ShapeError: If the first axis is not P.
            ObjectiveError: For an objective made from a batch loss, which has no outputs, and
                for a criterion that is not convex in the outputs, or linear.
        """
        V = self._matrix(vectors)
        self._need_outputs("the GGN")
        self._shared.hvps += V.shape[1]
        middle = loss_hessian(self._evaluator)
        total = self._over_ranks(lambda W: self._through(W, middle), V)
        return total if vectors.ndim == 2 else total[:, 0]

    @torch.inference_mode(False)
    def ggn_diagonal(self) -> Tensor:
        r"""Return the exact diagonal ``[P]`` of the generalised Gauss-Newton matrix.

        .. math:: G_{ii} = \frac1N \sum_n \sum_k w_{nk} (J_n^\top c_{nk})_i^2, \qquad
            \nabla^2_f \ell_n = \sum_k w_{nk} c_{nk} c_{nk}^\top

        Costs as many gradients of the data as an example has outputs that a loss term
        depends on (classes, times positions of a sequence), and no memory of that size.
        Examples and columns are taken together by torch.func where that gives the same, in
        float64 on a few examples, as one backward pass for each, and one by one elsewhere.

        Raises:
            ObjectiveError: As for :meth:`ggnvp`; for criteria other than CrossEntropyLoss,
                MSELoss and BCEWithLogitsLoss with more than 2048 outputs an example.

        Example:
            >>> from sharpkit import Objective
            >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
            >>> Objective(torch.nn.Linear(2, 1), torch.nn.MSELoss(), (x, y)).ggn_diagonal()
            tensor([2., 8., 2.])
        """
        self._need_outputs("the GGN")
        ggn_diagonal.choose(self._evaluator, self._leaves, self._through, self._memory_budget)

        def work() -> list[Tensor]:
            return ggn_diagonal.of_own_data(
                self._evaluator, self._leaves, self._through, self._memory_budget
            )

        shapes: list[Shape] = [((self.space.dim,), torch.float64), ((), torch.float64)]
        diagonal, passes = self._over_data(work, shapes)
        self._shared.gradients += math.ceil(float(passes) / max(self._evaluator.num_examples, 1))
        return diagonal.to(self.space.dtype)

    @torch.inference_mode(False)
    def fisher_vp(self, vectors: Tensor) -> Tensor:
        r"""Return the empirical Fisher matrix times ``[P]`` or ``[P, K]``.

        .. math:: F = \frac1N \sum_n g_n g_n^\top, \quad g_n \text{ the example gradients.}

        At the price of a GGN product where outputs have a row for each example, otherwise
        of one backward pass an example.

        Raises:
            ShapeError: If the first axis is not P.
            ObjectiveError: If the loss is not a sum over examples.
        """
        V = self._matrix(vectors)
        self._shared.hvps += V.shape[1]
        fisher.choose(self._evaluator, self._leaves, self._through)

        def work(W: Tensor) -> Tensor:
            return fisher.empirical(self._evaluator, self._leaves, self._through, W)

        total = self._over_ranks(work, V)
        self._shared.gradients += not self._through.by_rows
        return total if vectors.ndim == 2 else total[:, 0]

    @torch.inference_mode(False)
    def mc_fisher_vp(self, vectors: Tensor, *, num_samples: int = 1, seed: int = 0) -> Tensor:
        r"""Return the Monte Carlo Fisher matrix times ``[P]`` or ``[P, K]``.

        .. math:: F = \frac1N \sum_n \tilde g_n \tilde g_n^\top, \quad
            \tilde g_n = J_n^\top r_n

        for slopes r at targets drawn from the model's predictions, weighted as the loss
        terms are. Their mean over seeds is the GGN; N counts loss terms.

        Args:
            vectors: ``[P]`` or ``[P, K]``.
            num_samples: Draws for each target, of which F is the mean.
            seed: Of the draws: the same seed is the same matrix, whatever the batches.

        Raises:
            ShapeError: If the first axis is not P.
            SettingsError: If the number or the seed is no such number.
            ObjectiveError: If the criterion is not CrossEntropyLoss, MSELoss or
                BCEWithLogitsLoss, or the data come in another order in each pass.
        """
        V = self._matrix(vectors)
        self._need_outputs("the Fisher matrix")
        middle = fisher.monte_carlo(self._evaluator, self._leaves, self._through, num_samples, seed)
        self._shared.hvps += V.shape[1]
        total = self._over_ranks(lambda W: self._through(W, middle), V)
        return total if vectors.ndim == 2 else total[:, 0]

    @torch.inference_mode(False)
    def grouped_forms(
        self,
        vectors: Tensor,
        lefts: Sequence[Tensor],
        *,
        matrix: Literal["hessian", "ggn"] = "hessian",
        num_groups: int = 8,
    ) -> GroupForms | None:
        r"""Return :math:`u^\top S_g v` of a matrix's part from each group of the data.

        How much these differ tells the error from the data being a sample. One streamed
        pass, ``1 + 2K`` gradients. None where only central differences work.

        Args:
            vectors: Right vectors ``[P, K]``.
            lefts: Left vectors, each ``[P, K]``.
            matrix: ``"hessian"`` or ``"ggn"``.
            num_groups: Groups that the batches, or pieces of them, are dealt out to.
        """
        V = self._matrix(vectors)
        if matrix == "ggn":
            self._need_outputs("the GGN")
            middle = loss_hessian(self._evaluator)
        else:
            self._hessian.choose()
            if self._hessian.by_differences:
                return None

        def product(piece: Any, W: Tensor) -> Tensor:
            if matrix == "ggn":
                linear = linearised(self._evaluator, self._leaves, piece)
                return through(linear, self._leaves, W, middle)
            return self._hessian.of_piece(piece, W)

        self._shared.hvps += V.shape[1]
        lefts = [self._matrix(U) for U in lefts]
        return grouped_forms(self._evaluator, self._leaves, product, V, lefts, num_groups)

    def release(self) -> None:
        """Free the graphs that were kept for curvature products."""
        self._hessian.reset()
        self._through.reset()
        gc.collect()

    def _need_outputs(self, what: str) -> None:
        if not self._through.verified:

            def verify() -> None:
                verify_criterion(self._evaluator, self._leaves, what)
                verify_outputs(self._evaluator, self._leaves)

            self.team.gather(verify)
            self._through.verified = True

    # -- how -------------------------------------------------------------------------

    def _over_data(
        self,
        work: Callable[[], list[Tensor]],
        shapes: Sequence[Shape],
        same: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        # Sums over all data, of what work sums over this rank's.
        if not self.team.shares_data:
            return work()
        return self.team.sum(work, shapes, self.space.device, same=[*self._leaves.values(), *same])

    def _over_ranks(self, work: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
        # A product with V over all data: one all-reduce of what each rank has of it.
        if self.team.alone:
            total = work(V)
            self._usage.report(self._usage.noted())
            return total
        if self.team.shares_probes:
            return self._own_columns(work, V)

        def product() -> list[Tensor]:
            return [work(V), self._usage.noted().to(V)]

        shapes: list[Shape] = [(V.shape, V.dtype), ((len(self._leaves) + 1,), V.dtype)]
        total, noted = self._over_data(product, shapes, [V])
        self._usage.report(noted)
        return total

    def _own_columns(self, work: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
        # Each rank does every so-many-th column, on all data; zeros stand for the others.
        team = self.team

        def product() -> list[Tensor]:
            rows = V.new_zeros(V.shape[1], V.shape[0])
            rows[team.rank :: team.size] = work(V[:, team.rank :: team.size]).T
            return [rows, self._usage.noted().to(V)]

        shapes: list[Shape] = [
            ((V.shape[1], V.shape[0]), V.dtype),
            ((len(self._leaves) + 1,), V.dtype),
        ]
        same = [*self._leaves.values(), V]
        total, noted = team.sum(product, shapes, self.space.device, same=same)
        self._usage.report(noted)
        return total.T

    def _matrix(self, vectors: Tensor) -> Tensor:
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.space.dim:
            raise ShapeError(
                f"Expected vectors of shape ({self.space.dim},) or ({self.space.dim}, K)."
                f" Got {tuple(vectors.shape)}."
            )
        if vectors.is_complex():
            raise ShapeError("Expected real vectors. Got complex ones. Pass their real part.")
        if vectors.device != self.space.device:
            raise ShapeError(
                f"Expected vectors on {self.space.device}. Got {vectors.device}. Move them"
                " with .to(objective.space.device)."
            )
        V = vectors.detach().to(self.space.dtype)
        if V.is_inference():  # autograd cannot save it
            with torch.inference_mode(False):
                V = V.clone()
        return V if V.ndim == 2 else V[:, None]
