"""Sweeps of trials that train in milliseconds, for the tests of configuration, sweeps and the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zoo.config import Sweep
from zoo.mixers import mixers
from zoo.registry import load_file
from zoo.tasks import tasks

PLUGIN = str(Path(__file__).with_name("sweep_plugin.py"))


@pytest.fixture(scope="module")
def plugin() -> Iterator[str]:
    """The plugin's file, its names registered until the module's tests are done."""
    before = [(registry, dict(registry._registered)) for registry in (mixers, tasks)]
    module = load_file(PLUGIN)
    yield PLUGIN
    for registry, names in before:
        registry._registered.clear()
        registry._registered.update(names)
    del sys.modules[module.__name__]


def grid(*, lr: Any = 0.01, epochs: int = 2, d_model: Any = 8, **options: Any) -> dict[str, Any]:
    """A grid as plain data; `options` are those of the plugin's mixer."""
    entry = {"task": "first_token", "examples": 64}
    return {
        "name": "tiny",
        "data": {"train": [entry], "test": [entry]},
        "model": {"d_model": d_model, "layers": [{"mixer": "running_mean", **options}]},
        "optimizer": {"lr": lr},
        "training": {"epochs": epochs, "batch_size": 32, "stop_accuracy": None},
    }


def sweep(**settings: Any) -> Sweep:
    return Sweep.from_dict(grid(**settings))
