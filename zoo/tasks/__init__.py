"""Synthetic tasks: one file each. `get_task(name)` gives the class; `@register_task(name)` adds one.

The base classes are imported when they are first used: the names of the tasks can be listed without numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zoo.registry import Registry

if TYPE_CHECKING:
    from zoo.tasks.base import IGNORE, Batch, Split, Task

tasks: Registry[Task] = Registry(
    kind="task",
    base=lambda: importlib.import_module("zoo.tasks.base").Task,
    group="zoo.tasks",
    builtins={
        "mqar": "zoo.tasks.mqar:MQAR",
        "set_disjointness": "zoo.tasks.set_disjointness:SetDisjointness",
    },
)
register_task = tasks.register
get_task = tasks.get

__all__ = ["IGNORE", "Batch", "Split", "Task", "get_task", "register_task", "tasks"]


def __getattr__(name: str) -> Any:
    if name not in ("IGNORE", "Batch", "Split", "Task"):
        raise AttributeError(f"module 'zoo.tasks' has no attribute {name!r}")
    return getattr(importlib.import_module("zoo.tasks.base"), name)
