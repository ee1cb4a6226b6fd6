"""Synthetic tasks: one file each. `get_task(name)` gives the class; `@register_task(name)` adds one."""

from __future__ import annotations

from zoo.registry import Registry
from zoo.tasks.base import IGNORE, Batch, Split, Task

tasks: Registry[Task] = Registry(
    kind="task",
    base=lambda: Task,
    group="zoo.tasks",
    builtins={
        "mqar": "zoo.tasks.mqar:MQAR",
        "set_disjointness": "zoo.tasks.set_disjointness:SetDisjointness",
    },
)
register_task = tasks.register
get_task = tasks.get

__all__ = ["IGNORE", "Batch", "Split", "Task", "get_task", "register_task", "tasks"]
