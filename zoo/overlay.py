"""Points to set beside a frontier: published ones, another run's, or a file's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import ConfigError, did_you_mean
from zoo.frontier import data_id, frontier_table, split_by_data
from zoo.record import Record
from zoo.results import REFERENCE, RunStore, flatten, is_reference, load_runs

if TYPE_CHECKING:
    import pandas as pd

OVERLAY_COLUMNS = ("family", "label", "bytes", "accuracy", "uncertainty", "source")
_PUBLISHED = resources.files("zoo").joinpath("data", "published")


def published() -> list[str]:
    """The names of the published results that come with the package, for `read_overlay`."""
    return sorted(entry.name.removesuffix(".csv") for entry in _PUBLISHED.iterdir() if entry.name.endswith(".csv"))


def read_overlay(source: str | Path, records: Sequence[Record] = ()) -> pd.DataFrame:
    """Points to draw hollow behind a frontier: columns family, label, bytes, accuracy, uncertainty, source.

    source: a CSV file with these columns (`#` begins a comment), the name of published results such as
    `based_figure2`, a run folder, or `reference`, the package's own runs. Of a run, the trials on the same data as
    `records` count; published results must be of that data, which is that of the reference run of their name. What a
    file's points are of is its author's affair. `attrs["name"]` is what the figure calls it.

    Raises ConfigError when no point is of that data, on a file without these columns, and on any other source.
    """
    import pandas as pd

    path = Path(source)
    name = path.stem if path.suffix == ".csv" else path.name
    if str(source) in published():
        file = _PUBLISHED.joinpath(f"{source}.csv")
        anyway = f" To have its points all the same, give their file: --overlay {file}"
        reference = RunStore(str(resources.files("zoo").joinpath("data", REFERENCE, str(source))))
        _on_same_data(reference.load(), records, str(source), anyway)
        frame = _read_csv(file.read_bytes(), str(source))
        name = f"{source} (published, its state by formula)"
    elif path.is_dir() or is_reference(source):
        measured = _on_same_data(load_runs([path]), records, str(source))
        ran = frontier_table(measured)
        ran = ran[ran["status"] == "ok"]
        frame = pd.DataFrame(
            {
                "family": ran["family"],
                "label": ran["label"],
                "bytes": ran["state_bytes"].astype(float),
                "accuracy": ran["accuracy"],
                "uncertainty": ((ran["high"] - ran["low"]) / 2).fillna(0.0),
                "source": str(source),
            }
        )
        if is_reference(source):
            name = f"reference ({', '.join(sorted({record.provenance.device for record in measured}))})"
    elif path.is_file():
        frame = _read_csv(path.read_bytes(), str(source))
    else:
        raise ConfigError(
            f"overlay {str(source)!r} is no CSV file, no run folder and no published result."
            f"{did_you_mean(str(source), [REFERENCE, *published()])} Published: {', '.join(published())}; "
            f"measured with zoo: {REFERENCE}."
        )
    frame.attrs["name"] = name
    return frame


def _on_same_data(measured: Sequence[Record], records: Sequence[Record], source: str, remedy: str = "") -> list[Record]:
    if not measured:
        raise ConfigError(f"overlay {source!r} has no records; `zoo sweep` writes one as each trial ends.")
    asked = {data_id(record) for record in records}
    found = [record for record in measured if not asked or data_id(record) in asked]
    if not found:
        here, there = split_by_data(records), split_by_data(measured)
        near = [_difference(members[0], there[title][0]) for title, members in here.items() if title in there]
        raise ConfigError(
            f"overlay {source!r} has nothing on this data, which is {'; '.join(here)}. "
            f"It has: {'; '.join(there)}{''.join(near)}.{remedy}"
        )
    return found


def _difference(here: Record, there: Record) -> str:
    """Where the data settings of two records differ that have the same test slices."""
    ours, theirs = flatten(here.trial["data"]), flatten(there.trial["data"])
    names = [name for name in dict.fromkeys([*theirs, *ours]) if name != "seed" and ours.get(name) != theirs.get(name)]
    if not names:
        return ", with another version of the task"
    some = ", ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} here" for name in names[:3])
    return f", with data.{some}{', ...' if len(names) > 3 else ''}"


def _read_csv(data: bytes, source: str) -> pd.DataFrame:
    import pandas as pd

    remedy = f"a CSV has {','.join(OVERLAY_COLUMNS)} (the last two may be left out)"
    try:
        frame = pd.read_csv(io.BytesIO(data), comment="#")
    except ValueError as error:
        raise ConfigError(f"overlay {source!r} is not a CSV file: {str(error).strip()}; {remedy}.") from error
    missing = [name for name in OVERLAY_COLUMNS[:4] if name not in frame]
    if missing:
        raise ConfigError(f"overlay {source!r} lacks the column {', '.join(missing)}; {remedy}.")
    frame = frame.assign(uncertainty=frame.get("uncertainty", 0.0), source=frame.get("source", source))
    for column in ("bytes", "accuracy", "uncertainty"):
        numbers = pd.to_numeric(frame[column], errors="coerce")
        wrong = ~(numbers > 0) if column == "bytes" else ~numbers.between(0, 1)
        if wrong.any():
            row = int(wrong.to_numpy().argmax())
            allowed = "a number above 0" if column == "bytes" else "a number from 0 to 1"
            raise ConfigError(
                f"overlay {source!r}, row {row + 1}: {column} {frame[column].tolist()[row]!r} is not {allowed}."
            )
        frame[column] = numbers.astype(float)
    return frame[list(OVERLAY_COLUMNS)]
