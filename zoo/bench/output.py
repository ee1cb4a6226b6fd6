"""What every benchmark leaves in its folder: CSV lines as they come, and what they were measured on and with."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zoo import __version__
from zoo.executors import Setting
from zoo.process import available_cores


@contextmanager
def csv_lines(path: Path) -> Iterator[Callable[[Any], None]]:
    """A function that writes a named tuple as a line, at once: a benchmark that is killed keeps what it had."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)

        def add(line: Any) -> None:
            if file.tell() == 0:
                writer.writerow(line._fields)
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in line])
            file.flush()

        yield add


def environment(setting: Setting) -> dict[str, Any]:
    """The machine and the versions that figures depend on."""
    packages = {}
    for package in ("torch", "triton", "fla-core", "flash-linear-attention"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "hardware": hardware(setting.device),
        "threads": setting.threads,
        "zoo": __version__,
        "git": setting.git,
        "python": platform.python_version(),
        **packages,
    }


def hardware(device: str) -> str:
    """`NVIDIA H200`, or for a CPU its number of cores and kind: `2 CPU cores, x86_64`."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{available_cores()} CPU cores, {platform.machine()}"


def save_environment(folder: Path, values: dict[str, Any]) -> str:
    """Write them to environment.json. Returns them as a line to print."""
    (folder / "environment.json").write_text(json.dumps(values, indent=1) + "\n")
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items() if v is not None)
