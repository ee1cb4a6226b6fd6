"""How long a pass takes on a GPU: called from Python, and replayed as a CUDA graph. Medians, in ms."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.bench.case import Op
from zoo.state import named_tensors

# Enough different inputs that none is left in the cache from its last turn.
_CACHES = 4
_MAX_SETS = 8


class Pass:
    """One op on several sets of inputs in turn: its forward pass, or forward and backward."""

    def __init__(self, op: Op, sets: Sequence[dict[str, Any]], backward: bool) -> None:
        self._op, self._sets, self._backward = op, sets, backward
        self._leaves = [[x for x in a.values() if isinstance(x, Tensor) and x.requires_grad] for a in sets]
        self._slopes: list[Tensor] = []
        if backward:
            with torch.no_grad():
                self._slopes = [torch.randn_like(self._output(a)) for a in sets]

    def __len__(self) -> int:
        return len(self._sets)

    def run(self, i: int) -> Any:
        """Returns every result, so that the caller decides when their memory is used again."""
        if not self._backward:
            with torch.no_grad():
                return self._op(**self._sets[i])
        o = self._output(self._sets[i])
        return o, torch.autograd.grad(o, self._leaves[i], self._slopes[i])

    def _output(self, inputs: dict[str, Any]) -> Tensor:
        return next(iter(named_tensors(self._op(**inputs))))[1]


def number_of_sets(inputs: dict[str, Any]) -> int:
    size = sum(t.nbytes for t in inputs.values() if isinstance(t, Tensor))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(_MAX_SETS, -(-_CACHES * cache // size)))


def eager_ms(work: Pass, repeats: int = 10) -> float:
    return _median(lambda: [work.run(i) for i in range(len(work))], repeats) / len(work)


def graph_ms(work: Pass, repeats: int = 30) -> float:
    """All sets in one graph. Each keeps its own results: writing over one would spare the memory part of the work."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(len(work)):
            work.run(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [work.run(i) for i in range(len(work))]
    time = _median(graph.replay, repeats) / len(work)
    del results
    return time


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    return 2e3 * a.nbytes / _median(lambda: b.copy_(a), 10)


def matmul_rate() -> float:
    """Operations a second of a large bf16 matrix product on random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2e3 * 8192**3 / _median(lambda: a @ b, 10)


def _median(run: Callable[[], object], repeats: int) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
