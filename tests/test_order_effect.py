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


def record(seed: int, accuracies: tuple[float, ...]):
    made = make_record(make_trial(seed=seed), test=0.5)
    sizes = ((4, 32, "a"), (32, 4, "a"), (32, 4, "b"), (8, 8, "a"))
    made.trial["data"]["test"] = [
        {"task": "set_disjointness", "examples": 1000, "size_a": a, "size_b": b, "first": first, "num_passes": 1}
        for a, b, first in sizes
    ]
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


def test_the_script_draws_and_prints(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "load_runs", lambda runs: [record(0, (0.9, 0.4, 0.7, 0.0))])
    script.main("run", str(tmp_path / "figure.png"))
    assert "+0.400" in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 1000
