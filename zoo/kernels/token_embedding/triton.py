"""The lookup, and its gradient by sorted tokens: no atomics, and no wait for the host.

Every tensor of the custom ops has the groups, tables of their own, as its first axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import check_launch, fold_batch
from zoo.kernels.streams import join, lane
from zoo.kernels.token_embedding import kernels

LIMIT = 512
# Elements of a program that looks up rows.
GATHER = 4096
# Elements of a program that adds up the places of tokens.
TOKENS = 1024


def token_embedding(tokens: Tensor, table: Tensor) -> Tensor:
    check_launch("token_embedding", table)
    x = torch.ops.zoo.token_embedding(tokens.reshape(1, -1), table[None])
    return x.view(*tokens.shape, table.shape[1])


@torch.library.custom_op("zoo::token_embedding", mutates_args=())
def _forward(tokens: Tensor, table: Tensor) -> Tensor:
    groups, V, D = table.shape
    places = tokens.numel()
    x = torch.empty(groups, places // groups, D, dtype=table.dtype, device=table.device)
    if places:
        block = triton.next_power_of_2(D)
        size = max(1, min(GATHER // block, triton.next_power_of_2(places)))
        kernels.gather_kernel[(triton.cdiv(places, size),)](
            tokens.contiguous(), table.contiguous(), x, places, places // groups, V, D=D, BLOCK_D=block, ROWS=size
        )
    return x


@_forward.register_fake
def _(tokens: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(*tokens.shape, table.shape[2])


@torch.library.custom_op("zoo::token_embedding_backward", mutates_args=())
def _backward(sorted_tokens: Tensor, order: Tensor, ends: Tensor, dx: Tensor, table: Tensor) -> Tensor:
    """The first three as `Places` has them; dx (groups, M, D)."""
    groups, V, D = table.shape
    places = len(order)
    out = torch.empty(groups, V, D, dtype=table.dtype, device=table.device)
    blocks = triton.cdiv(places, LIMIT)
    sums = torch.empty(blocks, 2, D, dtype=torch.float32, device=table.device)
    block = triton.next_power_of_2(D)
    sizes = {"D": D, "BLOCK_D": block, "LIMIT": LIMIT}
    dx = dx.contiguous()
    if blocks:
        kernels.blocks_kernel[(blocks,)](dx, order, sorted_tokens, ends, sums, places, ROWS=16, num_warps=2, **sizes)
    size = max(1, TOKENS // block)
    kernels.tokens_kernel[(triton.cdiv(groups * V, size),)](
        dx, order, sorted_tokens, ends, sums, out, groups * V, ROWS=size, num_warps=4, **sizes
    )
    return out


@_backward.register_fake
def _(sorted_tokens: Tensor, order: Tensor, ends: Tensor, dx: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(table.shape)


class Places(NamedTuple):
    """Tokens of all groups in order, where each stood before, and where in that order each row of the tables ends."""

    tokens: Tensor
    order: Tensor
    ends: Tensor


def sorted_places(tokens: Tensor, V: int) -> Places:
    """What the backward pass needs of tokens (groups, M), made beside the forward pass: only `gradient` joins it."""
    with lane(tokens, "places"):
        sorted_tokens, order = _rows(tokens, V).flatten().sort(stable=True)
        numbers = torch.arange(len(tokens) * V, dtype=sorted_tokens.dtype, device=tokens.device)
        return Places(sorted_tokens, order, torch.searchsorted(sorted_tokens, numbers, right=True, out_int32=True))


def gradient(places: Places, dx: Tensor, table: Tensor) -> Tensor:
    """Of the tables (groups, V, D)."""
    join(dx, "places")
    return torch.ops.zoo.token_embedding_backward(*places, dx, table)


def _rows(tokens: Tensor, V: int) -> Tensor:
    """Tokens of group i counted from i V: rows of all tables as one. With half the bits they sort twice as fast."""
    groups = len(tokens)
    dtype = next(d for d in (torch.int16, torch.int32, torch.int64) if groups * V - 1 <= torch.iinfo(d).max)
    first = torch.arange(0, groups * V, V, dtype=dtype, device=tokens.device)
    return tokens.to(dtype) + first[:, None]


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    tokens, table = inputs
    ctx.places = sorted_places(tokens, table.shape[1])
    # The tokens too, which are being sorted.
    ctx.save_for_backward(tokens, table)


def _gradients(ctx: Any, dx: Tensor) -> tuple[None, Tensor]:
    return None, gradient(ctx.places, dx, ctx.saved_tensors[1])


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
