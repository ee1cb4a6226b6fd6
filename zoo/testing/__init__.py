"""Conformance: does a mixer or a task keep its contract? Behind `zoo check`, and as pytest classes for plugins.

`check_mixer(name)` and `check_task(name)` return a list of `Check`s; `render` prints them. `MixerConformance` and
`TaskConformance` are the same checks as tests: subclass, name the class under test, and every test is inherited.
pytest is imported only when one of these two is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zoo.testing.report import Check, render

_LAZY = {
    "MixerConformance": "zoo.testing.mixer_pytest",
    "TaskConformance": "zoo.testing.task",
    "check_mixer": "zoo.testing.mixer",
    "check_task": "zoo.testing.task",
}

__all__ = ["Check", "MixerConformance", "TaskConformance", "check_mixer", "check_task", "render"]

if TYPE_CHECKING:
    from zoo.testing.mixer import check_mixer
    from zoo.testing.mixer_pytest import MixerConformance
    from zoo.testing.task import TaskConformance, check_task


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'zoo.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
