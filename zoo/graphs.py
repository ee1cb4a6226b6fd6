"""Work that is done again and again without Python: on a GPU as a CUDA graph, on a CPU from a tape."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch

from zoo.process import no_collection
from zoo.tape import Arena, Tape

Pool = Any
"""What `new_pool` returns."""


class Replay:
    """A function without arguments, over tensors that stay where they are; its result is not used.

    On a GPU its kernels are recorded at the first call and replayed from then on, at no cost to the host. rehearse:
    what the first call runs beforehand, without lasting effect, so that kernels are compiled and libraries ready. On a
    CPU its operations are recorded after some calls, where they can be (zoo.tape). Those of one `pool` share memory:
    what one leaves there the next may overwrite.
    """

    def __init__(
        self,
        function: Callable[[], object],
        device: torch.device,
        rehearse: Callable[[], object],
        pool: Pool | None = None,
    ) -> None:
        self._function = function
        self._rehearse = rehearse
        self._device = device
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tape = Tape(function, pool) if device.type == "cpu" else None

    def __call__(self) -> None:
        if self._tape is not None:
            self._tape()
            return
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self._device):
            stream = _rehearsal_stream(self._device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._rehearse()
            torch.cuda.current_stream().wait_stream(stream)
            if torch.cuda.mem_get_info()[0] < torch.cuda.memory_reserved():
                # What the rehearsal leaves in torch's cache cannot be freed during the recording, which needs as much.
                torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            # A graph of an earlier pack that is collected during a recording invalidates it.
            with no_collection(), torch.cuda.graph(graph, pool=self._pool):
                self._function()
        return graph


@functools.cache
def _rehearsal_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all, because torch reuses memory within a stream alone."""
    return torch.cuda.Stream(device)


def new_pool(device: torch.device) -> Pool | None:
    """Memory for the graphs of a pack, when that of earlier ones, which are in reference cycles, is free."""
    if device.type != "cuda":
        return Arena()
    gc.collect()
    return torch.cuda.graph_pool_handle()
