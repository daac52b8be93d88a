"""The objective: a fixed, differentiable function of the parameters."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit.errors import ObjectiveError, SettingsError
from sharpkit.objective import batches as trees
from sharpkit.objective import fisher, products
from sharpkit.objective.admission import HvpMode, refuse_training_mode, trainable, validate
from sharpkit.objective.checks import first_pass
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.gauss_newton import OutputProducts
from sharpkit.objective.groups import grouped_losses
from sharpkit.objective.hessian import HessianProducts
from sharpkit.objective.isolation import unwrap
from sharpkit.objective.losses import BatchLoss, CriterionLoss
from sharpkit.objective.memory import available_memory, default_budget
from sharpkit.objective.ranks import agreed
from sharpkit.objective.readings import Readings
from sharpkit.objective.shards import shards_of
from sharpkit.objective.usage import PartlySpent, Spent, Usage
from sharpkit.parameters import ParameterSpace, Selection, select_names
from sharpkit.results import Cost
from sharpkit.team import Group, Shape, Share, Team

__all__ = ["Objective"]


class Objective(Readings):
    r"""The empirical risk of a model on a data set, as a function of its parameters.

    .. math::
        L(\theta) = \frac{\text{sum of loss terms}}{\text{number of loss terms}}

    Batches are a way to compute the sum, not a part of the function: any split of the
    same examples gives the same loss, gradient and Hessian, with a ragged last batch and
    masked tokens too. The parameters are copied at construction, and the module is read,
    never written: its ``.grad``, buffers, mode and the global random state stay as they
    were, also after an exception.

    Frozen parameters (``requires_grad=False``) are never part of theta, tied ones count
    once, DDP and compiled modules are unwrapped, and fused attention runs under the math
    kernel, which has second derivatives.

    Args:
        model: A network in evaluation mode.
        loss: A criterion of mean reduction, module or function: ``(outputs, targets)``
            to the mean loss. Terms are counted as the criterion divides: unmasked
            (weighted) targets for cross-entropy, elements for MSE.
        data: A re-iterable of batches ``(inputs, targets)`` (or mappings with a
            ``labels`` key), a ``DataLoader``, a ``Dataset``, or one pair of tensors.
        params: The parameters that span theta: a glob, several, or a function of the name.
        dtype: Evaluate in this floating dtype, for example ``torch.float64``; the module
            itself is not converted.
        hvp_mode: ``"auto"`` keeps gradient graphs within ``memory_budget`` and streams the
            rest by double backward; where an operation has no double backward it falls
            back to forward-over-reverse, then to checked central differences.
        memory_budget: Bytes that kept graphs and cached batches may take; default a
            quarter of the free memory.
        num_terms: ``(outputs, targets)`` to the number that the criterion divides by, if
            it is none of the usual ones.
        check: Verify at construction that loss and data are the same twice and that the
            loss adds up over examples. Turn it off only for data that are very slow to read.
        process_group: ``"world"`` or a group of ``torch.distributed``, whose ranks measure
            together and get the same numbers; None: this process alone. Without an
            initialized group ``"world"`` is one process. See :mod:`sharpkit.distributed`.
        share: What the ranks share out: ``"data"``, of which each is given its own batches,
            any number of any size; or ``"probes"``, the columns of blocks of vectors, where
            each is given all the data.

    Raises:
        ObjectiveError: In training mode with dropout or BatchNorm; for one-shot iterators,
            an empty selection, data or losses that differ between two passes, a loss that
            is not finite or does not add up; for parameters that differ between ranks.
        DistributedError: If a rank raised something else, or the ranks went different ways.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> objective = Objective(model, nn.MSELoss(), (x, y))
        >>> objective.value().item(), objective.gradient().tolist()
        (1.0, [1.0, 1.0])
        >>> objective.hvp(torch.tensor([1.0, 0.0])).tolist()
        [1.0, 0.0]
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        data: Any,
        params: Selection = "*",
        *,
        dtype: torch.dtype | None = None,
        hvp_mode: HvpMode = "auto",
        memory_budget: int | None = None,
        num_terms: Callable[[Any, Any], float] | None = None,
        check: bool = True,
        process_group: Group = None,
        share: Share = "data",
    ):
        self._init(
            model,
            CriterionLoss(loss, num_terms),
            data,
            params,
            dtype=dtype,
            hvp_mode=hvp_mode,
            memory_budget=memory_budget,
            check=check,
            team=Team(process_group, share),
        )

    @classmethod
    def from_batch_loss(
        cls,
        model: nn.Module,
        batch_loss: BatchLoss,
        data: Any,
        params: Selection = "*",
        *,
        dtype: torch.dtype | None = None,
        hvp_mode: HvpMode = "auto",
        memory_budget: int | None = None,
        check: bool = True,
        process_group: Group = None,
        share: Share = "data",
    ) -> Objective:
        """Return the objective of any batches: dicts, graphs, language models, PINNs.

        Args:
            model: As for the class; ``batch_loss`` may call any of its methods.
            batch_loss: Maps ``(model, batch)`` to ``(loss_sum, num_terms)``: the *sum* of
                the loss terms of the batch, and how many there are.
            data: A re-iterable of batches.
            params: As for the class; so are the other arguments.
            dtype: As for the class.
            hvp_mode: As for the class.
            memory_budget: As for the class.
            check: As for the class.
            process_group: As for the class.
            share: As for the class.

        Raises:
            ObjectiveError: As for the class.

        Example:
            >>> def batch_loss(model, batch):
            ...     error = model(batch["x"]) - batch["y"]
            ...     return (error**2).sum(), error.numel()
            >>> batch = {"x": torch.eye(2), "y": torch.zeros(2, 1)}
            >>> model = nn.Linear(2, 1)
            >>> Objective.from_batch_loss(model, batch_loss, [batch]).space.dim
            3
        """
        if not callable(batch_loss):
            raise ObjectiveError(
                "Expected `batch_loss` to be a function (model, batch) -> (loss_sum,"
                f" num_terms). Got {type(batch_loss).__name__}."
            )
        self = cls.__new__(cls)
        self._init(
            model,
            batch_loss,
            data,
            params,
            dtype=dtype,
            hvp_mode=hvp_mode,
            memory_budget=memory_budget,
            check=check,
            team=Team(process_group, share),
        )
        return self

    def _init(
        self,
        model: nn.Module,
        batch_loss: BatchLoss,
        data: Any,
        params: Selection,
        *,
        dtype: torch.dtype | None,
        hvp_mode: HvpMode,
        memory_budget: int | None,
        check: bool,
        team: Team,
    ) -> None:
        def prepare() -> tuple[Evaluator, dict[str, Tensor]]:
            validate(model, dtype, hvp_mode, memory_budget)
            own = unwrap(model)
            refuse_training_mode(own)
            names = trainable(own, params, dtype)
            parameters = dict(own.named_parameters())
            batches = trees.as_batches(data)
            evaluator = Evaluator(own, batch_loss, batches, names, dtype=dtype, team=team)
            return evaluator, {n: evaluator.cast(parameters[n].detach()) for n in names}

        evaluator, start = agreed(team, prepare, dtype, hvp_mode)
        self.space = ParameterSpace.of(start)
        self._leaves = differentiable(start)
        if memory_budget is None:
            memory_budget = default_budget(self.space.device) // team.crowd
        fixed = {n: t.detach() for n, t in self._leaves.items()}
        first_pass(evaluator, fixed, budget=memory_budget, check=check)
        self._evaluator = evaluator
        self._shared = Spent()
        self._started = time.perf_counter()
        self._requested_mode: HvpMode = hvp_mode
        self._memory_budget = memory_budget
        self._begin()

    def _begin(self) -> None:
        # Curvature products from scratch, at the present leaves.
        self._usage = Usage(self._evaluator, self._leaves, self._shared.unused)
        self._hessian = HessianProducts(
            self._evaluator,
            self._leaves,
            self.space.dtype,
            self._requested_mode,
            self._memory_budget,
            self._usage.note,
        )
        self._through = OutputProducts(
            self._evaluator, self._leaves, self._requested_mode, self._memory_budget
        )

    # -- what it is ------------------------------------------------------------------

    @property
    def free_memory(self) -> int:
        """The bytes that are free on the device, where the ranks have least of it."""
        team = self.team
        return min(team.gather(lambda: available_memory(self.space.device))) // team.crowd

    def __repr__(self) -> str:
        return (
            f"Objective({type(self._evaluator.model).__name__}, P={self.space.dim},"
            f" {self._evaluator.num_examples} examples in {self._evaluator.num_batches}"
            f" batches, {self.num_terms:g} loss terms)"
        )

    @property
    def theta(self) -> Tensor:
        """The parameters ``[P]`` at which everything is evaluated, as a copy."""
        return self.space.flatten({n: t.detach() for n, t in self._leaves.items()})

    @property
    def num_terms(self) -> float:
        """The number of loss terms in the data."""
        return self._evaluator.num_terms

    @property
    def num_examples(self) -> int:
        """The number of examples in the data (length of the first axis, summed)."""
        return self._evaluator.num_examples

    @property
    def data_fingerprint(self) -> str:
        """A hash of the examples that depends neither on their order nor on batches."""
        return self._evaluator.fingerprint

    @property
    def model(self) -> nn.Module:
        """The module that was given, without wrappers; sharpkit reads it and never writes."""
        return self._evaluator.model

    @property
    def criterion(self) -> Callable[..., Tensor] | None:
        """The criterion of ``(outputs, targets)``; None for a batch loss."""
        loss = self._evaluator.batch_loss
        return loss.criterion if isinstance(loss, CriterionLoss) else None

    @property
    def model_dtype(self) -> torch.dtype:
        """The coarsest dtype of the parameters in theta: it sets the rounding level."""
        return Evaluator.coarsest_dtype(self._leaves)

    @property
    def hvp_mode(self) -> str:
        """How Hessian-vector products are computed; ``"auto"`` until the first one."""
        return self._hessian.mode or self._requested_mode

    @property
    def hvp_error(self) -> float:
        """The largest relative disagreement of central differences; 0 for exact ways."""
        return self._hessian.error

    @property
    def cost(self) -> Cost:
        """What was spent so far, over all objectives made from this one."""
        seconds = time.perf_counter() - self._started
        spent = self._shared
        return Cost(round(spent.hvps), round(spent.gradients), round(spent.forwards), seconds)

    def at(self, theta: Tensor, *, copy_theta: bool = True) -> Objective:
        """Return the same objective at other parameters ``theta [P]``.

        They are rounded to the model's dtype: in bfloat16 a small perturbation may vanish,
        so measure perturbed losses with ``dtype=torch.float32``.

        Args:
            theta: The parameters.
            copy_theta: Whether to copy them; otherwise they must not change while the
                objective is used.

        Raises:
            ShapeError: If theta does not have shape ``[P]``.
        """
        parts = self.space.unflatten(theta.detach())
        other = copy.copy(self)
        cast = {n: t.to(self._leaves[n].dtype) for n, t in parts.items()}
        other._leaves = differentiable(cast, copied=copy_theta)
        other._hessian = self._hessian.at(other._leaves)
        other._through = self._through.at(other._leaves)
        return other

    def restrict(self, params: Selection) -> Objective:
        """Return the objective of some of the parameters; the others stay at theta.

        Raises:
            ObjectiveError: If the selection matches none of this objective's parameters.
        """
        names = select_names(self.space.names, params)
        chosen = set(names)
        other = copy.copy(self)
        other._leaves = differentiable({n: self._leaves[n].detach() for n in names})
        other.space = ParameterSpace.of(other._leaves)
        other._evaluator = self._evaluator.restrict(
            {n: t.detach() for n, t in self._leaves.items() if n not in chosen}
        )
        other._begin()
        other._through.verified = self._through.verified
        return other

    def shards(self, size: int | None = None) -> Iterator[Objective]:
        """Yield the objective of the first ``size`` examples, of the next ones, and so on.

        Each is a mean over its own loss terms, at the same theta. The data's order decides
        what is in a shard, their batches do not; the last may have fewer examples. Shards
        without a loss term (all masked) are left out. What a shard costs counts by its
        share of the examples, and one forward pass for its number of terms.

        Args:
            size: Examples of a shard; None: the batches as they are.

        Raises:
            SettingsError: If the size is not a whole number of at least 1.
            ObjectiveError: If the loss is not a sum over examples and a size is given.

        Example:
            >>> x = torch.arange(5.0)[:, None]
            >>> model = nn.Linear(1, 1)
            >>> objective = Objective(model, nn.MSELoss(), [(x[:3], x[:3]), (x[3:], x[3:])])
            >>> [shard.num_examples for shard in objective.shards(2)]
            [2, 2, 1]
        """
        if size is not None:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise SettingsError(
                    f"Expected shards of a whole number of examples, at least 1. Got {size!r}."
                )
            if not self._evaluator.additive:
                raise ObjectiveError(
                    "Expected a loss that is a sum over examples, to cut the data into shards."
                    " This one depends on how the examples are batched. Use shards(None), which"
                    " takes the batches as they are."
                )
        return self._shards(size)

    def _shards(self, size: int | None) -> Iterator[Objective]:
        for pieces in shards_of(self._evaluator, size):
            other = copy.copy(self)
            other._evaluator = evaluator = self._evaluator.on(pieces)
            whole = self._evaluator
            share = evaluator.num_batches / whole.num_batches  # of batches without examples
            if whole.num_examples:
                share = evaluator.num_examples / whole.num_examples
            other._shared = PartlySpent(self._shared, share)
            other._shared.forwards += 1
            evaluator.num_terms = evaluator.over_data(lambda it=evaluator: self._terms(it))  # type: ignore[misc]
            if evaluator.num_terms > 0:
                other._begin()
                other._through.verified = self._through.verified
                yield other

    def _terms(self, evaluator: Evaluator) -> float:
        counts: list[float] = []
        evaluator.each(
            lambda batch: evaluator.loss(self._leaves, batch)[1], counts.append, grad=False
        )
        return sum(counts)

    # -- values and gradients --------------------------------------------------------

    @torch.inference_mode(False)  # sums must not become inference tensors
    def value(self) -> Tensor:
        """Return ``L(theta)``, a float64 scalar; it may be inf or NaN away from the start."""
        self._shared.forwards += 1
        total = torch.zeros((), dtype=torch.float64, device="cpu")

        def add(result: tuple[Tensor, float]) -> None:
            total.add_(result[0].detach().cpu().double())

        def work() -> list[Tensor]:
            self._evaluator.each(
                lambda batch: self._evaluator.loss(self._leaves, batch), add, grad=False
            )
            return [total]

        (found,) = self._over_data(work, [((), torch.float64)])
        return found.cpu() / self.num_terms

    @torch.inference_mode(False)
    def grouped_value(self, num_groups: int = 8) -> tuple[Tensor, Tensor]:
        """Return L by groups of the data: shares of the loss terms and of L, ``[G]`` each.

        Args:
            num_groups: Groups that the batches, or pieces of them, are dealt out to.
        """
        self._shared.forwards += 1
        return grouped_losses(self._evaluator, self._leaves, num_groups)

    def gradient(self) -> Tensor:
        """Return the gradient of L, shape ``[P]``."""
        return self.value_and_gradient()[1]

    @torch.inference_mode(False)
    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return the value and the gradient ``[P]`` from one pass over the data."""
        self._shared.gradients += 1
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        gradient = torch.zeros(self.space.dim, dtype=self.space.dtype, device=self.space.device)
        parts = list(self.space.unflatten(gradient).values())
        used = [False] * len(self._leaves)

        def one(batch: Any) -> tuple[Tensor, Sequence[Tensor | None]]:
            loss = self._evaluator.share(self._leaves, batch)
            return loss.detach(), products.gradients(loss, self._leaves)

        def add(result: tuple[Tensor, Sequence[Tensor | None]]) -> None:
            total.add_(result[0].cpu().double())
            for i, grad in enumerate(result[1]):
                if grad is not None:
                    parts[i].add_(grad)
                    used[i] = True

        def work() -> list[Tensor]:
            self._evaluator.each(one, add, grad=True, theta=self._leaves)
            self._usage.note(used)
            return [total, gradient, self._usage.noted()]

        shapes: list[Shape] = [
            ((), torch.float64),
            (gradient.shape, gradient.dtype),
            ((len(used) + 1,), torch.float64),
        ]
        value, gradient, noted = self._over_data(work, shapes)
        self._usage.report(noted)
        return value.cpu(), gradient

    @torch.inference_mode(False)
    def per_example_gradients(self) -> Tensor:
        """Return the gradient of each example, ``[num_examples, P]``; their mean is g.

        One backward pass an example, in any model: the cost of about ``num_examples``
        small gradients, and ``num_examples * P`` numbers of memory.

        Raises:
            ObjectiveError: If the loss is not a sum over examples.
        """
        rows: list[Tensor] = []
        self._shared.gradients += 1
        fisher.each_gradient_in_order(self._evaluator, self._leaves, self.space.dtype, rows.append)
        return torch.stack(rows)

    @torch.inference_mode(False)
    def fisher_diagonal(self) -> Tensor:
        """Return the mean square ``[P]`` of the examples' gradients.

        The diagonal of the empirical Fisher matrix, by one backward pass an example.

        Raises:
            ObjectiveError: If the loss is not a sum over examples.
        """
        total = torch.zeros(self.space.dim, dtype=torch.float64, device=self.space.device)

        def add(g: Tensor) -> None:
            total.add_(g.double().square())

        def work() -> list[Tensor]:
            fisher.each_gradient(self._evaluator, self._leaves, self.space.dtype, add)
            return [total]

        self._shared.gradients += 1
        (total,) = self._over_data(work, [((self.space.dim,), torch.float64)])
        return (total / self.num_examples).to(self.space.dtype)


def differentiable(tensors: dict[str, Tensor], *, copied: bool = True) -> dict[str, Tensor]:
    """Return copies to differentiate by, also when made inside ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.no_grad():
        return {
            n: (t.clone() if copied or t.is_inference() else t.detach()).requires_grad_()
            for n, t in tensors.items()
        }
