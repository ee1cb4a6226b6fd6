"""Work beside other work on a GPU: most kernels of small models leave some of it idle."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def lane(x: Tensor, name: str) -> Iterator[None]:
    """What is launched inside runs beside what follows, until `join` of that name; where x is on a CPU, at once.

    A lane is a stream of its own that first waits for all that was launched before. So does the backward pass of what
    is inside, where autograd waits as it must. What is read inside must live until the join, and nothing made inside
    may be read before it.
    """
    if x.device.type != "cuda":
        yield
        return
    stream = _stream(x.device, name)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        yield


def join(x: Tensor, name: str) -> None:
    """All that follows waits for what was launched in the lane of that name."""
    if x.device.type == "cuda":
        torch.cuda.current_stream(x.device).wait_stream(_stream(x.device, name))


@functools.cache
def _stream(device: torch.device, name: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
