"""What the order of the sets costs, in a run of set disjointness: accuracy where the smaller set comes first, less that
of the mirrored slices, for each model against its state, over sets as large as trained on and over larger ones. Prints
tables and draws FIGURE.

    python experiments/order_effect.py RUN [FIGURE.png]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from statistics import mean

import matplotlib.pyplot as plt
import pandas as pd

from zoo.frontier import frontier_table, split_by_data, t_interval
from zoo.plot import style
from zoo.record import Record
from zoo.results import load_runs
from zoo.text import aligned


def order_effect(records: Sequence[Record], larger: bool | None = None) -> pd.DataFrame:
    """One row a model: state_bytes, accuracy smaller set first and larger set first, and their gap, low and high.

    Means over slices; then over seeds, with a 95 % t interval of the gap. Slices of equal sets do not count. larger:
    only slices with more tokens than those trained on (True), or only the others (False).
    largest_gap: of all the model's trials, whatever their learning rate, the gap of the one where it is largest. The
    published plot of the difference shows this one (jrt_plot.py of HazyResearch/prefix-linear-attention).
    """
    models = {record.key: json.dumps(record.trial["model"], sort_keys=True) for record in records}
    orders = {record.key: _by_order(record, larger) for record in records if record.status == "ok"}
    rows = []
    for row in frontier_table(records).to_dict("records"):
        if not row["keys"]:
            continue
        seeds = [orders[key] for key in row["keys"]]
        gaps = [small - large for small, large in seeds]
        # t_interval is of fractions; a gap is in [-1, 1].
        low, high = (2 * bound - 1 for bound in t_interval([(1 + gap) / 2 for gap in gaps]))
        means = {"smaller_first": mean(s for s, _ in seeds), "larger_first": mean(s for _, s in seeds)}
        kept = {name: row[name] for name in ("family", "label", "state_bytes", "n", "trials")}
        model = models[row["keys"][0]]
        largest = max(small - large for key, (small, large) in orders.items() if models[key] == model)
        rows.append({**kept, **means, "gap": mean(gaps), "low": low, "high": high, "largest_gap": largest})
    return pd.DataFrame(rows).sort_values("state_bytes", ignore_index=True)


def _by_order(record: Record, larger: bool | None) -> tuple[float, float]:
    assert record.outcome is not None
    trained = max(entry["size_a"] + entry["size_b"] for entry in record.trial["data"]["train"])
    found: dict[bool, list[float]] = {True: [], False: []}
    for entry, part in zip(record.trial["data"]["test"], record.outcome.test, strict=True):
        first, second = entry["size_a"], entry["size_b"]
        if larger is not None and larger != (first + second > trained):
            continue
        if entry["first"] == "b":
            first, second = second, first
        if first != second:
            found[first < second].append(part.accuracy)
    return mean(found[True]), mean(found[False])


def _table(frame: pd.DataFrame) -> str:
    head = ["model", "settings", "state B", "smaller first", "larger first", "gap", "95 % interval", "seeds"]
    rows = [[*head, "largest gap of its trials"]]
    for row in frame.itertuples():
        interval = "" if row.n < 2 else f"{row.low:+.3f} .. {row.high:+.3f}"
        accuracies = [f"{row.smaller_first:.3f}", f"{row.larger_first:.3f}", f"{row.gap:+.3f}"]
        largest = f"{row.largest_gap:+.3f} of {row.trials}"
        rows.append([row.family, row.label, f"{row.state_bytes:,}", *accuracies, interval, str(row.n), largest])
    return aligned(rows, right=(2, 3, 4, 5, 7, 8))


SIZES = {"all sizes": None, "as trained on": False, "larger than trained on": True}


def main(run: str, figure: str | None = None) -> None:
    records = [record for record in load_runs([run]) if _is_of_sets(record)]
    if not records:
        sys.exit(f"{run} has no trial on set_disjointness.")
    fig, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    axes[2].sharey(axes[1])
    settings = sorted(split_by_data(records).items(), key=lambda setting: _passes(setting[1]))
    for line, (title, records) in zip(("-", "--", ":"), settings, strict=False):
        passes = _passes(records)
        frames = {name: order_effect(records, larger) for name, larger in SIZES.items()}
        for name, frame in frames.items():
            print(f"{title}, {name}\n{_table(frame)}\n")
            for family, part in frame.groupby("family"):
                look = style(str(family))
                who = f"{look.name}, given {'once' if passes == 1 else f'{passes} times'}"
                common = {
                    "color": look.colour,
                    "marker": look.marker,
                    "linestyle": line,
                    "capsize": 2,
                    "alpha": 1 / passes,
                }
                # Settings of one state stand beside each other.
                x = part["state_bytes"] * 1.06 ** (passes - 1)
                if name == "all sizes":
                    axes[0].errorbar(x, part["smaller_first"], label=f"{who}: smaller set first", **common)
                    axes[0].errorbar(x, part["larger_first"], label="larger set first", **common, mfc="white")
                else:
                    spread = [
                        part["gap"] - part["low"].fillna(part["gap"]),
                        part["high"].fillna(part["gap"]) - part["gap"],
                    ]
                    axes[1 + bool(SIZES[name])].errorbar(x, part["gap"], yerr=spread, label=who, **common)
    for ax, title in zip(axes, ("all sizes", "sets as large as trained on", "larger sets"), strict=True):
        ax.set_title(title, fontsize=10)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("measured recurrent state of one sequence, bytes")
        ax.set_ylabel("test accuracy" if ax is axes[0] else "gap, smaller less larger set first")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    if figure is not None:
        fig.savefig(figure, dpi=150)


def _is_of_sets(record: Record) -> bool:
    data = record.trial["data"]
    return all(entry["task"] == "set_disjointness" for entry in (*data["train"], *data["test"]))


def _passes(records: Sequence[Record]) -> int:
    return int(records[0].trial["data"]["test"][0]["num_passes"])


if __name__ == "__main__":
    main(*sys.argv[1:])
