"""zoo: how much can a sequence mixer recall, for how much recurrent state?

The public names below are imported when they are first used, so that `import zoo` (and `zoo --help`) costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "ZooError": "zoo.errors",
    "register_mixer": "zoo.mixers",
    "register_task": "zoo.tasks",
    "Mixer": "zoo.mixers",
    "MixerConfig": "zoo.mixers",
    "LayerInfo": "zoo.mixers",
    "Task": "zoo.tasks",
    "Batch": "zoo.tasks",
    "Trial": "zoo.config",
    "Sweep": "zoo.config",
    "Model": "zoo.model",
    "build_model": "zoo.model",
    "run_pack": "zoo.train",
    "run_trial": "zoo.train",
    "evaluate": "zoo.evaluate",
    "measure_state": "zoo.state",
    "run_sweep": "zoo.sweep",
    "RunStore": "zoo.results",
    "frontier_table": "zoo.frontier",
}

__all__ = [*sorted(_PUBLIC), "__version__"]

if TYPE_CHECKING:
    from zoo.config import Sweep, Trial
    from zoo.errors import ZooError
    from zoo.evaluate import evaluate
    from zoo.frontier import frontier_table
    from zoo.mixers import LayerInfo, Mixer, MixerConfig, register_mixer
    from zoo.model import Model, build_model
    from zoo.results import RunStore
    from zoo.state import measure_state
    from zoo.sweep import run_sweep
    from zoo.tasks import Batch, Task, register_task
    from zoo.train import run_pack, run_trial


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
