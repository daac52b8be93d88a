"""Two and three gloo processes measure what one process with all their data measures."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from distributed_worker import ALL, LAYOUTS, MEASURED, PRODUCTS, SCORED, SLOWLY_SCORED

import sharpkit as sk
from sharpkit.errors import SettingsError
from sharpkit.estimators import basis
from sharpkit.objective import checks
from sharpkit.team import SOLO, Team, checksum, interleaved

HERE = Path(__file__).parent
TOLERANCE = 1e-12  # of a sum in float64 whose order alone differs


def environment():
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def together(folder, speed):
    """What each of three ranks saved, alone with a second one and together."""
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "distributed_worker.py", str(rank), folder / "store",
             folder, speed],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        for process in processes:
            _, errors = process.communicate(timeout=900)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    saved = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(3)]
    return {size: [found[size] for found in saved[:size]] for size in (2, 3)}


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    return together(tmp_path_factory.mktemp("ranks"), "fast")


@pytest.fixture(scope="module")
def slow_groups(tmp_path_factory):
    return together(tmp_path_factory.mktemp("slow"), "slow")


@pytest.fixture(params=[2, 3], ids=["2 ranks", "3 ranks, one empty"])
def ranks(request, groups):
    return groups[request.param]


@pytest.fixture
def three(groups):
    return groups[3]


def same(found, expected, tolerance=TOLERANCE):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            scale = float(value.abs().max()) or 1.0
            assert found[name].shape == value.shape, name
            assert float((found[name] - value).abs().max()) <= tolerance * scale, name
        elif name == "margins":  # a sentence, after which rank it is of
            assert found[name].endswith(value)
        else:
            assert found[name] == value, name


def identical(a, b):
    """Whether two ranks have the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b or (a != a and b != b)


def equal_readings(ranks, name):
    expected, _ = worker.readings(worker.objective(ALL[name], len(ranks)))
    for rank in ranks:
        same(rank[name][0], expected)
        assert identical(rank[name], ranks[0][name])


@pytest.mark.parametrize(
    ("size", "name"), [(size, name) for size, names in MEASURED.items() for name in names]
)
def test_what_the_data_say_is_that_of_one_process(groups, size, name):
    equal_readings(groups[size], name)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ALL)
def test_every_case_is_that_of_one_process(slow_groups, size, name):
    equal_readings(slow_groups[size], name)


def test_a_hessian_product_is_that_of_the_dense_matrix(ranks):
    case = ALL["masked tokens"]
    alone = worker.objective(case, len(ranks))
    loss, g, H = case.dense(alone)
    V = worker.vectors(alone)
    found = ranks[1]["masked tokens"][0]
    assert abs(float(found["value"] - loss)) < 1e-12
    assert float((found["gradient"] - g).norm() / g.norm()) < 1e-12
    assert float((found["hvp"] - H @ V).norm() / (H @ V).norm()) < 1e-11


def test_a_block_of_products_takes_one_all_reduce(ranks):
    for rank in ranks:
        for name in MEASURED[len(ranks)]:
            assert rank[name][1] == dict.fromkeys([*PRODUCTS, "gradient"], 1)


def test_every_way_of_products_agrees(three):
    expected = worker.ways(ALL["mlp, cross-entropy"], len(three))
    by_differences = expected.pop("central_difference")
    for rank in three:
        ways = dict(rank["ways"])
        same({"differences": ways.pop("central_difference")}, {"differences": by_differences}, 1e-6)
        same(ways, expected)


def test_a_batch_loss_sums_terms_over_ranks(three):
    expected = worker.from_batch_loss(len(three))
    for rank in three:
        same(rank["batch loss"], expected)


def test_the_users_model_is_left_alone(three):
    assert all(rank["untouched"] for rank in three)


@pytest.mark.parametrize(
    ("size", "name", "options"),
    [
        (3, "eigenpairs", {}),
        (2, "sharded eigenpairs", {}),
        (3, "sharded eigenpairs", {}),
        (3, "sharded restarts", {"max_basis": 20}),
        (3, "sharded blocks", {"block_size": 2}),
    ],
)
def test_eigenpairs_are_those_of_one_process(groups, size, name, options):
    ranks = groups[size]
    expected = worker.eigenpairs(worker.wide(size), **options)
    for rank in ranks:
        same({"values": rank[name]["values"]}, {"values": expected["values"]}, 1e-10)
        same({"vectors": rank[name]["vectors"]}, {"vectors": expected["vectors"]}, 1e-6)
        assert identical(rank[name], ranks[0][name])


def test_each_rank_holds_its_share_of_the_basis(ranks):
    held, values = worker.krylov_bytes(worker.wide(len(ranks)))
    shares = [rank["krylov"][0] for rank in ranks]
    assert held <= sum(shares) <= 1.05 * held
    assert max(shares) <= 1.05 * held / len(ranks)
    for rank in ranks:
        same({"ritz": rank["krylov"][1]}, {"ritz": values}, 1e-10)


def test_probes_shared_out_are_the_same_bits(groups):
    expected = worker.probes(2)
    for rank in groups[2]:
        same(rank["probes"], expected, 1e-10)
        for name in PRODUCTS:
            assert torch.equal(rank["probes"][name], expected[name])


def numbers(score):
    """The value and the errors of a score, NaN where there is none."""
    estimate = score["estimate"] or {}
    found = [estimate.get(key) for key in ("value", "probe_error", "data_error")]
    return [math.nan if x is None else float(x) for x in found]


def equal_scores(ranks, name, tolerance):
    alone = worker.scores(ALL[name], len(ranks))
    for rank in ranks:
        found = rank["scores"][name]
        assert identical(found, ranks[0]["scores"][name])
        assert [s["measure"] for s in found] == [s["measure"] for s in alone]
        for one, many in zip(alone, found, strict=True):
            assert one["error"] == many["error"]
            a, b = numbers(one), numbers(many)
            label = one["measure"]
            assert math.isnan(a[0]) == math.isnan(b[0]), label
            if not math.isnan(a[0]):
                assert b[0] == pytest.approx(a[0], rel=tolerance, abs=1e-15), label
            # An error may be rounding itself, so it is compared on the value's scale.
            for x, y in zip(a[1:], b[1:], strict=True):
                scale = max(abs(x), 1e-4 * abs(a[0])) if math.isfinite(x) else 1.0
                assert identical(x, y) or abs(x - y) <= 1e-5 * scale, label


def test_scores_are_those_of_one_process(groups):
    equal_scores(groups[2], SCORED, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", SLOWLY_SCORED)
def test_scores_of_other_networks_are_those_of_one_process(slow_groups, size, name):
    equal_scores(slow_groups[size], name, 1e-8)


# -- what goes wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["value", "gradient", "hvp", "groups"])
def test_an_error_on_one_rank_is_raised_on_all(three, name):
    said = [rank["failures"][name] for rank in three]
    assert said[1][0] == "ValueError: no luck"
    others = [text for i, (text, _) in enumerate(said) if i != 1]
    assert others == ["DistributedError: Rank 1: ValueError: no luck"] * len(others)
    assert max(seconds for _, seconds in said) < 60


def test_what_cannot_be_sent_is_told_to_all(three):
    said = [rank["failures"]["unsendable"][0] for rank in three]
    assert said[0] == said[2] == f"DistributedError: Rank 1: {said[1]}"
    assert "ickl" in said[1]


def test_an_error_does_not_end_the_measurement(three):
    assert all(rank["failures"]["goes on"][0] == "" for rank in three)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("construction", "ObjectiveError: Rank 1: The model or the loss failed on a batch"),
        ("not finite", "ObjectiveError: Rank 1: Expected a finite loss"),
        ("changing", "ObjectiveError: Rank 1: Expected the same examples in every pass"),
        ("parameters", "Rank 1 differs from rank 0 in 2.bias. Load the same checkpoint"),
        ("settings", "Rank 1 differs from rank 0 in "),
        ("other data for probes", "Expected the same data on all ranks"),
        ("no terms", "Expected at least one loss term"),
        ("vectors", "have other vectors or parameters than rank 0"),
        ("afterwards", "have other vectors or parameters than rank 0"),
        ("other objectives", "do different things than rank 0"),
        ("alike", "Expected vectors of shape"),
        ("margins", "MeasureError"),
    ],
)
def test_all_ranks_say_the_same(three, name, sentence):
    for rank in three:
        text, seconds = rank["failures"][name]
        assert sentence in text
        assert text == three[0]["failures"][name][0]
        assert seconds < 60


# -- without processes ---------------------------------------------------------------------


def test_one_process_shares_nothing():
    case = ALL["mlp, cross-entropy"]
    alone = case.objective()
    for options in ({}, {"share": "probes"}):
        world = case.objective(process_group="world", **options)
        assert torch.equal(world.gradient(), alone.gradient())
        assert world.team.alone
        assert world.team.num_sums == 0
        assert repr(world) == repr(alone)


def test_a_group_that_is_none_is_refused(monkeypatch):
    case = ALL["mlp, cross-entropy"]
    with pytest.raises(SettingsError, match="None, 'world' or a group"):
        case.objective(process_group="all")
    with pytest.raises(SettingsError, match=r"Got int\."):
        case.objective(process_group=3)
    with pytest.raises(SettingsError, match="'data' or 'probes'"):
        case.objective(process_group="world", share="columns")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="init_process_group"):
        case.objective(process_group="world")


class Ranked(Team):
    """A rank of several, for what needs no communication."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.size = rank, size


def dealt(monkeypatch, data, size=3):
    found = []
    for rank in range(size):
        monkeypatch.setattr(sk.distributed, "Team", lambda _, rank=rank: Ranked(rank, size))
        found.append(sk.distributed.shard(data))
    return found


class Stream:
    """A re-iterable without a length."""

    def __iter__(self):
        return iter(range(7))


def test_every_batch_goes_to_one_rank(monkeypatch):
    assert [list(part) for part in dealt(monkeypatch, list(range(7)))] == [
        [0, 3, 6], [1, 4], [2, 5],
    ]  # fmt: skip
    assert [list(part) for part in dealt(monkeypatch, Stream())] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [list(part) for part in dealt(monkeypatch, [5])] == [[5], [], []]
    parts = dealt(monkeypatch, Stream())
    assert list(parts[1]) == list(parts[1])


class Counted(torch.utils.data.Dataset):
    """Remembers what was read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 11

    def __getitem__(self, i):
        self.read.append(i)
        return torch.tensor(i)


def test_a_rank_reads_its_own_examples_alone(monkeypatch):
    data = Counted()
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    parts = dealt(monkeypatch, loader)
    assert [[b.tolist() for b in part] for part in parts] == [
        [[0, 1], [6, 7]],
        [[2, 3], [8, 9]],
        [[4, 5], [10]],
    ]
    assert [len(part) for part in parts] == [2, 2, 2]
    data.read.clear()
    list(parts[1])
    assert data.read == [2, 3, 8, 9]
    whole = dealt(monkeypatch, data)
    assert [len(list(part)) for part in whole] == [1, 0, 0]


def test_loaders_that_shuffle_and_single_batches_are_refused(monkeypatch):
    loader = torch.utils.data.DataLoader(Counted(), batch_size=2, shuffle=True)
    with pytest.raises(SettingsError, match="shuffle=False"):
        dealt(monkeypatch, loader)
    with pytest.raises(SettingsError, match="one batch"):
        dealt(monkeypatch, (torch.ones(2, 1), torch.ones(2)))


def test_a_solo_team_gives_back_what_it_is_given():
    ones = torch.ones(2)
    assert SOLO.sum(lambda: [ones], [((2,), ones.dtype)], ones.device)[0] is ones
    assert SOLO.gather(lambda: 3) == [3]
    assert SOLO.first(lambda: 3) == 3
    assert SOLO.join(ones[:, None], [2]).shape == (2, 1)
    assert interleaved([[], [1]]) == [1]
    assert int(checksum(torch.zeros(0))) == 0


def test_layouts_hold_every_batch_in_order():
    for sizes, owned in LAYOUTS.values():
        assert interleaved(owned) == list(range(len(sizes)))
        assert sum(sizes) == 11


# -- the page ------------------------------------------------------------------------------

PAGE = (HERE.parent / "docs" / "distributed.md").read_text()


def script(folder):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    path = folder / "measure.py"
    path.write_text(code)
    return path


ABORT = "terminate called without an active exception"  # of torch's gloo, at exit: see the page


def run_script(folder, *launcher):
    said = set()
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, *launcher, script(folder)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
        said.add(done.stdout)
        if ABORT not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert len(said) == 1  # a process that aborted at its exit had said everything
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.slow
def test_the_pages_script_says_the_same_alone_and_under_torchrun(tmp_path):
    alone = run_script(tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert len(alone) == 2
    assert run_script(tmp_path, *launcher) == alone


def test_the_pages_command_and_names_exist():
    assert "torchrun --nproc-per-node 2 measure.py" in PAGE
    assert basis.SHARED == 16384
    assert checks.HEAD_EXAMPLES == 64


@pytest.mark.slow
def test_ranks_with_sums_of_different_sizes_end_and_do_not_wait(tmp_path):
    path = tmp_path / "torn.py"
    path.write_text(
        "import sys, torch, sharpkit as sk, distributed_worker as worker\n"
        "import torch.distributed as dist\n"
        "rank = int(sys.argv[1])\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=rank,"
        " world_size=2)\n"
        "worker.GROUPS[2] = 'world'\n"
        "made = worker.objective(worker.ALL['mlp, cross-entropy'], 2, rank)\n"
        "V = worker.vectors(made)\n"
        "made.hvp(V[:, 0])\n"
        "made.hvp(V) if rank else made.hvp(V[:, :2])\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, path, str(rank), tmp_path / "store"],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode for process in processes)
    assert any("Expected all 2 ranks to take part in a sum" in text for text in said)
