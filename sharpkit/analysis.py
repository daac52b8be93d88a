"""What measures of one objective share, each computed once."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpkit.errors import MeasureError, SettingsError, ShapeError, SharpkitWarning
from sharpkit.estimators import (
    BlockTraces,
    Diagonal,
    Eigenpairs,
    SketchedDiagonal,
    Which,
    block_traces,
    exact_diagonal,
    hutchinson_diagonal,
    xdiag,
)
from sharpkit.geometry.layouts import Factorization, find_pairs
from sharpkit.objective import Objective
from sharpkit.objective.groups import GroupForms
from sharpkit.operators import OptimizerState, SymmetricOperator, congruent, ggn, hessian
from sharpkit.parameters import group_slices
from sharpkit.spectral import Spectral

__all__ = ["Analysis", "DiagonalMethod"]

T = TypeVar("T")
Matrix: TypeAlias = Literal["hessian", "ggn"]
DiagonalMethod: TypeAlias = Literal["auto", "exact", "hutchinson", "xdiag", "ggn"]

FEWEST_BASIS = 8
FEWEST_GROUPS = 4
MOST_STEPS = 400  # a basis of more was never needed
BASIS_SHARE = 4  # of the free memory, a quarter
ROUNDING = 8  # a loss is a chain of sums: a few eps of its size are lost
PRODUCT = 30  # products lose a few eps of their size
NOISE = 6.0  # one random change of the last digits may be smaller than the rounding itself
DISTANCES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
DISTANCE_FUNCTIONS = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
SATURATED = 100  # a cross-entropy below so many eps is a difference of rounded numbers


class Analysis:
    """The gradient, the Hessian and what was already computed of them.

    Args:
        objective: What is measured.
        seed: Seed of every random draw. Each purpose has its own stream, so a number does
            not depend on which other measures were asked for.
        max_basis: Most Krylov vectors to hold, each as large as theta; None: what a quarter
            of the free memory holds.
        num_groups: Groups of the data by whose differences the error from the data being a
            sample is estimated; 0: do not.
        initial: The parameters before training: a module, a state dict, or theta ``[P]``.
        optimizer: The optimizer that trained the model, or its state dict.
        withheld: Of ``"initial"`` and ``"optimizer"``, which exist but are not to be used, and
            the sentences that say why.

    Raises:
        SettingsError: If ``max_basis`` is less than 8 or more than P, or ``num_groups`` is
            between 1 and 3.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        seed: int = 0,
        max_basis: int | None = None,
        num_groups: int = 8,
        initial: nn.Module | Mapping[str, Tensor] | Tensor | None = None,
        optimizer: object = None,
        withheld: Mapping[str, str] | None = None,
    ):
        dim = objective.space.dim
        if max_basis is not None and not min(FEWEST_BASIS, dim) <= max_basis <= dim:
            raise SettingsError(
                f"Expected `max_basis` between {min(FEWEST_BASIS, dim)} and the number of"
                f" parameters, {dim}. Got {max_basis}."
            )
        if num_groups and num_groups < FEWEST_GROUPS:
            raise SettingsError(
                f"Expected `num_groups` of at least {FEWEST_GROUPS}, or 0 for no error from the"
                f" data. Got {num_groups}."
            )
        self.objective, self.seed, self.num_groups = objective, seed, num_groups
        self._max_basis = max_basis
        self._initial = None if initial is None else _initial(objective, initial)
        self._optimizer = None
        if optimizer is not None:
            self._optimizer = OptimizerState.of(optimizer, objective.model)
        self._withheld = dict(withheld or {})
        self._memory: dict[tuple[Any, ...], Any] = {}

    def _once(self, key: tuple[Any, ...], compute: Callable[[], T]) -> T:
        if key not in self._memory:
            self._memory[key] = compute()
        value: T = self._memory[key]
        return value

    def generator(self, purpose: str) -> torch.Generator:
        """Return a fresh generator for a purpose, on the objective's device."""
        mixed = (self.seed * 0x9E3779B1 + zlib.crc32(purpose.encode())) % 2**63
        return torch.Generator(self.objective.space.device).manual_seed(mixed)

    @property
    def value(self) -> float:
        """L(theta)."""
        return self._value_and_gradient()[0]

    @property
    def gradient(self) -> Tensor:
        """The gradient, ``[P]``."""
        return self._value_and_gradient()[1]

    def _value_and_gradient(self) -> tuple[float, Tensor]:
        def compute() -> tuple[float, Tensor]:
            value, gradient = self.objective.value_and_gradient()
            if not bool(torch.isfinite(gradient).all()):
                raise MeasureError(
                    "Expected a finite gradient. Got NaN or inf. Look for sqrt(0) or norms"
                    " of zero in the model and the loss."
                )
            return float(value), gradient

        return self._once(("value_and_gradient",), compute)

    def meets(self, need: str) -> bool:
        """Return whether what a measure needs is there.

        Args:
            need: ``"initial"``, ``"optimizer"``; ``"labels"``: a criterion of class labels;
                ``"examples"``: a loss that is a sum over four examples or more; ``"layers"``:
                linear maps; ``"factors"``: pairs of factors, such as those of attention heads;
                ``"paths"``: a network of homogeneous layers.
        """
        objective = self.objective
        found: dict[str, Callable[[], bool]] = {
            "initial": lambda: self._initial is not None,
            "optimizer": lambda: self._optimizer is not None,
            "labels": lambda: objective.has_labels,
            "examples": lambda: objective.adds_up and objective.num_examples >= FEWEST_GROUPS,
            "layers": lambda: _defined(lambda: objective.linear_layers() or True),
            "factors": lambda: _defined(lambda: self.factorization.pairs),
            "paths": lambda: _defined(lambda: objective.path_sum() or True),
        }
        return self._once(("meets", need), found[need])

    @property
    def initial(self) -> Tensor:
        """The parameters before training, ``[P]``.

        Raises:
            MeasureError: If they were not given.
        """
        if self._initial is None:
            self._refuse("initial")
            raise MeasureError(
                "Expected the parameters before training. None were given. Pass initial=... (a"
                " module, a state dict or theta) to sharpkit.score, or define"
                " initial(checkpoint) in the recipe."
            )
        return self._initial

    @property
    def optimizer(self) -> OptimizerState:
        """What the optimizer knows: ``setting("lr")``, ``adam_diagonal(space)``.

        Raises:
            MeasureError: If it was not given.
        """
        if self._optimizer is None:
            self._refuse("optimizer")
            raise MeasureError(
                "Expected the optimizer that trained the model. None was given. Pass"
                " optimizer=... (the optimizer or its state_dict()) to sharpkit.score, or define"
                " optimizer(checkpoint) in the recipe."
            )
        return self._optimizer

    def _refuse(self, need: str) -> None:
        if need in self._withheld:
            raise MeasureError(self._withheld[need])

    @property
    def hessian(self) -> SymmetricOperator:
        """The Hessian as an operator."""
        return self._once(("hessian",), lambda: hessian(self.objective))

    def spectral(self, matrix: Matrix = "hessian") -> Spectral:
        """Return what the numbers of the Hessian's or the GGN's spectrum share."""
        operator = self.hessian if matrix == "hessian" else ggn(self.objective)

        def forms(V: Tensor, lefts: Sequence[Tensor]) -> GroupForms | None:
            return self.objective.grouped_forms(V, lefts, matrix=matrix, num_groups=self.num_groups)

        return self._once(
            ("spectral", matrix),
            lambda: Spectral(
                operator,
                self.generator,
                blocks=group_slices(self.objective.space),
                max_basis=self._basis_that_fits(),
                forms=forms if self.num_groups else None,
            ),
        )

    def congruent(self, purpose: str, root: Callable[[Tensor], Tensor]) -> Spectral:
        """Return what the numbers of ``T H T`` share, for a symmetric map T of vectors.

        Args:
            purpose: Names the map: one name, one map. Its random draws depend on the name.
            root: Maps ``V [P, K]`` to ``T V``.
        """

        def forms(V: Tensor, lefts: Sequence[Tensor]) -> GroupForms | None:
            return self.objective.grouped_forms(
                root(V), [root(U) for U in lefts], matrix="hessian", num_groups=self.num_groups
            )

        return self._once(
            ("congruent", purpose),
            lambda: Spectral(
                congruent(self.hessian, root),
                lambda draws: self.generator(f"{purpose}: {draws}"),
                max_basis=self._basis_that_fits(),
                forms=forms if self.num_groups else None,
            ),
        )

    def row_traces(self, *, num_probes: int) -> BlockTraces:
        """Return the traces of the Hessian's blocks of each row of each parameter.

        A row is what belongs to one index of the first axis; a vector is one row. All come
        from one set of probes of the whole Hessian, whose outliers count exactly.
        """

        def compute() -> BlockTraces:
            space = self.objective.space
            rows = [shape[0] if len(shape) > 1 else 1 for shape in space.shapes]
            return block_traces(
                self.hessian,
                self.spectral().locked,
                list(zip(space.sizes, rows, strict=True)),
                num_probes=num_probes,
                generator=self.generator("row_traces"),
            )

        return self._once(("row_traces", num_probes), compute)

    def _basis_that_fits(self) -> int | None:
        space = self.objective.space
        if self._max_basis is not None:
            return self._max_basis if self._max_basis < space.dim else None
        room = self.objective.free_memory * self.objective.team.size  # each rank has its rows
        rows = room // (BASIS_SHARE * space.dim * space.dtype.itemsize)
        return None if rows >= min(space.dim, MOST_STEPS) else max(rows, FEWEST_BASIS)

    def eigenpairs(
        self, *, k: int, which: Which, tol: float, max_matvecs: int, block_size: int = 1
    ) -> Eigenpairs:
        """Return extreme eigenpairs of the Hessian; the same settings are computed once."""
        return self.spectral().eigenpairs(
            k=k, which=which, tol=tol, max_matvecs=max_matvecs, block_size=block_size
        )

    def layers(self) -> dict[str, Analysis]:
        """Return an analysis of each layer's weights alone, the rest held fixed.

        Layers are tensors of two or more axes; where there is none, all tensors.
        """

        def compute() -> dict[str, Analysis]:
            space = self.objective.space
            names = [n for n, s in zip(space.names, space.shapes, strict=True) if len(s) >= 2]
            names = names or list(space.names)
            blocks = {
                name: self.objective.restrict(lambda n, name=name: n == name)  # type: ignore[misc]
                for name in names
            }
            most, initial = self._max_basis, None
            if self._initial is not None:
                initial = space.unflatten(self._initial)
            return {
                name: Analysis(
                    block,
                    seed=self.seed,
                    max_basis=None if most is None else min(most, block.space.dim),
                    num_groups=self.num_groups,
                    initial=initial,
                    optimizer=self._optimizer,
                    withheld=self._withheld,
                )
                for name, block in blocks.items()
            }

        return self._once(("layers",), compute)

    def diagonal(self, *, method: DiagonalMethod, num_probes: int) -> Diagonal:
        """Return the Hessian's diagonal, or with ``"ggn"`` that of the GGN.

        Args:
            method: ``"exact"`` (P products), ``"hutchinson"``, ``"xdiag"`` (far smaller errors
                where eigenvalues decay; keeps twice as many vectors as products), ``"ggn"``
                (the GGN's, exactly), or ``"auto"``: exact if that takes no more than
                ``num_probes`` products, else Hutchinson's. So is ``"xdiag"`` exact then.
            num_probes: Budget of products of the estimates.

        Raises:
            MeasureError: If the vectors of ``"xdiag"`` do not fit in a quarter of the memory.
        """
        if method == "ggn":
            return self._once(("diagonal", "ggn"), self._ggn_diagonal)
        few = self.objective.space.dim <= num_probes
        if method == "exact" or (few and method in ("auto", "xdiag")):
            return self._once(("diagonal",), lambda: exact_diagonal(self.hessian))
        if method == "xdiag":
            return self._once(("diagonal", "xdiag", num_probes), lambda: self._xdiag(num_probes))
        return self._once(
            ("diagonal", num_probes),
            lambda: hutchinson_diagonal(
                self.hessian, num_probes=num_probes, generator=self.generator("diagonal")
            ),
        )

    def _ggn_diagonal(self) -> Diagonal:
        before = self.objective.cost.gradients
        values = self.objective.ggn_diagonal()
        spent = self.objective.cost.gradients - before
        return Diagonal(values, torch.zeros_like(values), 0, num_gradients=spent)

    def _xdiag(self, num_probes: int) -> SketchedDiagonal:
        space, count = self.objective.space, num_probes - num_probes % 2
        needed = 2 * count * space.dim * space.dtype.itemsize
        room = self.objective.free_memory // BASIS_SHARE
        if needed > room:
            raise MeasureError(
                f"Expected memory for the {2 * count} vectors of P that method='xdiag' keeps:"
                f" {needed / 1e9:.3g} GB, at most a quarter of what is free. That is"
                f" {room / 1e9:.3g} GB. Give fewer `num_probes`, or take method='hutchinson'."
            )
        return xdiag(self.hessian, num_matvecs=count, generator=self.generator("diagonal"))

    def by_layer(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the entries of a vector ``[P]`` that belong to each layer."""
        where = group_slices(self.objective.space)
        return {n: torch.cat([vector[part] for part in parts]) for n, parts in where.items()}

    def loss_at(self, delta: Tensor) -> float:
        """Return ``L(theta + delta)``; it may be inf or NaN."""
        return float(self._near(delta).value())

    def loss_and_gradient_at(self, delta: Tensor) -> tuple[float, Tensor]:
        """Return the value and the gradient ``[P]`` at ``theta + delta``."""
        value, gradient = self._near(delta).value_and_gradient()
        return float(value), gradient

    def _near(self, delta: Tensor) -> Objective:
        # At theta + delta, for use at once: the memory is that of the last such call.
        place = self._once(("place",), lambda: torch.empty_like(self.theta))
        with torch.no_grad():
            torch.add(self.theta, delta, out=place)
        return self.objective.at(place, copy_theta=False)

    @property
    def error_rate(self) -> float:
        """The share of class labels that the network misses.

        Raises:
            MeasureError: If there are no class labels.
        """
        return self._once(("error_rate",), self.objective.error_rate)

    def error_rate_at(self, delta: Tensor) -> float:
        """Return the share of class labels missed at ``theta + delta``."""
        return self.objective.at(self.theta + delta).error_rate()

    def shared(self, key: tuple[Any, ...], compute: Callable[[], T]) -> T:
        """Return what measures share under a key, computed by the first that asks."""
        return self._once(("shared", *key), compute)

    def moved(self, theta: Tensor) -> Analysis:
        """Return the analysis of the same objective at other parameters ``[P]``.

        Seed and groups are the same; nothing measured is carried over.
        """
        return Analysis(
            self.objective.at(theta),
            seed=self.seed,
            max_basis=self._max_basis,
            num_groups=self.num_groups,
        )

    @property
    def factorization(self) -> Factorization:
        """The factors of products in the network, such as those of attention heads.

        Each guess is tested on the network: a few forward passes in float64.
        """
        return self._once(("factorization",), lambda: find_pairs(self.objective))

    @property
    def theta(self) -> Tensor:
        """The parameters, ``[P]``."""
        return self._once(("theta",), lambda: self.objective.theta)

    @property
    def last_digits(self) -> Tensor:
        """One unit of rounding of each parameter, up or down at random, ``[P]``."""
        eps = torch.finfo(self.objective.model_dtype).eps
        signs = torch.randint(
            2, self.theta.shape, generator=self.generator("noise"), device=self.theta.device
        )
        return self.theta * (eps * (2 * signs - 1)).to(self.theta)

    @property
    def noise(self) -> tuple[float, float]:
        """The rounding level of the loss and of the gradient (its norm), at theta.

        What a sum loses by cancellation cannot be read off the sum. The weights are moved
        by one unit of rounding at random, which changes the outputs about as much as the
        rounding of the forward pass does, and the change is taken: one gradient more.
        """

        def compute() -> tuple[float, float]:
            eps = torch.finfo(self.objective.model_dtype).eps
            value, gradient = self.loss_and_gradient_at(self.last_digits)
            g = self.gradient.double()
            change = float((gradient.double() - g).norm())
            steps = float((g * self.theta.double()).norm())
            loss = max(2 * eps * abs(self.value), abs(value - self.value), eps * steps)
            slope = max(change, eps * float(g.norm()))
            floor = eps if self._logarithmic else 0.0
            return max(NOISE * loss, floor / 4), max(NOISE * slope, 2 * floor)

        return self._once(("noise",), compute)

    @property
    def product_error(self) -> float:
        """How wrong Hessian-vector products are, relative: rounding, or what differences lose.

        To be read after the products, which find out how they can be computed.
        """
        eps = torch.finfo(self.objective.model_dtype).eps
        error = max(PRODUCT * eps, float(self.objective.hvp_error))
        if self._logarithmic:
            error = max(error, min(eps / abs(self.value), 1.0) if self.value else 1.0)
        return error

    @property
    def _logarithmic(self) -> bool:
        # Whether the loss may be a logarithm of probabilities near 1. These are rounded to
        # eps, and so are their logarithms and slopes, however small the loss is.
        criterion = self.objective.criterion
        return abs(self.value) < 1 and not (
            isinstance(criterion, DISTANCES) or criterion in DISTANCE_FUNCTIONS
        )

    @property
    def saturated(self) -> bool:
        """Whether the loss is a logarithm that its dtype can hardly tell from zero."""
        eps = torch.finfo(self.objective.model_dtype).eps
        return self._logarithmic and abs(self.value) < SATURATED * eps

    def saturation_note(self) -> tuple[str, ...]:
        """Return the sentence for a number of a saturated loss; empty if it is not."""
        if not self.saturated:
            return ()
        dtype = str(self.objective.model_dtype).removeprefix("torch.")
        return (
            f"The loss, {self.value:.1e}, is at the rounding level of {dtype}, and what depends"
            " on it may be rounding only. Measure with dtype=torch.float64.",
        )

    def rounding(self, *losses: float) -> float:
        """Return the rounding level of a difference of these losses in the model's dtype."""
        noise, here = self.noise[0], abs(self.value)
        # A loss near zero is a square or a logarithm of what was rounded: its rounding
        # grows like its root, one far from zero like itself.
        return sum(
            noise * max(1.0, math.sqrt(abs(loss) / here) if here > 0 else 1.0)
            + ROUNDING * torch.finfo(self.objective.model_dtype).eps * abs(loss)
            for loss in losses
        )


def _defined(compute: Callable[[], object]) -> bool:
    try:
        return bool(compute())
    except MeasureError:
        return False
    except Exception as error:  # a model that cannot be watched: other measures need not care
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(
            f"What some measures need was not looked for, and they are left out: {reason}",
            SharpkitWarning,
            stacklevel=2,
        )
        return False


def _initial(objective: Objective, initial: nn.Module | Mapping[str, Tensor] | Tensor) -> Tensor:
    space = objective.space
    if isinstance(initial, Tensor):
        if initial.shape != (space.dim,):
            raise SettingsError(
                f"Expected `initial` of shape ({space.dim},). Got {tuple(initial.shape)}."
            )
        return initial.detach().to(space.device, space.dtype)
    state = initial.state_dict() if isinstance(initial, nn.Module) else initial
    if not isinstance(state, Mapping):
        raise SettingsError(
            "Expected `initial` to be a module, a state dict or theta [P]. Got"
            f" {type(initial).__name__}."
        )
    missing = [n for n in space.names if n not in state]
    if missing:
        raise SettingsError(
            f"Expected `initial` to hold every parameter. It lacks {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more." if len(missing) > 5 else ".")
        )
    try:
        return space.flatten({n: state[n].detach() for n in space.names})
    except ShapeError as error:
        raise SettingsError(f"`initial` does not fit the model. {error}") from error
