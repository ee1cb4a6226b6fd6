"""Many records in one small file: JSON lines, compressed."""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from pathlib import Path

from zoo.errors import RecordError, SchemaError
from zoo.record import Record, parse_record

ARCHIVE = "records.jsonl.xz"
_REMEDY = "restore the file, or delete it and run its trials again"


def pack_records(records: Iterable[Record]) -> bytes:
    """The contents of an archive: the records by key, the same bytes for the same records."""
    lines = (record.model_dump_json() for record in sorted(records, key=lambda record: record.key))
    return lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=9)


def read_archive(path: Path) -> dict[str, Record]:
    """The records of an archive, by key. Raises RecordError that says what is wrong with the file."""
    try:
        lines = lzma.decompress(path.read_bytes()).splitlines()
    except lzma.LZMAError as error:
        raise RecordError(f"archive {str(path)!r} cannot be read: {error}; {_REMEDY}.") from error
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = parse_record(line)
        except SchemaError as error:
            raise SchemaError(f"archive {str(path)!r} cannot be read: line {number}, {error}.") from error
        except RecordError as error:
            raise RecordError(f"archive {str(path)!r} cannot be read: line {number}, {error}; {_REMEDY}.") from error
        records[record.key] = record
    return records
