"""The run folder: what is written comes back, a broken record is set aside, and the table says what varies."""

from __future__ import annotations

import errno
import json
import lzma
import os
import subprocess
import sys

import pandas as pd
import pytest
from synthetic_records import make_record, make_trial

from zoo import __version__
from zoo.archive import pack_records
from zoo.config import ModelConfig
from zoo.errors import ConfigError, RecordError, SchemaError, UnsupportedError
from zoo.record import SCHEMA, family_name
from zoo.results import REFERENCE, RecordWarning, RunStore, export, labels, load_runs, table


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "run", create=True)


def test_a_record_comes_back_as_it_was_written(store):
    ok = make_record(make_trial(seed=0), test=(0.9, 0.5, 1 / 3))
    diverged = make_record(make_trial(seed=1), status="diverged")
    failed = make_record(make_trial(seed=2), status="failed")
    for record in (ok, diverged, failed):
        store.write(record)
    assert store.load() == sorted([ok, diverged, failed], key=lambda r: r.key)
    assert store.keys() == {ok.key, diverged.key, failed.key}


def test_nan_and_infinity_survive(store):
    record = make_record()
    epoch = record.outcome.history[-1].model_copy(update={"validation_loss": float("inf")})
    outcome = record.outcome.model_copy(update={"history": (epoch,)})
    store.write(record.model_copy(update={"outcome": outcome}))
    assert store.load()[0].outcome.history[0].validation_loss == float("inf")


def test_writing_the_same_key_again_replaces_the_record(store):
    failed, ok = make_record(status="failed"), make_record()
    assert failed.key == ok.key
    store.write(failed)
    store.write(ok)
    assert [record.status for record in store.load()] == ["ok"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "the file is empty"),
        (b'{"key": "tru', "not valid JSON"),
        (b'{"schema_version": "new"}', "schema_version: input should be"),
        (b'{"key": "k", "status": "splendid"}', "status: input should be"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "the record: input should be"),
    ],
)
def test_a_corrupt_record_is_named_and_moved_aside_and_the_rest_loads(store, content, fault):
    good = make_record()
    store.write(good)
    (store.records / "bad.json").write_bytes(content)
    with pytest.warns(RecordWarning, match=fault) as caught:
        assert store.load() == [good]
    assert "bad.json" in str(caught[0].message)
    assert "moved to corrupt/" in str(caught[0].message)
    assert (store.path / "corrupt" / "bad.json").read_bytes() == content
    assert store.keys() == {good.key}
    assert store.load() == [good]


def test_a_record_of_another_zoo_is_refused_and_left_where_it_is(store):
    record = make_record()
    path = store.write(record)
    newer = record.model_dump(mode="json") | {"schema_version": SCHEMA + 1}
    newer["provenance"]["zoo"] = "9.1"
    for content in (newer, newer | {"colour": "red"}):
        text = json.dumps(content)
        path.write_text(text)
        for read in (store.load, lambda: store.get(record.key), store.compact):
            with pytest.raises(
                SchemaError,
                match=rf"zoo 9\.1 wrote it with schema version 2, and zoo {__version__}, .* reads 1; it was left",
            ):
                read()
        assert path.read_text() == text
        assert not (store.path / "corrupt").exists()
        assert not store.archive.exists()


def test_a_record_under_another_name_is_corrupt(store):
    path = store.write(make_record())
    path.rename(path.with_name("0123.json"))
    with pytest.warns(RecordWarning, match="holds the record of the key"):
        assert store.load() == []


def test_a_record_that_cannot_be_moved_is_skipped(store):
    (store.records / "bad.json").write_bytes(b"")
    (store.path / "corrupt").write_text("a file where the folder should be")
    with pytest.warns(RecordWarning, match="could not be moved"):
        assert store.load() == []


def test_get_by_key_or_unique_prefix(store):
    records = [make_record(make_trial(seed=seed)) for seed in range(40)]
    for record in records:
        store.write(record)
    assert store.get(records[0].key) == records[0]
    assert store.get(records[0].key[:20]) == records[0]
    with pytest.raises(RecordError, match=r"no record .* \(40 records\) has the key 'zz'"):
        store.get("zz")
    with pytest.raises(RecordError, match="has the key ''"):
        store.get("")
    digit = next(d for d in "0123456789abcdef" if sum(r.key.startswith(d) for r in records) > 1)
    with pytest.raises(RecordError, match=f"records begin with '{digit}'.*add digits"):
        store.get(digit)
    (store.records / "feed.json").write_bytes(b"")
    with pytest.raises(RecordError, match=r"the file is empty.*moved to corrupt/"):
        store.get("feed")


def test_a_folder_that_is_no_run_is_an_error_with_the_nearest_name(store):
    with pytest.raises(RecordError, match=r"does not exist.*Did you mean '.*/run'\?"):
        RunStore(store.path.parent / "rnu")
    assert not (store.path.parent / "rnu").exists()
    with pytest.raises(RecordError, match="is no run folder"):
        RunStore(store.path.parent)


def test_a_run_is_found_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunStore("runs/quick", create=True)
    with pytest.raises(RecordError, match=r"'quick' does not exist\. Did you mean 'runs/quick'"):
        RunStore("quick")


def test_records_that_cannot_be_written_are_an_error_before_any_is_computed(store, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != store.records)
    with pytest.raises(PermissionError, match="records"), store.lock():
        pass


def test_there_is_nothing_to_compact(store):
    with pytest.raises(RecordError, match="has no records to compact"):
        store.compact()
    assert not store.archive.exists()


def test_a_compacted_run_reads_as_before(store):
    ok, diverged = make_record(make_trial(seed=0)), make_record(make_trial(seed=1), status="diverged")
    for record in (ok, diverged):
        store.write(record)
    before = store.load()
    assert store.compact() == 2
    assert not list(store.records.iterdir())
    reader = RunStore(store.path)
    assert reader.load() == before
    assert reader.keys() == {ok.key, diverged.key}
    assert reader.get(ok.key[:12]) == ok
    late = make_record(make_trial(seed=2))
    store.write(late)
    assert len(store.load()) == 3
    first = store.archive.read_bytes()
    assert store.compact([ok]) == 3
    assert {r.key for r in store.load()} == {ok.key, diverged.key, late.key}
    assert store.archive.read_bytes() != first


def test_compacting_keeps_the_better_record_of_a_trial(store):
    failed, ok = make_record(status="failed"), make_record()
    store.write(failed)
    store.compact([ok])
    assert [record.status for record in store.load()] == ["ok"]


def test_compacting_removes_only_what_the_archive_holds(store):
    store.write(make_record())
    broken = store.records / "broken.json"
    broken.write_bytes(b"{")
    (store.path / "corrupt").write_text("in the way")
    with pytest.warns(RecordWarning, match="could not be moved to corrupt/"):
        assert store.compact() == 1
    assert list(store.records.iterdir()) == [broken]


def test_an_archive_that_does_not_hold_what_was_written_costs_no_record(store, monkeypatch):
    store.write(make_record())
    monkeypatch.setattr("zoo.results.pack_records", lambda records: pack_records([]))
    with pytest.raises(RecordError, match="nothing was removed"):
        store.compact()
    assert len(list(store.records.glob("*.json"))) == 1


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"no xz", "cannot be read: .* restore the file"),
        (lzma.compress(b'{"key": 3}\n'), "line 1, key: .* restore the file"),
        (lzma.compress(b'{"schema_version": 2}\n'), "line 1, another zoo wrote it with schema version 2, .* reads 1"),
    ],
)
def test_a_broken_archive_says_what_is_wrong(store, content, fault):
    store.archive.write_bytes(content)
    with pytest.raises(RecordError, match=fault):
        store.load()


def test_the_reference_comes_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference = RunStore(REFERENCE).load()
    assert len(reference) >= 80
    assert {record.status for record in reference} == {"ok"}
    assert all(record.provenance.git and "H200" in record.provenance.device for record in reference)
    assert all(record.outcome.agreement.same_answers > 0.99 for record in reference)
    assert set(RunStore(f"{REFERENCE}/based_figure2").keys()) <= {record.key for record in reference}
    with pytest.raises(
        RecordError, match=r"'reference/based_figure3' does not exist.*Did you mean 'reference/based_figure2'"
    ):
        RunStore(f"{REFERENCE}/based_figure3")
    for name in (REFERENCE, f"{REFERENCE}/based_figure2"):
        before = sorted(RunStore(name).path.rglob("*"))
        with pytest.raises(RecordError, match="comes with the package and is not written to"):
            RunStore(name).compact()
        assert sorted(RunStore(name).path.rglob("*")) == before
        with pytest.raises(RecordError, match="comes with the package and is not written to"):
            RunStore(name, create=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / REFERENCE).mkdir()
    with pytest.raises(RecordError, match="no run folder"):
        RunStore(REFERENCE)


def test_the_sweep_snapshot(store):
    assert store.read_sweep() is None
    store.write_sweep({"name": "quick", "trials": 3})
    assert store.read_sweep() == {"name": "quick", "trials": 3}
    (store.path / "sweep.json").write_text("{")
    with pytest.raises(RecordError, match=r"sweep\.json' is not valid JSON"):
        store.read_sweep()


def test_the_lock_removes_leftovers_and_keeps_others_out(store):
    leftover = store.records / ".abc.json.1.tmp"
    leftover.write_text('{"half a rec')
    with store.lock():
        assert not leftover.exists()
        with pytest.raises(RecordError, match="another sweep is writing"), RunStore(store.path).lock():
            pass
    with store.lock():
        pass


def test_an_interrupted_write_leaves_the_old_record(store, monkeypatch):
    old = make_record(status="failed")
    store.write(old)

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write(make_record())
    assert store.load() == [old]
    assert [path.suffix for path in store.records.iterdir()] == [".json"]


def test_a_full_disk_is_an_error_that_names_the_record(store, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    record = make_record()
    with pytest.raises(OSError, match=rf"No space left on device: '.*{record.key}\.json'"):
        store.write(record)
    assert not list(store.records.iterdir())


def test_several_runs_load_together(tmp_path):
    first, second = RunStore(tmp_path / "a", create=True), RunStore(tmp_path / "b", create=True)
    failed, ok = make_record(status="failed", started="2025-06-01"), make_record(started="2025-01-01")
    newer = make_record(started="2025-03-01", test=0.7)
    other = make_record(make_trial(seed=1))
    first.write(failed)
    first.write(other)
    second.write(ok)
    assert load_runs([first.path, second.path]) == sorted([ok, other], key=lambda r: r.key)
    second.write(newer)
    first.write(ok)
    assert newer in load_runs([first.path, second.path])
    assert newer in load_runs([second.path, first.path])


@pytest.mark.parametrize(
    ("mixers", "expected"),
    [
        (["gated_conv"], "gated_conv"),
        (["gated_conv", "based"], "based"),
        (["gated_conv", "based", "sliding_window"], "based+sliding_window"),
        (["mamba", "mamba"], "mamba"),
        (["gated_conv", "plugins/mine.py:Mine"], "Mine"),
    ],
)
def test_family(mixers, expected):
    assert family_name(mixers) == expected


def test_the_model_config_calls_its_family_the_same():
    model = ModelConfig.model_validate({"d_model": 64, "layers": ["gated_conv", "based", "sliding_window"]})
    assert model.family == "based+sliding_window"


def test_labels_name_what_varies_within_a_family():
    trials = [
        make_trial("based", {"feature_dim": 8, "taylor": True}),
        make_trial("based", {"feature_dim": 16, "taylor": True}),
        make_trial("attention", {"num_heads": 1}),
        make_trial("attention", {"num_heads": 1}, epochs=16),
        make_trial("mamba", {"d_state": 16}, d_model=128),
    ]
    assert labels(make_record(trial) for trial in trials) == [
        "d64 epochs=8 f8",
        "d64 epochs=8 f16",
        "d64 epochs=8",
        "d64 epochs=16",
        "d128 epochs=8 N16",
    ]


def test_a_label_has_what_sets_the_state_even_where_all_models_share_it():
    trials = [make_trial("based", {"feature_dim": 16}, lr=lr) for lr in (0.1, 0.2)]
    trials += [make_trial("linear_attention", {"feature_dim": None}), make_trial("sliding_window", {"window": 65})]
    assert labels(make_record(trial) for trial in trials) == ["d64 f16", "d64 f16", "d64", "d64 w65"]


def test_a_label_has_what_families_differ_in_and_says_nothing_of_what_a_model_lacks():
    plain, wide, learned = make_trial("based"), make_trial("mamba"), make_trial("attention")
    wide["model"]["mlp"] = {"expand": 4, "activation": "gelu"}
    learned["model"]["positions"] = "learned"
    assert labels(make_record(trial) for trial in (plain, wide, learned)) == [
        "d64",
        "d64 mlp.expand=4 mlp.activation=gelu",
        "d64 positions=learned",
    ]


def test_labels_tell_layer_patterns_mixers_versions_and_layers_of_one_mixer_apart():
    plain, alone, two = make_trial("mamba", {"d_state": 8}), make_trial("mamba", {"d_state": 8}), make_trial("based")
    alone["model"]["layers"].pop(0)
    two["model"]["layers"] = [{"mixer": "based", "feature_dim": 4}, {"mixer": "based", "feature_dim": 8}]
    one = make_trial()
    one["model"]["layers"] = [{"mixer": "based", "feature_dim": 4}, {"mixer": "based", "feature_dim": 4}]
    found = labels([make_record(trial) for trial in (plain, alone, two, one)])
    assert "layers=gated_conv+mamba" in found[0]
    assert "layers=mamba" in found[1]
    assert found[2:] == ["d64 f4/8", "d64 f4"]
    versions = [make_record(versions={"mixer based": "1"}), make_record(versions={"mixer based": "2"})]
    assert labels(versions) == ["d64 mixer based version=1", "d64 mixer based version=2"]


def test_table_has_one_tidy_row_a_trial():
    records = [
        make_record(make_trial(options={"feature_dim": 8}, lr=1e-3), status="failed"),
        make_record(
            make_trial(options={"feature_dim": 8}, lr=3e-3), test=(1.0, 0.5, 0.0), state_bytes=4096, grows=True
        ),
        make_record(make_trial(options={"feature_dim": 16}, lr=3e-3, seed=1), status="diverged"),
        make_record(make_trial("mamba", {"d_state": 16}, lr=3e-3), agreement=0.5),
    ]
    frame = table(records)
    assert list(frame["key"]) == [record.key for record in records]
    assert list(frame["status"]) == ["failed", "ok", "diverged", "ok"]
    assert list(frame["family"]) == ["based", "based", "based", "mamba"]
    assert list(frame["label"]) == ["d64 f8", "d64 f8", "d64 f16", "d64 N16"]
    assert list(frame["lr"]) == [1e-3, 3e-3, 3e-3, 3e-3]
    assert list(frame["seed"]) == [0, 0, 1, 0]
    assert frame["model.layers.1.feature_dim"][1] == 8
    assert pd.isna(frame["model.layers.1.feature_dim"][3])
    assert frame["model.layers.1.mixer"][3] == "mamba"
    assert not any(name.startswith(("model.d_model", "optimizer.lr", "training", "data")) for name in frame)
    assert frame["accuracy.T=64 n=4"][1] == 1.0
    assert frame["accuracy.T=256 n=16"][1] == 0.0
    assert frame["test_accuracy"][1] == 0.5
    assert frame["state_bytes"][1] == 4096
    assert frame["state_elements"][1] == 1024
    assert frame["state_seq_len"][1] == 256
    assert frame["agreement"][3] == 0.5
    assert pd.isna(frame["test_accuracy"][0])
    assert pd.isna(frame["state_bytes"][0])
    assert frame["state_bytes"][2] == 4096
    assert frame["error"][0] == "RuntimeError: shapes <2> & <3> differ"
    assert frame["error"][2].startswith("diverged: the training loss became nan")
    assert frame["error"][1] is None or pd.isna(frame["error"][1])


def test_table_of_nothing_is_empty():
    assert len(table([])) == 0


def test_export(tmp_path, monkeypatch):
    records = [
        make_record(make_trial(options={"dial": 8})),
        make_record(make_trial(options={"dial": "eight"}), status="failed"),
        make_record(make_trial("mamba", {"dial": [1, 2]})),
    ]
    export(records, tmp_path / "out" / "t.csv")
    export(records, tmp_path / "t.parquet")
    csv, parquet = pd.read_csv(tmp_path / "out" / "t.csv"), pd.read_parquet(tmp_path / "t.parquet")
    assert list(csv.columns) == list(parquet.columns) == list(table(records).columns)
    assert list(csv["key"]) == list(parquet["key"]) == [record.key for record in records]
    assert list(parquet["model.layers.1.dial"]) == ["8", "eight", "[1, 2]"]
    assert csv["test_accuracy"][0] == parquet["test_accuracy"][0] == table(records)["test_accuracy"][0]
    with pytest.raises(ConfigError, match=r"'\.xlsx' must be \.csv or \.parquet"):
        export(records, tmp_path / "t.xlsx")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"zoo-mixers\[parquet\]"):
        export(records, tmp_path / "u.parquet")


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, zoo.results, zoo.frontier, zoo.plot, zoo.report\n"
        "print([m for m in ('pandas', 'matplotlib', 'ray', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_records_are_plain_json_on_disk(store):
    record = make_record()
    assert json.loads(store.write(record).read_text())["trial"] == record.trial
