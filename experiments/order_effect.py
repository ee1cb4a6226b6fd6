"""What the order of the sets costs, in a run of set disjointness: accuracy where the smaller set comes first, less that
of the mirrored slices, for each model against its state: over sets of the sizes trained on, over larger ones, and where
one set is smaller than any trained on. Prints tables and draws FIGURE.

    python experiments/order_effect.py RUN [FIGURE.png]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from zoo.frontier import frontier_table, split_by_data, t_interval
from zoo.plot import style
from zoo.record import Record
from zoo.results import load_runs
from zoo.text import aligned

SIZES = ("as trained on", "larger than trained on", "smaller than trained on")
"""Of a slice's sets: more tokens together than in training; else, one of fewer tokens than any in training; else, as
trained on."""


def order_effect(records: Sequence[Record], sizes: str | None = None) -> pd.DataFrame:
    """One row a model: state_bytes, accuracy smaller set first and larger set first, and their gap, low and high.

    Means over slices; then over seeds, with a 95 % t interval of the gap. Slices of equal sets do not count. sizes:
    only slices of these, one of SIZES; no rows where there are none.
    largest_gap: of all the model's trials, whatever their learning rate, the gap of the one where it is largest. The
    published plot of the difference shows this one (jrt_plot.py of HazyResearch/prefix-linear-attention).
    """
    models = {record.key: json.dumps(record.trial["model"], sort_keys=True) for record in records}
    found = {record.key: _by_order(record, sizes) for record in records if record.status == "ok"}
    orders = {key: order for key, order in found.items() if order is not None}
    rows = []
    for row in frontier_table(records).to_dict("records"):
        seeds = [orders[key] for key in row["keys"] if key in orders]
        if not seeds:
            continue
        gaps = [small - large for small, large in seeds]
        # t_interval is of fractions; a gap is in [-1, 1].
        low, high = (2 * bound - 1 for bound in t_interval([(1 + gap) / 2 for gap in gaps]))
        means = {"smaller_first": mean(s for s, _ in seeds), "larger_first": mean(s for _, s in seeds)}
        kept = {name: row[name] for name in ("family", "label", "state_bytes", "n", "trials")}
        model = models[row["keys"][0]]
        largest = max(small - large for key, (small, large) in orders.items() if models[key] == model)
        rows.append({**kept, **means, "gap": mean(gaps), "low": low, "high": high, "largest_gap": largest})
    return pd.DataFrame(rows).sort_values("state_bytes", ignore_index=True) if rows else pd.DataFrame()


def sizes_of(entry: Mapping[str, Any], train: Sequence[Mapping[str, Any]]) -> str:
    """Which of SIZES a test slice's sets have."""
    if entry["size_a"] + entry["size_b"] > max(each["size_a"] + each["size_b"] for each in train):
        return "larger than trained on"
    least = min(min(each["size_a"], each["size_b"]) for each in train)
    return "smaller than trained on" if min(entry["size_a"], entry["size_b"]) < least else "as trained on"


def _by_order(record: Record, sizes: str | None) -> tuple[float, float] | None:
    assert record.outcome is not None
    found: dict[bool, list[float]] = {True: [], False: []}
    for entry, part in zip(record.trial["data"]["test"], record.outcome.test, strict=True):
        if sizes is not None and sizes != sizes_of(entry, record.trial["data"]["train"]):
            continue
        first, second = entry["size_a"], entry["size_b"]
        if entry["first"] == "b":
            first, second = second, first
        if first != second:
            found[first < second].append(part.accuracy)
    return (mean(found[True]), mean(found[False])) if found[True] and found[False] else None


def _table(frame: pd.DataFrame) -> str:
    head = ["model", "settings", "state B", "smaller first", "larger first", "gap", "95 % interval", "seeds"]
    rows = [[*head, "largest gap of its trials"]]
    for row in frame.itertuples():
        interval = "" if row.n < 2 else f"{row.low:+.3f} .. {row.high:+.3f}"
        accuracies = [f"{row.smaller_first:.3f}", f"{row.larger_first:.3f}", f"{row.gap:+.3f}"]
        largest = f"{row.largest_gap:+.3f} of {row.trials}"
        rows.append([row.family, row.label, f"{row.state_bytes:,}", *accuracies, interval, str(row.n), largest])
    return aligned(rows, right=(2, 3, 4, 5, 7, 8))


def main(run: str, figure: str | None = None) -> None:
    records = [record for record in load_runs([run]) if is_of_sets(record)]
    if not records:
        sys.exit(f"{run} has no trial on set_disjointness.")
    fig, axes = plt.subplots(1, 1 + len(SIZES), figsize=(17, 4), layout="constrained")
    for ax in axes[2:]:
        ax.sharey(axes[1])
    for ax in axes[1:]:
        ax.axhline(0, color="0.6", linewidth=1)
    settings = sorted(split_by_data(records).items(), key=lambda setting: passes(setting[1]))
    for line, (title, members) in zip(("-", "--", ":"), settings, strict=False):
        for ax, sizes in zip(axes, (None, *SIZES), strict=True):
            frame = order_effect(members, sizes)
            if frame.empty:
                continue
            print(f"{title}, {sizes or 'all sizes'}\n{_table(frame)}\n")
            for family, part in frame.groupby("family"):
                _draw(ax, part, str(family), passes(members), line, of_gap=sizes is not None)
    guess = _guess(records[0])
    axes[0].axhline(guess, color="0.6", linewidth=1, label=f"any token of the smaller set: {guess:.2f}")
    for ax, title in zip(axes, ("all sizes", *(f"sets {sizes}" for sizes in SIZES)), strict=True):
        ax.set_title(title, fontsize=10)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("measured recurrent state of one sequence, bytes")
        ax.set_ylabel("test accuracy" if ax is axes[0] else "gap, smaller less larger set first")
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=8)
    if figure is not None:
        fig.savefig(figure, dpi=150)


def _draw(ax: Any, part: pd.DataFrame, family: str, times: int, line: str, of_gap: bool) -> None:
    look = style(family)
    who = f"{look.name}, given {'once' if times == 1 else f'{times} times'}"
    common = {"color": look.colour, "marker": look.marker, "linestyle": line, "capsize": 2, "alpha": 1 / times}
    # Settings of one state stand beside each other.
    x = part["state_bytes"] * 1.06 ** (times - 1)
    if of_gap:
        spread = [part["gap"] - part["low"].fillna(part["gap"]), part["high"].fillna(part["gap"]) - part["gap"]]
        ax.errorbar(x, part["gap"], yerr=spread, label=who, **common)
    else:
        ax.errorbar(x, part["smaller_first"], label=f"{who}: smaller set first", **common)
        ax.errorbar(x, part["larger_first"], label="larger set first", **common, mfc="white")


def _guess(record: Record) -> float:
    """Mean over test slices of the accuracy of one who answers with any token of the smaller set."""
    return mean(1 / min(entry["size_a"], entry["size_b"]) for entry in record.trial["data"]["test"])


def is_of_sets(record: Record) -> bool:
    """Whether a trial is of set disjointness, or of a task made from it, only."""
    data = record.trial["data"]
    return all("size_a" in entry for entry in (*data["train"], *data["test"]))


def passes(records: Sequence[Record]) -> int:
    """How many times the sets are given, in records of one data setting."""
    return int(records[0].trial["data"]["test"][0]["num_passes"])


if __name__ == "__main__":
    main(*sys.argv[1:])
