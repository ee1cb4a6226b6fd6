"""Products and contractions of one pass over memory each. The batch is the first axis of every tensor."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Config, check_launch, configured, fold_batch
from zoo.kernels.outer_product import kernels


def outer_product(k: Tensor, v: Tensor) -> Tensor:
    check_launch("outer_product", k, v)
    return torch.ops.zoo.outer_product(k, v)


def read_product(q: Tensor, s: Tensor) -> Tensor:
    check_launch("read_product", q, s)
    return torch.ops.zoo.read_product(q, s)


@torch.library.custom_op("zoo::outer_product", mutates_args=())
def _outer(k: Tensor, v: Tensor) -> Tensor:
    s = k.new_empty(*k.shape[:3], *v.shape[2:])
    k, v = _tokens(k), _tokens(v)
    programs, options = _launch(k)
    if programs:
        kernels.outer_kernel[(programs,)](
            k, v, s, len(k), k.stride(0), v.stride(0), I=k.shape[1], J=v.shape[1], **options
        )
    return s


@_outer.register_fake
def _(k: Tensor, v: Tensor) -> Tensor:
    return k.new_empty(*k.shape[:3], *v.shape[2:])


@torch.library.custom_op("zoo::read_product", mutates_args=())
def _read(q: Tensor, s: Tensor) -> Tensor:
    return _contract(q, s, over=2)


@_read.register_fake
def _(q: Tensor, s: Tensor) -> Tensor:
    return q.new_empty(*s.shape[:2], *s.shape[3:])


@torch.library.custom_op("zoo::read_product_last", mutates_args=())
def _read_last(y: Tensor, s: Tensor) -> Tensor:
    """x_i = sum_j s_ij y_j."""
    return _contract(y, s, over=3)


@_read_last.register_fake
def _(y: Tensor, s: Tensor) -> Tensor:
    return y.new_empty(*s.shape[:3], s.shape[4])


def config_of(x: Tensor) -> Config:
    """block: elements of a program's block; chunk is unused."""
    return Config(chunk=1, block=1024, num_warps=4, num_stages=1)


def _contract(a: Tensor, s: Tensor, over: int) -> Tensor:
    """Sums over axis 2 or 3 of s (B, T, I, J, H)."""
    B, T, I, J, H = s.shape
    given, wanted = (I, J) if over == 2 else (J, I)
    y = a.new_empty(B, T, wanted, H)
    a, s = _tokens(a), s.contiguous()
    programs, options = _launch(a)
    strides = (J * H, H) if over == 2 else (H, J * H)
    if programs:
        kernels.contract_kernel[(programs,)](
            a, s, y, len(a), a.stride(0), *strides, GIVEN=given, WANTED=wanted, **options
        )
    return y


def _tokens(x: Tensor) -> Tensor:
    """(B, T, I, H) -> (B T, I, H), a view if the channels of a token are in one piece and the tokens evenly apart."""
    x = x.flatten(0, 1)
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _launch(x: Tensor) -> tuple[int, dict[str, Any]]:
    tokens, _, H = x.shape
    config = configured("outer_product", config_of, x)
    block = triton.next_power_of_2(H)
    rows = max(1, min(config.block // block, triton.next_power_of_2(max(1, tokens))))
    return triton.cdiv(tokens, rows), {"H": H, "BLOCK_H": block, "ROWS": rows, "num_warps": config.num_warps}


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _outer_gradients(ctx: Any, ds: Tensor) -> tuple[Tensor, Tensor]:
    k, v = ctx.saved_tensors
    return torch.ops.zoo.read_product_last(v, ds), torch.ops.zoo.read_product(k, ds)


def _read_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    q, s = ctx.saved_tensors
    return torch.ops.zoo.read_product_last(dy, s), torch.ops.zoo.outer_product(q, dy).to(s.dtype)


_outer.register_autograd(_outer_gradients, setup_context=_save)
_read.register_autograd(_read_gradients, setup_context=_save)
for _op in (_outer, _read, _read_last):
    fold_batch(_op)
