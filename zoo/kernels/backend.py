"""Which backend of an op runs: by device, or as forced by `impl`. There is no silent fallback."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from zoo.errors import UnsupportedError


def backend(package: str, impls: tuple[str, ...], impl: str | None, device: torch.device) -> ModuleType:
    """The module `package.impl`; with impl=None the fused kernels on a GPU where the op has them, else plain torch.

    Raises UnsupportedError when the op has no such backend.
    """
    if impl is None:
        impl = "triton" if device.type == "cuda" and "triton" in impls else "chunked"
    if impl not in impls:
        op = package.rpartition(".")[2]
        raise UnsupportedError(f"{op} has no backend {impl!r}; choose one of {', '.join(impls)}, or None.")
    return importlib.import_module(f"{package}.{impl}")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that recurrences accumulate in: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
