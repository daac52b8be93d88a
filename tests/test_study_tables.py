"""Tables and exports of studies: every score once, labels that tell them apart."""

import json

import pandas as pd
import pytest

from sharpkit.errors import SettingsError, StoreError
from sharpkit.results import Estimate, Score
from sharpkit.study import tables
from sharpkit.study.identity import Options, Subject
from sharpkit.study.owner import Owner
from sharpkit.study.store import Entry, Store

NAMES = ("zoo/a.pt", 'zoo/"b",\n<c>.pt')
META = {"gap": 0.5, "spec": {"width": 8, "family": "mlp"}, "sizes": [1, 2]}


def fill(store, options=None, seed=0, recipe="recipe.py", names=NAMES, **settings):
    options = options or Options()
    for i, name in enumerate(names):
        subject = Subject(f"w{i}", recipe, "d", "", options.text())
        entry = Entry(name, recipe, options.text(), seed)
        store.begin(entry, subject, "[]", Owner.here(), metadata={**META, "gap": i / 2})
        estimate = Estimate(1.0 + i, 0.1, "stderr", converged=i == 0)
        store.record(subject.key, Score("hessian_trace", estimate, settings, seed))
        failed = Score("log_det", None, {}, seed, error="Expected this.")
        store.record(subject.key, failed)
        store.finish(entry, subject.key, Owner.here())


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "study.db") as opened:
        yield opened


def test_the_long_table_has_each_score_with_what_is_known_of_its_checkpoint(store):
    fill(store)
    store.fail(Entry("zoo/bad.pt", "recipe.py", Options().text(), 0), "[]", "Expected weights.")
    table = tables.scores_table(store)
    assert len(table) == 5
    trace = table[table["measure"] == "hessian_trace"].set_index("checkpoint")
    assert trace.loc[NAMES[1], "value"] == 2.0
    assert trace.loc[NAMES[1], "meta.gap"] == 0.5
    assert trace.loc[NAMES[0], "meta.spec.width"] == 8
    assert trace.loc[NAMES[0], "meta.sizes"] == "[1, 2]"
    assert list(trace["converged"]) == [False, True]  # by path: the quote comes first
    bad = table[table["checkpoint"] == "zoo/bad.pt"].iloc[0]
    assert pd.isna(bad["measure"])
    assert pd.isna(bad["label"])
    assert bad["error"] == "Expected weights."
    failed = table[table["measure"] == "log_det"]
    assert set(failed["error"]) == {"Expected this."}
    assert failed["value"].isna().all()


def test_labels_name_what_differs_and_nothing_else(store):
    fill(store)
    label = tables.scores_table(store, measure="hessian_trace")["label"]
    assert set(label) == {"hessian_trace"}
    fill(store, num_probes=4)
    label = tables.scores_table(store, measure="hessian_trace")["label"]
    assert set(label) == {"hessian_trace", "hessian_trace(num_probes=4)"}
    fill(store, Options(canonical=True))
    label = tables.scores_table(store, measure="log_det")["label"]
    assert set(label) == {"log_det(canonical=false)", "log_det(canonical=true)"}
    fill(store, seed=1)
    fill(store, recipe="test.py")
    label = set(tables.scores_table(store, measure="log_det")["label"])
    assert "log_det(canonical=false, recipe=test.py, seed=0)" in label
    assert len(label) == 4


def test_the_wide_table_has_one_row_a_checkpoint(store):
    fill(store)
    store.fail(Entry("zoo/bad.pt", "recipe.py", Options().text(), 0), "[]", "Expected weights.")
    table = tables.wide_table(store).set_index("checkpoint")
    assert list(table.index) == ['zoo/"b",\n<c>.pt', "zoo/a.pt", "zoo/bad.pt"]
    assert table.loc["zoo/a.pt", "hessian_trace"] == 1.0
    assert table.loc["zoo/a.pt", "hessian_trace.error"] == 0.1
    assert table.loc["zoo/bad.pt", "error"] == "Expected weights."
    assert list(table["hessian_trace.converged"][:2]) == [False, True]
    assert "hessian_trace.error" not in tables.wide_table(store, errors=False)


def test_metadata_with_the_name_of_another_column_are_kept(store, tmp_path):
    fill(store)
    entry = Entry("zoo/a.pt", "recipe.py", Options().text(), 0)
    subject = Subject("w0", "recipe.py", "d", "", Options().text())
    given = {"error": 0.12, "checkpoint": "last", "hessian_trace": 3, "gap": 0.5}
    store.begin(entry, subject, "[]", Owner.here(), metadata=given)
    table = tables.wide_table(store).set_index("checkpoint").loc["zoo/a.pt"]
    assert table["meta.error"] == 0.12
    assert table["error"] is None
    assert table["meta.checkpoint"] == "last"
    assert (table["meta.hessian_trace"], table["hessian_trace"]) == (3, 1.0)
    assert table["gap"] == 0.5
    pytest.importorskip("pyarrow", reason="Parquet is an extra")
    found = pd.read_parquet(tables.export(store, tmp_path / "t.parquet", wide=True))
    assert found["meta.error"].dropna().tolist() == [0.12]


def test_scores_belong_to_the_seed_of_the_entry(store):
    fill(store)
    fill(store, seed=1)
    table = tables.scores_table(store, measure="hessian_trace")
    assert len(table) == 4
    assert set(table["label"]) == {"hessian_trace(seed=0)", "hessian_trace(seed=1)"}
    assert sorted(tables.entries_table(store)["scores"]) == [2] * 4
    for held in tables.documents(store)["checkpoints"]:
        assert [s["seed"] for s in held["scores"]] == [held["seed"]] * 2


def test_entries_count_scores_and_failures(store):
    fill(store)
    table = tables.entries_table(store)
    assert list(table["scores"]) == [2, 2]
    assert list(table["failed"]) == [1, 1]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_exports_read_back_as_the_table(store, tmp_path, kind, wide):
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet is an extra")
    fill(store)
    path = tables.export(store, tmp_path / f"study.{kind}", wide=wide)
    found = pd.read_csv(path) if kind == "csv" else pd.read_parquet(path)
    expected = (tables.wide_table if wide else tables.scores_table)(store)
    found, expected = (t.astype(object).where(t.notna(), None) for t in (found, expected))
    pd.testing.assert_frame_equal(found, expected)


def test_json_holds_the_whole_scores(store, tmp_path):
    fill(store)
    document = json.loads(tables.export(store, tmp_path / "study.json").read_text())
    assert [c["checkpoint"] for c in document["checkpoints"]] == sorted(NAMES)
    held = document["checkpoints"][1]
    assert held["metadata"] == {**META, "gap": 0.0}
    assert {s["measure"] for s in held["scores"]} == {"hessian_trace", "log_det"}
    assert Score.from_dict(held["scores"][0]).measure


def test_a_failed_export_leaves_the_old_file_and_nothing_beside(store, tmp_path, monkeypatch):
    fill(store)
    target = tmp_path / "study.csv"
    target.write_text("before")
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tables.export(store, target)
    assert target.read_text() == "before"
    assert [p.name for p in tmp_path.glob("*.csv")] == ["study.csv"]


def test_exports_say_what_they_need(store, tmp_path):
    with pytest.raises(SettingsError, match="ends in"):
        tables.export(store, tmp_path / "study.xls")
    with pytest.raises(StoreError, match="folder"):
        tables.export(store, tmp_path / "none" / "study.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(StoreError, match="Name another file"):
        tables.export(store, tmp_path / "folder.csv")
    assert sorted(p.name for p in tmp_path.glob("*.csv")) == ["folder.csv"]


def test_an_empty_study_has_empty_tables(store):
    assert len(tables.scores_table(store)) == 0
    assert len(tables.wide_table(store)) == 0
    assert len(tables.entries_table(store)) == 0
