"""Accuracy against measured state: the learning rate chosen on validation data, seeds, intervals, the Pareto set.

Of the trials that differ only in optimiser settings, the one with the best validation accuracy is chosen, for each
seed on its own; what is reported is the chosen trials' test accuracy. Test data never choose anything.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zoo.errors import ConfigError, PluginError, RecordError, UnknownNameError, did_you_mean
from zoo.record import Record
from zoo.results import error_text, labels, longest_state, model_family

if TYPE_CHECKING:
    import pandas as pd

COVERAGE = 0.95
SAME_ANSWERS = 0.99
"""Below this share of equal answers the parallel and the recurrent form of a trial disagree: its point is flagged."""


def split_by_data(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each data setting, under a title such as `mqar T=64 n=4, T=128 n=8`.

    A setting is everything of a trial's data (train, validation, test, task versions) but its seed.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(data_id(record), []).append(record)
    titles = {identity: _data_title(members) for identity, members in groups.items()}
    return {
        title if list(titles.values()).count(title) == 1 else f"{title} (data {identity[:8]})": groups[identity]
        for identity, title in titles.items()
    }


def data_id(record: Record) -> str:
    """Names the record's data setting, as `split_by_data` takes it."""
    setting = {name: value for name, value in record.trial["data"].items() if name != "seed"}
    return _hash([setting, {name: v for name, v in record.versions.items() if name.startswith("task ")}])


def _data_title(members: list[Record]) -> str:
    task_names = list(dict.fromkeys(entry["task"].rpartition(":")[2] for entry in members[0].trial["data"]["test"]))
    tested = next((r.outcome.test for r in members if r.outcome is not None and r.outcome.test), ())
    slices = [part.name for part in tested]
    if len(slices) > 4:
        slices = [f"{len(slices)} slices from {slices[0]} to {slices[-1]}"]
    return " ".join(part for part in (" + ".join(task_names), ", ".join(slices)) if part)


def _model_id(record: Record) -> str:
    versions = {name: v for name, v in record.versions.items() if not name.startswith("task ")}
    return _hash([record.trial["model"], record.trial["training"], versions])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def choose(trials: Iterable[Record]) -> Record | None:
    """The trial with the best validation accuracy, then the lower validation loss, then the lower learning rate.

    None when no trial ended well: a diverged or failed one is never chosen.
    """
    ok = [trial for trial in trials if trial.status == "ok"]
    return min(ok, key=_merit) if ok else None


def _merit(record: Record) -> tuple[float, float, float, str]:
    outcome = record.outcome
    assert outcome is not None
    assert outcome.validation_accuracy is not None
    loss = sum(part.loss for part in outcome.validation) / len(outcome.validation)
    return -outcome.validation_accuracy, math.inf if math.isnan(loss) else loss, _optimizer(record, "lr"), record.key


def _optimizer(record: Record, setting: str) -> float:
    return record.trial["optimizer"][setting]


def frontier_table(records: Iterable[Record], slice_name: str | None = None) -> pd.DataFrame:
    """One row a model configuration: measured state and test accuracy over seeds, with the keys it comes from.

    Columns: family, label, status (`ok`; `diverged` or `failed` when no trial of it ended well), state_bytes,
    state_elements, state_seq_len, grows (the state grows with the sequence), parameters, accuracy (mean over seeds),
    low, high (95 % t interval, clipped to [0, 1]; NaN for one seed), n; per seed, as tuples, seeds, accuracies, lrs,
    weight_decays, keys (of the chosen trials); lost_seeds (seeds of which no trial ended well), trials, bad_trials,
    lr_at_edge (a chosen learning rate is the least or the greatest of three or more tried), agreement (least share of
    same answers through the state), error (of the first bad trial), on_frontier, on_family_frontier (Pareto set).
    `attrs["data"]` is the title of the data setting.

    slice_name: that test slice's accuracy and the state at its length, instead of the mean over slices and the state
    at the longest; the chosen trials stay the same.

    Raises ConfigError when there are no records, records of several data settings, or no such slice; RecordError when
    the seeds of one model measured different states.
    """
    import pandas as pd

    records = list(records)
    if not records:
        raise ConfigError("there are no records to make a frontier of; run `zoo sweep` first.")
    settings = split_by_data(records)
    if len(settings) > 1:
        raise ConfigError(
            f"the records have {len(settings)} data settings, which one frontier must not mix: {'; '.join(settings)}. "
            "Plot the runs apart, or split the records with zoo.frontier.split_by_data."
        )
    length = None if slice_name is None else slice_length(records, slice_name)
    models: dict[str, list[tuple[Record, str]]] = {}
    for record, label in zip(records, labels(records), strict=True):
        models.setdefault(_model_id(record), []).append((record, label))
    rows = [_row([record for record, _ in members], members[0][1], slice_name, length) for members in models.values()]
    rows.sort(key=lambda row: (row["family"], row["state_bytes"] or 0, row["label"]))
    frame = pd.DataFrame(rows)
    for name in ("state_bytes", "state_elements", "state_seq_len", "parameters"):
        frame[name] = frame[name].astype("Int64")
    ok, families = (frame["status"] == "ok").to_numpy(), frame["family"].to_numpy()
    frame["on_frontier"] = _pareto_among(frame, ok)
    frame["on_family_frontier"] = np.any([_pareto_among(frame, ok & (families == f)) for f in set(families)], axis=0)
    frame.attrs["data"] = next(iter(settings)) if slice_name is None else slice_name
    return frame


def _xy(frame: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return frame["state_bytes"].to_numpy(dtype=float, na_value=math.nan), frame["accuracy"].to_numpy(dtype=float)


def _pareto_among(frame: pd.DataFrame, rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
    flags = np.zeros(len(frame), dtype=bool)
    size, accuracy = _xy(frame)
    flags[rows] = pareto(size[rows], accuracy[rows])
    return flags


def compare(frontier: pd.DataFrame, overlay: pd.DataFrame) -> pd.DataFrame:
    """The rows of a `frontier_table` that are also points of an overlay (see `zoo.overlay.read_overlay`), side by side.

    A row is a point if it is of the same family and its label has every setting of the point's; a point with several
    readings, `d64 N16 or d128 N8`, gives a row each. Columns family, label, accuracy, low, high, state_bytes, and the
    point's: point, point_accuracy, point_bytes, uncertainty; difference = accuracy - point_accuracy.
    """
    import pandas as pd

    ours = ["family", "label", "accuracy", "low", "high", "n", "state_bytes"]
    theirs = {"label": "point", "accuracy": "point_accuracy", "bytes": "point_bytes", "uncertainty": "uncertainty"}
    here = frontier.loc[frontier["status"] == "ok", ours].to_dict("records")
    rows = []
    for point in overlay.to_dict("records"):
        readings = [set(reading.split()) for reading in point["label"].split(" or ")]
        there: dict[Hashable, Any] = {name: point[column] for column, name in theirs.items()}
        for row in here:
            if row["family"] == point["family"] and any(reading <= set(row["label"].split()) for reading in readings):
                rows.append({**row, **there, "difference": row["accuracy"] - point["accuracy"]})
    return pd.DataFrame(rows, columns=[*ours, *theirs.values(), "difference"])


def by_slice(records: Iterable[Record]) -> dict[str, pd.DataFrame]:
    """A frontier for each test slice: the chosen trials are the same, the state is that at the slice's length."""
    records = list(records)
    return {name: frontier_table(records, name) for name in slice_names(records)}


def slice_names(records: Iterable[Record]) -> list[str]:
    """The test slices of records of one data setting, in the order of the mixture; empty when every trial failed."""
    tested = next((r.outcome.test for r in records if r.outcome is not None and r.outcome.test), ())
    return [part.name for part in tested]


def slice_length(records: list[Record], slice_name: str) -> int:
    """The tokens of one test slice's examples. Raises ConfigError when no slice has that name."""
    lengths = {task.slice_name: task.length for task in _test_tasks(records[0])}
    if slice_name not in lengths:
        raise ConfigError(
            f"no test slice is called {slice_name!r}.{did_you_mean(slice_name, lengths)} Known: {', '.join(lengths)}."
        )
    return lengths[slice_name]


def _test_tasks(record: Record) -> list[Any]:
    from zoo.tasks import get_task

    return [
        get_task(entry["task"])(**{name: v for name, v in entry.items() if name not in ("task", "examples")})
        for entry in record.trial["data"]["test"]
    ]


def _row(members: list[Record], label: str, slice_name: str | None, length: int | None) -> dict[str, Any]:
    replicates: dict[tuple[int, int], list[Record]] = {}
    for record in members:
        replicates.setdefault((record.trial["seed"], record.trial["data"]["seed"]), []).append(record)
    picked = {seed: choose(trials) for seed, trials in sorted(replicates.items())}
    chosen = [record for record in picked.values() if record is not None]
    bad = [record for record in members if record.status != "ok"]
    status = "ok" if chosen else "diverged" if any(r.status == "diverged" for r in bad) else "failed"
    accuracies = [_accuracy(record, slice_name) for record in chosen]
    low, high = t_interval(accuracies)
    rates = sorted({_optimizer(record, "lr") for record in members})
    agreements = [r.outcome.agreement.same_answers for r in chosen if r.outcome and r.outcome.agreement]
    return {
        "family": model_family(members[0]),
        "label": label,
        "status": status,
        **_state(chosen or bad, length),
        "parameters": next((r.outcome.parameters for r in chosen or bad if r.outcome is not None), None),
        "accuracy": sum(accuracies) / len(accuracies) if accuracies else math.nan,
        "low": low,
        "high": high,
        "n": len(chosen),
        "seeds": tuple(record.trial["seed"] for record in chosen),
        "accuracies": tuple(accuracies),
        "lrs": tuple(_optimizer(record, "lr") for record in chosen),
        "weight_decays": tuple(_optimizer(record, "weight_decay") for record in chosen),
        "keys": tuple(record.key for record in chosen),
        "lost_seeds": tuple(seed for (seed, _), record in picked.items() if record is None),
        "trials": len(members),
        "bad_trials": len(bad),
        "lr_at_edge": len(rates) > 2 and any(_optimizer(r, "lr") in (rates[0], rates[-1]) for r in chosen),
        "agreement": min(agreements, default=math.nan),
        "error": error_text(bad[0]) if bad else None,
    }


def _accuracy(record: Record, slice_name: str | None) -> float:
    outcome = record.outcome
    assert outcome is not None
    assert outcome.test_accuracy is not None
    if slice_name is None:
        return outcome.test_accuracy
    return next(part.accuracy for part in outcome.test if part.name == slice_name)


def _state(members: list[Record], length: int | None) -> dict[str, Any]:
    """The state that the records measured, at `length` tokens or the most; nothing when all failed before that."""
    measured = [(record, state) for record in members if (state := longest_state(record, length)) is not None]
    if not measured:
        return {"state_bytes": None, "state_elements": None, "state_seq_len": None, "grows": False}
    record, state = measured[0]
    for other, its_state in measured:
        if its_state.bytes != state.bytes:
            raise RecordError(
                f"the trials {record.key[:12]} ({record.provenance.device}) and {other.key[:12]} "
                f"({other.provenance.device}) of one model measured states of {state.bytes} and {its_state.bytes} B; "
                "plot their runs apart."
            )
    assert record.outcome is not None
    return {
        "state_bytes": state.bytes,
        "state_elements": state.elements,
        "state_seq_len": state.seq_len,
        "grows": len({s.bytes for s in record.outcome.state}) > 1,
    }


def t_interval(values: Sequence[float], coverage: float = COVERAGE) -> tuple[float, float]:
    """Student's t interval of a mean of accuracies, clipped to [0, 1]; (NaN, NaN) for fewer than two values."""
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean = sum(values) / n
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    half = t_quantile(n - 1, coverage) * error
    return max(0.0, mean - half), min(1.0, mean + half)


def t_quantile(df: int, coverage: float = COVERAGE) -> float:
    """The t with P(|T| <= t) = coverage for Student's T with df >= 1 degrees of freedom: by bisection."""
    low, high = 0.0, 1.0
    while _t_coverage(high, df) < coverage:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_coverage(middle, df) < coverage else (low, middle)
    return (low + high) / 2


def _t_coverage(t: float, df: int) -> float:
    """P(|T| <= t), the finite series of Abramowitz and Stegun 26.7.3 (odd df) and 26.7.4 (even df)."""
    theta = math.atan2(t, math.sqrt(df))
    cosine, total = math.cos(theta), 0.0
    term = cosine if df % 2 else 1.0
    for power in range(1 if df % 2 else 0, df - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    if df % 2:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def pareto(state_bytes: ArrayLike, accuracy: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other beats: none has as little state and more accuracy, or less state and as much accuracy.

    Equal points are all in the set, or none is.
    """
    size, score = np.asarray(state_bytes, dtype=float), np.asarray(accuracy, dtype=float)
    as_small, as_good = size[None, :] <= size[:, None], score[None, :] >= score[:, None]
    better = (size[None, :] < size[:, None]) | (score[None, :] > score[:, None])
    return np.logical_not(np.any(as_small & as_good & better, axis=1))


def staircase(state_bytes: ArrayLike, accuracy: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The corners of the best accuracy that a state of at most x bytes gives, from the least state to the greatest."""
    size, score = np.asarray(state_bytes, dtype=float), np.asarray(accuracy, dtype=float)
    corners = sorted(set(zip(size[pareto(size, score)].tolist(), score[pareto(size, score)].tolist(), strict=True)))
    xs, ys = [], []
    for i, (x, y) in enumerate(corners):
        if i:
            xs.append(x)
            ys.append(corners[i - 1][1])
        xs.append(x)
        ys.append(y)
    return np.array(xs), np.array(ys)


def hypervolume(state_bytes: ArrayLike, accuracy: ArrayLike, reference: tuple[float, float]) -> float:
    """The area under the staircase, in doublings of state x accuracy, within the reference point (bytes, accuracy).

    A point counts from its state up to the reference's bytes, and from the reference's accuracy up to its own. No state
    counts as one byte.
    """
    end, floor = math.log2(reference[0]), reference[1]
    xs, ys = staircase(np.maximum(np.asarray(state_bytes, dtype=float), 1), accuracy)
    area, best, at = 0.0, floor, end
    for x, y in zip(np.log2(xs), ys, strict=True):
        if x >= end:
            break
        area += max(0.0, x - at) * (best - floor)
        at, best = float(x), max(best, float(y))
    return area + (end - at) * (best - floor)


def hypervolumes(frontier: pd.DataFrame, reference: tuple[float, float] | None = None) -> pd.DataFrame:
    """The hypervolume of each family and, as `all`, of all together, greatest first.

    reference: by default the next power of two above the greatest state, at accuracy 0; it is in `attrs["reference"]`.
    """
    import pandas as pd

    ok = frontier[frontier["status"] == "ok"]
    if reference is None:
        reference = (2.0 ** (math.floor(math.log2(max([1, *ok["state_bytes"]]))) + 1) if len(ok) else 1.0, 0.0)
    groups = [("all", ok), *((name, ok[ok["family"] == name]) for name in sorted(ok["family"].unique()))]
    rows = [(name, len(members), hypervolume(*_xy(members), reference)) for name, members in groups if len(members)]
    rows.sort(key=lambda row: row[2], reverse=True)
    frame = pd.DataFrame(rows, columns=["family", "points", "hypervolume"])
    frame.attrs["reference"] = reference
    return frame


def information_limit(records: Iterable[Record], slice_name: str | None = None) -> pd.DataFrame | None:
    """The most accuracy that any causal model can have with a state of so many bytes: columns bytes, accuracy.

    The mean over the test slices of one data setting, or one slice's. The tasks give the fewest bits for an accuracy
    (`Task.information_limit_bits`); this is the inverse. None when a task states no limit, or is a plugin that is not
    loaded.
    """
    import pandas as pd

    try:
        tasks = [task for task in _test_tasks(next(iter(records))) if slice_name in (None, task.slice_name)]
    except (UnknownNameError, PluginError):
        return None
    levels = np.linspace(0.0, 1.0, 1001)
    needed = []
    for task in tasks:
        bits = [task.information_limit_bits(float(level)) for level in levels]
        if any(b is None for b in bits):
            return None
        needed.append(np.maximum.accumulate(np.maximum(0.0, np.array(bits, dtype=float))))
    most = max(1.0, max(bits[-1] for bits in needed))
    size = np.geomspace(1 / 8, most / 8, 400)
    reached = [levels[np.searchsorted(bits, 8 * size * (1 + 1e-12), side="right") - 1] for bits in needed]
    return pd.DataFrame({"bytes": size, "accuracy": np.mean(reached, axis=0)})
