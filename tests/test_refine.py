"""Coarse to fine: what is interpolated is near, what cannot be is measured, and it is told."""

import itertools

import numpy as np
import pytest

from sharpkit.landscape.refine import fill_grid, levels

X = np.linspace(-1.0, 1.0, 51)
SURFACES = {
    "bowl": lambda x, y: 0.02 + 0.1 * np.log1p(np.exp(9 * x + 2 * y)) + 0.5 * (np.cosh(2 * x - y) - 1),
    "kink": lambda x, y: 0.05 + np.abs(x) + np.abs(y - 0.3),
    "wavy": lambda x, y: 1 + x**2 + 0.3 * np.sin(12 * x) * np.cos(9 * y),
}  # fmt: skip


def fill(true, tolerance=0.02, cut=np.inf, **named):
    calls = []

    def measure(indices):
        calls.extend(indices)
        return {i: np.array([true[i] if true[i] <= cut else np.nan]) for i in indices}

    found = fill_grid(
        [X, X], (25, 25), measure, lambda i: true[i] > cut, [True], tolerance=tolerance, **named
    )
    assert len(set(calls)) == len(calls)  # nothing is measured twice
    assert found.measured.sum() == len(calls)
    return found, len(calls) / true.size


@pytest.mark.parametrize("name", SURFACES)
def test_what_is_interpolated_is_within_the_tolerance(name):
    true = SURFACES[name](*np.meshgrid(X, X, indexing="ij"))
    found, share = fill(true)
    values = found.values[..., 0]
    assert (found.measured ^ found.predicted).all()
    np.testing.assert_array_equal(values[found.measured], true[found.measured])
    miss = np.abs(values - true) / true
    assert miss.max() < 0.06
    assert (miss < 0.02).mean() > (0.98 if name == "kink" else 0.99)  # kinks fall by half a level
    assert found.worst <= 1
    assert found.worst_miss[0] <= 0.02 * true.max()
    assert share < {"bowl": 0.4, "kink": 0.5, "wavy": 0.8}[name]


def test_cubics_cost_the_coarse_levels_only():
    x, y = np.meshgrid(X, X, indexing="ij")
    found, share = fill(4 + x**3 - 2 * x * y**3 + y)
    assert share < 0.12
    assert found.worst_miss[0] < 1e-12


def test_noise_is_measured_everywhere():
    _, share = fill(1 + np.random.default_rng(0).random((51, 51)))
    assert share > 0.98


def test_a_spike_between_coarse_nodes_is_found_or_said():
    # What no measured point sees cannot be known; held-out points find it with some probability.
    true = np.ones((51, 51))
    true[19:24, 28:33] += 1.0  # wider than the second level's distance
    found, _ = fill(true)
    assert np.abs(found.values[..., 0] - true).max() < 0.02


def test_gaps_are_measured_around_and_cut_regions_are_left_out():
    x, y = np.meshgrid(X, X, indexing="ij")
    true = 0.1 + 4 * (x**2 + y**2)
    found, share = fill(true, cut=2.0)
    inside = true <= 2.0
    known = ~np.isnan(found.values[..., 0])
    assert (known == inside).all()
    assert found.skipped.any()
    assert not found.skipped[inside].any()
    assert share < 0.75


def test_levels_hold_the_centre_and_both_ends():
    for count in (2, 3, 5, 6, 17, 50, 51, 101):
        for centre in (0, count // 3, count - 1):
            found = levels(count, centre)
            assert found[-1] == list(range(count))
            for before, now in itertools.pairwise(found):
                assert set(before) < set(now)
            assert {0, centre, count - 1} <= set(found[0])


def test_a_line_is_filled_like_a_plane():
    true = 0.3 + X**4

    def measure(indices):
        return {i: np.array([true[i]]) for i in indices}

    found = fill_grid([X], (25,), measure, lambda i: False, [True], tolerance=0.01)
    assert found.measured.sum() < 40
    np.testing.assert_allclose(found.values[:, 0], true, rtol=0.01)
