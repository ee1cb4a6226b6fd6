"""The frontier: chosen on validation data, reported on test data, one row a model, nothing dropped in silence."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from synthetic_records import make_record, make_trial, make_zoo

from zoo.errors import ConfigError, RecordError
from zoo.frontier import (
    by_slice,
    compare,
    frontier_table,
    hypervolume,
    hypervolumes,
    information_limit,
    pareto,
    split_by_data,
    staircase,
    t_interval,
    t_quantile,
)
from zoo.tasks import Task, tasks


def only_row(records):
    frame = frontier_table(records)
    assert len(frame) == 1
    return frame.iloc[0]


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_the_rate_is_chosen_on_validation_and_the_test_accuracy_of_that_trial_is_reported():
    records = [
        make_record(make_trial(lr=1e-3), validation=0.90, test=0.70),
        make_record(make_trial(lr=3e-3), validation=0.80, test=0.99),
    ]
    row = only_row(records)
    assert row["accuracy"] == pytest.approx(0.70)
    assert row["lrs"] == (1e-3,)
    assert row["keys"] == (records[0].key,)


def test_each_seed_chooses_for_itself_among_everything_of_the_optimizer():
    best = {
        0: make_record(make_trial(lr=1e-3, weight_decay=0.0, seed=0), validation=0.9, test=0.6),
        1: make_record(make_trial(lr=3e-3, weight_decay=0.1, seed=1), validation=0.8, test=0.8),
    }
    others = [
        make_record(make_trial(lr=lr, weight_decay=wd, seed=seed), validation=0.5, test=0.9)
        for lr, wd, seed in itertools.product((1e-3, 3e-3), (0.0, 0.1), (0, 1))
        if (lr, wd, seed) not in ((1e-3, 0.0, 0), (3e-3, 0.1, 1))
    ]
    row = only_row([*others, *best.values()])
    assert row["keys"] == (best[0].key, best[1].key)
    assert row["lrs"] == (1e-3, 3e-3)
    assert row["weight_decays"] == (0.0, 0.1)
    assert row["seeds"] == (0, 1)
    assert row["accuracies"] == pytest.approx((0.6, 0.8))
    assert row["accuracy"] == pytest.approx(0.7)
    assert (row["low"], row["high"]) == pytest.approx(t_interval([0.6, 0.8]))
    assert row["trials"] == 8


def test_a_tie_in_validation_accuracy_goes_to_the_lower_loss_then_the_lower_rate():
    def with_loss(record, loss):
        parts = tuple(part.model_copy(update={"loss": loss}) for part in record.outcome.validation)
        return record.model_copy(update={"outcome": record.outcome.model_copy(update={"validation": parts})})

    trials = [make_record(make_trial(lr=lr), validation=1.0, test=lr * 100) for lr in (1e-3, 2e-3, 3e-3)]
    lower = [with_loss(trials[0], math.nan), with_loss(trials[1], 0.3), with_loss(trials[2], 0.2)]
    assert only_row(lower)["lrs"] == (3e-3,)
    same = [with_loss(trial, 0.2) for trial in reversed(trials)]
    assert only_row(same)["lrs"] == (1e-3,)


def test_a_diverged_trial_is_never_chosen_and_is_counted():
    row = only_row(
        [
            make_record(make_trial(lr=1e-3), validation=0.1, test=0.1),
            make_record(make_trial(lr=3e-3), status="diverged"),
            make_record(make_trial(lr=1e-2), status="failed"),
        ]
    )
    assert row["status"] == "ok"
    assert row["lrs"] == (1e-3,)
    assert row["bad_trials"] == 2
    assert row["lost_seeds"] == ()
    assert row["error"].startswith("diverged: ")


def test_a_model_without_a_good_trial_is_a_row_of_its_own():
    frame = frontier_table(
        [
            make_record(make_trial(options={"feature_dim": 8})),
            make_record(make_trial(options={"feature_dim": 16}), status="diverged", state_bytes=9999),
            make_record(make_trial(options={"feature_dim": 32}), status="failed"),
        ]
    ).set_index("label")
    assert list(frame.loc[["d64 f8", "d64 f16", "d64 f32"], "status"]) == ["ok", "diverged", "failed"]
    assert frame.loc["d64 f16", "state_bytes"] == 9999
    assert math.isnan(frame.loc["d64 f16", "accuracy"])
    assert list(frame["on_frontier"]) == [label == "d64 f8" for label in frame.index]


def test_a_seed_whose_every_trial_is_lost_is_named():
    row = only_row([make_record(make_trial(seed=0)), make_record(make_trial(seed=1), status="diverged")])
    assert row["n"] == 1
    assert row["lost_seeds"] == (1,)
    assert math.isnan(row["low"])
    assert math.isnan(row["high"])


def test_a_rate_at_the_edge_of_three_or_more_is_flagged():
    def flagged(best, rates):
        records = [make_record(make_trial(lr=lr), validation=0.9 if lr == best else 0.5) for lr in rates]
        return bool(only_row(records)["lr_at_edge"])

    assert flagged(1e-3, (1e-3, 3e-3, 1e-2))
    assert flagged(1e-2, (1e-3, 3e-3, 1e-2))
    assert not flagged(3e-3, (1e-3, 3e-3, 1e-2))
    assert not flagged(1e-3, (1e-3, 3e-3))


def test_the_least_agreement_of_the_chosen_trials():
    records = [make_record(make_trial(seed=s), agreement=a) for s, a in ((0, 1.0), (1, 0.75))]
    assert only_row(records)["agreement"] == 0.75


def test_every_point_can_be_traced_to_its_records():
    records = make_zoo()
    by_key = {record.key: record for record in records}
    for row in frontier_table(records).to_dict("records"):
        chosen = [by_key[key] for key in row["keys"]]
        assert [r.outcome.test_accuracy for r in chosen] == list(row["accuracies"])
        assert [r.trial["seed"] for r in chosen] == list(row["seeds"])
        assert {r.outcome.state[-1].bytes for r in chosen} == {row["state_bytes"]}


# --- what is one model, one data setting ------------------------------------------------------------------------------


def test_epochs_and_versions_make_other_models():
    frame = frontier_table(
        [
            make_record(make_trial(epochs=8)),
            make_record(make_trial(epochs=16)),
            make_record(make_trial(epochs=16), versions={"mixer based": "2"}),
        ]
    )
    assert len(frame) == 3
    assert len(set(frame["label"])) == 3


def test_data_settings_are_never_mixed():
    short, longer = make_trial(slices=((64, 4),)), make_trial(slices=((64, 8),))
    records = [make_record(short), make_record(longer)]
    with pytest.raises(ConfigError, match=r"2 data settings.*mqar T=64 n=4; mqar T=64 n=8"):
        frontier_table(records)
    assert split_by_data(records) == {"mqar T=64 n=4": [records[0]], "mqar T=64 n=8": [records[1]]}


def test_data_settings_of_one_title_are_told_apart():
    other = make_trial()
    other["data"]["train"][0]["examples"] = 5
    records = [make_record(), make_record(other), make_record(versions={"task mqar": "2"})]
    groups = split_by_data(records)
    assert list(groups.values()) == [[record] for record in records]
    assert all(title.startswith("mqar T=64 n=4, T=128 n=8, T=256 n=16 (data ") for title in groups)


def test_data_seeds_are_replicates_of_one_setting():
    records = [make_record(make_trial(data_seed=seed), test=0.5 + seed / 10) for seed in (0, 1)]
    row = only_row(records)
    assert row["n"] == 2
    assert row["accuracies"] == pytest.approx((0.5, 0.6))


def test_many_slices_make_a_short_title():
    slices = tuple((64, n) for n in (1, 2, 4, 6, 8))
    assert list(split_by_data([make_record(make_trial(slices=slices))])) == ["mqar 5 slices from T=64 n=1 to T=64 n=8"]


def test_no_records_is_an_error():
    with pytest.raises(ConfigError, match="no records"):
        frontier_table([])


def test_seeds_with_other_states_are_not_averaged():
    records = [make_record(make_trial(seed=s), state_bytes=b) for s, b in ((0, 4096), (1, 2048))]
    with pytest.raises(RecordError, match="states of 4096 and 2048 B"):
        frontier_table(records)


def test_by_slice_takes_the_slices_accuracy_and_the_state_at_its_length():
    records = [
        make_record(
            make_trial("attention", lr=1e-3), validation=0.9, test=(0.9, 0.6, 0.3), state_bytes=4096, grows=True
        ),
        make_record(
            make_trial("attention", lr=3e-3), validation=0.8, test=(1.0, 1.0, 1.0), state_bytes=4096, grows=True
        ),
    ]
    frames = by_slice(records)
    assert list(frames) == ["T=64 n=4", "T=128 n=8", "T=256 n=16"]
    assert [float(f["accuracy"][0]) for f in frames.values()] == pytest.approx([0.9, 0.6, 0.3])
    assert [int(f["state_bytes"][0]) for f in frames.values()] == [1024, 2048, 4096]
    assert all(f["grows"][0] and f["lrs"][0] == (1e-3,) for f in frames.values())
    with pytest.raises(ConfigError, match=r"no test slice is called 'T=64 n=5'. Did you mean 'T=64 n=4'\?"):
        frontier_table(records, "T=64 n=5")


# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("df", "coverage", "expected"),
    [
        (1, 0.95, math.tan(math.pi * 0.475)),
        (2, 0.95, 0.95 * math.sqrt(2 / (1 - 0.95**2))),
        # scipy.stats.t.ppf((1 + coverage) / 2, df)
        (3, 0.95, 3.182446305),
        (4, 0.95, 2.776445105),
        (5, 0.99, 4.032142984),
        (9, 0.95, 2.262157163),
        (10, 0.90, 1.812461123),
        (29, 0.95, 2.045229642),
        (120, 0.95, 1.979930405),
        (1000, 0.95, 1.962339081),
    ],
)
def test_t_quantile(df, coverage, expected):
    assert t_quantile(df, coverage) == pytest.approx(expected, abs=2e-9)


def test_t_interval_of_known_values():
    low, high = t_interval([0.4, 0.5, 0.6])
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 4.302652730 * 0.1 / math.sqrt(3))
    assert t_interval([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))
    assert t_interval([0.99, 0.9])[1] == 1.0
    assert t_interval([0.01, 0.1])[0] == 0.0
    assert all(math.isnan(edge) for edge in t_interval([0.5]))


def test_t_interval_of_three_seeds_covers_the_mean():
    draws = np.random.default_rng(0).normal(0.5, 0.02, size=(4000, 3))
    covered = [low <= 0.5 <= high for low, high in (t_interval(row.tolist()) for row in draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


# --- Pareto -----------------------------------------------------------------------------------------------------------


def test_pareto_against_the_definition():
    rng = np.random.default_rng(1)
    for _ in range(50):
        size, accuracy = rng.integers(1, 6, 12), rng.integers(0, 5, 12) / 4
        beaten = [
            any(
                (s <= size[i] and a >= accuracy[i]) and (s < size[i] or a > accuracy[i])
                for s, a in zip(size, accuracy, strict=True)
            )
            for i in range(12)
        ]
        assert pareto(size, accuracy).tolist() == [not b for b in beaten]


def test_pareto_ties():
    assert pareto([1, 1, 2, 2], [0.5, 0.5, 0.5, 0.6]).tolist() == [True, True, False, True]
    assert pareto([], []).tolist() == []


def test_staircase_corners():
    xs, ys = staircase([4, 1, 2, 8, 1], [0.9, 0.2, 0.1, 0.9, 0.2])
    assert xs.tolist() == [1, 4, 4]
    assert ys.tolist() == [0.2, 0.2, 0.9]


def test_hypervolume_against_a_fine_sum():
    rng = np.random.default_rng(2)
    for _ in range(20):
        size, accuracy = 2 ** rng.uniform(0, 10, 6), rng.uniform(0, 1, 6)
        reference = (2.0**8, 0.1)
        x = (np.arange(200_000) + 0.5) / 200_000 * 8
        best = np.zeros_like(x)
        for s, a in zip(np.log2(size), accuracy, strict=True):
            best = np.maximum(best, np.where(x >= s, max(0.0, a - 0.1), 0.0))
        assert hypervolume(size, accuracy, reference) == pytest.approx(best.mean() * 8, abs=1e-3)


def test_hypervolume_by_hand():
    assert hypervolume([2, 8], [0.5, 1.0], (16, 0.0)) == pytest.approx(2 * 0.5 + 1 * 1.0)
    assert hypervolume([32], [1.0], (16, 0.0)) == 0.0
    assert hypervolume([2], [0.1], (16, 0.2)) == 0.0
    # No state counts as one byte.
    assert hypervolume([0, 8], [0.25, 1.0], (16, 0.0)) == pytest.approx(3 * 0.25 + 1 * 1.0)


def test_hypervolumes_by_family():
    records = [
        make_record(make_trial("based", {"feature_dim": 8}), test=0.5, state_bytes=1024),
        make_record(make_trial("based", {"feature_dim": 16}), test=1.0, state_bytes=4096),
        make_record(make_trial("mamba", {"d_state": 8}), test=0.75, state_bytes=2048),
        make_record(make_trial("h3", {"d_state": 8}), status="diverged"),
    ]
    frame = hypervolumes(frontier_table(records))
    assert frame.attrs["reference"] == (8192.0, 0.0)
    found = dict(zip(frame["family"], frame["hypervolume"], strict=True))
    assert found == pytest.approx({"all": 0.5 + 0.75 + 1.0, "based": 2 * 0.5 + 1.0, "mamba": 2 * 0.75})
    assert list(frame["family"]) == ["all", "based", "mamba"]


def test_hypervolumes_without_any_state():
    frame = hypervolumes(frontier_table([make_record(test=0.5, state_bytes=0)]))
    assert frame.attrs["reference"] == (2.0, 0.0)
    assert list(frame["hypervolume"]) == [0.5, 0.5]


def test_both_frontiers():
    records = [
        make_record(make_trial("based", {"feature_dim": 8}), test=0.5, state_bytes=1024),
        make_record(make_trial("based", {"feature_dim": 16}), test=0.4, state_bytes=2048),
        make_record(make_trial("mamba", {"d_state": 8}), test=0.5, state_bytes=2048),
        make_record(make_trial("mamba", {"d_state": 16}), test=0.6, state_bytes=4096),
    ]
    frame = frontier_table(records)
    assert list(frame["label"]) == ["d64 f8", "d64 f16", "d64 N8", "d64 N16"]
    assert list(frame["on_frontier"]) == [True, False, False, True]
    assert list(frame["on_family_frontier"]) == [True, False, True, True]


# --- the information limit --------------------------------------------------------------------------------------------


@tasks.register("frontier_test_line")
class Line(Task):
    """Accuracy a needs a * bits."""

    bits: int = 80
    stated: bool = True

    @property
    def length(self) -> int:
        return 8

    @property
    def slice_name(self) -> str:
        return f"bits={self.bits}"

    def information_limit_bits(self, accuracy: float) -> float | None:
        return accuracy * self.bits if self.stated else None


def line_records(*entries):
    trial = make_trial()
    record = make_record(trial)
    test = [{"task": "frontier_test_line", "examples": 1, **entry} for entry in entries]
    return [record.model_copy(update={"trial": {**trial, "data": {**trial["data"], "test": test}}})]


def test_information_limit_inverts_what_the_tasks_state():
    curve = information_limit(line_records({"bits": 80}))
    inside = curve[curve["bytes"] <= 10]
    assert np.abs(inside["accuracy"] - inside["bytes"] / 10).max() < 2e-3
    assert curve["accuracy"].iloc[-1] == 1.0
    mean = information_limit(line_records({"bits": 80}, {"bits": 800}))
    expected = (np.minimum(1, mean["bytes"] / 10) + np.minimum(1, mean["bytes"] / 100)) / 2
    assert np.abs(mean["accuracy"] - expected).max() < 2e-3
    one = information_limit(line_records({"bits": 80}, {"bits": 800}), "bits=800")
    assert one["bytes"].max() == pytest.approx(100)


def test_information_limit_is_none_when_unknown():
    assert information_limit(line_records({"bits": 80}, {"stated": False})) is None
    missing = line_records({"bits": 80})
    missing[0].trial["data"]["test"][0]["task"] = "a_plugin_that_is_not_loaded"
    assert information_limit(missing) is None


# --- beside other points ----------------------------------------------------------------------------------------------


def test_a_row_meets_the_point_whose_settings_it_has():
    records = [
        make_record(make_trial("based", d_model=d), test=accuracy, state_bytes=100 * d)
        for d, accuracy in ((16, 0.3), (32, 0.5), (64, 0.9))
    ]
    records.append(make_record(make_trial("mamba", d_model=64), test=0.7))
    points = pd.DataFrame(
        {
            "family": ["based", "based", "gla"],
            "label": ["d16 or d32", "d128", "d64"],
            "bytes": [1500.0, 1.0, 1.0],
            "accuracy": [0.4, 0.5, 0.5],
            "uncertainty": [0.01, 0.0, 0.0],
        }
    )
    frame = compare(frontier_table(records), points)
    assert frame["label"].tolist() == ["d16", "d32"]
    assert frame["difference"].tolist() == pytest.approx([-0.1, 0.1])
    assert frame["point_bytes"].tolist() == [1500.0, 1500.0]
    assert compare(frontier_table(records), points[1:]).empty
