"""What all numbers of one matrix share: the start of a Lanczos run, and random probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.estimators import (
    Eigenpairs,
    Krylov,
    Locked,
    Probing,
    Quadrature,
    QuadratureRuns,
    Which,
    deflated_trace,
    frobenius_norm,
    lanczos,
    lock,
    random_signs,
)
from sharpkit.estimators.basis import column_dots
from sharpkit.estimators.deflation import Probes, trace_of
from sharpkit.estimators.protocol import block_size
from sharpkit.objective.groups import group_error
from sharpkit.operators import SymmetricOperator
from sharpkit.results import Estimate

__all__ = ["DataForms", "Function", "Spectral"]

T = TypeVar("T")
Function = Callable[[np.ndarray], np.ndarray]

HEAD_STEPS = 24  # of the run that outliers are taken from; more of them find bulk only
DATA_PROBES = 2  # they only have to show how much groups of the data differ
MOST_DATA_VECTORS = 8


class DataForms(Protocol):
    """What groups of the data contribute to bilinear forms, as an objective gives it."""

    def error(self, coefficients: Tensor) -> tuple[float, tuple[float, ...]] | None:
        """Return a standard error and pseudo-values of a combination."""
        ...


FormsOf = Callable[[Tensor, Sequence[Tensor]], Any]


class Spectral:
    """Eigenpairs, traces and functions of one matrix, each computed once.

    One Lanczos run serves all: its first 24 steps give the outliers, which are then known
    and out of the noise of every trace; the search for eigenpairs goes on from there. What
    a number is does not depend on which other numbers were asked for.

    Args:
        operator: The matrix.
        generator: Gives a fresh generator for a purpose.
        blocks: Parts of the diagonal (layers) to be summed on their own.
        max_basis: Most Krylov vectors to hold; None: no limit.
        forms: Gives the forms of groups of the data; None: no error from the data.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        generator: Callable[[str], torch.Generator],
        *,
        blocks: dict[str, list[slice]] | None = None,
        max_basis: int | None = None,
        forms: FormsOf | None = None,
    ):
        self.operator, self.blocks, self.max_basis = operator, blocks or {}, max_basis
        self._generator, self._forms = generator, forms
        self._krylov: Krylov | None = None
        self._memory: dict[tuple[Any, ...], Any] = {}

    def _once(self, key: tuple[Any, ...], compute: Callable[[], T]) -> T:
        if key not in self._memory:
            self._memory[key] = compute()
        value: T = self._memory[key]
        return value

    # -- the Lanczos run -------------------------------------------------------------

    @property
    def _head_steps(self) -> int:
        # With bounded memory, a third is for the outliers: they stay when the basis has gone.
        return HEAD_STEPS if self.max_basis is None else min(HEAD_STEPS, self.max_basis // 3)

    @property
    def _room(self) -> int | None:
        return None if self.max_basis is None else self.max_basis - self._head_steps

    def _run(self) -> Krylov:
        if self._krylov is None:
            self._krylov = Krylov(self.operator, self._generator("lanczos"), max_basis=self._room)
        return self._krylov

    def _head(self) -> tuple[Krylov, int]:
        krylov = self._run()
        most = self._head_steps
        while len(krylov.steps) < most and not (krylov.steps and krylov.steps[-1].exhausted):
            krylov.step()
        return krylov, min(len(krylov.steps), most)

    @property
    def locked(self) -> Locked:
        """The outliers that the first steps of the run have found."""
        return self._once(("locked",), lambda: lock(*self._head()))

    def ritz_extremes(self) -> tuple[float, float, float, bool]:
        """Return the extreme Ritz values of the first steps, and whether the largest stands.

        Returns:
            Smallest and largest value, the residual of the one of larger magnitude, and
            whether that is below 1% of it.
        """

        def compute() -> tuple[float, float, float, bool]:
            krylov, steps = self._head()
            values, _, residuals = krylov.ritz(steps)
            at = int(np.argmax(abs(values)))
            error = float(residuals[at]) + krylov.floor(steps)
            return (
                float(values[0]),
                float(values[-1]),
                error,
                error <= max(0.01 * abs(float(values[at])), 2 * krylov.floor(steps)),
            )

        return self._once(("extremes",), compute)

    def eigenpairs(
        self,
        *,
        k: int,
        which: Which,
        tol: float,
        max_matvecs: int,
        block_size: int = 1,
    ) -> Eigenpairs:
        """Return extreme eigenpairs; the same settings are computed once.

        Raises:
            SettingsError: If the basis is too small for so many pairs.
        """
        room = self._room
        count = k * (2 if which == "both" else 1)
        needed = min(count + 2 * block_size + 2, self.operator.dim)
        if room is not None and room < needed:
            raise SettingsError(
                f"Expected `max_basis` of at least {needed + self._head_steps} for {count}"
                f" eigenpairs. Got {self.max_basis}. Ask for fewer, or give more memory."
            )

        def compute() -> Eigenpairs:
            shared = block_size == 1
            if shared and room is not None:
                _ = self.locked  # before a restart overwrites the run's first vectors
                self.ritz_extremes()
            pairs = lanczos(
                self.operator,
                k=k,
                which=which,
                tol=tol,
                max_matvecs=max_matvecs,
                block_size=block_size,
                max_basis=room,
                generator=self._generator("lanczos") if not shared else self._generator("second"),
                krylov=self._run() if shared else None,
            )
            if shared and room is not None:
                self._krylov = None  # its outliers are kept; another search begins anew
            return pairs

        return self._once(("eigenpairs", k, which, tol, max_matvecs, block_size), compute)

    # -- probes ----------------------------------------------------------------------

    def _probing(self) -> Probing:
        return Probing(self.operator, self.locked, self._generator("probes"), self.blocks)

    def probes(self, num_probes: int) -> Probes:
        """Return products of the deflated matrix with random signs."""
        return self._once(("probes", num_probes), lambda: self._probing().until(num_probes))

    def trace(self, *, num_probes: int, target_error: float | None = None) -> Estimate:
        """Return the trace, with the data's error; see :func:`deflated_trace`."""
        if target_error is None:
            estimate = trace_of(self.probes(num_probes))
        else:
            estimate = deflated_trace(
                self._probing(), num_probes=num_probes, target_error=target_error
            )
        return self.with_data_error(estimate, lambda x: x)

    def frobenius_norm(self, *, num_probes: int) -> Estimate:
        """Return the Frobenius norm, with the data's error."""
        estimate = frobenius_norm(self.probes(num_probes))
        scale = 2 * estimate.value or 1.0
        return self.with_data_error(estimate, lambda x: x**2 / scale)

    def quadrature(self, *, num_probes: int, num_steps: int) -> Quadrature:
        """Return short Lanczos runs of the deflated matrix, the first steps of the longest."""

        def start() -> QuadratureRuns:
            return QuadratureRuns(
                self.operator,
                self.locked,
                num_probes=num_probes,
                generator=self._generator("probes"),
            )

        runs = self._once(("runs", num_probes), start)
        return self._once(("quadrature", num_probes, num_steps), lambda: runs.until(num_steps))

    def resolved(
        self,
        number: Callable[[Quadrature], Estimate],
        *,
        num_probes: int,
        num_steps: int,
        max_steps: int,
    ) -> tuple[Estimate, Quadrature]:
        """Return a number of the spectrum, with as many steps as it takes.

        The runs go on, by half or a third at a time, until the number has converged: what
        the steps leave open is no more than the probes' error. The steps of a number do not
        depend on those of others, which take what there is.

        Args:
            number: Makes the estimate of the runs.
            num_probes: Random vectors.
            num_steps: Lanczos steps of each to begin with.
            max_steps: Most steps of each, unless there are more to begin with.
        """
        steps = num_steps
        while True:
            quadrature = self.quadrature(num_probes=num_probes, num_steps=steps)
            estimate = number(quadrature)
            if estimate.converged or steps >= max_steps or quadrature.num_steps < steps:
                return estimate, quadrature
            steps = min(_next(num_steps, steps), max_steps)

    # -- the data's error ------------------------------------------------------------

    def with_data_error(
        self, estimate: Estimate, function: Function, further: Function | None = None
    ) -> Estimate:
        r"""Return the estimate with its error from the data being a sample.

        To first order a change dA of the matrix moves :math:`\operatorname{tr}\varphi(A)` by
        :math:`\operatorname{tr}\varphi'(A)\,dA`: exactly along the known eigenvectors, and
        with the quadratic that fits phi best over the rest of the spectrum, for the probes.

        Args:
            estimate: A number.
            function: The phi whose trace has the number's first-order changes.
            further: Maps known eigenvalues to further slopes along each of them.
        """
        parts = self._data_parts()
        if parts is None:
            return estimate
        blocks, values, nodes, weights = parts
        slopes = _slope(function, values)
        if further is not None:
            slopes = slopes + further(values)
        line, curve = _fit(function, nodes, weights)
        total, at = torch.zeros_like(blocks[0].weights), 0
        for forms in blocks:
            lefts, _, width = forms.forms.shape
            if lefts == 1:
                coefficients = slopes[None, at : at + width]
                at += width
            else:
                coefficients = np.tile([[line / width], [curve / width]], width)
            total += torch.einsum(
                "lgk,lk->g", forms.forms, torch.as_tensor(coefficients, device="cpu")
            )
        found = group_error(total, blocks[0].weights)
        if found is None:
            return estimate
        return replace(estimate, data_error=found[0], data_draws=_centred(found[1], estimate.value))

    def with_shape_data_error(
        self,
        estimate: Estimate,
        quadrature: Quadrature,
        function: Function,
        further: Function | None = None,
    ) -> Estimate:
        r"""Return the estimate with its error from the data, for functions with a kink at zero.

        As :meth:`with_data_error`, with :math:`\varphi'(A') z` from the Lanczos vectors of
        two of the probes; where these were not kept, there is no error from the data. The
        slope at a known eigenvalue is its mean within the eigenvalue's own error, as one
        that other data may put on the other side of the kink has none of its own.

        Args:
            estimate: A number.
            quadrature: What it was computed from.
            function: The phi whose trace has the number's first-order changes.
            further: Maps known eigenvalues to further slopes along each of them.
        """
        if self._forms is None or (not quadrature.bases and quadrature.dim > self.locked.size):
            return estimate
        key = ("shape data", len(quadrature.masses), quadrature.num_steps)
        probes = self._once(key, lambda: self._shape_parts(quadrature))
        order, known = self._known_forms(self.locked.size)
        if probes is None or None in known:
            return estimate
        errors = np.zeros(self.locked.size)
        errors[order] = np.concatenate([[], *(_errors(forms) for forms in known)])
        reach = math.sqrt(3) * errors  # a uniform spread so far has that variance
        slopes = _slope(function, self.locked.values, reach)
        if further is not None:
            slopes = slopes + further(self.locked.values)
        count, width = len(probes), block_size(self.operator)

        def bulk(x: np.ndarray) -> np.ndarray:
            # The node put at zero stands for what has no curvature: rounding has no slope.
            return np.where(abs(x) > quadrature.floor, _slope(function, x), 0.0)

        total: Tensor | None = None
        weights = None
        for forms, coefficients in [
            *((f, slopes[None, order[i * width : (i + 1) * width]]) for i, f in enumerate(known)),
            *((f, quadrature.slopes(bulk, i)[:, None] / count) for i, f in enumerate(probes)),
        ]:
            part = torch.einsum(
                "lgk,lk->g", forms.forms, torch.as_tensor(coefficients, device="cpu")
            )
            total, weights = part if total is None else total + part, forms.weights
        if total is None or weights is None:
            return estimate
        error = group_error(total, weights)
        if error is None:
            return estimate
        return replace(estimate, data_error=error[0], data_draws=_centred(error[1], estimate.value))

    def _shape_parts(self, quadrature: Quadrature) -> Any:
        # Forms (v_j, z) of each probe and its Lanczos vectors.
        assert self._forms is not None
        probes = []
        for i, basis in enumerate(quadrature.bases):
            z = basis[:1].T * math.sqrt(quadrature.masses[i])
            probes.append(self._forms(z, [v[:, None] for v in basis]))
        return None if None in probes else probes

    def _known_forms(self, most: int) -> tuple[np.ndarray, list[Any]]:
        # The order of the known vectors by magnitude, and the forms (q, q) of the first.
        order = np.argsort(-abs(self.locked.values))[:most]
        width = block_size(self.operator)
        parts = [order[start : start + width] for start in range(0, len(order), width)]
        return order, [self._form(part) for part in parts]

    def _form(self, indices: np.ndarray) -> Any:
        def compute() -> Any:
            assert self._forms is not None
            Q = self.locked.vectors
            columns = Q[:, torch.as_tensor(indices.copy(), device=Q.device)]
            return self._forms(columns, [columns])

        return self._once(("known forms", *indices.tolist()), compute)

    def eigenvalue_data_error(self, estimate: Estimate, vector: Tensor) -> Estimate:
        """Return an eigenvalue with its error from the data: ``v . (A_g v)`` group by group."""
        if self._forms is None:
            return estimate
        V = vector[:, None]
        forms = self._forms(V, [V])
        found = None if forms is None else forms.error(torch.ones(1, 1, device="cpu"))
        if found is None:
            return estimate
        return replace(estimate, data_error=found[0], data_draws=_centred(found[1], estimate.value))

    def with_plain_data_error(self, estimate: Estimate) -> Estimate:
        """Return a trace with its error from the data, by a few probes and no known vectors.

        The probes' own noise counts in: it is on the safe side.
        """
        if self._forms is None:
            return estimate

        def compute() -> Any:
            Z = random_signs(self.operator, DATA_PROBES, self._generator("probes"))
            assert self._forms is not None
            return self._forms(Z, [Z])

        forms = self._once(("plain data",), compute)
        found = (
            None
            if forms is None
            else forms.error(torch.full((1, DATA_PROBES), 1 / DATA_PROBES, device="cpu"))
        )
        if found is None:
            return estimate
        return replace(estimate, data_error=found[0], data_draws=_centred(found[1], estimate.value))

    def _data_parts(self) -> tuple[list[Any], np.ndarray, np.ndarray, np.ndarray] | None:
        return self._once(("data",), self._compute_data_parts)

    def _compute_data_parts(
        self,
    ) -> tuple[list[Any], np.ndarray, np.ndarray, np.ndarray] | None:
        # Forms of the largest known eigenvectors (v, v), and of probes: (z, z) and (A'z, z).
        if self._forms is None:
            return None
        locked = self.locked
        everything = self.operator.dim <= locked.size
        most = locked.size if everything else MOST_DATA_VECTORS
        order, blocks = self._known_forms(most)
        Z = random_signs(self.operator, DATA_PROBES, self._generator("probes"))
        Z = Z[:, :0] if everything else Z
        Q = locked.vectors[:, torch.as_tensor(order.copy(), device=locked.vectors.device)]
        Z = Z - Q @ (Q.T @ Z)  # the probes stand for all but the largest, known or not
        Y = self.operator @ Z if Z.shape[1] else Z
        Y = Y - Q @ (Q.T @ Y)
        if Z.shape[1]:
            blocks.append(self._forms(Z, [Z, Y]))
        if None in blocks:
            return None
        masses, firsts, seconds = (column_dots(a, b).tolist() for a, b in ((Z, Z), (Z, Y), (Y, Y)))
        nodes, weights = [], []
        for mass, first, second in zip(masses, firsts, seconds, strict=True):
            # Two-point rules from first and second moments: where the rest of the spectrum lies.
            mean = first / mass
            spread = math.sqrt(max(second / mass - mean**2, 0.0))
            nodes += [mean - spread, mean, mean + spread]
            weights += [mass / 4, mass / 2, mass / 4]
        return blocks, locked.values[order], np.array(nodes), np.array(weights)


def _next(first: int, steps: int) -> int:
    # The next of first times 1, 3/2, 2, 3, 4, 6, 8, ...: half of most was there before.
    doubled = first
    while 2 * doubled <= steps:
        doubled *= 2
    between = doubled + (doubled + 1) // 2
    return between if steps < between < 2 * doubled else 2 * doubled


def _centred(draws: tuple[float, ...], value: float) -> tuple[float, ...]:
    # Linear parts of a number do not sum to it: shift them so that their mean is the number.
    mean = sum(draws) / len(draws)
    return tuple(d - mean + value for d in draws)


def _errors(forms: Any) -> np.ndarray:
    # The data's error of each eigenvalue whose vector is a column.
    found = [group_error(forms.forms[0, :, k], forms.weights) for k in range(forms.forms.shape[2])]
    return np.array([0.0 if error is None else error[0] for error in found])


def _slope(function: Function, x: np.ndarray, reach: np.ndarray | None = None) -> np.ndarray:
    # With a reach, the mean slope so far to both sides: that of a kink within it.
    if not len(x):
        return x
    step = 1e-4 * np.maximum(abs(x), 1e-30)
    step = step if reach is None else np.maximum(step, reach)
    slope: np.ndarray = (function(x + step) - function(x - step)) / (2 * step)
    return slope


def _fit(function: Function, x: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    # Constant and linear coefficient of the slope's least-squares line. Where all of the
    # spectrum is at one place, the line is right there.
    if not len(x):
        return 0.0, 0.0
    scale = float(abs(x).max()) or 1.0
    root = np.sqrt(weights / weights.sum())
    columns = np.stack([np.ones_like(x), x / scale], axis=1) * root[:, None]
    solution = np.linalg.lstsq(columns, _slope(function, x) * root, rcond=1e-10)[0]
    return float(solution[0]), float(solution[1]) / scale
