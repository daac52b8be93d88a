"""Runs of studies: the same numbers whoever works, one bad file does not stop the rest."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from study_cases import RECIPE, make
from test_study_kill import numbers

import sharpkit as sk
from sharpkit import measures
from sharpkit.cli import run as cli
from sharpkit.errors import RecipeError, SettingsError, StoreError, UnknownMeasureError
from sharpkit.scoring import parse_requests
from sharpkit.study import engines, forecast, work
from sharpkit.study import run as run_module
from sharpkit.study.doctor import shown_duration
from sharpkit.study.identity import Options, Subject
from sharpkit.study.owner import Owner
from sharpkit.study.recipe import load_recipe
from sharpkit.study.run import run_study
from sharpkit.study.store import Store
from sharpkit.study.tables import entries_table, scores_table

FEW = ["hessian_trace", "top_eigenvalues:k=2", "parameter_norm"]


@pytest.fixture
def folder(tmp_path):
    make(tmp_path, 3)
    return tmp_path


def score(folder, names=FEW, files=None, **named):
    files = sorted(folder.glob("*.pt")) if files is None else files
    return run_study(folder / "study.db", files, folder / "recipe.py", names, **named)


def test_numbers_are_those_of_score_and_are_measured_once(folder):
    report = score(folder)
    assert (report.measured, report.present, report.failed) == (9, 0, ())
    with Store(folder / "study.db", read_only=True) as store:
        (subject,) = store.query("SELECT subject FROM entry WHERE path = 'net1.pt'")[0]
        held = {s.measure: s for s in store.scores(subject, 0)}
    objective, _ = load_recipe(folder / "recipe.py").objective(folder / "net1.pt")
    for expected in sk.score(objective, FEW):
        found = held[expected.measure]
        assert found.settings == expected.settings
        assert found.estimate.value == expected.estimate.value
        assert found.estimate.probe_error == expected.estimate.probe_error
        assert found.estimate.data_error == expected.estimate.data_error
    again = score(folder)
    assert (again.measured, again.present) == (0, 9)


def test_default_measures_are_those_of_score(folder):
    files = [folder / "net0.pt"]
    assert score(folder, None, files).measured > 20
    objective, _ = load_recipe(folder / "recipe.py").objective(files[0])
    with Store(folder / "study.db", read_only=True) as store:
        names = {m for (m,) in store.query("SELECT measure FROM score")}
    assert names == {s.measure for s in sk.score(objective)}
    assert score(folder, None, files).measured == 0


def test_only_what_is_missing_is_measured(folder):
    score(folder, "parameter_norm")
    assert score(folder, ["parameter_norm", "gradient_norm"]).measured == 3
    assert score(folder, "parameter_norm", options=Options(seed=1)).measured == 3
    assert score(folder, "parameter_norm", options=Options(dtype="float64")).measured == 3
    shutil.copy(folder / "net0.pt", folder / "net7.pt")  # the same weights
    assert score(folder, "parameter_norm").measured == 0
    with Store(folder / "study.db", read_only=True) as store:
        rows = scores_table(store, checkpoint="net7.pt")
    assert set(rows["label"]) == {
        f"{n}_norm(dtype=null, seed=0)" for n in ("parameter", "gradient")
    }


def test_a_checkpoint_that_changed_is_measured_again(folder):
    score(folder, "parameter_norm")
    shutil.copy(folder / "net0.pt", folder / "net1.pt")
    torch.save({k: 2 * v for k, v in torch.load(folder / "net2.pt").items()}, folder / "net2.pt")
    assert score(folder, "parameter_norm").measured == 1
    with Store(folder / "study.db", read_only=True) as store:
        values = scores_table(store).set_index("checkpoint")["value"]
    assert len(values) == 3
    assert values["net1.pt"] == values["net0.pt"]


def test_metadata_are_read_anew_without_measuring(folder):
    score(folder, "parameter_norm")
    (folder / "recipe.py").write_text(RECIPE.replace('"gap": number / 10', '"gap": 7.5'))
    assert score(folder, "parameter_norm").measured == 0
    with Store(folder / "study.db", read_only=True) as store:
        assert set(scores_table(store)["meta.gap"]) == {7.5}
    (folder / "recipe.py").write_text(RECIPE.replace("CrossEntropyLoss()", "MultiMarginLoss()"))
    assert score(folder, "parameter_norm").measured == 3


def test_one_bad_checkpoint_is_recorded_and_the_rest_go_on(folder):
    (folder / "net1.pt").write_bytes(b"nothing")
    (folder / "net9.pt").write_bytes((folder / "net2.pt").read_bytes()[:700])
    report = score(folder)
    assert report.measured == 6
    assert {o.entry.path for o in report.failed} == {"net1.pt", "net9.pt"}
    with Store(folder / "study.db", read_only=True) as store:
        table = entries_table(store).set_index("checkpoint")
        long = scores_table(store)
    assert "torch.save" in table.loc["net1.pt", "error"]
    assert long[long["checkpoint"] == "net1.pt"]["measure"].isna().all()
    make(folder, 3)  # mended
    os.unlink(folder / "net9.pt")
    assert score(folder).failed == ()


def test_a_measure_that_fails_is_kept_and_retried_on_request(folder, monkeypatch):
    files = [folder / "net0.pt"]
    usual = work.measure_all

    def fails(analysis, parsed, **named):
        if parsed[0][0].name == "hessian_trace":
            parsed = [(_Broken(), parsed[0][1])]
        return usual(analysis, parsed, **named)

    with monkeypatch.context() as patched:
        patched.setattr(work, "measure_all", fails)
        report = score(folder, files=files)
    assert (report.measured, report.outcomes[0].failed) == (3, 1)
    assert "hessian_trace failed: ValueError: broken" in " ".join(report.outcomes[0].notes)
    again = score(folder, files=files)
    assert (again.measured, again.present) == (0, 3)
    assert score(folder, files=files, retry_failed=True).measured == 1
    with Store(folder / "study.db", read_only=True) as store:
        assert store.query("SELECT count(error) FROM score") == [(0,)]


class _Broken:
    name = "hessian_trace"

    def __call__(self, *_, **__):
        raise ValueError("broken")


def test_wrong_use_is_refused_before_a_file_is_made(folder):
    for named, error in (
        ({"names": "hesian_trace"}, UnknownMeasureError),
        ({"names": ["hessian_trace:k=1"]}, SettingsError),
        ({"workers": 0}, SettingsError),
        ({"threads": -1}, SettingsError),
        ({"engine": "dask"}, SettingsError),
        ({"options": Options(dtype="float3")}, SettingsError),
    ):
        with pytest.raises(error):
            score(folder, **named)
    (folder / "recipe.py").write_text("x = 1")
    with pytest.raises(RecipeError):
        score(folder)
    assert not (folder / "study.db").exists()


def test_a_checkpoint_that_another_process_works_at_is_waited_for(folder):
    files = [folder / "net0.pt"]
    score(folder, "parameter_norm", files)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with Store(folder / "study.db") as store:
            started = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
            owner = Owner(Owner.here().host, child.pid, started, "x")
            (subject,) = store.query("SELECT subject FROM entry")[0]
            with store._writing() as c:
                c.execute(
                    "INSERT INTO claim VALUES (?, 0, ?, ?, NULL, NULL)",
                    (subject, owner.text, time.time()),
                )
        begun = time.perf_counter()
        timer = subprocess.Popen(["sh", "-c", f"sleep 1.5; kill -9 {child.pid}"])
        assert score(folder, "gradient_norm", files).measured == 1
        assert time.perf_counter() - begun > 1.0
        timer.wait()
    finally:
        child.kill()
        child.communicate()


def _hold(folder, subject, owner):
    with Store(folder / "study.db") as store, store._writing() as c:
        c.execute(
            "INSERT INTO claim VALUES (?, 0, ?, ?, NULL, NULL)", (subject, owner.text, time.time())
        )


def test_two_files_of_one_subject_are_both_waited_for(folder, monkeypatch):
    shutil.copy(folder / "net0.pt", folder / "net3.pt")
    score(folder, "parameter_norm")
    with Store(folder / "study.db", read_only=True) as store:
        ((subject,),) = store.query("SELECT subject FROM entry WHERE path = 'net3.pt'")
    owner = Owner.here()
    _hold(folder, subject, owner)
    monkeypatch.setattr(run_module.time, "sleep", lambda _: owner.leave())
    report = score(folder, "parameter_norm")
    assert sorted(o.entry.path for o in report.outcomes) == [f"net{i}.pt" for i in range(4)]
    assert report.present == 4


def test_other_settings_are_another_measurement(folder):
    files = [folder / "net0.pt"]
    score(folder, "top_eigenvalues:k=1", files)
    assert score(folder, ["top_eigenvalues:k=1", "top_eigenvalues:k=2"], files).measured == 1


def test_failures_of_earlier_runs_are_told_again(folder, monkeypatch, capsys):
    files, usual = [folder / "net0.pt"], work.measure_all

    def fails(analysis, parsed, **named):
        return usual(analysis, [(_Broken(), s) for _, s in parsed], **named)

    with monkeypatch.context() as patched:
        patched.setattr(work, "measure_all", fails)
        assert len(score(folder, "hessian_trace", files).failed) == 1
    again = score(folder, "hessian_trace", files)
    assert (again.measured, again.present, again.outcomes[0].failed) == (0, 1, 1)
    assert [o.entry.path for o in again.failed] == ["net0.pt"]
    assert score(folder, "parameter_norm", files).failed == ()  # not asked for
    command = ["score", str(files[0]), "-r", str(folder / "recipe.py"), "-m", "hessian_trace"]
    assert cli([*command, "-o", str(folder / "study.db")]) == 1
    assert "1 measures failed" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [KeyboardInterrupt, StoreError("Expected room. It is full.")])
def test_what_stops_a_run_stops_it_and_the_same_process_can_go_on(folder, monkeypatch, stop):
    usual = work.measure_all

    def stops(analysis, parsed, **named):
        if parsed[0][0].name == "gradient_norm":
            raise stop
        return usual(analysis, parsed, **named)

    names = ["parameter_norm", "gradient_norm"]
    kind = stop if isinstance(stop, type) else type(stop)
    with monkeypatch.context() as patched:
        patched.setattr(work, "measure_all", stops)
        with pytest.raises(kind):
            score(folder, names)
    with Store(folder / "study.db") as store:
        assert store.owners() == []
        assert store.query("SELECT error FROM entry") == [(None,)]  # the first, and not at fault
    monkeypatch.setattr(run_module.time, "sleep", lambda _: pytest.fail("it waits for itself"))
    assert score(folder, names).measured == 5


def test_a_full_disk_does_not_leave_a_claim_that_the_process_waits_for(folder, monkeypatch):
    def full(*_, **__):
        raise StoreError("Expected room. The disk is full.")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "record", full)
        patched.setattr(Store, "finish", full)
        with pytest.raises(StoreError, match="full"):
            score(folder, "parameter_norm")
    monkeypatch.setattr(run_module.time, "sleep", lambda _: pytest.fail("it waits for itself"))
    assert score(folder, "parameter_norm").measured == 3


def test_a_worker_whose_command_ended_stops_after_its_measure(folder, monkeypatch):
    usual, files = run_module.Task, [folder / "net0.pt"]
    monkeypatch.setattr(run_module, "Task", lambda *a: replace(usual(*a), parent=os.getppid() + 1))
    assert score(folder, FEW, files).measured == 0
    monkeypatch.setattr(run_module, "Task", lambda *a: replace(usual(*a), parent=os.getppid()))
    assert score(folder, FEW, files).measured == 3


def test_a_sign_of_life_is_given_during_a_measure(folder, monkeypatch):
    usual, seen, beats = work.measure_all, threading.Event(), []

    def slow(analysis, parsed, **named):
        assert seen.wait(20)
        return usual(analysis, parsed, **named)

    def beat(self, owner):
        beats.append(owner)
        seen.set()

    monkeypatch.setattr(work, "BEAT", 0.05)
    monkeypatch.setattr(work, "measure_all", slow)
    monkeypatch.setattr(Store, "beat", beat)
    score(folder, "parameter_norm", [folder / "net0.pt"])
    assert len({o.token for o in beats}) == 1


def test_code_that_changed_while_a_run_goes_on_is_filed_nowhere(folder, monkeypatch):
    (folder / "parts.py").write_text("scale = 1.0\n")
    text = RECIPE.replace("x[:16], y[:16]", "parts.scale * x[:16], y[:16]")
    (folder / "recipe.py").write_text("import parts\n" + text)
    usual = run_module.source_hash

    def late(path):  # the worker comes to its recipe after somebody has edited it
        found = usual(path)
        (folder / "parts.py").write_text("scale = 100.0\n")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "source_hash", late)
        report = score(folder, "gradient_norm")
    assert report.measured == 0
    assert all("as they were when the run began" in o.error for o in report.outcomes)
    assert score(folder, "gradient_norm").measured == 3


@pytest.mark.parametrize("package", [False, True])
def test_neighbours_that_changed_are_imported_anew(folder, package):
    # As in a notebook: one process, the code edited between two runs.
    (folder / "inner").mkdir()
    if package:
        (folder / "inner" / "__init__.py").write_text("")
    inner = folder / "inner" / "study_scale.py"
    inner.write_text("scale = 1.0\n")
    (folder / "study_parts.py").write_text("from inner import study_scale\nused = study_scale\n")
    text = RECIPE.replace("x[:16], y[:16]", "study_parts.used.scale * x[:16], y[:16]")
    (folder / "recipe.py").write_text("import study_parts\n" + text)
    try:
        assert score(folder, "gradient_norm").measured == 3
        before = sys.modules["study_parts"]
        score(folder, "gradient_norm")
        assert sys.modules["study_parts"] is before  # what did not change stays
        inner.write_text("scale = 100.0\n")
        assert score(folder, "gradient_norm").measured == 3
        with Store(folder / "study.db", read_only=True) as store:
            rows = store.query(
                "SELECT subject, value FROM score WHERE subject IN (SELECT subject FROM entry)"
            )
        (folder / "study.db").unlink()
        for name in ("study_parts", "inner.study_scale", "inner"):
            sys.modules.pop(name)
        score(folder, "gradient_norm")  # as a new process
        with Store(folder / "study.db", read_only=True) as store:
            assert sorted(store.query("SELECT subject, value FROM score")) == sorted(rows)
    finally:
        for name in ("study_parts", "inner.study_scale", "inner"):
            sys.modules.pop(name, None)


def _dying(monkeypatch, at_measure):
    """Let every worker die, at a measure or before, and return how often one did."""
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    deaths = []
    gone = replace(Owner.here(), pid=2**22 - 7)

    def processes(tasks, path, workers, slots):
        for task in tasks:
            with Store(path, check=False) as store:
                if at_measure:
                    subject = Subject("w", "r", "d", "", task.options.text())
                    begun = store.begin(task.entry, subject, "[]", gone, retry=task.retry)
                    if begun.fatal:
                        yield work.Outcome(task.entry, subject.key, failed=1)
                        continue
                    store.start(subject.key, 0, "log_det", "{}")
            deaths.append(task.entry)
            assert len(deaths) < 10, "it never ends"
            raise TerminatedWorkerError

    monkeypatch.setattr(engines, "_processes", processes)
    return deaths


@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize("at_measure", [False, True])
def test_what_kills_its_workers_is_given_up_also_when_failures_are_retried(
    folder, monkeypatch, at_measure, retry
):
    deaths = _dying(monkeypatch, at_measure)
    report = score(folder, "log_det", [folder / "net0.pt"], workers=2, retry_failed=retry)
    assert len(deaths) == 3  # once among others, twice alone
    assert len(report.failed) == 1


def test_a_measure_that_is_given_up_is_recorded_and_not_measured(folder, monkeypatch):
    files = [folder / "net0.pt"]
    score(folder, "parameter_norm", files)
    with Store(folder / "study.db") as store, store._writing() as c:
        ((subject,),) = store.query("SELECT subject FROM entry")
        settings = parse_requests("gradient_norm").parsed[0][1]
        values = (subject, "gradient_norm", work.settings_text(settings))
        c.execute("INSERT INTO death VALUES (?, ?, ?, 0, 2)", values)
    monkeypatch.setattr(work, "measure_all", lambda *_, **__: pytest.fail("it was measured"))
    (outcome,) = score(folder, "gradient_norm", files).outcomes
    assert (outcome.measured, outcome.failed) == (1, 1)
    with Store(folder / "study.db", read_only=True) as store:
        ((error,),) = store.query("SELECT error FROM score WHERE measure = 'gradient_norm'")
    assert "Expected the process to outlive the measure" in error


def test_progress_counts_measures_of_all_checkpoints(folder):
    told = []
    score(folder, FEW, progress=told.append)
    assert (told[-1].done, told[-1].total, told[-1].checkpoints) == (9, 9, 3)
    files = [folder / "net0.pt"]
    score(folder, ["parameter_norm", "all"], files, progress=told.append)
    assert told[-1].total == len(measures.names())
    usual = [n for n in measures.names() if not measures.get(n).dear]
    score(folder, None, files, progress=told.append)
    assert told[-1].total == len(usual)


def test_progress_tells_what_is_measured_now(folder, monkeypatch):
    usual, told = work.measure_all, []

    def slow(analysis, parsed, **named):
        if parsed[0][0].name == "parameter_norm":
            ends = time.monotonic() + 20
            while not told and time.monotonic() < ends:
                time.sleep(0.01)
        return usual(analysis, parsed, **named)

    monkeypatch.setattr(run_module, "POLL", 0.05)
    monkeypatch.setattr(work, "measure_all", slow)

    def tell(at):
        if "parameter_norm" in at.now:
            told.append(at)

    score(folder, FEW, [folder / "net0.pt"], progress=tell)
    assert (told[0].done, told[0].total) == (2, 3)
    assert told[0].now == "net0.pt: parameter_norm"


def test_options_of_the_run_reach_the_objective(folder):
    files = [folder / "net0.pt"]
    options = Options(dtype="float64", params=("0.*",), num_groups=0, seed=5)
    score(folder, "hessian_trace", files, options=options)
    with Store(folder / "study.db", read_only=True) as store:
        (subject,) = store.query("SELECT subject FROM entry")[0]
        (found,) = store.scores(subject, 5)
    assert found.provenance["dtype"] == "float64"
    assert found.provenance["num_parameters"] == 30
    assert found.estimate.data_error is None


def test_slots_of_workers_differ_and_are_freed(tmp_path):
    assert engines.take_slot(str(tmp_path)) == 0
    assert engines.take_slot(str(tmp_path)) == 0
    code = (
        "import sys; from sharpkit.study.engines import take_slot\n"
        "print(take_slot(sys.argv[1]), flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"1\n"
        first.communicate(b"\n")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as second:
        assert second.stdout.readline() == b"1\n"
        second.communicate(b"\n")


def test_forecasts_come_from_the_study_where_it_can_tell(folder):
    files = sorted(folder.glob("*.pt"))
    recipe = folder / "recipe.py"
    with Store(folder / "study.db") as store:
        first = forecast.forecast(store, files, recipe, FEW, Options(), 1)
        assert "3 new (one gradient of net" in first
        assert "Krylov" in first
        score(folder, files=files[:1])
        assert "2 new (from 1 measured" in forecast.forecast(
            store, files, recipe, FEW, Options(), 1
        )
        score(folder)
        assert forecast.forecast(store, files, recipe, FEW, Options(), 1) == ""


def test_forecasts_are_for_the_options_and_workers_of_the_run(folder):
    files, recipe = sorted(folder.glob("*.pt")), folder / "recipe.py"
    score(folder, files=files[:1])
    score(folder, files=files[:1], options=Options(seed=1))
    with Store(folder / "study.db") as store:
        with store._writing() as c:  # 300 s each checkpoint
            c.execute("UPDATE score SET seconds = 100.0")
        said = [
            forecast.forecast(store, files, recipe, FEW, options, workers)
            for options, workers in ((Options(), 1), (Options(), 2), (Options(seed=2), 1))
        ]
        other = forecast.forecast(store, files, recipe, FEW, Options(num_groups=0), 1)
    one, two, three = (f"about {shown_duration(s)}" for s in (600, 300, 900))
    assert said[0].startswith(f"forecast: {one} for 2 new (from 2 measured before)")
    assert said[1].startswith(f"forecast: {two} for 2 new")
    assert said[2].startswith(f"forecast: {three} for 3 new")
    assert "3 new (one gradient of net" in other


# -- the command -------------------------------------------------------------------------


def test_the_command_fills_a_study_and_exports_it(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "net1.pt").write_bytes(b"nothing")
    arguments = ["score", ".", "-r", "recipe.py", "-m", "parameter_norm", "-o", "study.db"]
    assert cli(arguments) == 1
    out, err = capsys.readouterr()
    assert "2 scores measured" in out
    assert "1 of 3 checkpoints failed" in " ".join(out.split())
    assert "net1.pt: Expected" in err
    assert "forecast: about" in err
    assert cli([*arguments, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [c["checkpoint"] for c in document["checkpoints"]] == ["net0.pt", "net1.pt", "net2.pt"]
    assert document["checkpoints"][0]["scores"][0]["measure"] == "parameter_norm"
    assert cli([*arguments, "--json", "--seed", "1"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [c["seed"] for c in document["checkpoints"]] == [1, 1, 1]
    os.unlink("study.db")
    assert cli(arguments) == 1
    capsys.readouterr()
    assert cli(["export", "study.db", "--wide"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("checkpoint,gap,spec.family,spec.width,error,parameter_norm,")
    assert len(lines) == 4
    assert cli(["export", "study.db", "-o", "study.xls"]) == 2
    assert "ends in .csv" in capsys.readouterr().err


def test_the_command_refuses_workers_without_a_study(folder, capsys):
    assert cli(["score", str(folder), "-r", str(folder / "recipe.py"), "--workers", "2"]) == 2
    assert "Add -o STUDY.db" in " ".join(capsys.readouterr().err.split())
    arguments = ["score", str(folder), "-r", str(folder / "recipe.py"), "-o", str(folder / "s.db")]
    assert cli([*arguments, "--engine", "dask"]) == 2
    (folder / "recipe.py").write_text("x = 1")
    assert cli(arguments) == 2
    assert not (folder / "s.db").exists()


# -- other processes ---------------------------------------------------------------------


def _command(folder, *more):
    return [
        sys.executable, "-m", "sharpkit", "score", str(folder), "-r", str(folder / "recipe.py"),
        "-o", str(folder / "study.db"), *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_two_workers_and_ray_give_the_bits_of_one(folder):
    score(folder, None)
    expected = numbers(folder / "study.db")
    for more in (["--workers", "2"], ["--workers", "2", "--engine", "ray"]):
        if "ray" in more:
            pytest.importorskip("ray", reason="Ray is an extra")
        (folder / "study.db").unlink()
        done = subprocess.run(_command(folder, *more), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert numbers(folder / "study.db") == expected


DEADLY = (
    RECIPE
    + """

def model():
    import os, signal, inspect, pathlib
    return torch.nn.Sequential(torch.nn.Linear(4, 6), Deadly(), torch.nn.Linear(6, 3))


class Deadly(torch.nn.Tanh):
    # Ends the process, as the system does for want of memory, for one checkpoint's weights.
    def forward(self, x):
        import os, signal
        if abs(x).max() > 50 and torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_checkpoint_that_kills_its_worker_is_given_up_and_the_rest_go_on(folder, engine):
    if engine == "ray":
        pytest.importorskip("ray", reason="Ray is an extra")
    (folder / "recipe.py").write_text(DEADLY)
    state = torch.load(folder / "net1.pt")
    torch.save({k: 100 * v for k, v in state.items()}, folder / "net1.pt")
    more = ["--workers", "2", "-m", "hessian_trace", "-m", "gradient_norm", "--engine", engine]
    done = subprocess.run(
        _command(folder, *more), capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 1, done.stderr
    with Store(folder / "study.db", read_only=True) as store:
        table = scores_table(store)
    good = table[table["checkpoint"] != "net1.pt"]
    assert len(good) == 4
    assert good["error"].isna().all()
    bad = table[table["checkpoint"] == "net1.pt"]
    assert len(bad) > 0
    assert all("Expected the process to outlive" in text for text in bad["error"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_ends_cleanly_and_the_same_command_goes_on(folder, workers):
    make(folder, 12)
    command = _command(folder, "--workers", workers)
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A process that ignores Ctrl-C, as those of xdist do, starts others that do.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    store = None
    for _ in range(600):
        time.sleep(0.1)
        if (folder / "study.db").exists() and (folder / "study.db").stat().st_size:
            store = store or Store(folder / "study.db")
            if store.query("SELECT count(*) FROM score")[0][0] > 3:
                break
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "go on with the same command" in " ".join(err.split())
    assert "Traceback" not in err
    had = store.query("SELECT count(*) FROM score")[0][0]
    assert had > 3
    assert not any(Owner.read(o).is_alive(time.time()) for o in store.owners())
    store.close()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{had} were there" in " ".join(done.stdout.split())
