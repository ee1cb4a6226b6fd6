"""Points beside a frontier: published ones, a run's or a file's, and that they are of the same data."""

from __future__ import annotations

import pandas as pd
import pytest
from synthetic_records import make_record, make_trial

from zoo.errors import ConfigError
from zoo.frontier import frontier_table
from zoo.overlay import OVERLAY_COLUMNS, published, read_overlay
from zoo.plot import STYLES
from zoo.results import RunStore


def test_the_published_points():
    assert published() == ["based_figure2"]
    frame = read_overlay("based_figure2")
    assert tuple(frame.columns) == OVERLAY_COLUMNS
    assert len(frame) == 44
    assert set(frame["family"]) <= set(STYLES)
    row = frame[(frame["family"] == "based") & (frame["label"] == "d64 f16")].iloc[0]
    assert (row["bytes"], row["accuracy"], row["uncertainty"]) == (40548, 0.912, 0.005)
    # The authors' own formulas: 4 bytes a number, with the gated convolution's 3 d where there is one.
    bytes_of = {(r.family, r.label): r.bytes for r in frame.itertuples()}
    assert bytes_of["attention", "d64"] == 4 * (2 * 64 * 1024 + 3 * 64)
    assert bytes_of["sliding_window", "d128 w9"] == 4 * (2 * 128 * 8 + 3 * 128)
    for d, f in ((48, 8), (64, 8), (128, 8), (64, 16), (128, 16), (128, 24)):
        features = 1 + f + f * (f + 1) // 2
        assert bytes_of["based", f"d{d} f{f}"] == 4 * (features * (d + 1) + 3 * d)
    for d in (64, 128, 256):
        assert bytes_of["delta_net", f"d{d}"] == 4 * (d * d // 2 + 3 * d)
        assert bytes_of["gated_delta_net", f"d{d}"] == 4 * (d * d + 3 * d)
        assert bytes_of["hyena", f"d{d}"] == 2 * 4 * d * 1024


def test_a_csv_and_a_run_folder_as_overlay(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("# a comment\nfamily,label,bytes,accuracy\nbased,d64,4096,0.5\n")
    frame = read_overlay(file)
    assert tuple(frame.columns) == OVERLAY_COLUMNS
    assert frame.attrs["name"] == "mine"
    assert frame["uncertainty"][0] == 0.0
    store = RunStore(tmp_path / "run", create=True)
    records = [make_record(make_trial(seed=s), test=a, state_bytes=512) for s, a in ((0, 0.5), (1, 0.52))]
    for record in [*records, make_record(make_trial("mamba"), status="failed")]:
        store.write(record)
    frame = read_overlay(store.path)
    row = frontier_table(records).iloc[0]
    assert frame.attrs["name"] == "run"
    assert frame[["family", "label", "bytes"]].to_numpy().tolist() == [["based", "d64", 512.0]]
    assert frame["accuracy"][0] == pytest.approx(0.51)
    assert frame["uncertainty"][0] == pytest.approx((row["high"] - row["low"]) / 2)


def test_of_a_run_the_trials_on_the_same_data_are_the_overlay(tmp_path):
    here = make_record(make_trial(), test=0.5)
    entry = {**here.trial["data"]["test"][0], "examples": 77}
    elsewhere = {**here.trial, "data": {**here.trial["data"], "test": [entry]}}
    other = make_record(make_trial("mamba"), test=0.9).model_copy(update={"trial": elsewhere})
    store = RunStore(tmp_path / "run", create=True)
    store.write(here)
    store.write(other)
    assert read_overlay(store.path, [here])["accuracy"].tolist() == [0.5]
    with pytest.raises(ConfigError, match=r"'reference' has nothing on this data, which is mqar T=64.* It has: .*mqar"):
        read_overlay("reference", [here])


def test_published_points_are_refused_beside_other_data():
    published_data = RunStore("reference/based_figure2").load()[0]
    assert len(read_overlay("based_figure2", [published_data])) == 44
    with pytest.raises(ConfigError, match="'based_figure2' has nothing on this data, which is mqar") as caught:
        read_overlay("based_figure2", [make_record()])
    file = str(caught.value).partition("--overlay ")[2]
    pd.testing.assert_frame_equal(read_overlay(file), read_overlay("based_figure2"))
    thinned = published_data.model_dump(mode="json")["trial"]
    thinned["data"]["train"][0]["examples"] = 7
    with pytest.raises(ConfigError, match=r"with data\.train\.0\.examples 100000 there, 7 here\. To have its points"):
        read_overlay("based_figure2", [published_data.model_copy(update={"trial": thinned})])
    newer = published_data.versions | {"task mqar": "99"}
    with pytest.raises(ConfigError, match="with another version of the task"):
        read_overlay("based_figure2", [published_data.model_copy(update={"versions": newer})])


def test_the_reference_as_overlay():
    frame = read_overlay("reference", RunStore("reference/based_figure2").load()[:1])
    assert "H200" in frame.attrs["name"]
    window = frame[(frame["family"] == "sliding_window") & (frame["label"] == "d128 w65")].iloc[0]
    assert window["accuracy"] == pytest.approx(0.514, abs=0.01)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("family,label,bytes\nbased,d64,1\n", "lacks the column accuracy"),
        (
            "family,label,bytes,accuracy\nbased,d64,1,0.5\nbased,d64,many,0.5\n",
            "row 2: bytes 'many' is not a number above 0",
        ),
        ("family,label,bytes,accuracy\nbased,d64,0,0.5\n", "row 1: bytes 0 is not a number above 0"),
        ("family,label,bytes,accuracy\nbased,d64,1,50\n", "row 1: accuracy 50 is not a number from 0 to 1"),
        ("", "not a CSV file"),
    ],
)
def test_a_bad_overlay_says_what_is_wrong(tmp_path, text, fault):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ConfigError, match=fault):
        read_overlay(tmp_path / "bad.csv")


def test_what_is_no_text_is_no_csv_file(tmp_path):
    (tmp_path / "bad.csv").write_bytes(b"family,label,bytes,accuracy\nbased,d64,1,0.5\xff\n")
    with pytest.raises(ConfigError, match=r"is not a CSV file: 'utf-8' codec .*; a CSV has family,label,bytes"):
        read_overlay(tmp_path / "bad.csv")


def test_a_run_without_records_is_no_overlay(tmp_path):
    store = RunStore(tmp_path / "run", create=True)
    with pytest.raises(ConfigError, match="has no records; `zoo sweep` writes one as each trial ends"):
        read_overlay(store.path, [make_record()])


def test_an_unknown_overlay_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no published result. Did you mean 'based_figure2'\?"):
        read_overlay("based_figure")
