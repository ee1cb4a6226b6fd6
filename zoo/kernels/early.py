"""Kernels that start early: their programs take their places while those of the kernel before them end.

This is CUDA's programmatic dependent launch, for compute capability 9 or newer, in CUDA graphs too. It spares most of
the 1 to 3 us between two kernels, which are a large part of a small model's step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

_CAPABILITY = tl.constexpr(9)
_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def wait_for_earlier():
    """The first line of every `kernel`: until earlier kernels have written what they write, no memory is touched."""
    if _COMPILED and cuda_capability_geq(_CAPABILITY):
        # From here on the next kernel's programs may take free places; they wait in their own first line.
        gdc_launch_dependents()
        gdc_wait()


class Kernel:
    """What `kernel` makes of a function: kernel[grid](...) launches it, early where the GPU can."""

    def __init__(self, jit: Any) -> None:
        self.jit = jit

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self.jit[grid], **_options())


def kernel(function: Callable[..., None] | None = None, **options: Any) -> Any:
    """triton.jit, with its options, for a kernel whose first line is wait_for_earlier()."""
    if function is None:
        return functools.partial(kernel, **options)
    return Kernel(triton.jit(function, **options))


def _options() -> dict[str, bool]:
    if triton.knobs.runtime.interpret or torch.version.cuda is None:
        return {}
    return {"launch_pdl": True} if _capability(torch.cuda.current_device()) >= _CAPABILITY.value else {}


@functools.lru_cache
def _capability(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]
