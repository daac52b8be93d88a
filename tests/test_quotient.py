"""Factors of a product under GL(h): the laws of the metrics, geodesics and the balanced gauge."""

import math
import re

import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import solve_sylvester as scipy_sylvester
from torch.func import grad, jvp, vmap

from sharpkit.errors import MeasureError, SettingsError, ShapeError
from sharpkit.geometry.quotient import Pair, balance, metric_at

NAMES = ("inv", "mix")
SHAPES = [(9, 7, 3), (4, 8, 4), (3, 3, 3), (5, 2, 1)]
each_metric = pytest.mark.parametrize("name", NAMES)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def a_pair(n=9, m=7, h=3, *heads, seed=0):
    """Factors whose columns differ in length."""
    lengths = torch.linspace(0.5, 2.5, h, dtype=torch.float64)
    return Pair(draw(*heads, n, h, seed=seed) * lengths, draw(*heads, m, h, seed=seed + 1))


def like(pair, seed=10):
    return Pair(draw(*pair.G.shape, seed=seed), draw(*pair.H.shape, seed=seed + 1))


def an_element(h, condition, *heads, seed=20):
    """A group element of exactly this condition number."""
    U, _ = torch.linalg.qr(draw(*heads, h, h, seed=seed))
    V, _ = torch.linalg.qr(draw(*heads, h, h, seed=seed + 1))
    return U * torch.logspace(0, math.log10(condition), h, dtype=torch.float64) @ V.mT


def unit(metric, xi, length=0.4):
    xi = metric.project(xi)
    return xi.times(length / metric.norm(xi))


def far(one, two):
    """Largest difference of two pairs relative to the largest entry of the second."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(one, two, strict=True))


def grams(pair):
    return pair.G.mT @ pair.G, pair.H.mT @ pair.H


def plain_inner(name, pair, xi, zeta):
    """The definition, in the gauge as it is."""
    MG, MH = grams(pair)
    left, right = (torch.linalg.inv(MG), torch.linalg.inv(MH)) if name == "inv" else (MH, MG)
    return torch.trace(left @ xi.G.T @ zeta.G) + torch.trace(right @ xi.H.T @ zeta.H)


def plain_multiplier(name, pair, xi, printed=False):
    """The projection's generator in the gauge as it is, with scipy's Sylvester solver."""
    (G, H), (MG, MH) = pair, grams(pair)
    if name == "mix":
        return 0.5 * (xi.H.T @ H @ torch.linalg.inv(MH) - torch.linalg.inv(MG) @ G.T @ xi.G)
    A, B = MG @ MH, MG @ H.T @ xi.H - xi.G.T @ G @ MH
    if printed:
        return torch.from_numpy(scipy_sylvester(A.numpy(), A.T.numpy(), B.numpy()))
    return torch.from_numpy(scipy_sylvester(A.numpy(), A.numpy(), B.numpy())).T


def tensor_of(name, x, n, m, h):
    """The metric as a dense matrix at flat parameters."""
    MG, MH = grams(unflat(x, n, m, h))
    left, right = (torch.linalg.inv(MG), torch.linalg.inv(MH)) if name == "inv" else (MH, MG)
    return torch.block_diag(*[left] * n, *[right] * m)


def flat(pair):
    return torch.cat([pair.G.reshape(-1), pair.H.reshape(-1)])


def unflat(x, n, m, h):
    return Pair(x[: n * h].reshape(n, h), x[n * h :].reshape(m, h))


def christoffel_of(name, pair, xi):
    """From the derivatives of the dense metric: no formula of the package enters."""
    n, m, h = pair.G.shape[0], pair.H.shape[0], pair.G.shape[1]
    x, v = flat(pair), flat(xi)
    d = torch.autograd.functional.jacobian(lambda y: tensor_of(name, y, n, m, h), x)  # [i, j, s]
    low = torch.einsum("ijs,j,s->i", d, v, v) - 0.5 * torch.einsum("ijs,i,j->s", d, v, v)
    return unflat(torch.linalg.solve(tensor_of(name, x, n, m, h), low), n, m, h)


# The metrics


@each_metric
@each_shape
def test_inner_products_are_the_definition(name, shape):
    pair = a_pair(*shape)
    metric, xi, zeta = metric_at(pair, name), like(pair), like(pair, 30)
    want = plain_inner(name, pair, xi, zeta)
    assert metric.inner(xi, zeta).item() == pytest.approx(want.item(), rel=1e-11)
    assert metric.norm(xi).item() == pytest.approx(
        plain_inner(name, pair, xi, xi).sqrt().item(), rel=1e-12
    )
    white, back = metric.whiten(xi), metric.unwhiten(metric.whiten(xi))
    assert white.dot(metric.whiten(zeta)).item() == pytest.approx(want.item(), rel=1e-11)
    assert far(back, xi) < 1e-12


@each_metric
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_both_metrics_are_invariant(name, condition):
    pair = a_pair(9, 7, 3, 20)
    A = an_element(3, condition, 20)
    xi, zeta = like(pair), like(pair, 30)
    here, there = metric_at(pair, name), metric_at(pair.act(A), name)
    a, b = here.inner(xi, zeta), there.inner(xi.act(A), zeta.act(A))
    scale = here.norm(xi) * here.norm(zeta)
    assert ((a - b).abs() / scale).max() < 1e-15 * condition * 50
    assert (
        far(there.project(xi.act(A)).act(torch.linalg.inv(A)), here.project(xi))
        < 1e-14 * condition * 50
    )
    gradient = here.gradient(xi)
    moved = there.gradient(xi.act_dual(A))
    assert far(moved.act(torch.linalg.inv(A)), gradient) < 1e-14 * condition * 200


def test_the_euclidean_metric_moves_under_the_group():
    pair = a_pair()
    xi, A = like(pair), an_element(3, 30.0)
    moved = xi.act(A)
    assert abs(moved.dot(moved) / xi.dot(xi) - 1) > 0.5


def test_inverse_gram_does_not_see_the_size_of_one_factor_and_crossed_does():
    pair, xi = a_pair(), like(a_pair())
    big, much = Pair(3 * pair.G, pair.H), Pair(3 * xi.G, xi.H)
    inv, mix = (metric_at(pair, k).norm(xi) for k in NAMES)
    assert metric_at(big, "inv").norm(much).item() == pytest.approx(inv.item(), rel=1e-12)
    assert metric_at(big, "mix").norm(much).item() == pytest.approx(3 * mix.item(), rel=1e-12)


def test_crossed_metric_is_that_of_the_product():
    pair = a_pair()
    metric = metric_at(pair, "mix")
    xi = metric.project(like(pair))
    dX = xi.G @ pair.H.T + pair.G @ xi.H.T
    PG, PH = (f @ torch.linalg.pinv(f) for f in pair)
    want = dX.square().sum() - 0.5 * (PG @ dX @ PH).square().sum()
    assert metric.inner(xi, xi).item() == pytest.approx(want.item(), rel=1e-12)


@each_metric
def test_white_draws_fill_the_horizontal_space(name):
    n, m, h, draws = 9, 7, 3, 4000
    metric = metric_at(a_pair(n, m, h), name)
    z = metric.unwhiten(Pair(draw(draws, n, h), draw(draws, m, h, seed=1)))
    squares = metric.norm(metric.project(z)).square()
    wanted = (n + m) * h - h * h
    deviation = (squares.mean() - wanted) / (squares.std() / draws**0.5)
    assert abs(deviation) < 4
    assert squares.var().item() == pytest.approx(2 * wanted, rel=0.15)  # chi-squared


# Vertical and horizontal


@each_metric
def test_vertical_vectors_are_tangent_to_the_orbit(name):
    pair, L = a_pair(), draw(3, 3, seed=5)
    metric = metric_at(pair, name)
    vertical = metric.vertical(L)
    t = 1e-5
    ahead, behind = (pair.act(torch.linalg.matrix_exp(-s * L)) for s in (t, -t))
    assert (
        far(Pair(*((a - b) / (2 * t) for a, b in zip(ahead, behind, strict=True))), vertical) < 1e-8
    )
    dX = vertical.G @ pair.H.T + pair.G @ vertical.H.T
    assert dX.abs().max() < 1e-13


@each_metric
@each_shape
def test_projection_is_one_and_self_adjoint(name, shape):
    pair = a_pair(*shape)
    h = shape[2]
    metric, xi, zeta = metric_at(pair, name), like(pair), like(pair, 30)
    p = metric.project(xi)
    scale = metric.norm(xi) * metric.norm(zeta)
    assert far(metric.project(p), p) < 1e-11
    vertical = metric.vertical(draw(h, h, seed=5))
    assert metric.norm(metric.project(vertical)) < 1e-12 * metric.norm(vertical)
    assert abs(metric.inner(p, vertical)) < 1e-12 * metric.norm(p) * metric.norm(vertical)
    assert abs(metric.inner(p, zeta) - metric.inner(xi, metric.project(zeta))) < 1e-13 * scale
    assert metric.norm(p) <= metric.norm(xi)
    dX, dP = (v.G @ pair.H.T + pair.G @ v.H.T for v in (xi, p))
    assert (dX - dP).abs().max() < 1e-12
    L = plain_multiplier(name, pair, xi)
    assert (metric.multiplier(xi) - L).abs().max() < 1e-10 * L.abs().max()


def test_the_printed_sylvester_equation_is_no_projection():
    pair = a_pair()
    xi, metric = like(pair), metric_at(pair, "inv")
    vertical = metric.vertical(draw(3, 3, seed=5))
    left = {}
    for printed in (True, False):
        L = plain_multiplier("inv", pair, xi, printed=printed)
        moved = xi.plus(metric.vertical(L))
        left[printed] = (
            abs(metric.inner(moved, vertical)) / metric.norm(moved) / metric.norm(vertical)
        )
    assert left[True] > 1e-2
    assert left[False] < 1e-12


@each_metric
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_single_precision_keeps_its_digits_in_a_bad_gauge(name, condition):
    pair, A = a_pair(9, 7, 3, 20), an_element(3, condition, 20)
    xi = like(pair)
    want = metric_at(pair, name).project(xi)
    wanted = metric_at(pair, name).norm(want)
    low = Pair(*(x.float() for x in pair.act(A)))
    metric = metric_at(low, name)
    got = metric.norm(metric.project(Pair(*(x.float() for x in xi.act(A)))))
    assert got.dtype == torch.float32
    assert ((got / wanted) - 1).abs().max() < 5e-7 + 6e-8 * condition


@each_metric
def test_single_precision_copes_with_an_ill_conditioned_product(name):
    """Singular values from 1 to 1e-4, in a gauge of condition 100: Gram matrices of 1e8."""
    G, _ = torch.linalg.qr(draw(9, 3))
    H, _ = torch.linalg.qr(draw(7, 3, seed=1))
    root = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    pair, A = Pair(G * root, H * root), an_element(3, 100.0)
    xi = like(pair)
    low, v = (Pair(*(x.float() for x in p.act(A))) for p in (pair, xi))
    exact = Pair(*(x.double() for x in low))  # the rounded factors are another point
    want = metric_at(exact, name).norm(
        metric_at(exact, name).project(Pair(*(x.double() for x in v)))
    )
    metric = metric_at(low, name)
    assert metric.norm(metric.project(v)).item() == pytest.approx(want.item(), rel=1e-4)


# Gradients


def fit(pair, target):
    return (pair.product() - target).pow(2).sum() + pair.product().sin().sum()


@each_metric
def test_gradient_is_dual_and_horizontal(name):
    pair, target = a_pair(), draw(9, 7, seed=40)
    metric = metric_at(pair, name)
    e = grad(lambda p: fit(p, target))(pair)
    g = metric.gradient(e)
    for seed in range(3):
        xi, t = like(pair, 50 + 2 * seed), 1e-5
        slope = (fit(pair.plus(xi, t), target) - fit(pair.plus(xi, -t), target)) / (2 * t)
        assert metric.inner(g, xi).item() == pytest.approx(slope.item(), rel=1e-7)
    assert far(metric.project(g), g) < 1e-13
    A = an_element(3, 1e3)
    there = pair.act(A)
    other = metric_at(there, name)
    size = other.norm(other.gradient(grad(lambda p: fit(p, target))(there)))
    assert size.item() == pytest.approx(metric.norm(g).item(), rel=1e-10)


@each_metric
def test_everything_has_derivatives_also_in_the_base_point(name):
    """Also where the singular values of the product are equal, and to second order."""
    small = Pair(draw(4, 2), draw(3, 2, seed=1))
    equal = balance(*small).pair
    equal = Pair(*(x / x.norm(dim=0) for x in equal))  # sigma = 1, 1
    for pair in (small, equal):
        xi, zeta = like(pair), like(pair, 30)

        def value(G, H, a, b, order=2, zeta=zeta):
            metric, v = metric_at(Pair(G, H), name), Pair(0.2 * a, 0.2 * b)
            end = metric.geodesic(metric.project(v), order=order)
            return metric.inner(metric.gradient(v), zeta), end.product().sin().sum(), metric.norm(v)

        args = [x.clone().requires_grad_() for x in (*pair, *xi)]
        assert torch.autograd.gradcheck(value, args, fast_mode=True)
        assert torch.autograd.gradcheck(
            lambda *a: value(*a, order="exact")[1], args, fast_mode=True
        )
        assert torch.autograd.gradgradcheck(lambda *a: value(*a)[1], args, fast_mode=True)


def test_forward_mode_and_vmap_agree_with_reverse_mode():
    pair = a_pair()
    xi, zeta, eta = like(pair), like(pair, 30), like(pair, 60)

    def value(v):
        metric = metric_at(pair, "inv")
        return metric.geodesic(metric.project(v), 0.1, order="exact").product().sin().sum()

    _, forward = jvp(value, (xi,), (zeta,))
    assert forward.item() == pytest.approx(grad(value)(xi).dot(zeta).item(), rel=1e-11)

    def at(p):
        metric = metric_at(p, "inv")
        return metric.geodesic(metric.project(xi), 0.1).product().sin().sum()

    _, forward = jvp(at, (pair,), (zeta,))
    assert forward.item() == pytest.approx(grad(at)(pair).dot(zeta).item(), rel=1e-11)
    metric = metric_at(pair, "inv")
    stacked = Pair(*(torch.stack(two) for two in zip(xi, eta, strict=True)))
    assert far(vmap(metric.project)(stacked), metric.project(stacked)) < 1e-13


def test_length_has_a_derivative_at_zero():
    pair = a_pair()
    zero = Pair(*(torch.zeros_like(x) for x in pair))
    slope = grad(lambda v: metric_at(pair, "inv").norm(v))(zero)
    assert all((x == 0).all() for x in slope)


# Geodesics


@each_metric
def test_christoffel_is_that_of_the_metric(name):
    pair = a_pair(4, 3, 2)
    xi = like(pair)
    metric = metric_at(pair, name)
    assert far(metric.christoffel(xi), christoffel_of(name, pair, xi)) < 1e-11
    A = an_element(2, 1e3)
    assert (
        far(metric_at(pair.act(A), name).christoffel(xi.act(A)), metric.christoffel(xi).act(A))
        < 1e-10
    )


def integrated(name, pair, xi):
    """The end of the geodesic by scipy, from the accelerations of the dense metric."""
    n, m, h = pair.G.shape[0], pair.H.shape[0], pair.G.shape[1]
    size = (n + m) * h

    def slope(_, y):
        y = torch.from_numpy(y)
        at, v = unflat(y[:size], n, m, h), unflat(y[size:], n, m, h)
        return torch.cat([y[size:], -flat(christoffel_of(name, at, v))]).numpy()

    y0 = torch.cat([flat(pair), flat(xi)]).numpy()
    end = solve_ivp(slope, (0, 1), y0, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    end = torch.from_numpy(end)
    return unflat(end[:size], n, m, h), unflat(end[size:], n, m, h)


@each_metric
@pytest.mark.parametrize("shape", [(4, 3, 2), (2, 2, 2), (3, 5, 1)], ids=str)
def test_exact_geodesics_are_those_of_an_independent_integration(name, shape):
    pair = a_pair(*shape)
    metric = metric_at(pair, name)
    xi = unit(metric, like(pair), 0.7 if name == "inv" else 0.2)
    point, velocity = metric.flow(xi, order="exact")
    want, speed = integrated(name, pair, xi)
    assert far(point, want) < 1e-9
    assert far(velocity, speed) < 1e-9


@each_metric
def test_exact_geodesics_start_right_keep_speed_and_stay_horizontal(name):
    pair = a_pair(9, 7, 3, 2)
    metric = metric_at(pair, name)
    xi = unit(metric, like(pair))
    start, velocity = metric.flow(xi, 0.0, order="exact")
    assert far(start, pair) < 1e-13
    assert far(velocity, xi) < 1e-13
    each = torch.tensor([1e-6, -1e-6], dtype=torch.float64)  # one time a head
    step = metric.geodesic(xi, each, order="exact").plus(pair, -1.0).times(1 / each)
    assert far(step, xi) < 1e-5
    for t in (-1.0, 0.3, 1.0, 2.0):
        point, velocity = metric.flow(xi, t, order="exact")
        there = metric_at(point, name)
        assert (there.norm(velocity) / 0.4 - 1).abs().max() < 1e-9
        assert far(there.project(velocity), velocity) < 1e-9
        on = there.geodesic(velocity, -t, order="exact")
        assert far(on, pair) < 1e-8  # and back


@each_metric
def test_orders_of_the_curves(name):
    pair = a_pair()
    metric = metric_at(pair, name)
    xi = unit(metric, like(pair))
    times = (0.1, 0.2)
    for order, slope in ((1, 2), (2, 3)):
        errors = []
        for t in times:
            off = metric.geodesic(xi, t, order=order).plus(
                metric.geodesic(xi, t, order="exact"), -1.0
            )
            errors.append(metric.norm(off).item())
        assert math.log2(errors[1] / errors[0]) == pytest.approx(slope, abs=0.1)


@each_metric
@pytest.mark.parametrize("order", [1, 2, "exact"])
def test_geodesics_of_equivalent_points_have_the_same_products(name, order):
    pair, A = a_pair(9, 7, 3, 4), an_element(3, 1e3, 4)
    metric, there = metric_at(pair, name), metric_at(pair.act(A), name)
    xi = unit(metric, like(pair))
    here = metric.geodesic(xi, order=order)
    moved = there.geodesic(xi.act(A), order=order)
    assert far(moved, here.act(A)) < 1e-9
    assert (moved.product() - here.product()).abs().max() < 1e-10 * here.product().abs().max()


@each_metric
def test_velocities_are_those_of_the_curves(name):
    pair = a_pair()
    metric = metric_at(pair, name)
    xi, t = unit(metric, like(pair)), torch.tensor(0.7, dtype=torch.float64)
    for order in (1, 2, "exact"):
        ahead, behind = (metric.geodesic(xi, t + s, order=order) for s in (1e-5, -1e-5))
        want = ahead.plus(behind, -1.0).times(0.5e5)
        assert far(metric.flow(xi, t, order=order)[1], want) < 1e-8


def test_scalar_factors_have_geodesics_one_can_write_down():
    one = torch.ones(1, 1, dtype=torch.float64)
    b, pair = 0.15, Pair(1.7 * one, -0.6 * one)
    xi = pair.times(b)  # horizontal in both metrics
    assert far(metric_at(pair, "inv").geodesic(xi, order="exact"), pair.times(math.exp(b))) < 1e-13
    assert (
        far(metric_at(pair, "mix").geodesic(xi, order="exact"), pair.times(math.sqrt(1 + 2 * b)))
        < 1e-10
    )


def test_square_crossed_geodesics_are_straight_in_the_product():
    pair = a_pair(3, 3, 3)
    metric = metric_at(pair, "mix")
    xi = unit(metric, like(pair))
    dX = xi.G @ pair.H.T + pair.G @ xi.H.T
    assert (metric.geodesic(xi, order="exact").product() - pair.product() - dX).abs().max() < 1e-9


def test_long_inverse_gram_geodesics_keep_full_rank():
    pair = a_pair()
    metric = metric_at(pair, "inv")
    end, velocity = metric.flow(unit(metric, like(pair), 5.0), order="exact")
    assert all(torch.linalg.svdvals(x).min() > 1e-3 for x in end)
    assert metric_at(end, "inv").norm(velocity).item() == pytest.approx(5.0, rel=1e-9)


def test_a_crossed_geodesic_can_end_and_says_so():
    one = torch.ones(2, 1, 1, dtype=torch.float64)
    pair = Pair(one, one)
    rates = torch.tensor([-1.0, 0.1], dtype=torch.float64)  # the first ends at t = 1/2
    with pytest.raises(MeasureError, match=r"fraction 0\.(5|49\d*) of it"):
        metric_at(pair, "mix").geodesic(pair.times(rates), order="exact")
    end = metric_at(pair, "mix").geodesic(pair.times(rates), 0.49, order="exact")
    assert end.G[0].item() == pytest.approx(math.sqrt(0.02), rel=1e-7)


def test_a_square_crossed_geodesic_ends_where_the_product_does():
    pair = a_pair(2, 2, 2)
    metric = metric_at(pair, "mix")
    xi = unit(metric, like(pair), 0.7)
    dX = xi.G @ pair.H.T + pair.G @ xi.H.T
    ends = torch.linalg.eigvals(torch.linalg.solve(pair.product(), -dX))
    end = 1 / max(x.real.item() for x in ends if abs(x.imag) < 1e-12)
    with pytest.raises(MeasureError, match="loses column rank") as failed:
        metric.geodesic(xi, order="exact")
    said = float(re.search(r"fraction ([\d.]+)", str(failed.value)).group(1))
    assert 0.98 * end < said <= end
    metric.geodesic(xi, 0.95 * end, order="exact")


@pytest.mark.parametrize("length", [3.0, 10.0])
def test_tolerance_is_kept(length):
    pair = a_pair()
    metric = metric_at(pair, "mix")
    xi = unit(metric, like(pair), length)
    best = metric.geodesic(xi, order="exact", tolerance=1e-13)
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9, None):
        off = metric.geodesic(xi, order="exact", tolerance=tolerance).plus(best, -1.0)
        assert metric.norm(off) < (tolerance or 1e-11) * length
    low, v = (Pair(*(x.float() for x in p)) for p in (pair, xi))
    assert far(metric_at(low, "mix").geodesic(v, order="exact"), best) < 2e-6


# Heads together


@each_metric
def test_heads_and_samples_together_are_each_one_alone(name):
    pair = a_pair(6, 5, 2, 2, 3)
    pair = Pair(
        pair.G * torch.tensor([1.0, 30.0, 0.01], dtype=torch.float64)[:, None, None], pair.H
    )
    xi = Pair(draw(4, 2, 3, 6, 2), draw(4, 2, 3, 5, 2, seed=1))  # 4 samples
    metric = metric_at(pair, name)
    v = metric.project(xi)
    v = v.times(0.4 / metric.norm(v))
    together = (v, metric.gradient(xi), *(metric.geodesic(v, order=k) for k in (1, 2, "exact")))
    for s in (0, 3):
        for i, j in ((0, 0), (1, 2)):
            one = metric_at(Pair(pair.G[i, j], pair.H[i, j]), name)
            x = Pair(xi.G[s, i, j], xi.H[s, i, j])
            w = unit(one, x)
            alone = (w, one.gradient(x), *(one.geodesic(w, order=k) for k in (1, 2, "exact")))
            for many, single in zip(together, alone, strict=True):
                assert far(Pair(many.G[s, i, j], many.H[s, i, j]), single) < 1e-11


# The balanced gauge


@each_shape
def test_balanced_factors(shape):
    pair = a_pair(*shape)
    found = balance(*pair)
    MG, MH = grams(found.pair)
    want = torch.linalg.svdvals(pair.product())[: shape[2]]
    assert (found.sigma - want).abs().max() < 1e-13 * want[0]
    assert (MG - torch.diag(found.sigma)).abs().max() < 1e-13 * want[0]
    assert (MH - torch.diag(found.sigma)).abs().max() < 1e-13 * want[0]
    assert (found.pair.product() - pair.product()).abs().max() < 1e-13 * want[0]
    assert far(pair.act(found.element), found.pair) < 1e-12
    assert (found.element @ found.inverse - torch.eye(shape[2])).abs().max() < 1e-12
    assert found.full
    assert found.notes == ()
    again = balance(*found.pair)
    assert far(again.pair, found.pair) < 1e-12  # idempotent
    assert (again.element - torch.eye(shape[2])).abs().max() < 1e-12


def test_balanced_factors_depend_on_the_product_alone():
    pair, A = a_pair(9, 7, 3, 20), an_element(3, 1e3, 20)
    assert far(balance(*pair.act(A)).pair, balance(*pair).pair) < 1e-9


def test_equal_singular_values_leave_a_rotation_free():
    Q, _ = torch.linalg.qr(draw(5, 2))
    P, _ = torch.linalg.qr(draw(4, 2, seed=1))
    turn, _ = torch.linalg.qr(draw(2, 2, seed=2))
    one, two = balance(Q, P).pair, balance(Q @ turn, P @ turn).pair
    between = one.G.T @ two.G
    assert (between.T @ between - torch.eye(2)).abs().max() < 1e-13
    assert far(Pair(one.G @ between, one.H @ between), two) < 1e-13


def test_column_lengths_cost_no_digits():
    pair = a_pair()
    lengths = torch.logspace(-9, 9, 3, dtype=torch.float64)
    found = balance(pair.G * lengths, pair.H / lengths)
    assert far(found.pair, balance(*pair).pair) < 1e-12


def test_balance_has_derivatives_where_singular_values_differ():
    def value(G, H):
        found = balance(G, H)
        return found.pair.G, found.pair.H, found.sigma, found.element

    args = [x.clone().requires_grad_() for x in a_pair(4, 3, 2)]
    assert torch.autograd.gradcheck(value, args)
    same = torch.eye(3, 2, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(balance(same, same.detach()).pair.G.sin().sum(), same)
    assert not torch.isfinite(slope).all()  # claimed: none there


# Deficient factors


def deficient(damping=0.0, A=None):
    G, H = a_pair(6, 5, 3)
    pair = Pair(G, torch.cat([H[:, :2], H[:, :1] - H[:, 1:2]], dim=1))  # rank 2
    if A is not None:
        pair = pair.act(A)
    return pair, balance(*pair, damping=damping) if damping else None


def test_deficient_factors_are_refused_without_damping():
    pair, _ = deficient()
    with pytest.raises(MeasureError, match=r"full column rank 3\. Got a head of rank 2"):
        balance(*pair)
    for metric in NAMES:
        with pytest.raises(MeasureError, match="full column rank"):
            metric_at(pair, metric)
    with pytest.raises(MeasureError, match="full column rank"):  # up to the rounding of the dtype
        balance(*(x.float() for x in pair))
    with pytest.raises(MeasureError, match="not zero"):
        balance(draw(4, 2), torch.zeros(3, 2, dtype=torch.float64), damping=0.1)


def test_deficient_factors_are_balanced_with_damping():
    pair, found = deficient(1e-3)
    assert found.rank.item() == 2
    assert (found.pair.product() - pair.product()).abs().max() < 1e-13
    assert found.sigma[2] == 0
    with pytest.raises(MeasureError, match="to name a group element"):
        _ = found.element
    assert "rank below 3 (lowest 2)" in found.notes[1]
    low = (found.sigma[1] / found.sigma[0]).item()
    assert f"multiplied by {math.sqrt(low / (low + 1e-3)):.3g}" in found.notes[0]
    long = found.damped()
    want = torch.diag(found.sigma + 1e-3 * found.sigma[0])
    assert all((M - want).abs().max() < 1e-13 for M in grams(long))
    assert far(found.strip(long), found.pair) == 0


@each_metric
def test_damping_keeps_the_invariance_and_the_laws(name):
    """A damped sharpness: length of the gradient, and the function along the geodesic."""
    target = draw(6, 5, seed=40)
    values = []
    for A in (None, an_element(3, 1e3)):
        _, found = deficient(1e-3, A)
        long = found.damped()
        metric = metric_at(long, name)
        e = grad(lambda p, found=found: fit(found.strip(p), target))(long)
        assert all((x[-3:] == 0).all() for x in e)
        g = metric.gradient(e)
        assert far(metric.project(g), g) < 1e-10
        g = g.times(0.3 / metric.norm(g))
        ends = [metric.geodesic(g, order=k) for k in (2, "exact")]
        assert far(found.pad(found.strip(e)), e) == 0
        values.append(
            [metric.norm(metric.gradient(e)), *(fit(found.strip(p), target) for p in ends)]
        )
    for here, there in zip(*values, strict=True):
        assert here.item() == pytest.approx(there.item(), rel=1e-9)


def test_damping_in_the_gauge_as_it_is_breaks_the_invariance():
    pair, A = a_pair(), an_element(3, 1e3)
    xi = like(pair)

    def length(p, v, eps=1e-3):
        parts = zip(v, grams(p), strict=True)
        return sum(
            torch.trace(torch.linalg.inv(M + eps * torch.eye(3)) @ x.T @ x) for x, M in parts
        )

    assert abs(length(pair.act(A), xi.act(A)) / length(pair, xi) - 1) > 1e-2


def test_damping_says_what_it_did():
    pair = a_pair()
    found = balance(*pair, damping=0.1)
    low = (found.sigma[-1] / found.sigma[0]).item()
    assert f"multiplied by {math.sqrt(low / (low + 0.1)):.3g}" in found.notes[0]
    assert len(found.notes) == 1
    last = Pair(
        found.pair.G[:, -1:] * torch.tensor([0.0, 0.0, 1.0]), torch.zeros(7, 3, dtype=torch.float64)
    )
    damped, plain = metric_at(found.damped(), "inv"), metric_at(found.pair, "inv")
    assert (damped.norm(found.pad(last)) / plain.norm(last)).item() == pytest.approx(
        math.sqrt(low / (low + 0.1))
    )


# What is refused


@pytest.mark.parametrize(
    ("G", "H", "error", "words"),
    [
        ((4, 2), (3, 3), ShapeError, "same last axis"),
        ((2, 4, 2), (3, 4, 2), ShapeError, "same leading axes"),
        ((2, 3), (5, 3), ShapeError, "tall as wide"),
        ((4, 0), (3, 0), ShapeError, "not empty"),
    ],
)
def test_shapes_that_do_not_match(G, H, error, words):
    with pytest.raises(error, match=words):
        balance(draw(*G), draw(*H))


def test_numbers_that_are_no_point():
    G, H = a_pair()
    with pytest.raises(MeasureError, match="float32 or both in float64"):
        balance(G, H.float())
    with pytest.raises(MeasureError, match="float32 or both in float64"):
        balance(G.bfloat16(), H.bfloat16())
    with pytest.raises(MeasureError, match="finite factors"):
        balance(G * math.nan, H)


def test_settings_that_make_no_sense():
    pair = a_pair()
    metric, xi = metric_at(pair, "mix"), like(pair)
    with pytest.raises(SettingsError, match=r"'inv' or 'mix'. Got 'euclid'"):
        metric_at(pair, "euclid")
    with pytest.raises(SettingsError, match=r"1, 2 or 'exact'. Got 3"):
        metric.geodesic(xi, order=3)
    with pytest.raises(SettingsError, match="between 0 and 1"):
        metric.geodesic(xi, order="exact", tolerance=0.0)
    with pytest.raises(SettingsError, match=r"at least 0\. Got -1"):
        balance(*pair, damping=-1)
    with pytest.raises(ShapeError, match="shapes of the point"):
        metric.inner(Pair(xi.G[:-1], xi.H), xi)
    with pytest.raises(ShapeError, match="both parts of a vector"):
        metric.project(Pair(xi.G.expand(2, -1, -1), xi.H))
