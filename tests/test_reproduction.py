"""The page on what was reproduced says what the records say that come with the package."""

from __future__ import annotations

import importlib
import re
import sys
from itertools import takewhile
from pathlib import Path

import pytest

from zoo.results import load_runs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        yield importlib.import_module("reproduction")
    finally:
        sys.path.remove(str(ROOT / "experiments"))
        for name in ("reproduction", "order_effect"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def page():
    """The lines of the page, each with single spaces."""
    return [" ".join(line.split()) for line in (ROOT / "docs" / "reproduction.md").read_text("utf-8").splitlines()]


def tables_of(page: list[str], head: str) -> list[list[str]]:
    """The lines of each table whose first line begins with `head`."""
    begins = [i for i, line in enumerate(page) if line.startswith(head)]
    return [list(takewhile(lambda line: line.startswith("|"), page[begin:])) for begin in begins]


def table_of(page: list[str], head: str) -> list[str]:
    """The lines of the only such table."""
    (table,) = tables_of(page, head)
    return table


def test_the_published_points_and_the_medians(script, page):
    table, _, medians = script.against_published(load_runs(["reference/based_figure2"])).partition("\n\n")
    assert table_of(page, "| model | published | here |") == table.splitlines()
    assert medians in page
    assert len(table.splitlines()) >= 2 + 44


def test_where_accuracy_falls(script, page):
    table = script.by_slice(load_runs(["reference/based_figure2"])).splitlines()
    assert table_of(page, "| d 128 | state |") == table


def test_accuracy_by_length(script, page):
    records = load_runs(["reference/mqar_by_length"])
    heads = [line for line in page if re.match(r"\| d \d+ \| \(", line)]
    assert heads
    for head in heads:
        table = script.by_length(records, int(head.split()[2])).splitlines()
        # The page says more of some learning rates, and has no order of its rows.
        printed, said = (
            sorted(line.split(" | ")[:-1] for line in t if "---" not in line) for t in (table, table_of(page, head))
        )
        assert said == printed


def test_the_order_of_the_sets(script, page):
    ours, published_blocks, paused = tables_of(page, "| BASED | state, bytes |")
    assert ours == script.by_order(load_runs(["reference/set_disjointness"])).splitlines()
    assert published_blocks == script.by_order(script.sets_of("published_block")).splitlines()
    assert paused == script.by_order(script.sets_of("paused_sets")).splitlines()


def test_the_seconds_and_the_number_of_trials(page):
    records = load_runs(["reference/based_figure2"])
    minutes = sum(record.provenance.seconds for record in records) / 60
    found = re.search(r"(\d+) trials in (\d+) minutes of GPU time", " ".join(page))
    assert found is not None
    assert int(found[1]) == len(records)
    assert int(found[2]) == pytest.approx(minutes, abs=0.6)
