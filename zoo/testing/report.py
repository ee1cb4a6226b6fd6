"""What a conformance check found, and how a list of findings is printed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from zoo.errors import ConformanceError


@dataclass(frozen=True)
class Check:
    """One part of the contract. detail: what was measured, or, on failure, which tensor, where and by how much."""

    name: str
    passed: bool
    detail: str


def run_check(name: str, check: Callable[[], str]) -> Check:
    """Run `check`, which returns its detail or raises ConformanceError.

    Any other exception is a failed check too, reported with its type, message, last frame outside torch, and notes.
    """
    try:
        return Check(name, True, check())
    except ConformanceError as error:
        return Check(name, False, str(error))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((f for f in reversed(frames) if "torch" not in Path(f.filename).parts), frames[-1])
        where = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
        where = ", ".join([where, *getattr(error, "__notes__", ())])
        return Check(name, False, f"crashed: {type(error).__name__}: {error} (at {where})")


def render(checks: Sequence[Check]) -> str:
    """One aligned line a check, failures marked, and a line with the count."""
    width = max((len(c.name) for c in checks), default=0)
    lines = []
    for c in checks:
        # A detail of several lines stays under its own column.
        detail = c.detail.replace("\n", "\n" + " " * (width + 10))
        lines.append(f"  {'pass' if c.passed else 'FAIL'}  {c.name:<{width}}  {detail}".rstrip())
    failed = sum(not c.passed for c in checks)
    lines.append(f"{len(checks) - failed} of {len(checks)} checks passed" + (f", {failed} FAILED" if failed else ""))
    return "\n".join(lines)
