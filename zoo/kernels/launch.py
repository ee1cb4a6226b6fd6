"""What every Triton backend needs around its kernels: what may run where, block sizes, and the rule for vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from zoo.errors import UnsupportedError

# Read as kernels are defined, so it holds for all of them.
INTERPRETED: bool = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Config(NamedTuple):
    """How a kernel cuts up its work: tokens in a chunk, channels in a block, warps of a program, stages of its loop."""

    chunk: int
    block: int
    num_warps: int
    num_stages: int


def check_launch(op: str, *tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in: the widest of `tensors`. Call it first in every Triton backend.

    Raises UnsupportedError where kernels cannot run: on a CPU outside the interpreter, or in fp64.
    """
    given = [t for t in tensors if t is not None]
    dtype = given[0].dtype
    for t in given[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    if dtype not in DTYPES:
        raise UnsupportedError(f"{op}: the Triton backend does not support {dtype}; pass impl='chunked'.")
    if given[0].device.type != "cuda" and not INTERPRETED:
        raise UnsupportedError(
            f"{op}: the Triton backend cannot run on {given[0].device.type}; pass impl='chunked'. To try the kernels "
            "in Triton's interpreter, set TRITON_INTERPRET=1 before zoo is imported."
        )
    return dtype


def padded(size: int) -> int:
    """The power of 2 that holds `size` channels and that a matrix product in a kernel takes: at least 16."""
    return max(16, triton.next_power_of_2(size))


def rows(x: Tensor) -> Tensor:
    """x with its last axis contiguous, copied only if it is not: kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def split_rows(number: int, size: int, config: Config, most: int, length: int = 0) -> tuple[int, int, int]:
    """Of `number` rows of `size` channels, a power of 2: rows of a block, blocks of a program, and programs.

    A block has up to config.block elements, and there are up to `most` programs. With a `length`, that of sequences
    of rows, no block has rows of two of them.
    """
    rows_of_block = max(1, min(config.block // size, triton.next_power_of_2(number)))
    if length:
        rows_of_block = min(rows_of_block, length & -length)
    blocks = triton.cdiv(number, rows_of_block)
    steps = triton.cdiv(blocks, max(1, most))
    return rows_of_block, steps, triton.cdiv(blocks, steps)


def empty_like(x: Tensor | None, q: Tensor) -> Tensor:
    """Contiguous memory for what has the shape of x; without an x, no elements, but q's batch, as vmap needs it."""
    if x is None:
        return q.new_empty(q.shape[0], 0)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight in another `dtype`, for a custom op to keep for its backward pass; if it has it already, no elements."""
    return weight.new_empty(len(weight), 0) if weight.dtype == dtype else weight.to(dtype)


def precision(x: Tensor) -> str:
    """Of products of x in a kernel. Three in tf32 are as good as one in fp32; 16 bits have nothing to lose."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def fold_batch(op: Any) -> None:
    """Give the custom op a rule for vmap: the new axis is folded into the first axis of every tensor argument.

    Holds for ops whose tensor arguments and results all have the batch as their first axis.
    """

    op.register_vmap(_folding(op))


def step_op(
    name: str, kernel: Callable[..., tuple[Tensor, ...]], fake: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., tuple[Tensor, ...]]:
    """`kernel` as the op zoo::`name`, with a rule for vmap as `fold_batch` has it; it refuses to be differentiated.

    It spares the layers of `torch.library.custom_op`, which take longer than all else in a call for one token.
    """
    qualified = f"zoo::{name}"
    torch.library.define(qualified, torch.library.infer_schema(kernel, mutates_args=()))
    torch.library.impl(qualified, ("cpu", "cuda"), kernel)
    torch.library.register_fake(qualified, fake)
    op = getattr(torch.ops.zoo, name)
    torch.library.register_vmap(qualified, _folding(op))

    def call(*args: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise UnsupportedError(f"{name}: the fused step has no gradient; pass impl='step', or use torch.no_grad().")
        return op(*args)

    return call


def _folding(op: Any) -> Callable[..., tuple[Any, Any]]:
    """The rule of `fold_batch`."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def fold(x: Any, dim: Any) -> Any:
            if isinstance(x, list) and isinstance(dim, list):
                return [fold(each, its) for each, its in zip(x, dim, strict=True)]
            if not isinstance(x, Tensor):
                return x
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        results = op(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        if isinstance(results, Tensor):
            return results.unflatten(0, (info.batch_size, -1)), 0
        results = tuple(r.unflatten(0, (info.batch_size, r.shape[0] // info.batch_size)) for r in results)
        return results, (0,) * len(results)

    return rule


def state_tile(K: int, V: int) -> Config:
    """Of a decode step, whose programs each hold all K rows of `block` columns of a state: 16 numbers a thread."""
    block = min(triton.next_power_of_2(V), 32)
    return Config(1, block, min(8, max(1, triton.next_power_of_2(K) * block // 512)), 1)


_forced: dict[str, Config] = {}


def configured(kernel: str, rule: Callable[..., Config], *args: Any) -> Config:
    """rule(*args), unless a benchmark tries another config for `kernel` at the moment."""
    return _forced.get(kernel) or rule(*args)


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """For benchmarks: run `kernel` with `config` in place of its rule's choice."""
    _forced[kernel] = config
    try:
        yield
    finally:
        del _forced[kernel]
