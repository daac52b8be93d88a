"""Lanczos runs that restart, come in blocks, start warm, are shared or stored elsewhere."""

import math

import numpy as np
import pytest
import torch
from test_estimators import HARD, SPECTRA, from_eigenvalues, generator

from sharpkit.errors import SettingsError, ShapeError
from sharpkit.estimators import basis, lanczos
from sharpkit.estimators.basis import Basis, Storage
from sharpkit.estimators.krylov import Krylov
from sharpkit.operators import SymmetricOperator

ALL = {**SPECTRA, **HARD}
WAYS = {
    "restarts": {"max_basis": 20},
    "blocks": {"block_size": 2},
    "blocks that restart": {"block_size": 3, "max_basis": 26},
    "bfloat16": {"storage": Storage(dtype=torch.bfloat16)},
    "float32": {"storage": Storage(dtype=torch.float32)},
    "bfloat16, blocks that restart": {
        "storage": Storage(dtype=torch.bfloat16), "block_size": 2, "max_basis": 20,
    },
}  # fmt: skip
SLOW = {"tight cluster", "square-root edge"}  # run to the budget


def wrap(A):
    return SymmetricOperator.wrap(A)


def wrong_pairs(A, values, pairs):
    """Whether a converged result misses a true eigenvalue; checks what always holds."""
    found = np.array([*pairs.largest, *pairs.smallest])
    errors = np.array([*pairs.largest_residuals, *pairs.smallest_residuals])
    vectors = torch.cat([pairs.largest_vectors, pairs.smallest_vectors], dim=1).to(A.dtype)
    true = (A @ vectors - vectors * torch.tensor(found, dtype=A.dtype)).norm(dim=0).numpy()
    assert (true <= errors * (1 + 1e-6) + 1e-12).all()
    assert torch.allclose(vectors.norm(dim=0), torch.ones(len(found), dtype=A.dtype), atol=1e-5)
    assert pairs.upper_bound >= values[-1] - 1e-9
    assert pairs.lower_bound <= values[0] + 1e-9
    if not pairs.converged:
        return False
    truth = np.array([*values[::-1][: len(pairs.largest)], *values[: len(pairs.smallest)]])
    return bool((abs(found - truth) > errors + 1e-12 * abs(values).max()).any())


def clipped(way, n):
    settings = dict(WAYS[way])
    for name in ("max_basis", "block_size"):
        if name in settings:
            settings[name] = min(settings[name], n)
    return settings


@pytest.mark.parametrize("name", [name for name in ALL if name != "repeated bulk"])
@pytest.mark.parametrize("way", WAYS)
def test_errors_hold_however_the_space_is_built(way, name):
    values, wrong, converged = np.sort(ALL[name]), 0, 0
    n, rounded = len(values), "storage" in WAYS[way]
    for seed in range(1 if rounded else 2):
        A = from_eigenvalues(values, seed)
        for k, tol, which in [(1, 1e-2, "both"), (3, 1e-6, "largest")]:
            if k > n:
                continue
            operator = wrap(A)
            pairs = lanczos(
                operator, k=k, tol=tol, which=which, max_matvecs=150,
                generator=generator(seed), **clipped(way, n),
            )  # fmt: skip
            wrong += wrong_pairs(A, values, pairs)
            converged += pairs.converged
            assert pairs.num_matvecs == operator.num_matvecs
            if not rounded:
                assert pairs.num_matvecs <= 150
    assert wrong == 0
    if way in ("restarts", "blocks") and name not in SLOW:
        assert converged > 0


@pytest.mark.parametrize("way", ["restarts", "blocks", "blocks that restart"])
def test_single_precision_states_its_rounding(way):
    for name in ("outliers and bulk", "indefinite, near ties", "duplicates"):
        values = np.sort(ALL[name])
        for seed in range(3):
            A = from_eigenvalues(values, seed)
            pairs = lanczos(
                wrap(A.float()), k=2, tol=1e-4, generator=generator(seed), **WAYS[way]
            )  # fmt: skip
            gaps = np.abs(np.array(pairs.largest) - values[::-1][:2])
            assert (gaps <= np.array(pairs.largest_residuals)).all()
            assert min(pairs.largest_residuals) >= 1e-6 * abs(values).max()
            assert gaps.max() <= 1e-3 * abs(values).max()


def test_a_basis_in_bfloat16_gives_eigenvalues_far_below_its_rounding():
    values = np.sort(ALL["semicircle"])
    A = from_eigenvalues(values)
    for seed in range(5):
        pairs = lanczos(
            wrap(A), tol=1e-3, generator=generator(seed), storage=Storage(dtype=torch.bfloat16)
        )
        assert pairs.converged
        assert pairs.largest[0] == pytest.approx(values[-1], abs=1e-5)


def test_the_matrix_s_own_device_is_no_other_place():
    A = from_eigenvalues(ALL["semicircle"])
    here = lanczos(wrap(A), k=2, generator=generator(), storage=Storage(device="cpu"))
    assert here.largest == lanczos(wrap(A), k=2, generator=generator()).largest


# -- the relation ---------------------------------------------------------------------------


def check_relation(krylov, A, tolerance=1e-11):
    """V orthonormal, A V = V T + X R (+ locked), all recomputed densely."""
    scale = max(float(torch.linalg.matrix_norm(A, 2)), 1e-30)
    V = krylov.basis.combine(torch.eye(krylov.size, dtype=A.dtype))
    eye = torch.eye(krylov.size, dtype=A.dtype)
    assert (V.T @ V - eye).abs().max() < tolerance
    values, S, residuals = krylov.ritz()
    T = torch.tensor(S * values @ S.T, dtype=A.dtype)
    assert (V.T @ A @ V - T).abs().max() < tolerance * scale
    rest = A @ V - V @ T
    held = torch.zeros_like(rest)
    if krylov.locked is not None:
        assert (krylov.locked.T @ V).abs().max() < tolerance
        held = krylov.locked @ (krylov.locked.T @ rest)
    X, coupling = krylov.beyond()
    if X is not None:
        assert (X.T @ V).abs().max() < tolerance
        assert (X.T @ X - torch.eye(X.shape[1], dtype=A.dtype)).abs().max() < tolerance
        rest = rest - X @ torch.tensor(coupling, dtype=A.dtype)
    assert (rest - held).abs().max() < tolerance * scale
    vectors = krylov.vectors(S)
    true = (A @ vectors - vectors * torch.tensor(values, dtype=A.dtype)).norm(dim=0).numpy()
    assert true == pytest.approx(residuals, rel=1e-6, abs=1e-10 * scale)


NAMES = ("outliers and bulk", "indefinite, near ties", "duplicates", "low rank", "identity")
BLOCKS = [(1, None), (1, 9), (3, None), (3, 17), (2, 8)]


@pytest.mark.parametrize(
    ("name", "block", "most"),
    [(n, *b) for n in NAMES for b in BLOCKS] + [("five", 1, None), ("five", 3, None)],
)
@pytest.mark.parametrize("lock", [False, True])
def test_the_relation_holds_after_steps_restarts_and_going_back(name, block, most, lock):
    A = from_eigenvalues(ALL[name])
    n = len(A)
    locked = torch.linalg.qr(A[:, :2] + torch.eye(n, dtype=A.dtype)[:, :2])[0] if lock else None
    krylov = Krylov(wrap(A), generator(), locked, block=min(block, n), max_basis=most, keep=(2, 2))
    undone = 0
    for step in range(24):
        if krylov.exhausted:
            break
        krylov.step()
        assert krylov.size <= (most or n)
        if step % 4 == 3 or krylov.exhausted:
            check_relation(krylov, A)
        if step == 15 and len(krylov.steps) > 2:
            want = [x.copy() for x in krylov.ritz(2)[::2]]
            krylov.truncate(2)
            assert len(krylov.steps) == 2
            undone = krylov.matrix.num_matvecs - krylov.num_products
            assert undone > 0
            for a, b in zip(krylov.ritz()[::2], want, strict=True):
                assert a == pytest.approx(b, rel=1e-9, abs=1e-12)
            check_relation(krylov, A)
    assert krylov.exhausted or krylov.restarts or most is None
    assert krylov.num_products == krylov.matrix.num_matvecs - undone


def test_a_restart_keeps_the_outermost_pairs_of_the_ends_wanted():
    A = from_eigenvalues(ALL["semicircle"])
    for keep in [(3, 3), (0, 4), (4, 0)]:
        krylov = Krylov(wrap(A), generator(), max_basis=14, keep=keep)
        for _ in range(14):
            krylov.step()
        before = krylov.ritz()[0]
        krylov.step()
        assert krylov.restarts == 1
        after = krylov.ritz()[0]
        low, high = keep
        assert (after[: max(low, 1)] <= before[: max(low, 1)] + 1e-12).all() or low == 0
        assert (after[len(after) - high :] >= before[14 - high :] - 1e-12).all()
        if low == 0:  # all of the room for one end
            assert after[0] > before[0]


def test_no_more_vectors_are_held_than_allowed(monkeypatch):
    most, rows = {}, []
    grow = Basis.append

    def append(self, X):
        kept = grow(self, X)
        most[id(self)] = max(most.get(id(self), 0), self.size)
        rows.append(sum(len(c) for c in self._chunks))
        return kept

    monkeypatch.setattr(Basis, "append", append)
    A = from_eigenvalues(ALL["outliers and bulk"])
    for block, which, limit in [
        (1, "both", 16),
        (2, "both", 16),
        (3, "both", 19),
        (1, "largest", 9),
    ]:
        most.clear()
        rows.clear()
        pairs = lanczos(
            wrap(A), k=2, tol=1e-4, which=which, block_size=block, max_basis=limit,
            generator=generator(),
        )  # fmt: skip
        assert pairs.num_restarts > 0
        assert limit - block < max(most.values()) <= limit
        assert max(rows) <= 16 * math.ceil(limit / 16)
        assert pairs.upper_bound == math.inf  # nothing is claimed of a compressed start


def test_restarts_cost_products_and_find_the_same():
    A = from_eigenvalues(ALL["outliers and bulk"])
    whole = lanczos(wrap(A), k=2, which="largest", tol=1e-6, generator=generator())
    small = lanczos(wrap(A), k=2, which="largest", tol=1e-6, max_basis=10, generator=generator())
    assert small.converged
    assert small.num_restarts > 0
    assert whole.num_restarts == 0
    assert small.largest == pytest.approx(whole.largest, rel=1e-9)
    assert whole.num_matvecs <= small.num_matvecs < 4 * whole.num_matvecs


# -- where a basis lies ---------------------------------------------------------------------


@pytest.mark.parametrize("kept", [None, torch.float64, torch.float32])
@pytest.mark.parametrize("width", [1, 3])
def test_products_with_a_basis_are_those_of_its_matrix(monkeypatch, kept, width):
    monkeypatch.setattr(basis, "SLICE", 7)  # more slices than one
    n, dtype = 40, torch.float32 if kept == torch.float64 else torch.float64
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator(), dtype=dtype))[0]
    V = Basis(wrap(torch.eye(n, dtype=dtype)), Storage(dtype=kept))
    assert V.lossy == (kept == torch.float32)
    assert V.coefficients(Q[:, :1]).shape == (0, 1)
    for at in range(0, 36, width):  # 36 vectors: chunks of 16, 16 and 4
        V.append(Q[:, at : at + width])
    held = Q[:, : V.size].to(kept or dtype).to(dtype)
    W = torch.randn(n, width, generator=generator(1), dtype=dtype)
    before, close = W.clone(), {"rtol": 1e-5, "atol": 1e-6} if kept else {}
    C = held.T @ W
    assert torch.allclose(V.coefficients(W), C, **close)
    assert torch.allclose(V.subtract(W, C), W - held @ C, **close)
    assert torch.equal(W, before)  # not changed in place
    assert torch.allclose(V.combine(C[:20]), held[:, :20] @ C[:20], **close)
    S = torch.linalg.qr(torch.randn(36, 19, generator=generator(2), dtype=dtype))[0]
    V.rotate(S)
    assert V.size == 19
    turned = V.combine(torch.eye(19, dtype=dtype))
    assert torch.allclose(turned, held @ S, **close)
    V.truncate(16)
    assert V.size == 16
    assert len(V._chunks) == 1
    V.append(Q[:, 39:])
    assert torch.allclose(V.combine(torch.eye(17, dtype=dtype))[:, 16], Q[:, 39], **close)


def test_sums_of_tall_matrices_are_exact_in_slices(monkeypatch):
    monkeypatch.setattr(basis, "SLICE", 7)
    X, W = torch.randn(2, 30, 3, generator=generator())
    assert torch.allclose(basis.accurate_gram(X, W), X.double().T @ W.double(), atol=1e-14)
    assert torch.allclose(basis.column_dots(X, W), (X.double() * W.double()).sum(0), atol=1e-14)


@pytest.mark.parametrize("name", ["duplicates", "low rank", "identity", "outliers and bulk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_rounded_basis_stays_near_orthonormal_where_nothing_is_left(name, dtype):
    # What is left of a product is then below the basis's rounding, and lies in its span:
    # normalized and taken in, it once made Ritz values of 1e151.
    A = from_eigenvalues(ALL[name])
    krylov = Krylov(wrap(A), generator(), storage=Storage(dtype=dtype))
    while krylov.size < min(80, len(A)) and not krylov.exhausted:
        krylov.step()
    V = krylov.basis.combine(torch.eye(krylov.size, dtype=A.dtype))
    assert abs(torch.linalg.svdvals(V) - 1).max() < 0.02
    assert abs(krylov.ritz()[0]).max() <= 1.02 * max(abs(np.array(ALL[name])))


# -- a run that others share ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["outliers and bulk", "indefinite, near ties", "semicircle", "clustered", "five"])  # fmt: skip
@pytest.mark.parametrize("done", [0, 1, 24, 90])
@pytest.mark.parametrize("block", [1, 2])
def test_a_shared_run_gives_what_an_own_one_gives(name, done, block):
    A = from_eigenvalues(ALL[name])
    settings = {"k": 2, "tol": 1e-4, "block_size": block}
    own = lanczos(wrap(A), generator=generator(3), **settings)
    random, operator = generator(3), wrap(A)
    krylov = Krylov(operator, random, block=block)
    for _ in range(done):
        krylov.step()
    head = len(krylov.steps)
    for _ in range(2):  # the second time the run has been used
        state = random.get_state()
        shared = lanczos(operator, generator=random, krylov=krylov, **settings)
        random.set_state(state)
        for field in ("largest", "smallest", "largest_residuals", "smallest_residuals"):
            assert getattr(shared, field) == pytest.approx(getattr(own, field), rel=1e-6, abs=1e-10)
        for field in ("num_steps", "num_matvecs", "second_start", "converged", "num_restarts"):
            assert getattr(shared, field) == getattr(own, field)
        # The bounds too: a longer run is no reason to claim more of values from its head.
        assert shared.upper_bound == pytest.approx(own.upper_bound, rel=1e-9)
        assert shared.lower_bound == pytest.approx(own.lower_bound, rel=1e-9)
        assert len(krylov.steps) == max(head, 1)
    check_relation(krylov, A)
    before = krylov.size
    krylov.step()
    assert krylov.size > before or before == len(A)
    check_relation(krylov, A)


def test_the_budget_of_a_shared_run_counts_what_was_done():
    A = from_eigenvalues(ALL["semicircle"])
    own = lanczos(wrap(A), k=3, max_matvecs=12, generator=generator(1))
    random, operator = generator(1), wrap(A)
    krylov = Krylov(operator, random)
    for _ in range(30):
        krylov.step()
    shared = lanczos(operator, k=3, max_matvecs=12, generator=random, krylov=krylov)
    assert shared.num_matvecs == own.num_matvecs == 12
    assert shared.largest == pytest.approx(own.largest, rel=1e-12)


def test_a_shared_run_that_restarts_stays_a_run():
    values = np.sort(ALL["outliers and bulk"])
    A = from_eigenvalues(values)
    random, operator = generator(), wrap(A)
    krylov = Krylov(operator, random, max_basis=20, keep=(3, 3))
    for _ in range(10):
        krylov.step()
    pairs = lanczos(operator, k=2, tol=1e-4, max_basis=20, generator=random, krylov=krylov)
    assert pairs.num_restarts > 0
    assert not wrong_pairs(A, values, pairs)
    check_relation(krylov, A)
    again = lanczos(operator, k=2, tol=1e-4, max_basis=20, generator=random, krylov=krylov)
    assert not wrong_pairs(A, values, again)
    assert again.largest == pytest.approx(pairs.largest, rel=1e-4)


@pytest.mark.parametrize(("block", "budget"), [(2, 7), (3, 10), (3, 31), (2, 41)])
def test_blocks_stay_within_the_budget(block, budget):
    operator = wrap(from_eigenvalues(ALL["semicircle"]))
    pairs = lanczos(operator, tol=1e-9, block_size=block, max_matvecs=budget, generator=generator())
    assert budget - block < pairs.num_matvecs == operator.num_matvecs <= budget
    assert not pairs.converged


# -- blocks and warm starts -----------------------------------------------------------------


@pytest.mark.parametrize("most", [None, 16])
def test_a_block_of_two_finds_a_double_eigenvalue_in_its_first_run(most):
    A = from_eigenvalues([9.0, 9.0, *np.linspace(-4, 4, 150)])
    for seed in range(5):
        krylov = Krylov(wrap(A), generator(seed), block=2, max_basis=most, keep=(1, 3))
        single = Krylov(wrap(A), generator(seed), max_basis=most, keep=(1, 3))
        for _ in range(9):
            krylov.step()
            single.step()
            single.step()
        assert krylov.ritz()[0][-2:] == pytest.approx([9.0, 9.0], abs=1e-4)
        assert single.ritz()[0][-2] < 4.5
        pairs = lanczos(
            wrap(A), k=2, which="largest", block_size=2, max_basis=most, generator=generator(seed)
        )
        assert pairs.largest == pytest.approx((9.0, 9.0), abs=1e-5)
        assert pairs.converged
        assert pairs.second_start == "agreed"


@pytest.mark.parametrize("block", [1, 2])
def test_a_warm_start_needs_fewer_products(block):
    values = [30.0, 20.0, *np.linspace(0, 9.9, 150)]
    A = from_eigenvalues(values)
    noise = torch.randn(A.shape, generator=generator(5), dtype=A.dtype)
    near = A + 0.01 * (noise + noise.T)
    start = torch.linalg.eigh(near)[1][:, -2:]
    for seed in range(5):
        settings = {"k": 2, "which": "largest", "tol": 1e-6, "block_size": block}
        cold = lanczos(wrap(A), generator=generator(seed), **settings)
        warm = lanczos(wrap(A), generator=generator(seed), start=start, **settings)
        assert warm.converged
        assert warm.largest == pytest.approx(cold.largest, rel=1e-9)
        assert warm.num_steps < cold.num_steps
        assert block > 1 or warm.num_matvecs < cold.num_matvecs
        assert warm.upper_bound == math.inf  # the bound is for a random start


def test_a_warm_start_does_not_hide_what_it_is_orthogonal_to():
    values = np.sort([5.0, 4.0, 3.0, *np.linspace(-1, 1, 100)])
    A = from_eigenvalues(values)
    vectors = torch.linalg.eigh(A)[1]
    for seed in range(5):
        pairs = lanczos(wrap(A), start=vectors[:, -2:-1], generator=generator(seed))
        assert pairs.largest[0] == pytest.approx(5.0, abs=1e-6)
        assert not wrong_pairs(A, values, pairs)
        sign = torch.tensor([1.0, -1.0])
        opposed = lanczos(
            wrap(A), start=vectors[:, -1:] * sign, generator=generator(seed)
        )  # their mean is zero
        assert not wrong_pairs(A, values, opposed)
        random = generator(seed)
        run = Krylov(wrap(A), random, start=vectors[:, -1:])
        assert run.warm
        assert lanczos(run.matrix, generator=random, krylov=run).upper_bound == math.inf


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 31}, "`k` between 1 and the number of parameters, 30. Got 31"),
        ({"block_size": 31}, "`block_size` between 1 and the number of parameters, 30. Got 31"),
        ({"block_size": 0}, "`block_size` between 1 and .* Got 0"),
        ({"max_basis": 31}, "`max_basis` between 6 .* number of parameters, 30. Got 31"),
        ({"max_basis": 0}, "`max_basis` between 6 .* Got 0"),
        ({"k": 5, "max_basis": 13}, r"between 14 \(for 10 pairs\) .* Got 13"),
        ({"k": 5, "which": "largest", "max_basis": 8}, r"between 9 \(for 5 pairs\) .* Got 8"),
        ({"k": 2, "block_size": 4, "max_basis": 13}, r"between 14 .* Got 13"),
        ({"start": torch.ones(30)}, r"`start` of shape \(30, j\). Got \(30,\)"),
        ({"start": torch.ones(29, 2)}, r"`start` of shape \(30, j\). Got \(29, 2\)"),
        ({"start": torch.full((30, 1), math.nan)}, "finite `start`"),
        ({"failure_probability": 0}, "`failure_probability`"),
        (
            {"krylov": Krylov(wrap(torch.eye(30)), generator()), "block_size": 2},
            "the run, 1. Got 2",
        ),
        (
            {"krylov": Krylov(wrap(torch.eye(30)), generator()), "start": torch.ones(30, 1)},
            "beside `krylov`",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    error = ShapeError if "`start` of shape" in message else SettingsError
    with pytest.raises(error, match=message):
        lanczos(wrap(torch.eye(30)), generator=generator(), **settings)


@pytest.mark.parametrize("ends", ["both", "largest"])
def test_the_smallest_basis_allowed_works(ends):
    values = np.sort(ALL["indefinite, near ties"])
    A = from_eigenvalues(values)
    for k, block in [(1, 1), (5, 1), (2, 4)]:
        most = k * (2 if ends == "both" else 1) + 2 * block + 2
        pairs = lanczos(
            wrap(A), k=k, which=ends, block_size=block, max_basis=most, max_matvecs=3000,
            tol=1e-3, generator=generator(),
        )  # fmt: skip
        assert not wrong_pairs(A, values, pairs)
        assert pairs.num_restarts > 0
