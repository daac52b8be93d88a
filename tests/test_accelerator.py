"""Devices and dtypes: on CUDA where there is one, on an emulated accelerator everywhere."""

import copy
import math

import pytest
import torch
from elsewhere import FAR, Far, accelerator
from torch import nn

import sharpkit as sk
from sharpkit import measures, operators
from sharpkit.analysis import Analysis
from sharpkit.estimators import (
    Storage,
    hutch_plus_plus,
    hutchinson_trace,
    lanczos,
    spectral_density,
    xdiag,
    xtrace,
)
from sharpkit.landscape.paths import SegmentPath, align, barrier, connect, plane_through
from sharpkit.testing import trained_with_adam

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False"
)
CE = nn.CrossEntropyLoss()
FIRST = torch.tensor([1])


def network(width=6):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).eval()


def data(dtype=torch.float32):
    g = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(24, 4, generator=g, device="cpu").to(dtype)
    y = torch.randint(3, (24,), generator=g, device="cpu")
    return [(x[:16], y[:16]), (x[16:], y[16:])]  # ragged, and on the host


def objective(model=None, **options):
    return sk.Objective(model or network(), CE, data(), **options)


def seeded(device="cpu"):
    return torch.Generator(device).manual_seed(0)


ESTIMATORS = {
    "lanczos": lambda H, g: lanczos(H, generator=g).largest,
    "lanczos, one end": lambda H, g: lanczos(H, which="smallest", generator=g).smallest,
    "lanczos, restarts": lambda H, g: lanczos(H, max_basis=12, generator=g).largest,
    "lanczos, blocks": lambda H, g: lanczos(H, block_size=2, generator=g).largest,
    "lanczos, on the host": lambda H, g: (
        lanczos(H, storage=Storage(device="cpu"), generator=g).largest
    ),
    "lanczos, bfloat16": lambda H, g: (
        lanczos(H, storage=Storage(dtype=torch.bfloat16), generator=g).largest
    ),
    "density": lambda H, g: spectral_density(H, num_probes=2, num_steps=5, generator=g).nodes[0],
    "xtrace": lambda H, g: [xtrace(H, num_matvecs=12, generator=g).value],
    "xdiag": lambda H, g: [xdiag(H, num_matvecs=12, generator=g).sum(FIRST).value],
    "hutch++": lambda H, g: [hutch_plus_plus(H, num_matvecs=12, generator=g).value],
    "hutchinson": lambda H, g: [hutchinson_trace(H, num_probes=12, generator=g).value],
}
MEASURED = [  # without those that need more than is given below
    n
    for n in measures.names()
    if measures.get(n).needs <= {"labels", "examples", "layers", "optimizer"}
]
FURTHER = [
    "adam_mini_sharpness:method=hutchinson",
    "adalayer_sharpness:method=ggn",
    "normalized_flatness:method=hutchinson,num_probes=10",
    "relative_flatness:layer=*,num_probes=4",
    "relative_flatness_max:form=joint",
    "relative_flatness_max:layer=*,max_neurons=2",
    "pac_bayes_bound:reference=origin",
    "sharpness_bound:reference=origin,steps=4",
    "parameter_norm:which=weights",
    "fisher_rao_norm:fisher=true",
    "adam_sharpness:method=xdiag,num_probes=10",
    "adam_sharpness:method=ggn",
    "adam_sharpness:method=hutchinson,num_probes=10",
    "hessian_trace:num_probes=4",
]


def values(scores):
    assert [s.error for s in scores] == [None] * len(scores)
    return {s.measure + str(s.settings): vars(s.estimate) for s in scores}


def assert_same(there, here):
    """The same operations: up to how the CPU's kernels round odd memory layouts."""
    for name, expected in here.items():
        value, error = expected["value"], expected["probe_error"]
        assert there[name]["value"] == pytest.approx(value, rel=1e-4, abs=0.01 * error), name
        assert there[name]["probe_error"] == pytest.approx(error, rel=0.05), name
        assert (there[name]["data_error"] is None) == (expected["data_error"] is None), name


# -- another default device --------------------------------------------------------------


@pytest.fixture
def elsewhere_by_default():
    """What is made without a device comes onto "meta", where it has no numbers."""

    def switch():
        torch.set_default_device("meta")

    yield switch
    torch.set_default_device(None)


def test_measures_do_not_ask_for_the_default_device(elsewhere_by_default):
    requests = [*MEASURED, *FURTHER]
    beside = {"optimizer": trained_with_adam(objective())}
    here = values(sk.score(objective(), requests, **beside))
    model = network()
    elsewhere_by_default()
    assert_same(values(sk.score(objective(model), requests, **beside)), here)


def test_estimators_do_not_ask_for_the_default_device(elsewhere_by_default):
    H = sk.hessian(objective())
    elsewhere_by_default()
    for name, estimate in ESTIMATORS.items():
        assert all(math.isfinite(x) for x in estimate(H, seeded())), name
    assert operators.shifted(H, 1.0).to_dense().device.type == "cpu"
    ends = lanczos(H, which="smallest", generator=seeded())
    assert ends.largest_vectors.device == ends.smallest_vectors.device


# -- an emulated accelerator -------------------------------------------------------------


def far(model):
    """A copy of the model on the accelerator; to be called inside ``accelerator()``."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().to(FAR)))
    return model


def test_the_emulated_accelerator_refuses_what_an_accelerator_does():
    with accelerator() as reads:
        x = torch.arange(3.0).to(FAR)
        with pytest.raises(RuntimeError, match="expected all tensors on the same device"):
            _ = x + torch.ones(3)
        assert isinstance(x + torch.tensor(1.0), Far)  # a number may be mixed
        assert reads.count == 0
        assert float((2 * x).sum()) == pytest.approx(2 * sum(x.tolist()))
        assert (reads.count, reads.largest) == (2, 3)


@pytest.mark.slow
def test_measures_are_the_same_on_an_accelerator():
    requests = [*MEASURED, *FURTHER]
    beside = {"optimizer": trained_with_adam(objective())}
    here = values(sk.score(objective(), requests, **beside))
    with accelerator():
        there = values(sk.score(objective(far(network())), requests, **beside))
    assert_same(there, here)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_the_same_on_an_accelerator_and_read_little(name):
    wide = network(40)  # 323 parameters
    H = sk.hessian(objective(wide))
    here = ESTIMATORS[name](H, seeded())
    with accelerator() as reads:
        A = sk.hessian(objective(far(wide)))
        A @ torch.ones(A.dim, device=FAR)
        before = reads.count
        reads.largest = 0
        products = A.num_matvecs
        there = ESTIMATORS[name](A, seeded())
        products = A.num_matvecs - products
    assert list(there) == pytest.approx(list(here), rel=1e-4)
    if name != "lanczos, on the host":
        assert reads.largest < A.dim // 2  # no vector of parameters comes back
    # Norms, dots and small matrices: some a product.
    assert (reads.count - before) / products < 16, (reads.count - before, products)


def test_products_are_the_same_on_an_accelerator_and_read_counts_only():
    plain = objective()
    V = torch.randn(plain.space.dim, 2, generator=seeded())
    functions = {
        "hvp": lambda o, V: o.hvp(V),
        "ggnvp": lambda o, V: o.ggnvp(V),
        "fisher_vp": lambda o, V: o.fisher_vp(V),
        "mc_fisher_vp": lambda o, V: o.mc_fisher_vp(V),
    }
    here = {name: f(plain, V) for name, f in functions.items()}
    diagonal = plain.ggn_diagonal()
    with accelerator() as reads:
        there = objective(far(network()))
        W = V.to(FAR)
        for name, f in functions.items():
            f(there, W)  # what is tried once
            reads.count = 0
            assert torch.equal(f(there, W).near, here[name]), name
            assert reads.count <= 2, name  # the number of loss terms of a batch, at most
        found = there.ggn_diagonal()
        assert isinstance(found, Far)
        assert torch.allclose(found.near, diagonal, rtol=1e-5)


# -- CUDA --------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("name", ["sphere", "deflated", "quadrature", "lanczos"])
def test_estimators_on_cuda_are_those_of_the_cpu_within_errors(name):
    H = sk.hessian(objective())
    A = sk.hessian(objective(network().cuda()))
    truth = float(H.to_dense().trace())
    shared = [Analysis(objective(m)).spectral() for m in (network(), network().cuda())]
    if name == "lanczos":
        a, b = lanczos(H, generator=seeded()), lanczos(A, generator=seeded("cuda"))
        assert b.largest_vectors.is_cuda
        assert abs(a.largest[0] - b.largest[0]) <= a.largest_residuals[0] + b.largest_residuals[0]
        assert abs(a.smallest[0] - b.smallest[0]) <= (
            a.smallest_residuals[0] + b.smallest_residuals[0]
        )
        return
    if name == "sphere":
        both = (
            xtrace(H, num_matvecs=20, generator=seeded()),
            xtrace(A, num_matvecs=20, generator=seeded("cuda")),
        )
    elif name == "deflated":
        both = tuple(s.trace(num_probes=16) for s in shared)
    else:
        sums = [s.quadrature(num_probes=8, num_steps=8).sums(lambda x: x) for s in shared]
        for x in sums:
            assert abs(x.mean() - truth) <= 5 * x.std() / len(x) ** 0.5 + 1e-4 * abs(truth)
        return
    for e in both:
        assert abs(e.value - truth) <= 5 * e.probe_error + 1e-4 * abs(truth)


@needs_cuda
def test_scores_and_spectra_on_cuda_are_those_of_the_cpu_within_errors():
    here, there = (objective(m) for m in (network(), network().cuda()))
    assert there.gradient().is_cuda
    assert torch.allclose(there.ggn_diagonal().cpu(), here.ggn_diagonal(), rtol=1e-3, atol=1e-6)
    scores = [sk.score(o) for o in (here, there)]
    spectra = [sk.spectrum(o, k=2).scores for o in (here, there)]
    for a, b in zip([*scores[0], *spectra[0]], [*scores[1], *spectra[1]], strict=True):
        assert (a.error, b.error) == (None, None)
        allowed = 5 * ((a.estimate.probe_error or 0) + (b.estimate.probe_error or 0))
        gap = abs(a.estimate.value - b.estimate.value)
        assert gap <= allowed + 1e-2 * abs(a.estimate.value), a.measure


# -- dtypes ------------------------------------------------------------------------------


def test_vectors_are_float32_at_least():
    half = sk.Objective(network().bfloat16(), CE, data(torch.bfloat16))
    v = half.theta
    assert half.model_dtype == torch.bfloat16
    for vector in (v, half.gradient(), half.hvp(v), half.ggnvp(v), half.ggn_diagonal()):
        assert vector.dtype == torch.float32
    assert half.value().dtype == torch.float64
    pairs = lanczos(sk.hessian(half), tol=0.01, generator=seeded())
    assert pairs.largest_vectors.dtype == torch.float32


def test_bfloat16_agrees_with_float32_within_errors_and_rounding():
    half = network().bfloat16()
    single = sk.Objective(
        copy.deepcopy(half).float(), CE, data(torch.bfloat16), dtype=torch.float32
    )
    half = sk.Objective(half, CE, data(torch.bfloat16))
    requests = ["top_eigenvalues:tol=0.01", "hessian_trace:num_probes=16"]
    eps = torch.finfo(torch.bfloat16).eps
    for a, b in zip(sk.score(half, requests), sk.score(single, requests), strict=True):
        gap = abs(a.estimate.value - b.estimate.value)
        rounding = 4 * eps * abs(b.estimate.value)  # a few products in a row are rounded
        assert gap <= a.estimate.probe_error + b.estimate.probe_error + rounding, a.measure


def test_float64_on_request():
    model = network()
    double = sk.Objective(model, CE, data(), dtype=torch.float64)
    v = double.theta
    exact = sk.Objective(copy.deepcopy(model).double(), CE, data(torch.float64))
    assert v.dtype == double.hvp(v).dtype == double.ggn_diagonal().dtype == torch.float64
    assert float((double.hvp(v) - exact.hvp(v)).norm()) < 1e-14 * float(exact.hvp(v).norm())
    assert next(model.parameters()).dtype == torch.float32  # the module is as it was
    pairs = lanczos(sk.hessian(double), generator=seeded())
    assert pairs.largest_vectors.dtype == torch.float64
    dense = torch.linalg.eigvalsh(sk.hessian(exact).to_dense())
    assert pairs.largest[0] == pytest.approx(float(dense[-1]), rel=1e-6)


def test_paths_are_the_same_on_an_accelerator():
    def measured(here):
        a, b = here.theta, here.theta.flip(0)
        found = align(here, b, ("permutation", "scale"), restarts=1)
        bend = connect(here, a, b, epochs=2, batch_size=8).path.bends[0]
        top = barrier(here, SegmentPath(a, found.theta), 5, ("loss", "error"), groups=4)
        _, markers = plane_through(a, b, bend)
        return [found.distance_after, *top.loss.rises, top.error, *markers[2].coordinates]

    def build():
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
    expected = measured(objective(model))
    with accelerator():
        found = measured(objective(far(model)))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
