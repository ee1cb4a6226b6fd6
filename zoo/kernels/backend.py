"""Which backend of an op runs: by device, or as forced by `impl`. There is no silent fallback."""

from __future__ import annotations

import contextlib
import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

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
    return _module(f"{package}.{impl}")


_module = functools.cache(importlib.import_module)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that recurrences accumulate in: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast off for x's device, where it is on: it would take an op's products in half precision."""
    device = x.device.type
    # To enter and leave torch.autocast costs as much as a small operation.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def step_backend(T: int, state: Tensor | None, return_state: bool, *inputs: Tensor | None) -> str | None:
    """The backend for one token that continues a state, as in a decode; None where it does not apply.

    That is where T is 1, a state is given and asked for, and no gradient is. On a GPU it is one kernel. The first of
    `inputs` must not be None.
    """
    if T != 1 or state is None or not return_state:
        return None
    given = [x for x in inputs if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return None
    fused = given[0].device.type == "cuda" and torch.float64 not in (x.dtype for x in given)
    return "step_triton" if fused else "step"


def check_step(op: str, T: int, state: Tensor | None) -> Tensor:
    """The state. Raises UnsupportedError where a backend for one token has more of them, or nothing to continue."""
    if T != 1 or state is None:
        given = "no initial_state" if state is None else f"T = {T}"
        raise UnsupportedError(f"{op}: a backend for one step needs T = 1 and an initial_state, not {given}.")
    return state
