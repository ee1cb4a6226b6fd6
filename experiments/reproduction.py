"""The tables of docs/reproduction.md, from the records that come with the package, as Markdown.

python experiments/reproduction.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
from order_effect import SIZES, is_of_sets, order_effect, passes

from zoo.frontier import compare, frontier_table, split_by_data
from zoo.overlay import read_overlay
from zoo.plot import style
from zoo.record import Record
from zoo.results import load_runs

CLOSE = ("based", "delta_net", "gla", "sliding_window", "attention")
"""The families whose published runs are expected to be met."""


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    first, *others = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([first, f"|{'---|' * len(head)}", *others])


def against_published(records: Sequence[Record]) -> str:
    """Every published point beside the model of its setting, and the medians of the differences."""
    frame = compare(frontier_table(records), read_overlay("based_figure2", records))
    rows = [
        [
            f"{style(row['family']).name} {row['label']}",
            f"{row['point_accuracy']:.3f}",
            f"{row['accuracy']:.3f}",
            f"{row['difference']:+.3f}",
            f"{row['state_bytes']:,}",
            f"{row['point_bytes']:,.0f}",
        ]
        for row in frame.to_dict("records")
    ]
    head = ("model", "published", "here", "difference", "state here, bytes", "published bytes")
    sizes, families = frame["difference"].abs(), frame["family"]
    medians = [f"{style(str(name)).name} {_median(part)}" for name, part in sizes.groupby(families)]
    close = sizes[families.isin(CLOSE)]
    names = [style(name).name for name in CLOSE]
    return (
        f"{markdown(head, rows)}\n\nMedian absolute difference (points): {', '.join(medians)}; all {_median(sizes)}; "
        f"{', '.join(names[:-1])} and {names[-1]} together {_median(close)}, at most {close.max():.3f}."
    )


def _median(sizes: pd.Series) -> str:
    return f"{sizes.median():.3f} ({len(sizes)})"


def by_slice(records: Sequence[Record], d_model: int = 128, windows: Sequence[int] = (65, 257)) -> str:
    """Accuracy by test slice, mean over seeds, of the models of one width; of sliding windows, those of `windows`."""
    outcomes = {record.key: record.outcome for record in records}
    entries = records[0].trial["data"]["test"]
    head = [f"d {d_model}", "state", *(f"({entry['seq_len']}, {entry['num_pairs']})" for entry in entries)]
    frame = frontier_table(records).sort_values("accuracy", ascending=False)
    rows = []
    for row in frame.to_dict("records"):
        width, *dials = row["label"].split()
        left_out = row["family"] == "sliding_window" and dials not in [[f"w{window}"] for window in windows]
        if width != f"d{d_model}" or left_out:
            continue
        tests = [outcomes[key].test for key in row["keys"]]
        accuracies = [f"{mean(test[i].accuracy for test in tests):.2f}" for i in range(len(entries))]
        rows.append([" ".join([style(row["family"]).name, *dials]), f"{row['state_bytes']:,}", *accuracies])
    return markdown(head, rows)


def by_length(records: Sequence[Record], d_model: int) -> str:
    """Accuracy of models of one width, each trained and tested on one task, and the learning rates that did best."""
    found: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    wide = [record for record in records if record.trial["model"]["d_model"] == d_model]
    for members in split_by_data(wide).values():
        entry = members[0].trial["data"]["test"][0]
        for row in frontier_table(members).to_dict("records"):
            setting = (entry["seq_len"], entry["num_pairs"])
            found.setdefault(f"{style(row['family']).name} {_dials(row['label'])}".strip(), {})[setting] = row
    settings = sorted({setting for rows in found.values() for setting in rows})
    head = [f"d {d_model}", *map(str, settings), "learning rate, by length"]
    rows = [
        [
            name,
            *(_fraction(row[setting]["accuracy"]) if setting in row else "-" for setting in settings),
            ", ".join(_rate(row[setting]["lrs"][0]) for setting in settings if setting in row),
        ]
        for name, row in found.items()
    ]
    return markdown(head, rows)


def by_order(records: Sequence[Record]) -> str:
    """What the order of the sets costs, once and with the context given twice; see order_effect.py."""
    head = ("BASED", "state, bytes", "seeds", "smaller first", "larger first", "gap", *(f"sets {s}" for s in SIZES))
    return markdown([*head, "largest gap of a trial"], list(_orders(records)))


def _orders(records: Sequence[Record]) -> Iterator[list[str]]:
    for members in sorted(split_by_data(records).values(), key=passes):
        twice = passes(members) == 2
        every, *parts = (order_effect(members, sizes).to_dict("records") for sizes in (None, *SIZES))
        for row, *of_sizes in zip(every, *parts, strict=True):
            yield [
                f"{_dials(row['label'], width=True)}{', context twice' if twice else ''}",
                f"{row['state_bytes']:,}",
                str(row["n"]),
                _fraction(row["smaller_first"]),
                _fraction(row["larger_first"]),
                *(_gap(part) for part in (row, *of_sizes)),
                _fraction(row["largest_gap"], "+"),
            ]


def sets_of(run: str) -> list[Record]:
    """The trials of set disjointness in a run beside this file."""
    return [record for record in load_runs([str(Path(__file__).parent / "results" / run)]) if is_of_sets(record)]


def _gap(row: dict[str, Any]) -> str:
    return f"{_fraction(row['gap'], '+')} ({_fraction(row['low'], '+')} .. {_fraction(row['high'], '+')})"


def _dials(label: str, width: bool = False) -> str:
    """`d64 positions=learned f16` -> `f 16`, or with its width `d 64, f 16`."""
    found = re.findall(r"(?<!\S)([A-Za-z])(\d+)(?!\S)", label)
    return ", ".join(f"{name} {value}" for name, value in found if width or name != "d")


def _fraction(value: float, sign: str = "") -> str:
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{sign}.3f}")


def _rate(value: float) -> str:
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


if __name__ == "__main__":
    figure2 = load_runs(["reference/based_figure2"])
    print(f"## BASED Figure 2\n\n{against_published(figure2)}\n")
    print(f"## Where accuracy falls\n\n{by_slice(figure2)}\n")
    lengths = load_runs(["reference/mqar_by_length"])
    for width in sorted({record.trial["model"]["d_model"] for record in lengths}):
        print(f"{by_length(lengths, width)}\n")
    print(f"## Set disjointness\n\n{by_order(load_runs(['reference/set_disjointness']))}\n")
    print(f"In the published blocks:\n\n{by_order(sets_of('published_block'))}\n")
    print(f"With a pause:\n\n{by_order(sets_of('paused_sets'))}")
