"""The analysis of set disjointness by order, beside the sweeps that it is for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from synthetic_records import make_record, make_trial

FILE = Path(__file__).parent.parent / "experiments" / "order_effect.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("order_effect", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SIZES = ((4, 32, "a"), (32, 4, "a"), (32, 4, "b"), (8, 8, "a"))


def record(seed: int, accuracies: tuple[float, ...], *, lr: float = 1e-3, sizes=SIZES, trained: int = 1):
    made = make_record(make_trial(seed=seed, lr=lr), test=0.5)
    made.trial["data"]["test"] = [
        {"task": "set_disjointness", "examples": 1000, "size_a": a, "size_b": b, "first": first, "num_passes": 1}
        for a, b, first in sizes
    ]
    made.trial["data"]["train"] = made.trial["data"]["test"][:trained]
    test = tuple(
        made.outcome.test[0].model_copy(update={"name": str(i), "accuracy": accuracy})
        for i, accuracy in enumerate(accuracies)
    )
    return made.model_copy(update={"outcome": made.outcome.model_copy(update={"test": test})})


def test_the_gap_is_of_mirrored_orders_and_its_interval_over_seeds(script):
    frame = script.order_effect([record(0, (0.9, 0.4, 0.7, 0.0)), record(1, (0.8, 0.2, 0.6, 1.0))])
    (row,) = frame.to_dict("records")
    # B first, so the smaller set of the third slice is read first.
    assert row["smaller_first"] == pytest.approx((0.9 + 0.7 + 0.8 + 0.6) / 4)
    assert row["larger_first"] == pytest.approx((0.4 + 0.2) / 2)
    assert row["gap"] == pytest.approx(0.45)
    assert -1 <= row["low"] < row["gap"] < row["high"] <= 1


def test_the_largest_gap_is_of_any_trial_and_the_sizes_can_be_told_apart(script):
    sizes = ((4, 32, "a"), (32, 4, "a"), (4, 64, "a"), (64, 4, "a"))
    records = [record(0, (0.9, 0.8, 0.3, 0.4), sizes=sizes), record(0, (0.5, 0.1, 0.2, 0.1), sizes=sizes, lr=1e-2)]
    # Validation tells the two apart by nothing: the lower rate is chosen.
    trained, larger = (script.order_effect(records, sizes).to_dict("records")[0] for sizes in script.SIZES[:2])
    (all_sizes,) = script.order_effect(records).to_dict("records")
    assert trained["gap"] == pytest.approx(0.1)
    assert larger["gap"] == pytest.approx(-0.1)
    assert all_sizes["gap"] == pytest.approx(0.0)
    assert all_sizes["largest_gap"] == pytest.approx(0.25)
    assert larger["largest_gap"] == pytest.approx(0.1)
    assert script.order_effect(records, "smaller than trained on").empty


@pytest.mark.parametrize(
    ("sizes", "which"),
    [((4, 8), "as trained on"), ((32, 5), "larger than trained on"), ((30, 3), "smaller than trained on")],
)
def test_which_sizes_a_slice_has(script, sizes, which):
    train = [{"size_a": 4, "size_b": 32}, {"size_a": 32, "size_b": 4}]
    assert script.sizes_of(dict(zip(("size_a", "size_b"), sizes, strict=True)), train) == which


def test_the_script_draws_and_prints(script, tmp_path, capsys, monkeypatch):
    sets = record(0, (0.9, 0.4, 0.7, 0.0, 0.5, 0.5), sizes=(*SIZES, (4, 64, "a"), (64, 4, "a")))
    monkeypatch.setattr(script, "load_runs", lambda runs: [make_record(make_trial()), sets])
    script.main("run", str(tmp_path / "figure.png"))
    printed = capsys.readouterr().out
    assert "+0.400" in printed
    assert "mqar" not in printed
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_diverged_trial_has_no_gap(script):
    other = record(0, (0.0,) * 4, lr=1e-2)
    outcome = other.outcome.model_copy(update={"status": "diverged", "test": ()})
    diverged = other.model_copy(update={"status": "diverged", "outcome": outcome})
    (row,) = script.order_effect([record(0, (0.9, 0.4, 0.7, 0.0)), diverged]).to_dict("records")
    assert (row["trials"], row["largest_gap"]) == (2, row["gap"])


def test_a_run_without_sets_is_told(script, monkeypatch):
    monkeypatch.setattr(script, "load_runs", lambda runs: [make_record(make_trial())])
    with pytest.raises(SystemExit, match="run has no trial on set_disjointness"):
        script.main("run")
