"""What one trial leaves: the schema of a record. Accuracies are fractions in [0, 1], times seconds, losses nats."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from zoo import __version__
from zoo.errors import RecordError, SchemaError

SCHEMA = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Epoch(_Part):
    """One line of a trial's history. `validation_*` are means over the validation slices."""

    epoch: int
    step: int
    learning_rate: float
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    seconds: float


class SliceResult(_Part):
    """Accuracy over every answer asked in one slice of a mixture."""

    name: str
    accuracy: float
    loss: float
    examples: int
    answers: int


class StateTensor(_Part):
    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    bytes: int


class LayerState(_Part):
    """One layer's share of the recurrent state, for one sequence."""

    layer: int
    mixer: str
    elements: int
    bytes: int
    tensors: tuple[StateTensor, ...]


class MeasuredState(_Part):
    """The state after a real decode of `seq_len` tokens, for one sequence, layer by layer."""

    seq_len: int
    elements: int
    bytes: int
    layers: tuple[LayerState, ...]


class Agreement(_Part):
    """The recurrent form against the parallel form, on a sample of test examples of slice `slice_name`."""

    slice_name: str
    examples: int
    answers: int
    accuracy_parallel: float
    accuracy_state: float
    same_answers: float
    max_logit_error: float


class Timing(_Part):
    """Seconds of the trial's pack, divided by its members."""

    data: float
    train: float
    evaluate: float


class Outcome(_Part):
    """What training and evaluating a trial gave. `diverged`: the loss became NaN or infinite; no accuracy is given."""

    status: Literal["ok", "diverged"]
    message: str
    parameters: int
    steps: int
    history: tuple[Epoch, ...]
    validation: tuple[SliceResult, ...]
    test: tuple[SliceResult, ...]
    validation_accuracy: float | None
    test_accuracy: float | None
    state: tuple[MeasuredState, ...]
    agreement: Agreement | None
    timing: Timing


class Failure(_Part):
    error: str
    message: str
    traceback: str


class Provenance(_Part):
    """Metadata, not part of the key. pack: trials that trained together; `seconds` are the pack's, divided by it."""

    zoo: str
    git: str | None
    torch: str
    python: str
    device: str
    threads: int
    executor: str
    started: str
    seconds: float
    pack: int = 1
    attempt: int = 1


class Record(_Part):
    """One trial, whole: its settings and the versions in its key, then its outcome or its failure."""

    schema_version: int = SCHEMA
    key: str
    status: Literal["ok", "diverged", "failed"]
    trial: dict[str, Any]
    versions: dict[str, str]
    outcome: Outcome | None
    failure: Failure | None
    provenance: Provenance


def parse_record(data: bytes) -> Record:
    """A record from its JSON. Raises RecordError, which says what is wrong and leaves it to the caller to say where;
    SchemaError if another version of zoo wrote it."""
    try:
        record = Record.model_validate_json(data)
    except ValidationError as error:
        raise _what_is_wrong(data, error) from error
    if record.schema_version != SCHEMA:
        raise _other_schema(record.schema_version, record.provenance.zoo)
    return record


def _what_is_wrong(data: bytes, error: ValidationError) -> RecordError:
    if not data:
        return RecordError("the file is empty")
    try:
        content = json.loads(data)
    except ValueError as syntax:
        return RecordError(f"it is not valid JSON ({syntax})")
    if isinstance(content, dict):
        schema, about = content.get("schema_version", SCHEMA), content.get("provenance")
        if isinstance(schema, int) and schema != SCHEMA:
            return _other_schema(schema, about.get("zoo") if isinstance(about, dict) else None)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the record"
    return RecordError(f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}")


def _other_schema(schema: int, version: Any) -> SchemaError:
    wrote = f"zoo {version} wrote" if version else "another zoo wrote"
    return SchemaError(
        f"{wrote} it with schema version {schema}, and zoo {__version__}, which runs here, reads {SCHEMA}; it was left "
        f"where it is. Use {'that zoo' if version else 'the zoo that wrote it'}, or another run folder"
    )


def family_name(mixers: Iterable[str]) -> str:
    """A model's family: the mixers of its layers other than the gated convolution, joined by `+`; a plugin's class."""
    names = list(dict.fromkeys(mixer.rpartition(":")[2] for mixer in mixers))
    return "+".join([name for name in names if name != "gated_conv"] or names)
