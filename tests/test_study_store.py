"""The file of a study: what it accepts, who may work, and that nothing foreign is touched."""

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from sharpkit.errors import StoreError
from sharpkit.results import Cost, Estimate, Part, Score
from sharpkit.study import owner as owner_module
from sharpkit.study import store as store_module
from sharpkit.study.identity import Subject
from sharpkit.study.owner import LEASE, Owner
from sharpkit.study.store import FATAL, Entry, Store

SUBJECT = Subject("w", "r", "d", "", "{}")
ENTRY = Entry("net.pt", "recipe.py", "{}", 0)
GONE = Owner(Owner.here().host, 2**22 - 7, "1", "t")  # a process that cannot be


def a_score(name="hessian_trace", value=1.0, **named):
    estimate = Estimate(value, 0.1, "stderr", 0.2, cost=Cost(3, 1, 0, 0.5), **named)
    return Score(name, estimate, {"num_probes": 4}, 0, {"loss": 0.5})


def begin(store, owner, entry=ENTRY, subject=SUBJECT, **named):
    return store.begin(entry, subject, "[]", owner, **named)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


@pytest.fixture
def store(path):
    with Store(path) as opened:
        yield opened


def test_a_score_comes_back_whole(store):
    score = a_score(parts=(Part("first", float("inf"), None),), notes=("One.",), dof=3.0)
    score = replace(score, estimate=replace(score.estimate, details={"k": [1, 2]}))
    begin(store, Owner.here())
    store.record(SUBJECT.key, score)
    assert store.scores(SUBJECT.key, 0) == [score]


def test_a_failed_score_comes_back(store):
    score = Score("log_det", None, {}, 0, {}, "Expected this. Got that.")
    store.record(SUBJECT.key, score)
    assert store.scores(SUBJECT.key, 0) == [score]


def test_another_process_reads_while_one_writes(store, path):
    begin(store, Owner.here())
    store.record(SUBJECT.key, a_score())
    with store._writing() as c:
        c.execute("UPDATE score SET value = 2.0")
        code = (
            "import sys; from sharpkit.study.store import Store\n"
            "print(Store(sys.argv[1], read_only=True).query('SELECT value FROM score')[0][0])"
        )
        seen = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
        )
    assert seen.stdout.strip() == "1.0"  # not what is not yet committed
    assert store.query("SELECT value FROM score") == [(2.0,)]


def test_a_finished_measure_is_not_written_twice(store):
    store.record(SUBJECT.key, a_score(value=1.0))
    store.record(SUBJECT.key, a_score(value=2.0))
    assert store.query("SELECT value FROM score") == [(1.0,)]


# -- claims ------------------------------------------------------------------------------


def test_a_claim_keeps_others_out_until_it_is_given_back(store):
    first = Owner.here()
    second = replace(first, token="another")
    assert begin(store, first).mine
    assert not begin(store, second).mine
    assert begin(store, first).mine  # one's own
    store.finish(ENTRY, SUBJECT.key, first)
    assert begin(store, second).mine


def test_a_recipe_that_moved_makes_no_second_entry(store):
    moved = replace(ENTRY, recipe="elsewhere/recipe.py")
    changed = Subject("w", "another recipe", "d", "", "{}")
    begin(store, Owner.here())
    begin(store, Owner.here(), moved)
    assert store.query("SELECT recipe FROM entry") == [("elsewhere/recipe.py",)]
    begin(store, Owner.here(), ENTRY, changed)  # other code at the old place: both stay
    assert len(store.query("SELECT recipe FROM entry")) == 2
    begin(store, Owner.here(), replace(moved, path="copy.pt"))
    assert len(store.query("SELECT recipe FROM entry")) == 3


def test_the_claim_of_a_process_that_ended_is_taken_over(store):
    assert begin(store, GONE).mine
    assert begin(store, Owner.here()).mine


def test_a_number_that_another_process_got_is_not_the_owner():
    here = Owner.here()
    assert here.is_alive(0.0)
    assert not replace(here, started="1").is_alive(time.time())


def test_a_process_that_nobody_collected_is_not_there():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        owner = replace(Owner.here(), pid=child.pid, started=_start_of(child.pid))
        assert owner.is_alive(0.0)
        child.stdin.close()
        for _ in range(200):
            if not owner.is_alive(0.0):
                break
            time.sleep(0.05)
        assert not owner.is_alive(0.0)  # a zombie
    finally:
        child.wait()


def _start_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[19]


def test_elsewhere_the_last_sign_of_life_decides():
    far = replace(Owner.here(), host="another machine")
    assert far.is_alive(time.time())
    assert not far.is_alive(time.time() - LEASE - 1)


def test_seeds_are_claimed_apart(store):
    assert begin(store, Owner.here()).mine
    other = replace(Owner.here(), token="another")
    assert begin(store, other, entry=replace(ENTRY, seed=1)).mine


def test_deaths_at_a_measure_are_counted_only_when_it_was_alone(store):
    me = Owner.here()
    for count in (False, True, True):
        begin(store, GONE)
        store.start(SUBJECT.key, 0, "log_det", "{}")
        assert store.bury([GONE.text], count=count) == [(SUBJECT.key, "log_det")]
    begun = begin(store, me)
    assert FATAL == 2
    assert begun.fatal == {("log_det", "{}")}
    assert begin(store, me, retry=True).fatal == set()


def test_workers_elsewhere_that_give_signs_of_life_are_not_dead(store):
    far = replace(Owner.here(), host="another machine")
    lost = replace(far, token="lost")
    for seed, owner in enumerate((far, lost, GONE, Owner.here())):
        begin(store, owner, entry=replace(ENTRY, seed=seed))
    with store._writing() as c:
        c.execute("UPDATE claim SET beat = ? WHERE owner = ?", (time.time() - LEASE - 1, lost.text))
    assert set(store.dead()) == {lost.text, GONE.text}


def test_signs_of_life_are_written_of_the_owner_alone(store):
    me, other = Owner.here(), replace(Owner.here(), token="another")
    for seed, owner in enumerate((me, other)):
        begin(store, owner, entry=replace(ENTRY, seed=seed))
    with store._writing() as c:
        c.execute("UPDATE claim SET beat = 0.0")
    before = time.time()
    store.beat(me)
    ((mine,), (others,)) = store.query("SELECT beat FROM claim ORDER BY seed")
    assert mine >= before
    assert others == 0.0


def test_an_owner_that_left_holds_nothing_though_its_process_lives(store):
    me = Owner.here()
    assert begin(store, me).mine
    assert not begin(store, Owner.here()).mine
    me.leave()
    assert begin(store, Owner.here()).mine


def test_a_claim_is_given_back_by_its_owner_alone(store):
    first, second = Owner.here(), replace(Owner.here(), token="another")
    begin(store, first)
    store.finish(ENTRY, SUBJECT.key, second)
    store.fail(ENTRY, "[]", "It failed.", claim=(SUBJECT.key, second))
    assert store.owners() == [first.text]


def test_containers_of_one_name_are_told_apart(monkeypatch):
    here = Owner.here()
    monkeypatch.setattr(owner_module.os, "readlink", lambda _: "pid:[1]")
    assert Owner.here().host != here.host
    assert not here.is_alive(0.0)  # elsewhere: numbers of processes say nothing


def test_between_measures_the_disk_is_spared_and_merging_is_not(store, monkeypatch):
    # In write-ahead mode NORMAL leaves out the wait at a commit but not that before a merge:
    # with OFF a power cut could damage scores that were on the disk.
    begin(store, Owner.here())
    seen, usual = [], Store._writing

    @contextmanager
    def watched(self, exclusive=False):
        seen.append(self.query("PRAGMA synchronous")[0][0])
        with usual(self, exclusive) as c:
            yield c

    monkeypatch.setattr(Store, "_writing", watched)
    store.start(SUBJECT.key, 0, "log_det", "{}")
    store.record(SUBJECT.key, a_score())
    assert seen == [1, 2]
    assert store.query("PRAGMA journal_mode") == [("wal",)]


def test_columns_hold_what_the_documents_hold(store):
    score = a_score(dof=3.0, converged=False)
    store.record(SUBJECT.key, score)
    e, names = score.estimate, "value, probe_error, error_kind, data_error, dof, converged"
    expected = (e.value, e.probe_error, e.error_kind, e.data_error, e.dof, 0, 3, 1, 0, 0.5)
    assert store.query(f"SELECT {names}, hvps, gradients, forwards, seconds FROM score") == [
        expected
    ]


def test_retry_forgets_failures_of_its_seed_alone(store):
    me = Owner.here()
    for seed in (0, 1):
        store.record(SUBJECT.key, Score("log_det", None, {}, seed, {}, "It failed."))
    assert begin(store, me, retry=True).done == set()
    assert begin(store, me, entry=replace(ENTRY, seed=1)).failed == {("log_det", "{}")}


def test_retry_forgets_failures_only(store):
    me = Owner.here()
    begin(store, me)
    store.record(SUBJECT.key, a_score())
    store.record(SUBJECT.key, Score("log_det", None, {}, 0, {}, "It failed."))
    assert {m for m, _ in begin(store, me).done} == {"hessian_trace", "log_det"}
    assert {m for m, _ in begin(store, me, retry=True).done} == {"hessian_trace"}


def test_what_was_chosen_is_kept_with_the_request(store):
    me = Owner.here()
    assert begin(store, me).chosen is None
    store.choose(SUBJECT.key, "[]", [("log_det", {"a": 1})])
    assert begin(store, me).chosen == (("log_det", {"a": 1}),)


# -- files that are none -----------------------------------------------------------------


def refused(path, match, **named):
    """Check that a file is refused and stays as it was, with nothing new beside it."""
    before = hashlib.sha256(path.read_bytes()).hexdigest(), sorted(os.listdir(path.parent))
    with pytest.raises(StoreError, match=match):
        Store(path, **named)
    after = hashlib.sha256(path.read_bytes()).hexdigest(), sorted(os.listdir(path.parent))
    assert after == before


@pytest.mark.parametrize("read_only", [False, True])
def test_foreign_files_are_refused_untouched(path, read_only):
    path.write_text("checkpoint,gap\nnet,0.1\n")
    refused(path, "something else", read_only=read_only)
    path.unlink()
    with sqlite3.connect(path) as c:
        c.execute("CREATE TABLE mine(x)")
    c.close()
    refused(path, "another program", read_only=read_only)


@pytest.mark.parametrize("read_only", [False, True])
def test_damaged_files_are_refused_untouched(path, read_only):
    with Store(path) as store:
        for i in range(300):
            store.record(f"s{i}", a_score())
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 9000] = os.urandom(9000)
    path.write_bytes(content)
    refused(path, "damaged", read_only=read_only)
    path.write_bytes(content[:5000])
    refused(path, "damaged", read_only=read_only)


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_newer_format_is_refused_untouched(path, read_only, mode):
    Store(path).close()
    with sqlite3.connect(path) as c:
        c.execute(f"PRAGMA user_version = {store_module.SCHEMA_VERSION + 1}")
    c.execute(f"PRAGMA journal_mode = {mode}")
    c.close()
    refused(path, "newer sharpkit", read_only=read_only)


def test_an_older_format_is_migrated_with_a_copy_kept(path, monkeypatch):
    with Store(path) as store:
        store.record(SUBJECT.key, a_score())
    now = store_module.SCHEMA_VERSION
    monkeypatch.setattr(store_module, "SCHEMA_VERSION", now + 1)
    change = "ALTER TABLE score ADD COLUMN extra TEXT DEFAULT 'new'"
    monkeypatch.setitem(store_module.MIGRATIONS, now, lambda c: c.execute(change))
    before = path.read_bytes()
    with Store(path, read_only=True) as store:  # in memory only
        assert store.query("SELECT value, extra FROM score") == [(1.0, "new")]
    assert path.read_bytes() == before
    with Store(path) as store:
        assert store.query("SELECT value, extra FROM score") == [(1.0, "new")]
    with Store(path) as store:
        assert store.query("PRAGMA user_version") == [(now + 1,)]
    with sqlite3.connect(path.with_name(f"study.db.v{now}")) as c:
        assert c.execute("PRAGMA user_version").fetchone() == (now,)
        assert c.execute("SELECT value FROM score").fetchone() == (1.0,)
    c.close()


def test_the_copy_of_an_older_format_is_kept_whoever_comes_second(path, monkeypatch):
    with Store(path) as store:
        store.record(SUBJECT.key, a_score())
    now = store_module.SCHEMA_VERSION
    monkeypatch.setattr(store_module, "SCHEMA_VERSION", now + 1)
    change = "ALTER TABLE score ADD COLUMN extra TEXT DEFAULT 'new'"
    monkeypatch.setitem(store_module.MIGRATIONS, now, lambda c: c.execute(change))
    usual = Store._migrate

    def overtaken(self, version):  # another process migrates between the look and the work
        monkeypatch.setattr(Store, "_migrate", usual)
        Store(path).close()
        usual(self, version)

    monkeypatch.setattr(Store, "_migrate", overtaken)
    with Store(path) as store:
        assert store.query("SELECT value, extra FROM score") == [(1.0, "new")]
    with sqlite3.connect(path.with_name(f"study.db.v{now}")) as c:
        assert c.execute("PRAGMA user_version").fetchone() == (now,)
    c.close()
    assert sorted(os.listdir(path.parent)) == ["study.db", f"study.db.v{now}"]


def test_a_migration_that_fails_leaves_the_study_as_it_was(path, monkeypatch):
    with Store(path) as store:
        store.record(SUBJECT.key, a_score())
    now = store_module.SCHEMA_VERSION
    with monkeypatch.context() as patched:
        patched.setattr(store_module, "SCHEMA_VERSION", now + 1)

        def broken(c):
            c.execute("DELETE FROM score")
            raise ZeroDivisionError

        patched.setitem(store_module.MIGRATIONS, now, broken)
        with pytest.raises(ZeroDivisionError):
            Store(path)
    with Store(path) as store:
        assert store.query("SELECT value FROM score") == [(1.0,)]


def test_a_study_that_another_process_makes_at_the_same_time_is_waited_for(monkeypatch):
    # SQLite refuses to change the mode at once, without the wait that it grants elsewhere.
    class Held:
        def __init__(self, times):
            self.times = times

        def execute(self, sql):
            self.times -= 1
            if self.times >= 0:
                raise sqlite3.OperationalError("database is locked")

    connection = Held(3)
    store_module._write_ahead(connection)
    assert connection.times == -1
    monkeypatch.setattr(store_module, "BUSY", 0.1)
    with pytest.raises(sqlite3.OperationalError):
        store_module._write_ahead(Held(10**6))


def test_a_missing_study_and_a_missing_folder(tmp_path):
    with pytest.raises(StoreError, match="no file"):
        Store(tmp_path / "none.db", read_only=True)
    with pytest.raises(StoreError, match="does not exist"):
        Store(tmp_path / "none" / "study.db")


@pytest.mark.parametrize(
    ("sqlite", "words"),
    [
        ("database is locked", "Another process holds it"),
        ("attempt to write a readonly database", "Change the permissions"),
        ("unable to open database file", "Change the permissions"),
        ("database or disk is full", "Make room and run the same command"),
        ("disk I/O error", "Try again, or with a copy"),
    ],
)
def test_what_sqlite_says_comes_with_what_to_do(path, sqlite, words):
    text = str(store_module._store_error(path, sqlite3.OperationalError(sqlite)))
    assert text.startswith("Expected ")
    assert str(path) in text
    assert words in text


def test_an_empty_file_becomes_a_study(path):
    path.touch()
    with pytest.raises(StoreError, match="is empty"):
        Store(path, read_only=True)
    with Store(path) as store:
        assert store.owners() == []


def test_a_study_in_a_folder_that_cannot_be_written_is_read(path, monkeypatch):
    with Store(path) as store:
        store.record(SUBJECT.key, a_score())
    monkeypatch.setattr(store_module.os, "access", lambda *_: False)
    before = path.read_bytes(), sorted(os.listdir(path.parent))
    with Store(path, read_only=True) as store:
        assert store.query("SELECT value FROM score") == [(1.0,)]
        assert sorted(os.listdir(path.parent)) == before[1]  # no file of write-ahead mode
    assert (path.read_bytes(), sorted(os.listdir(path.parent))) == before


def test_paths_are_kept_from_the_study_folder(store, tmp_path):
    assert store.relative(tmp_path / "zoo" / "net.pt") == "zoo/net.pt"
    assert store.relative(tmp_path.parent / "net.pt") == str(tmp_path.parent / "net.pt")


def test_json_of_scores_is_strict(store):
    store.record(SUBJECT.key, a_score(value=float("inf")))
    store.record(SUBJECT.key, a_score("log_det", value=float("nan")))
    for (text,) in store.query("SELECT document FROM score"):
        json.loads(text, parse_constant=pytest.fail)
    values = [s.estimate.value for s in store.scores(SUBJECT.key, 0)]
    assert values[0] == float("inf")
    assert values[1] != values[1]
