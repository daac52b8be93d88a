r"""Two Riemannian metrics on factors that GL(h) leaves alone, at one base point.

Every formula is evaluated in the balanced gauge of the point and taken back. That is no
approximation, because all of them are equivariant, and the element in between is a constant;
it keeps the condition number of the gauge, which enters Gram matrices squared, out of the
rounding, and makes the Sylvester equation of the projection element-wise.

Source: da Silva, Dangel, Oore, "Hide & Seek: Transformer Symmetries Obscure Sharpness &
Riemannian Geometry Finds It", ICML 2025 (arXiv:2505.05409). Two of its printed equations are
not used: its Sylvester equation for the inverse Gram metric, whose solution is not
horizontal, and the transpose in that metric's condition of horizontality.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from sharpkit.errors import SettingsError
from sharpkit.geometry.quotient.balance import balance
from sharpkit.geometry.quotient.geodesics import exact_crossed, exact_inverse
from sharpkit.geometry.quotient.pair import Pair, check_vector
from sharpkit.geometry.quotient.sylvester import solve_sylvester

__all__ = [
    "CrossGramMetric",
    "InverseGramMetric",
    "MetricName",
    "Order",
    "QuotientMetric",
    "metric_at",
]

MetricName: TypeAlias = Literal["inv", "mix"]
Order: TypeAlias = Literal[1, 2, "exact"]


class QuotientMetric(ABC):
    r"""An invariant metric at a point; vectors and gradients are pairs of the point's shapes.

    Batched over all leading axes; a vector may have more of them in front. Everything is
    differentiable, to any order and forwards too, with respect to the vectors and, through
    the pair given here, to the point. ``torch.vmap`` is for vectors, not for points.

    Args:
        pair: The base point, factors of full column rank (:meth:`Balanced.damped
            <sharpkit.geometry.quotient.Balanced.damped>` otherwise).

    Cost: :func:`balance` and two inverses once, ``O((n + m) h^2 + h^3)`` a head; then a few
    products of ``[n, h]`` with ``[h, h]`` a call.

    Raises:
        ShapeError: If the shapes do not match.
        MeasureError: If the pair has a deficient factor, or numbers that are no point.
    """

    name: ClassVar[MetricName]

    def __init__(self, pair: Pair):
        self.pair = pair
        found = balance(*pair.detach())
        self._element, self._inverse = found.element, found.inverse
        self._diagonal = found.sigma.square()
        self._at = found.move(pair)
        G, H = self._at
        self._MG, self._MH = G.mT @ G, H.mT @ H
        self._IG, self._IH = torch.linalg.inv(self._MG), torch.linalg.inv(self._MH)

    # Formulas at the balanced point.

    @property
    @abstractmethod
    def _weights(self) -> tuple[Tensor, Tensor]:
        """The matrices that weigh the columns of a vector in the inner product."""

    @property
    @abstractmethod
    def _inverse_weights(self) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _multiplier(self, xi: Pair) -> Tensor: ...

    @abstractmethod
    def _christoffel(self, xi: Pair) -> Pair: ...

    @abstractmethod
    def _exact(self, xi: Pair, tolerance: float | None) -> tuple[Pair, Pair]: ...

    def _in(self, vector: Pair) -> Pair:
        check_vector(self.pair, vector)
        return vector.act(self._element, self._inverse)

    def _out(self, vector: Pair) -> Pair:
        return vector.act(self._inverse, self._element)

    # What a user asks for.

    def inner(self, xi: Pair, zeta: Pair) -> Tensor:
        """Return the inner product ``[...]`` of two tangent vectors."""
        xi, zeta = self._in(xi), self._in(zeta)
        left, right = self._weights
        return Pair(xi.G @ left, xi.H @ right).dot(zeta)

    def norm(self, xi: Pair) -> Tensor:
        """Return the length ``[...]`` of a tangent vector; its derivative at 0 is taken as 0."""
        white = self.whiten(xi)
        parts = torch.cat([white.G.flatten(-2), white.H.flatten(-2)], dim=-1)
        length: Tensor = torch.linalg.vector_norm(parts, dim=-1)
        return length

    def whiten(self, xi: Pair) -> Pair:
        r"""Return coordinates in which the metric is the Euclidean one.

        With the weight :math:`W = CC^\top` (Cholesky), :math:`\zeta = \xi C`. They belong to
        the balanced gauge: equivalent points have equal ones, up to a rotation.
        """
        parts = zip(self._in(xi), self._weights, strict=True)
        return Pair(*(part @ torch.linalg.cholesky(weight) for part, weight in parts))

    def unwhiten(self, zeta: Pair) -> Pair:
        r"""Return the tangent vector with these white coordinates, :math:`\zeta C^{-1}`.

        Standard normal coordinates give a standard normal tangent vector; its
        :meth:`project` is standard normal on the ``(n + m) h - h^2`` horizontal dimensions.
        """
        check_vector(self.pair, zeta)
        parts = zip(zeta, self._weights, strict=True)
        return self._out(
            Pair(
                *(
                    torch.linalg.solve_triangular(
                        torch.linalg.cholesky(weight), part, upper=False, left=False
                    )
                    for part, weight in parts
                )
            )
        )

    def gradient(self, euclidean: Pair) -> Pair:
        r"""Return the Riemannian gradient: :math:`\langle\mathrm{grad}, \xi\rangle = \sum e\,\xi`.

        That of an invariant function at its own point is horizontal; that of a function of
        the velocity of a geodesic is not, and wants :meth:`project`.

        Args:
            euclidean: e, the gradient as autograd gives it.
        """
        check_vector(self.pair, euclidean)
        e = euclidean.act_dual(self._element, self._inverse)
        left, right = self._inverse_weights
        return self._out(Pair(e.G @ left, e.H @ right))

    def vertical(self, generator: Tensor) -> Pair:
        r"""Return :math:`(G\Lambda, -H\Lambda^\top)`, which is tangent to the orbit.

        Args:
            generator: :math:`\Lambda`, ``[..., h, h]``.
        """
        return Pair(self.pair.G @ generator, -self.pair.H @ generator.mT)

    def multiplier(self, xi: Pair) -> Tensor:
        r"""Return the :math:`\Lambda` ``[..., h, h]`` whose vertical vector makes xi horizontal."""
        return self._inverse @ self._multiplier(self._in(xi)) @ self._element

    def project(self, xi: Pair) -> Pair:
        r"""Return the horizontal part :math:`(\xi_G + G\Lambda, \xi_H - H\Lambda^\top)`.

        It changes the product :math:`GH^\top` to first order exactly as xi does, and is the
        shortest vector that does.
        """
        inside = self._in(xi)
        generator = self._multiplier(inside)
        G, H = self._at
        return self._out(inside.plus(Pair(G @ generator, -H @ generator.mT)))

    def christoffel(self, xi: Pair) -> Pair:
        r"""Return :math:`\Gamma(\xi, \xi)`, minus the acceleration of a geodesic."""
        return self._out(self._christoffel(self._in(xi)))

    def geodesic(
        self,
        xi: Pair,
        t: float | Tensor = 1.0,
        *,
        order: Order = 2,
        tolerance: float | None = None,
    ) -> Pair:
        r"""Return the point at time t of the geodesic that starts here with velocity xi.

        Args:
            xi: The velocity at time 0. If horizontal, it stays so.
            t: The time, a number or one a head, ``[...]``; any sign.
            order: 1: the straight line :math:`x + t\xi`; 2: :math:`x + t\xi -
                \tfrac12t^2\Gamma(\xi, \xi)`, the curve of the paper, wrong by
                :math:`O(t^3)`; ``"exact"``: see the two metrics.
            tolerance: Of the integration, for ``order="exact"`` where there is no closed form.

        Raises:
            SettingsError: If the order is unknown or the tolerance not positive.
            MeasureError: If the geodesic ends before t.
        """
        return self.flow(xi, t, order=order, tolerance=tolerance)[0]

    def flow(
        self,
        xi: Pair,
        t: float | Tensor = 1.0,
        *,
        order: Order = 2,
        tolerance: float | None = None,
    ) -> tuple[Pair, Pair]:
        """Return point and velocity of the geodesic at time t; arguments of :meth:`geodesic`."""
        if order not in (1, 2, "exact"):
            raise SettingsError(f"Expected `order` to be 1, 2 or 'exact'. Got {order!r}.")
        if tolerance is not None and not 0 < tolerance < 1:
            raise SettingsError(f"Expected `tolerance` between 0 and 1. Got {tolerance!r}.")
        if order == 1:
            check_vector(self.pair, xi)
            return self.pair.plus(xi, t), xi
        inside = self._in(xi)
        if order == 2:
            bend = self._christoffel(inside)
            line = self._at.plus(inside, t)
            return self._out(line.plus(bend, -0.5 * t * t)), self._out(inside.plus(bend, -t))
        # A geodesic at time t is that of t times the velocity at time 1.
        end, velocity = self._exact(inside.times(t), tolerance)
        steps = torch.as_tensor(t, dtype=inside.G.dtype, device=inside.G.device)[..., None, None]
        parts = zip(inside, velocity, strict=True)
        velocity = Pair(
            *(torch.where(steps == 0, v, w / torch.where(steps == 0, 1, steps)) for v, w in parts)
        )
        return self._out(end), self._out(velocity)


class InverseGramMetric(QuotientMetric):
    r"""``"inv"``: perturbations relative to the factors, unmoved also by :math:`G \to cG`.

    .. math::
        \langle\eta, \zeta\rangle = \mathrm{Tr}\bigl(M_G^{-1}\eta_G^\top\zeta_G
            + M_H^{-1}\eta_H^\top\zeta_H\bigr),\qquad M_G = G^\top G,\ M_H = H^\top H

    Horizontal are the vectors with :math:`\xi_G^\top GM_H = M_GH^\top\xi_H`. The projection
    solves :math:`(M_GM_H)\Lambda^\top + \Lambda^\top(M_GM_H) = M_GH^\top\xi_H - \xi_G^\top GM_H`.
    The gradient is :math:`(e_GM_G, e_HM_H)`, and

    .. math::
        \Gamma_G = -\xi_GM_G^{-1}(\xi_G^\top G + G^\top\xi_G) + GM_G^{-1}\xi_G^\top\xi_G,

    the same for H. ``order="exact"`` is a closed form with matrix exponentials of size 2h
    (:func:`sharpkit.geometry.quotient.geodesics.exact_inverse`), defined for all times.
    """

    name = "inv"

    @property
    def _weights(self) -> tuple[Tensor, Tensor]:
        return self._IG, self._IH

    @property
    def _inverse_weights(self) -> tuple[Tensor, Tensor]:
        return self._MG, self._MH

    def _multiplier(self, xi: Pair) -> Tensor:
        G, H = self._at
        right = self._MG @ (H.mT @ xi.H) - (xi.G.mT @ G) @ self._MH
        return solve_sylvester(self._MG @ self._MH, right, self._diagonal).mT

    def _christoffel(self, xi: Pair) -> Pair:
        out = []
        for at, v, inverse in zip(self._at, xi, (self._IG, self._IH), strict=True):
            cross = v.mT @ at
            out.append(at @ (inverse @ (v.mT @ v)) - v @ (inverse @ (cross + cross.mT)))
        return Pair(*out)

    def _exact(self, xi: Pair, tolerance: float | None) -> tuple[Pair, Pair]:
        del tolerance  # nothing is integrated
        (G, dG), (H, dH) = (exact_inverse(at, v) for at, v in zip(self._at, xi, strict=True))
        return Pair(G, H), Pair(dG, dH)


class CrossGramMetric(QuotientMetric):
    r"""``"mix"``: perturbations of the product, in its own units.

    .. math::
        \langle\eta, \zeta\rangle = \mathrm{Tr}\bigl(M_H\eta_G^\top\zeta_G
            + M_G\eta_H^\top\zeta_H\bigr),\qquad M_G = G^\top G,\ M_H = H^\top H

    For horizontal xi and :math:`dX = \xi_GH^\top + G\xi_H^\top` this is
    :math:`\|dX\|_F^2 - \tfrac12\|P_GdXP_H\|_F^2`, with the projections onto the columns of the
    factors. Horizontal are the vectors with :math:`G^\top\xi_GM_H = M_G\xi_H^\top H`; the
    projection has :math:`\Lambda = \tfrac12(\xi_H^\top HM_H^{-1} - M_G^{-1}G^\top\xi_G)`. The
    gradient is :math:`(e_GM_H^{-1}, e_HM_G^{-1})`, and

    .. math::
        \Gamma_G = \xi_G(\xi_H^\top H + H^\top\xi_H)M_H^{-1} - G\,\xi_H^\top\xi_HM_H^{-1},

    the same for H with the letters changed. ``order="exact"`` integrates the equation with a
    controlled error (:func:`sharpkit.geometry.quotient.geodesics.exact_crossed`); a geodesic
    can end after a finite time, where a factor loses rank.
    """

    name = "mix"

    @property
    def _weights(self) -> tuple[Tensor, Tensor]:
        return self._MH, self._MG

    @property
    def _inverse_weights(self) -> tuple[Tensor, Tensor]:
        return self._IH, self._IG

    def _multiplier(self, xi: Pair) -> Tensor:
        G, H = self._at
        twice: Tensor = (xi.H.mT @ H) @ self._IH - self._IG @ (G.mT @ xi.G)
        return twice / 2

    def _christoffel(self, xi: Pair) -> Pair:
        crosses = [v.mT @ at for at, v in zip(self._at, xi, strict=True)]
        squares = [v.mT @ v for v in xi]
        inverses = (self._IG, self._IH)
        out = []
        for mine, other in ((0, 1), (1, 0)):
            turn = (crosses[other] + crosses[other].mT) @ inverses[other]
            out.append(xi[mine] @ turn - self._at[mine] @ (squares[other] @ inverses[other]))
        return Pair(*out)

    def _exact(self, xi: Pair, tolerance: float | None) -> tuple[Pair, Pair]:
        return exact_crossed(self._at, xi, tolerance)


_METRICS: dict[str, type[QuotientMetric]] = {
    kind.name: kind for kind in (InverseGramMetric, CrossGramMetric)
}


def metric_at(pair: Pair, name: MetricName) -> QuotientMetric:
    """Return the metric of this name at a point.

    Args:
        pair: The base point.
        name: ``"inv"`` (:class:`InverseGramMetric`) or ``"mix"`` (:class:`CrossGramMetric`).

    Raises:
        SettingsError: If the name is unknown.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> metric = metric_at(Pair(2 * one, 3 * one), "inv")
        >>> xi = metric.project(Pair(0.4 * one, 0 * one))  # half of it moves H
        >>> [round(v.item(), 6) for v in xi]
        [0.2, 0.3]
        >>> [round(v.item(), 6) for v in metric.geodesic(xi, order="exact")]  # 2 and 3, times e^0.1
        [2.210342, 3.315513]
    """
    if name not in _METRICS:
        raise SettingsError(f"Expected `name` to be 'inv' or 'mix'. Got {name!r}.")
    return _METRICS[name](pair)
