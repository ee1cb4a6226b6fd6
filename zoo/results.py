"""The store: one JSON record a trial in a run folder, or all in one archive; and the table, one row a trial."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import warnings
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.archive import ARCHIVE, pack_records, read_archive
from zoo.errors import ConfigError, RecordError, SchemaError, UnsupportedError, did_you_mean
from zoo.process import no_collection
from zoo.record import MeasuredState, Record, family_name, parse_record

if TYPE_CHECKING:
    import pandas as pd


REFERENCE = "reference"
"""The runs that come with the package: published grids, measured with zoo. `reference/NAME` is one of them."""


class RecordWarning(UserWarning):
    """A stored record cannot be read and was set aside."""


class RunStore:
    """A run folder: `records/KEY.json`, one a trial, and those that were compacted into one file, the archive;
    `sweep.json`, what was asked for; `corrupt/`, what was set aside. A folder of compacted runs reads as one run. The
    path `reference` is the package's own, `reference/NAME` one of them.

    create: make the folder. Without it a folder that does not exist raises RecordError: a typo is not an empty run.
    """

    def __init__(self, path: str | Path, create: bool = False) -> None:
        self.path = Path(path)
        self.packaged = is_reference(path)
        if self.packaged and create:
            raise _not_written_to(path)
        if self.packaged:
            self.path = Path(str(resources.files("zoo").joinpath("data", *self.path.parts)))
        self.records = self.path / "records"
        self.archive = self.path / ARCHIVE
        if create:
            self.records.mkdir(parents=True, exist_ok=True)
        elif not is_run(self.path):
            given, parent = Path(path), self.path.parent
            runs = [str(given.parent / p.name) for p in sorted(parent.glob("*")) if is_run(p)]
            runs += [str(p) for p in sorted(Path("runs").glob("*")) if is_run(p)]
            what = "is no run folder (it has no records/)" if self.path.exists() else "does not exist"
            raise RecordError(
                f"{str(path)!r} {what}.{did_you_mean(str(path), runs)} `zoo sweep FILE --run FOLDER` makes one."
            )

    def __repr__(self) -> str:
        return f"RunStore({str(self.path)!r})"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run folder while writing to it; what an interrupted write left is removed first.

        Raises PermissionError when records cannot be written, before one has been computed.

        The operating system frees the lock when its process ends, however it ends. Raises RecordError, with the
        process id of the holder, when another process holds it.
        """
        import fcntl

        if self.records.is_dir() and not os.access(self.records, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.records))
        # Appending, because the holder's name must survive that others open the file.
        with open(self.path / ".lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RecordError(
                    f"another sweep is writing to {str(self.path)!r}: {file.read().strip()}; wait for it, or choose "
                    "another run folder."
                ) from None
            except OSError as error:
                warnings.warn(
                    f"{str(self.path)!r} is on a file system without locks ({error}); see to it that only one sweep "
                    "writes there.",
                    RecordWarning,
                    stacklevel=3,
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            for leftover in [*self.path.glob("*.tmp"), *self.records.glob("*.tmp")]:
                leftover.unlink()
            yield

    def write(self, record: Record) -> Path:
        """Store a record, in place of one with the same key. The file is either whole and on the disk, or not there."""
        path = self.records / f"{record.key}.json"
        _write_durably(path, record.model_dump_json().encode())
        return path

    def keys(self) -> set[str]:
        """The keys of the stored records; no file of records/ is read, so a corrupt one counts."""
        return self._files() | self._archived().keys()

    def load(self) -> list[Record]:
        """Every readable record, by key. One that cannot be read is named in a RecordWarning and moved to corrupt/.

        Raises SchemaError at a record of another version of zoo: without it the same trial would run again and take
        its place.
        """
        records = self._archived()
        # Every object stays alive, so collecting garbage meanwhile finds nothing and triples the time.
        with no_collection():
            for path in self.records.glob("*.json"):
                try:
                    records[path.stem] = _read(path)
                except SchemaError:
                    raise
                except RecordError as error:
                    warnings.warn(f"{error} {self._set_aside(path)}", RecordWarning, stacklevel=2)
        return [records[key] for key in sorted(records)]

    def get(self, key: str) -> Record:
        """The record whose key is, or begins with, `key`. Raises RecordError: none, several, or it cannot be read."""
        archived = self._archived()
        keys = self._files() | archived.keys()
        found = sorted(k for k in keys if k.startswith(key))
        if not found or not key:
            raise RecordError(
                f"no record of {str(self.path)!r} ({len(keys)} records) has the key {key!r}; "
                "`zoo table` lists the keys."
            )
        if len(found) > 1:
            some = ", ".join(k[: len(key) + 8] for k in found[:5])
            raise RecordError(
                f"{len(found)} records begin with {key!r} ({some}{', ...' if len(found) > 5 else ''}); add digits."
            )
        path = self.records / f"{found[0]}.json"
        if not path.is_file():
            return archived[found[0]]
        try:
            return _read(path)
        except SchemaError:
            raise
        except RecordError as error:
            raise RecordError(f"{error} {self._set_aside(path)}") from error

    def compact(self, others: Iterable[Record] = ()) -> int:
        """Move every record into the archive, with copies of `others`; returns how many it then holds.

        Their files are removed when the archive has been read back and is the same. Of two records of one trial the one
        of `load_runs` stays. Raises RecordError when there are none, and for the package's own runs, which are compact
        as they are.
        """
        if self.packaged:
            raise _not_written_to(self.path)
        with self.lock():
            kept = best_of([*self.load(), *others])
            if not kept:
                raise RecordError(f"{str(self.path)!r} has no records to compact.")
            _write_durably(self.archive, pack_records(kept))
            if list(read_archive(self.archive).values()) != kept:
                raise RecordError(f"{str(self.archive)!r} does not hold what was written to it; nothing was removed.")
            for record in kept:
                (self.records / f"{record.key}.json").unlink(missing_ok=True)
        return len(kept)

    def _files(self) -> set[str]:
        return {path.stem for path in self.records.glob("*.json")}

    def _archived(self) -> dict[str, Record]:
        records: dict[str, Record] = {}
        for path in _archives(self.path):
            records |= read_archive(path)
        return records

    def write_sweep(self, snapshot: dict[str, Any]) -> None:
        """Store what was asked for, as plain data, in sweep.json."""
        _write_durably(self.path / "sweep.json", json.dumps(snapshot, indent=1).encode())

    def read_sweep(self) -> dict[str, Any] | None:
        """The snapshot, or None when there is none. Raises RecordError when it is not valid JSON."""
        path = self.path / "sweep.json"
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            raise RecordError(
                f"{str(path)!r} is not valid JSON ({error}); delete it: the records do not need it."
            ) from error

    def _set_aside(self, path: Path) -> str:
        aside = self.path / "corrupt"
        try:
            aside.mkdir(exist_ok=True)
            path.replace(aside / path.name)
        except OSError as error:
            return f"It could not be moved to corrupt/ ({error.strerror}) and was skipped."
        return "It was moved to corrupt/; the same sweep runs this trial again."


def is_run(path: str | Path) -> bool:
    """Whether there is a run folder."""
    return (Path(path) / "records").is_dir() or bool(_archives(Path(path)))


def is_reference(path: str | Path) -> bool:
    """Whether the path names the package's own runs, or one of them; a folder of that name here comes first."""
    return Path(path).parts[:1] == (REFERENCE,) and not Path(REFERENCE).exists()


def _not_written_to(path: str | Path) -> RecordError:
    return RecordError(
        f"{str(path)!r} comes with the package and is not written to; name a folder of your own. To have its records "
        f"there: `zoo compact FOLDER {REFERENCE}`, or `zoo sweep GRID --run FOLDER --known {REFERENCE}`."
    )


def _archives(folder: Path) -> list[Path]:
    return [*folder.glob(ARCHIVE), *sorted(folder.glob(f"*/{ARCHIVE}"))]


def _read(path: Path) -> Record:
    """The record in one file. Raises RecordError that names the file and what is wrong with it."""
    try:
        record = parse_record(path.read_bytes())
    except RecordError as error:
        raise type(error)(f"record {str(path)!r} cannot be read: {error}.") from error
    if record.key != path.stem:
        raise RecordError(f"record {str(path)!r} cannot be read: it holds the record of the key {record.key!r}.")
    return record


def _write_durably(path: Path, data: bytes) -> None:
    """Write to a temporary file beside `path`, fsync, rename, fsync the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # A full disk names no file.
            error.filename = str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_runs(paths: Iterable[str | Path]) -> list[Record]:
    """The records of several run folders together, by key; of one trial in two runs the ok one, then the newest."""
    return best_of(record for path in paths for record in RunStore(path).load())


def best_of(records: Iterable[Record]) -> list[Record]:
    """One record a trial, by key: the ok one, then the newest."""
    best: dict[str, Record] = {}
    for record in records:
        other = best.get(record.key)
        if other is None or _rank(record) > _rank(other):
            best[record.key] = record
    return [best[key] for key in sorted(best)]


def _rank(record: Record) -> tuple[bool, str]:
    return record.status == "ok", record.provenance.started


# The letters that papers and figures use; any other field is written out.
SYMBOLS = {
    "d_model": "d",
    "feature_dim": "f",
    "state_dim": "N",
    "d_state": "N",
    "window": "w",
    "num_heads": "h",
    "depth": "L",
}
# What sets the size of a state: a label has it even where all its family share it, so that a figure says what it is of.
DIALS = ("d_model", "feature_dim", "d_state", "window")


def model_family(record: Record) -> str:
    """What a figure calls the record's model."""
    return family_name(layer["mixer"] for layer in record.trial["model"]["layers"])


def _shared_settings(record: Record) -> dict[str, Any]:
    """What a model of any family has: flat settings of model and training, and the engine's version."""
    model, training = record.trial["model"], record.trial["training"]
    flat = {name: value for name, value in flatten(model).items() if not name.startswith("layers.")}
    flat |= {f"training.{name}": value for name, value in flatten(training).items()}
    return flat | {"engine version": record.versions.get("engine")}


def _mixer_settings(record: Record) -> dict[str, Any]:
    """What only its family has: its layers, their options and versions."""
    layers = record.trial["model"]["layers"]
    options: dict[str, list[Any]] = {}
    for layer in layers:
        for option, value in flatten(layer).items():
            if option != "mixer":
                options.setdefault(f"{layer['mixer'].rpartition(':')[2]}.{option}", []).append(value)
    flat: dict[str, Any] = {"layers": "+".join(layer["mixer"].rpartition(":")[2] for layer in layers)}
    # Several layers of one mixer: one value when they agree, else all of them.
    flat |= {name: v[0] if all(x == v[0] for x in v) else "/".join(map(str, v)) for name, v in options.items()}
    return flat | {f"{name} version": v for name, v in record.versions.items() if name.startswith("mixer ")}


def labels(records: Iterable[Record]) -> list[str]:
    """A short label for each record, such as `d64 f16`: what sets the size of its state, what varies within its family,
    and what varies among all the records of what every family has."""
    known: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    described = []
    for record in records:
        identity = json.dumps([record.trial["model"], record.trial["training"], record.versions])
        if identity not in known:
            known[identity] = _shared_settings(record), _mixer_settings(record)
        described.append((model_family(record), *known[identity]))
    families: dict[str, list[dict[str, Any]]] = {}
    for name, _, own in described:
        families.setdefault(name, []).append(own)
    shown = {name: {*varying(members)} for name, members in families.items()}
    common = {*varying([shared for _, shared, _ in described])}
    return [
        _label({s: v for s, v in (shared | own).items() if s.rpartition(".")[2] in DIALS or s in common | shown[name]})
        for name, shared, own in described
    ]


def varying(settings: list[dict[str, Any]]) -> list[str]:
    """The names whose value is not the same in all `settings`, or missing in some, in order of appearance."""
    values: dict[str, list[Any]] = {}
    for flat in settings:
        for name, value in flat.items():
            values.setdefault(name, []).append(value)
    return [name for name, v in values.items() if len(v) < len(settings) or any(x != v[0] for x in v)]


def _label(settings: dict[str, Any]) -> str:
    last = [setting if setting.startswith("mlp.") else setting.rpartition(".")[2] for setting in settings]
    parts = []
    for (setting, value), short in zip(settings.items(), last, strict=True):
        # Of what a model does not have, nothing is said.
        if value in (None, "none"):
            continue
        name = short if last.count(short) == 1 else setting
        text = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(f"{SYMBOLS[name]}{text}" if name in SYMBOLS else f"{name}={text}")
    return " ".join(parts)


def flatten(value: Any) -> dict[str, Any]:
    """Nested mappings and lists of mappings as one mapping with dotted names; a plain list is one value."""
    flat: dict[str, Any] = {}
    _flatten_into(flat, "", value)
    return flat


def _flatten_into(flat: dict[str, Any], prefix: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _flatten_into(flat, f"{prefix}.{name}" if prefix else name, item)
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        for index, item in enumerate(value):
            _flatten_into(flat, f"{prefix}.{index}", item)
    else:
        flat[prefix] = value


def longest_state(record: Record, seq_len: int | None = None) -> MeasuredState | None:
    """The state as measured after the most tokens, or after `seq_len`; None when the trial failed before that."""
    if record.outcome is None:
        return None
    states = [state for state in record.outcome.state if seq_len in (None, state.seq_len)]
    return max(states, key=lambda state: state.seq_len, default=None)


def error_text(record: Record) -> str | None:
    """Why a trial has no accuracy, in one line; None when it has one."""
    if record.failure is not None:
        return f"{record.failure.error}: {record.failure.message}"
    if record.status == "diverged" and record.outcome is not None:
        return record.outcome.message
    return None


_PLAIN = {
    "model.d_model": "d_model",
    "optimizer.lr": "lr",
    "optimizer.weight_decay": "weight_decay",
    "seed": "seed",
}


def table(records: Iterable[Record]) -> pd.DataFrame:
    """One row a trial: key, status, model, every setting that varies (dotted names), accuracies, state, cost, error.

    Accuracies are fractions, `accuracy.SLICE` one test slice's; the state is that of one sequence at the longest test
    slice (`state_seq_len`); `agreement` is the share of answers that are the same through the state; seconds are the
    whole trial's.
    """
    import pandas as pd

    records = list(records)
    settings = [flatten(record.trial) for record in records]
    varied = [name for name in varying(settings) if name not in _PLAIN]
    rows = []
    for record, flat, label in zip(records, settings, labels(records), strict=True):
        outcome, state = record.outcome, longest_state(record)
        row: dict[str, Any] = {
            "key": record.key,
            "status": record.status,
            "family": model_family(record),
            "label": label,
            **{short: flat.get(name) for name, short in _PLAIN.items()},
            **{name: _plain(flat.get(name)) for name in varied},
            "validation_accuracy": outcome.validation_accuracy if outcome else None,
            "test_accuracy": outcome.test_accuracy if outcome else None,
            **{f"accuracy.{part.name}": part.accuracy for part in (outcome.test if outcome else ())},
            "state_bytes": state.bytes if state else None,
            "state_elements": state.elements if state else None,
            "state_seq_len": state.seq_len if state else None,
            "parameters": outcome.parameters if outcome else None,
            "steps": outcome.steps if outcome else None,
            "agreement": outcome.agreement.same_answers if outcome and outcome.agreement else None,
            "seconds": record.provenance.seconds,
            "error": error_text(record),
        }
        rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    # The accuracies by slice stay together though the first rows may be failures without any.
    slices = [name for name in columns if name.startswith("accuracy.")]
    rest = [name for name in columns if not name.startswith("accuracy.")]
    at = rest.index("test_accuracy") + 1 if rest else 0
    frame = pd.DataFrame(rows, columns=[*rest[:at], *slices, *rest[at:]])
    for name in ("state_bytes", "state_elements", "state_seq_len", "parameters", "steps"):
        if name in frame:
            frame[name] = frame[name].astype("Int64")
    for name in ("validation_accuracy", "test_accuracy", "agreement", *slices):
        if name in frame:
            frame[name] = frame[name].astype("float64")
    return frame


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def export(records: Iterable[Record], path: str | Path) -> None:
    """Write `table(records)` as .csv or .parquet.

    Raises ConfigError on another suffix, UnsupportedError when pyarrow is missing.
    """
    file = Path(path)
    if file.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"cannot export to {str(path)!r}: the suffix {file.suffix!r} must be .csv or .parquet.")
    frame = table(records)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        frame.to_csv(file, index=False)
        return
    for name in frame.columns:
        # A Parquet column has one type; a setting may be a number in one mixer and text in another.
        kinds = {type(value) for value in frame[name].dropna()}
        if len(kinds) > 1 and not kinds <= {int, float}:
            frame[name] = frame[name].map(lambda value: None if value is None else str(value))
    try:
        frame.to_parquet(file, engine="pyarrow", index=False)
    except ImportError as error:
        raise UnsupportedError(
            f"cannot export to {str(path)!r}: Parquet needs pyarrow; `pip install 'zoo-mixers[parquet]'`, or use .csv."
        ) from error
