"""This process: the cores that it may use, and its garbage collector."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

MOST_THREADS = 1024
"""Of one trial: some thousands end its process."""


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """While this holds, nothing is collected that only reference cycles keep."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
