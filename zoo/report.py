"""One self-contained HTML page: figures, tables with the keys behind every point, what went wrong, how to repeat it."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError
from zoo.frontier import SAME_ANSWERS, frontier_table, hypervolumes, information_limit, slice_names, split_by_data
from zoo.plot import figure, format_bytes, style, to_svg
from zoo.record import Record
from zoo.results import error_text, flatten, labels, longest_state, model_family

if TYPE_CHECKING:
    import pandas as pd


class _Html(str):
    """Text that is HTML already; any other text is escaped."""


def write_report(records: Iterable[Record], path: str | Path, title: str = "Recall against recurrent state") -> Path:
    """Write the page and return its path: no scripts or fonts from elsewhere; the same records give the same bytes.

    Raises ConfigError when there are no records.
    """
    records = list(records)
    if not records:
        raise ConfigError("there are no records to report on; run `zoo sweep` first.")
    parts = [_Html(f"<h1>{_escape(title)}</h1>"), _summary(records)]
    for data, members in split_by_data(records).items():
        parts += _data_section(data, members)
    parts += [_troubles(records), _environment(records)]
    page = _PAGE.format(title=_escape(title), style=_STYLE, script=_SCRIPT, body="\n".join(parts))
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")
    return file


def _summary(records: list[Record]) -> _Html:
    count = {status: sum(record.status == status for record in records) for status in ("ok", "diverged", "failed")}
    bad = ", ".join(f"{count[status]} {status}" for status in ("diverged", "failed") if count[status])
    families = {model_family(record) for record in records}
    hours = sum(record.provenance.seconds for record in records) / 3600
    days = sorted(record.provenance.started[:10] for record in records)
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    text = (
        f"{len(records)} trials ({bad or 'all ended well'}), {len(families)} model families, {hours:.2f} hours of "
        f"trials, {when}. The learning rate is chosen on validation data, for each seed; accuracies are test "
        "accuracies. The state is counted from the tensors of a real decode of one sequence."
    )
    return _Html(f'<p class="lead">{_escape(text)}</p>')


def _data_section(data: str, members: list[Record]) -> list[_Html]:
    frontier = frontier_table(members)
    parts = [_Html(f"<h2>{_escape(data)}</h2>")]
    if (frontier["status"] == "ok").any():
        drawn = figure(frontier, limit=information_limit(members))
        label = _escape(f"Accuracy against measured state: {data}")
        parts.append(_Html(f'<figure role="img" aria-label="{label}">{to_svg(drawn)}</figure>'))
    parts += [_flags(frontier), _frontier(frontier)]
    if (frontier["status"] == "ok").any():
        parts += [_slices(frontier, members), _hypervolumes(frontier), _states(frontier, members)]
    return [*parts, _settings(members)]


def _flags(frontier: pd.DataFrame) -> _Html:
    """What a reader of the figure must know before trusting a point."""
    found = []
    for row in frontier.to_dict("records"):
        name = f"{style(row['family']).name} {row['label']}"
        if row["status"] != "ok":
            found.append(f"{name} is not in the figure: all of its {row['trials']} trials {row['status']}.")
            continue
        if row["agreement"] < SAME_ANSWERS:
            found.append(
                f"{name}: through its state the model gives the same answer as the parallel form in only "
                f"{row['agreement']:.1%} of cases; its state may not be all of its memory."
            )
        if row["lost_seeds"]:
            lost = ", ".join(map(str, row["lost_seeds"]))
            found.append(f"{name}: no trial of seed {lost} ended well; the mean is over the others.")
        if row["lr_at_edge"]:
            found.append(f"{name}: a chosen learning rate is the least or greatest tried; a wider grid may do better.")
    if not found:
        return _Html("")
    items = "".join(f"<li>{_escape(text)}</li>" for text in found)
    return _Html(f'<div class="flags"><h3>Read with care</h3><ul>{items}</ul></div>')


def _frontier(frontier: pd.DataFrame) -> _Html:
    rows = []
    for row in frontier.to_dict("records"):
        ok = row["status"] == "ok"
        interval = "" if math.isnan(row["low"]) else f"{row['low']:.3f} to {row['high']:.3f}"
        rows.append(
            [
                _Html('<span title="on the Pareto frontier">●</span>') if row["on_frontier"] else "",
                _chip(row["family"]),
                row["label"],
                _bytes(row["state_bytes"]),
                _number(row["parameters"]),
                f"{row['accuracy']:.3f}" if ok else row["status"],
                interval,
                ", ".join(f"{seed}: {value:.3f}" for seed, value in zip(row["seeds"], row["accuracies"], strict=True)),
                ", ".join(f"{rate:.2g}" for rate in row["lrs"]),
                _Html(" ".join(f'<code title="{key}">{key[:10]}</code>' for key in map(_escape, row["keys"]))),
            ]
        )
    head = ("", "family", "model", "state", "parameters", "accuracy", "95% interval", "seeds", "lr", "trials")
    return _Html("<h3>Models</h3>" + _table(head, rows))


def _slices(frontier: pd.DataFrame, members: list[Record]) -> _Html:
    """Accuracy by test slice: the mean over the chosen trials of each model."""
    names = slice_names(members)
    by_key = {record.key: record for record in members}
    rows = []
    for row in frontier[frontier["status"] == "ok"].to_dict("records"):
        chosen = [by_key[key].outcome for key in row["keys"]]
        cells: list[str] = [_chip(row["family"]), row["label"]]
        for name in names:
            values = [part.accuracy for outcome in chosen if outcome for part in outcome.test if part.name == name]
            mean = sum(values) / len(values)
            cells.append(_Html(f'<span class="heat" style="--a:{mean:.3f}">{mean:.3f}</span>'))
        rows.append(cells)
    return _Html("<h3>By test slice</h3>" + _table(("family", "model", *names), rows))


def _hypervolumes(frontier: pd.DataFrame) -> _Html:
    frame = hypervolumes(frontier)
    size, floor = frame.attrs["reference"]
    rows = [
        ["all families" if name == "all" else _chip(name), str(points), f"{volume:.3f}"]
        for name, points, volume in frame[["family", "points", "hypervolume"]].itertuples(index=False)
    ]
    note = (
        "Area under the Pareto staircase, in doublings of state times accuracy, up to the reference point "
        f"({format_bytes(size)}, accuracy {floor:g}). It depends on which sizes were run."
    )
    return _Html(f"<h3>Hypervolume</h3><p>{_escape(note)}</p>" + _table(("family", "models", "hypervolume"), rows))


def _states(frontier: pd.DataFrame, members: list[Record]) -> _Html:
    """Every tensor of every model's state."""
    by_key = {record.key: record for record in members}
    rows = []
    for row in frontier[frontier["status"] == "ok"].to_dict("records"):
        state = longest_state(by_key[row["keys"][0]])
        for layer in state.layers if state else ():
            for tensor in layer.tensors:
                shape = " × ".join(map(str, tensor.shape))
                place = f"{layer.layer}: {layer.mixer}"
                rows.append(
                    [_chip(row["family"]), row["label"], place, tensor.name, shape, tensor.dtype, _bytes(tensor.bytes)]
                )
    head = ("family", "model", "layer", "tensor", "shape", "dtype", "size")
    return _details("The measured state, tensor by tensor", _table(head, rows))


def _settings(members: list[Record]) -> _Html:
    import yaml

    flat = [flatten(record.trial) for record in members]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    rows = []
    for name in names:
        values = list(map(str, _distinct(settings[name] for settings in flat if name in settings)))
        rows.append([name, ", ".join(values[:12]) + (", ..." if len(values) > 12 else "")])
    grid = yaml.safe_dump(reproducing_grid(members), sort_keys=False, default_flow_style=None, width=110)
    how = (
        "Save this as grid.yaml; <code>zoo sweep grid.yaml</code> runs these trials again, under the same keys while "
        "the versions below are the same."
    )
    return _Html(
        _details("Settings", _table(("setting", "values"), rows))
        + _details("How to reproduce", f"<p>{how}</p><pre>{_escape(grid)}</pre>")
    )


def reproducing_grid(records: Sequence[Record]) -> dict[str, Any]:
    """A sweep, as plain data for a YAML file, whose trials are those of the records: one variant a model."""
    sections = ("data", "model", "optimizer", "training", "seed")
    first = records[0].trial
    shared = {name: first[name] for name in sections if all(record.trial[name] == first[name] for record in records)}
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        rest = {name: record.trial[name] for name in sections if name not in shared}
        fixed = {name: value for name, value in rest.items() if name not in ("optimizer", "seed")}
        groups.setdefault(repr(fixed), []).append(rest)
    return {"name": "reproduced", **shared, "variants": [v for group in groups.values() for v in _variants(group)]}


def _variants(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials that differ in optimiser and seed, as one variant with axes where they are a full grid, else one each."""
    flat = [{f"optimizer.{k}": v for k, v in t.get("optimizer", {}).items()} | {"seed": t.get("seed")} for t in trials]
    axes = {name: _distinct(settings[name] for settings in flat) for name in flat[0]}
    varying = {name: values for name, values in axes.items() if len(values) > 1}
    points = {repr(settings) for settings in flat}
    # A list among the values would be read as an axis of its own.
    if math.prod(map(len, axes.values())) != len(points) or any(
        isinstance(v, list) for vs in varying.values() for v in vs
    ):
        return trials
    variant = dict(trials[0])
    if "optimizer" in variant:
        variant["optimizer"] = {k: varying.get(f"optimizer.{k}", v) for k, v in variant["optimizer"].items()}
    if "seed" in variant:
        variant["seed"] = varying.get("seed", variant["seed"])
    return [variant]


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once; numbers in order."""
    found = list({repr(value): value for value in values}.values())
    return sorted(found) if all(isinstance(value, int | float) for value in found) else found


def _troubles(records: list[Record]) -> _Html:
    bad = [(record, label) for record, label in zip(records, labels(records), strict=True) if record.status != "ok"]
    if not bad:
        return _Html("")
    rows = []
    for record, label in bad:
        error: str = error_text(record) or ""
        if record.failure is not None:
            error = _details(error, f"<pre>{_escape(record.failure.traceback)}</pre>")
        rows.append(
            [
                _Html(f'<code title="{_escape(record.key)}">{_escape(record.key[:10])}</code>'),
                record.status,
                _chip(model_family(record)),
                label,
                f"{record.trial['optimizer']['lr']:.2g}",
                str(record.trial["seed"]),
                error,
            ]
        )
    head = ("trial", "status", "family", "model", "lr", "seed", "error")
    return _Html(f"<h2>{len(bad)} trials without an accuracy</h2>" + _table(head, rows))


def _environment(records: list[Record]) -> _Html:
    rows = []
    for name in ("zoo", "git", "torch", "python", "device", "threads", "executor"):
        rows.append([name, _tally(str(getattr(record.provenance, name)) for record in records)])
    for name in sorted({name for record in records for name in record.versions}):
        rows.append([name, _tally(record.versions[name] for record in records if name in record.versions)])
    return _Html("<h2>Versions</h2>" + _table(("what", "version (trials)"), rows))


def _tally(values: Iterable[str]) -> str:
    count: dict[str, int] = {}
    for value in values:
        count[value] = count.get(value, 0) + 1
    return ", ".join(f"{value} ({count[value]})" for value in sorted(count))


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)


def _cell(text: str) -> str:
    return text if isinstance(text, _Html) else _escape(text)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> _Html:
    top = "".join(f"<th>{_escape(name)}</th>" for name in head)
    body = "\n".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return _Html(f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>')


def _details(summary: str, inside: str) -> _Html:
    return _Html(f"<details><summary>{_escape(summary)}</summary>{inside}</details>")


def _chip(name: str) -> _Html:
    look = style(name)
    return _Html(f'<span class="chip" style="--c:{look.colour}" title="{_escape(name)}">{_escape(look.name)}</span>')


def _bytes(size: Any) -> str:
    if _missing(size):
        return ""
    return _Html(f'<span data-sort="{int(size)}" title="{int(size):,} bytes">{format_bytes(int(size))}</span>')


def _number(value: Any) -> str:
    return "" if _missing(value) else f"{int(value):,}"


def _missing(value: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(value))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; } .lead { color: #555; max-width: 52rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: #555; border-bottom: 1px solid #bbb; cursor: pointer; }
th, td { padding: .22rem .7rem .22rem 0; vertical-align: top; white-space: nowrap; }
tbody tr:nth-child(even) { background: #f7f7f5; }
td details, td:last-child { white-space: normal; }
code, pre { font-family: ui-monospace, monospace; font-size: .8rem; }
pre { background: #f7f7f5; padding: .8rem; overflow-x: auto; }
.chip::before { content: ""; display: inline-block; width: .6em; height: .6em; margin-right: .45em; }
.chip::before { background: var(--c); }
.heat { padding: 0 .4em; background: rgba(18, 87, 166, calc(var(--a) * .35)); }
.flags { border-left: 4px solid #d55e00; padding: .1rem 1rem; background: #fdf5ef; } .flags h3 { margin-top: .6rem; }
details { margin: .7rem 0; } summary { cursor: pointer; }
"""

_SCRIPT = """
document.querySelectorAll("th").forEach(th => th.addEventListener("click", () => {
  const column = [...th.parentNode.children].indexOf(th), body = th.closest("table").tBodies[0];
  const key = row => {
    const cell = row.children[column];
    const text = (cell.querySelector("[data-sort]")?.dataset.sort ?? cell.textContent).trim();
    const number = parseFloat(text.replaceAll(",", ""));
    return Number.isNaN(number) ? text : number;
  };
  const up = th.dataset.up !== "1";
  th.dataset.up = up ? "1" : "0";
  const compare = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : (typeof a < typeof b ? -1 : 1);
  [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(key(a), key(b))).forEach(row => body.append(row));
}));
"""
