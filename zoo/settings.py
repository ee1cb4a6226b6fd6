"""What every class that a user's settings fill has in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Settings(BaseModel):
    """Frozen; unknown keys and infinite numbers are refused, and so are true and false for a number, which pydantic
    reads as 1 and 0.

    Other spellings of the same number, `8.0` or `"8"` for 8, give the same trial and the same key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def __hash__(self) -> int:
        # A plugin's field may be a list, which has no hash of its own.
        return hash((type(self), self.model_dump_json()))

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(v, bool) for v in values):
            types = set(_types(cls.model_fields[info.field_name or ""].annotation))
            if types & {int, float} and bool not in types:
                raise ValueError("it takes a number, and true and false are none")
        return value


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)
