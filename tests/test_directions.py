"""Directions: normalised by their definitions, eigenvectors never rescaled, planes of checkpoints."""

import math

import numpy as np
import pytest
import torch
from section_cases import Vector, digits_like, objectives, quadratic
from torch import nn

from sharpkit import Objective
from sharpkit.errors import MeasureError, SettingsError, ShapeError
from sharpkit.landscape import (
    GeodesicSection,
    StraightSection,
    between,
    compute_slice,
    eigen_directions,
    filter_normalized,
    geodesic_slice,
    gradient_direction,
    orthogonalized,
    random_direction,
    tensor_direction,
    trajectory_plane,
    worst_direction,
)


@pytest.fixture(scope="module")
def conv():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=True), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)
    )
    model = model.double().eval()
    x, y = torch.randn(12, 1, 4, 4).double(), torch.arange(12) % 4
    return Objective(model, nn.CrossEntropyLoss(), (x, y))


def parts(objective, direction):
    return objective.space.unflatten(direction.vector), objective.space.unflatten(objective.theta)


def test_filter_normalisation_is_its_definition_on_conv_linear_and_norm_layers(conv):
    d, w = parts(conv, random_direction(conv, seed=3))
    for i in range(3):
        assert float(d["0.weight"][i].norm()) == pytest.approx(float(w["0.weight"][i].norm()))
    for i in range(4):
        assert float(d["4.weight"][i].norm()) == pytest.approx(float(w["4.weight"][i].norm()))
    for name in ("0.bias", "1.weight", "1.bias", "4.bias"):
        assert not d[name].any()
    details = random_direction(conv).details
    assert details["ignored"] == ["0.bias", "1.weight", "1.bias", "4.bias"]
    everything = random_direction(conv, ignore=None, seed=3)
    d, w = parts(conv, everything)
    assert float(d["1.weight"].norm()) == pytest.approx(float(w["1.weight"].norm()))
    assert not d["1.bias"].any()  # its norm is zero
    assert everything.details["num_ignored"] == 0
    # The same draw, only scaled: filters keep their direction.
    plain = conv.space.unflatten(random_direction(conv, "theta", ignore=None, seed=3).vector)
    cosine = nn.functional.cosine_similarity(plain["0.weight"].flatten(1), d["0.weight"].flatten(1))
    assert cosine.tolist() == pytest.approx([1.0] * 3)


def test_other_normalisations(conv):
    d, w = parts(conv, random_direction(conv, "layer"))
    assert float(d["0.weight"].norm()) == pytest.approx(float(w["0.weight"].norm()))
    rows = d["0.weight"].flatten(1).norm(dim=1) / w["0.weight"].flatten(1).norm(dim=1)
    assert float(rows.std()) > 0.01
    d, w = parts(conv, random_direction(conv, "weight", seed=1))
    ratio = d["4.weight"] / w["4.weight"]
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(conv.space.dim, generator=generator, dtype=torch.float64)
    assert torch.allclose(ratio, conv.space.unflatten(noise)["4.weight"])
    direction = random_direction(conv, "theta")
    moving = torch.cat([w["0.weight"].flatten(), w["4.weight"].flatten()])
    assert float(direction.vector.norm()) == pytest.approx(float(moving.norm()))
    chosen = random_direction(conv, ignore="4.*")
    assert chosen.details["ignored"] == ["4.weight", "4.bias"]


def test_a_filter_slice_is_the_same_after_a_scale_of_layers():
    model, x, y = digits_like()
    first = Objective(model, nn.CrossEntropyLoss(), (x, y))
    scaled = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    scaled.load_state_dict(model.state_dict())
    with torch.no_grad():
        scaled[0].weight *= 10
        scaled[0].bias *= 10
        scaled[2].weight /= 10
    second = Objective(scaled, nn.CrossEntropyLoss(), (x, y))

    def line(objective, normalization):
        section = StraightSection(objective.theta, [random_direction(objective, normalization)])
        return compute_slice(section, objective, "-1:1:5").loss

    for normalization in ("filter", "layer", "weight"):
        np.testing.assert_allclose(
            line(second, normalization), line(first, normalization), rtol=1e-9
        )
    assert np.abs(line(second, "theta") - line(first, "theta")).max() > 0.01


def test_a_plane_is_not_flat():
    # A known library steps along two directions without moving the weights.
    objective, _ = objectives()
    directions = [random_direction(objective, seed=s) for s in (0, 1)]
    found = compute_slice(
        StraightSection(objective.theta, directions), objective, "-1:1:5", "-1:1:5"
    )
    assert np.ptp(found.loss) > 0.1
    assert np.ptp(found.loss[2]) > 0.01
    assert np.ptp(found.loss[:, 2]) > 0.01


def test_eigenvectors_are_not_rescaled_and_their_steps_rise_as_stated():
    objective, A, _, _ = quadratic()
    values, vectors = torch.linalg.eigh(A)
    found = eigen_directions(objective, 2, which="both", rise=0.3)
    expected = [
        (values[-1], vectors[:, -1]),
        (values[-2], vectors[:, -2]),
        (values[0], vectors[:, 0]),
    ]
    picked = [found[0], found[1], *[d for d in found if d.details["end"] == "smallest"][-1:]]
    smallest = [d for d in found if d.details["end"] == "smallest"]
    assert len(smallest) == 2
    for direction, (value, vector) in zip(picked[:2], expected[:2], strict=True):
        assert direction.details["eigenvalue"] == pytest.approx(float(value), rel=1e-6)
        assert abs(float(direction.vector @ vector)) == pytest.approx(1.0, abs=1e-6)
        assert float(direction.vector.norm()) == pytest.approx(1.0)
    assert min(d.details["eigenvalue"] for d in smallest) == pytest.approx(
        float(values[0]), rel=1e-6
    )
    for direction in found:
        section = StraightSection(objective.theta, [direction])
        line = compute_slice(section, objective, [-1.0, 0.0, 1.0], quadratic=True)
        bend = (line.loss[0] + line.loss[2]) / 2 - line.loss[1]
        sign = np.sign(direction.details["eigenvalue"])
        assert bend == pytest.approx(sign * 0.3, rel=1e-5)
        assert ("rise" in direction.label) == (sign > 0)
    flat = Objective.from_batch_loss(
        Vector(torch.ones(5).double()), lambda m, b: ((m(b)[0] - 2) ** 2, 1), [torch.zeros(1, 1)]
    )
    with pytest.raises(MeasureError, match="told from zero"):
        eigen_directions(flat, 2)


def test_the_gradient_rises_by_what_is_said_on_a_quadratic():
    for seed in range(6):
        objective, *_ = quadratic(seed=seed)
        direction = gradient_direction(objective, rise=0.2)
        g = objective.gradient()
        assert torch.allclose(direction.vector, g / g.norm())
        section = StraightSection(objective.theta, [direction])
        line = compute_slice(section, objective, [0.0, 1.0])
        assert line.loss[1] - line.loss[0] == pytest.approx(0.2, rel=1e-9)
    still = Objective.from_batch_loss(
        Vector(torch.zeros(3).double()), lambda m, b: (m(b).square().sum(), 1), [torch.zeros(1, 1)]
    )
    with pytest.raises(MeasureError, match="stationary"):
        gradient_direction(still)


def test_the_worst_perturbation_is_the_trust_region_s_on_a_quadratic():
    objective, A, b, _ = quadratic(seed=2)
    theta, rho = objective.theta, 0.3
    from sharpkit.geometry.ball import maximize_quadratic

    best = maximize_quadratic(A @ theta + b, A, rho)
    direction = worst_direction(objective, rho, steps=40, restarts=2)
    assert direction.details["rise"] == pytest.approx(best.value, rel=0.01)
    assert float(direction.vector.norm()) == pytest.approx(rho, rel=1e-6)
    line = compute_slice(StraightSection(theta, [direction]), objective, [0.0, 1.0])
    assert line.loss[1] - line.loss[0] == pytest.approx(direction.details["rise"], rel=1e-9)
    adaptive = worst_direction(objective, 0.1, metric="adaptive", norm="linf")
    assert float((adaptive.vector / theta).abs().max()) == pytest.approx(0.1, rel=1e-6)


def test_between_and_tensors_of_the_user():
    a, b = torch.zeros(4), torch.tensor([1.0, 2.0, 2.0, 0.0])
    assert between(a, b).axis.step == 3.0
    section = StraightSection(a, [between(a, b)])
    assert torch.equal(section.point([1.0]), b)
    objective, _ = objectives()
    vector = objective.gradient()
    named = objective.space.unflatten(vector)
    assert torch.equal(tensor_direction(named, objective.space).vector, vector)
    with pytest.raises(MeasureError, match="different points"):
        between(a, a)
    with pytest.raises(MeasureError, match="same parameters"):
        between(a, b[:2])
    with pytest.raises(ShapeError):
        tensor_direction(vector[:5], objective.space)


def test_orthogonalised_directions_are_and_keep_their_length():
    objective, _ = objectives()
    first, second = (random_direction(objective, seed=s) for s in (0, 1))
    turned = orthogonalized(first, second)
    assert float(turned.vector @ first.vector) == pytest.approx(0.0, abs=1e-10)
    assert float(turned.vector.norm()) == pytest.approx(float(second.vector.norm()))
    plane = torch.stack([first.vector, second.vector, turned.vector])
    assert torch.linalg.matrix_rank(plane) == 2
    cosine = float(first.vector @ second.vector / first.vector.norm() / second.vector.norm())
    assert turned.details["turned_degrees"] == pytest.approx(math.degrees(math.asin(abs(cosine))))
    with pytest.raises(MeasureError, match="not parallel"):
        orthogonalized(first, first)


def test_the_plane_of_a_trajectory_is_that_of_principal_components():
    rng = np.random.default_rng(0)
    rows = np.cumsum(rng.normal(size=(9, 40)) * np.r_[5.0, 3.0, np.ones(38)], axis=0)
    found = trajectory_plane([torch.tensor(r) for r in rows], [f"epoch {i}" for i in range(9)])
    centred = rows - rows.mean(0)
    _, s, Vt = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(found.explained_variance, (s**2 / (s**2).sum())[:2], rtol=1e-9)
    for k, direction in enumerate(found.section.directions):
        assert abs(direction.vector.numpy() @ Vt[k]) == pytest.approx(1.0)
    # Coordinates and distances by hand; the last checkpoint is at the centre, on the plane.
    basis = np.stack([d.vector.numpy() for d in found.section.directions])
    for marker, row in zip(found.markers, rows, strict=True):
        offset = row - rows[-1]
        np.testing.assert_allclose(marker.coordinates, basis @ offset, atol=1e-9)
        rest = offset - basis.T @ (basis @ offset)
        assert marker.distance == pytest.approx(np.linalg.norm(rest), abs=1e-9)
    assert found.markers[-1].distance == pytest.approx(0.0, abs=1e-12)
    assert found.markers[0].coordinates[0] > 0
    x, y = found.grid(11)
    at = np.array([m.coordinates for m in found.markers])
    assert x[0] < at[:, 0].min()
    assert y[-1] > at[:, 1].max()
    assert "random walk" in found.notes[0]


def test_a_random_walk_explains_what_is_said_of_one():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(60, 50_000, generator=generator)
    found = trajectory_plane(list(steps.cumsum(0)))
    assert found.explained_variance == pytest.approx(found.random_walk, abs=0.02)
    assert found.random_walk[0] == pytest.approx(6 / math.pi**2, abs=0.02)


def test_trajectories_that_span_no_plane_are_refused():
    line = [torch.tensor([float(i), 0.0, 0.0]) for i in range(4)]
    with pytest.raises(MeasureError, match="on a line"):
        trajectory_plane(line)
    assert trajectory_plane(line, axes=1).explained_variance == pytest.approx((1.0,))
    with pytest.raises(MeasureError, match="on a point"):
        trajectory_plane([line[0]] * 4)
    with pytest.raises(SettingsError, match="at least 3"):
        trajectory_plane(line[:2])
    with pytest.raises(SettingsError, match="label for each"):
        trajectory_plane(line, ["a"])
    with pytest.raises(MeasureError, match="finite"):
        trajectory_plane([*line, line[0] * math.nan])


def test_a_geodesic_plane_holds_the_geodesic_line():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 4, bias=False)).double()
    x, y = torch.randn(20, 5).double(), torch.randint(0, 4, (20,))
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
    plane = GeodesicSection(objective, ["gradient", "random"])
    found = compute_slice(plane, objective, [-0.4, 0.0, 0.4], [-0.3, 0.0, 0.3])
    line = geodesic_slice(objective, [-0.4, 0.0, 0.4])
    np.testing.assert_allclose(found.loss[:, 1], line.y, rtol=1e-9)
    # The function decides, not the factors that it is written in.
    turn = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, -1.0], [1.0, 0.0, 2.0]]).double()
    other = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 4, bias=False)).double()
    with torch.no_grad():
        other[0].weight.copy_(turn @ net[0].weight)
        other[1].weight.copy_(net[1].weight @ torch.linalg.inv(turn))
    moved = Objective(other, nn.CrossEntropyLoss(), (x, y))
    again = compute_slice(GeodesicSection(moved), moved, [-0.4, 0.0, 0.4])
    np.testing.assert_allclose(again.loss, line.y, rtol=1e-3)  # damping moves with the factors
    assert plane.units() is None
    with pytest.raises(SettingsError, match="This one is curved"):
        compute_slice(plane, objective, [0.0, 1.0], [0.0, 1.0], quadratic=True)
    with pytest.raises(SettingsError, match="gradient twice"):
        GeodesicSection(objective, ["gradient", "gradient"])


def test_wrong_use_of_directions_is_said(conv):
    for call, error, match in [
        (lambda: random_direction(conv, "rows"), SettingsError, "normalization among"),
        (lambda: random_direction(conv.restrict("*.bias")), MeasureError, "moves"),
        (lambda: random_direction(conv, ignore="*"), MeasureError, "moves"),
        (lambda: eigen_directions(conv, 0), SettingsError, "at least 1"),
        (lambda: eigen_directions(conv, which="top"), SettingsError, "'largest'"),
        (lambda: eigen_directions(conv, rise=-1), SettingsError, "positive `rise`"),
        (lambda: gradient_direction(conv, rise=0), SettingsError, "positive `rise`"),
        (lambda: worst_direction(conv, metric="round"), SettingsError, "'euclidean'"),
        (lambda: worst_direction(conv, -1.0), SettingsError, "rho"),
        (lambda: filter_normalized(conv.restrict("*.bias")), MeasureError, "moves"),
    ]:
        with pytest.raises(error, match=match):
            call()
