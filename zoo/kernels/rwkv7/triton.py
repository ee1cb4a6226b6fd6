"""Keys and read-out, each in one pass over memory, and their gradients in another.

Every tensor of the custom ops has the groups, each with weights of its own, as its first axis: (groups, M, H, K) and,
the weights, (groups, H, K).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Config, check_launch, configured, fold_batch, split_rows
from zoo.kernels.parts import sum_all
from zoo.kernels.rwkv7 import kernels

# Programs: enough to keep the memory of a GPU busy, and, where each leaves a sum of its own, not many more.
PROGRAMS = 16384
SUMMING_PROGRAMS = 2048


def rwkv7_keys(
    k: Tensor, rate: Tensor, rate_bias: Tensor, removal: Tensor, replacement: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_launch("rwkv7_keys", k, rate, rate_bias, removal, replacement)
    weights = (w[None] for w in (rate_bias, removal, replacement))
    written, a, b = torch.ops.zoo.rwkv7_keys(_rows(k), _rows(rate), *weights, eps)
    return written.view(k.shape), a.view(k.shape), b.view(k.shape)


def rwkv7_readout(
    o: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, bonus: Tensor, eps: float
) -> Tensor:
    check_launch("rwkv7_readout", o, q, k, v, gate, weight, bias, bonus)
    by_token, weights = (_rows(x) for x in (o, q, k, v, gate)), (w[None] for w in (weight, bias, bonus))
    return torch.ops.zoo.rwkv7_readout(*by_token, *weights, eps).view(o.shape)


@torch.library.custom_op("zoo::rwkv7_keys", mutates_args=())
def _keys(
    k: Tensor, rate: Tensor, rate_bias: Tensor, removal: Tensor, replacement: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [x.contiguous() for x in (k, rate, rate_bias, removal, replacement)]
    written, a, b = (torch.empty_like(tensors[0]) for _ in range(3))
    programs, split, options = _launch(k, configured("rwkv7.keys_forward", config_of, k), PROGRAMS)
    kernels.keys_forward_kernel[(programs,)](*tensors, written, a, b, *split, eps, **options)
    return written, a, b


@_keys.register_fake
def _(
    k: Tensor, rate: Tensor, rate_bias: Tensor, removal: Tensor, replacement: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return k.new_empty(k.shape), k.new_empty(k.shape), k.new_empty(k.shape)


@torch.library.custom_op("zoo::rwkv7_keys_backward", mutates_args=())
def _keys_backward(
    k: Tensor,
    rate: Tensor,
    rate_bias: Tensor,
    removal: Tensor,
    replacement: Tensor,
    dwritten: Tensor,
    da: Tensor,
    db: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = [x.contiguous() for x in (k, rate, rate_bias, removal, replacement, dwritten, da, db)]
    dk, drate = torch.empty_like(tensors[0]), torch.empty_like(tensors[1])
    programs, split, options = _launch(k, configured("rwkv7.keys_backward", backward_config, k), SUMMING_PROGRAMS)
    sums = _sums(k, programs)
    kernels.keys_backward_kernel[(programs,)](*tensors, dk, drate, sums, *split, eps, **options)
    return dk, drate, *_totals(sums, rate_bias, removal, replacement)  # type: ignore[return-value]


@_keys_backward.register_fake
def _(
    k: Tensor,
    rate: Tensor,
    rate_bias: Tensor,
    removal: Tensor,
    replacement: Tensor,
    dwritten: Tensor,
    da: Tensor,
    db: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (k, rate, rate_bias, removal, replacement))  # type: ignore[return-value]


@torch.library.custom_op("zoo::rwkv7_readout", mutates_args=())
def _readout(
    o: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, bonus: Tensor, eps: float
) -> Tensor:
    tensors = [x.contiguous() for x in (o, q, k, v, gate, weight, bias, bonus)]
    y = torch.empty_like(tensors[0])
    programs, split, options = _launch(o, configured("rwkv7.readout_forward", config_of, o), PROGRAMS)
    kernels.readout_forward_kernel[(programs,)](*tensors, y, *split, eps, **options)
    return y


@_readout.register_fake
def _(
    o: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, bonus: Tensor, eps: float
) -> Tensor:
    return o.new_empty(o.shape)


@torch.library.custom_op("zoo::rwkv7_readout_backward", mutates_args=())
def _readout_backward(
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    bonus: Tensor,
    dy: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = [x.contiguous() for x in (o, q, k, v, gate, weight, bias, bonus, dy)]
    gradients = [torch.empty_like(x) for x in tensors[:5]]
    programs, split, options = _launch(o, configured("rwkv7.readout_backward", backward_config, o), SUMMING_PROGRAMS)
    sums = _sums(o, programs)
    kernels.readout_backward_kernel[(programs,)](*tensors, *gradients, sums, *split, eps, **options)
    return *gradients, *_totals(sums, weight, bias, bonus)  # type: ignore[return-value]


@_readout_backward.register_fake
def _(
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    bonus: Tensor,
    dy: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (o, q, k, v, gate, weight, bias, bonus))  # type: ignore[return-value]


def config_of(x: Tensor) -> Config:
    """block: elements of a program's block; chunk is unused."""
    return Config(chunk=1, block=2048, num_warps=4, num_stages=1)


def backward_config(x: Tensor) -> Config:
    """A warp alone meets no barriers where rows are summed."""
    return Config(chunk=1, block=256, num_warps=1, num_stages=1)


def _rows(x: Tensor) -> Tensor:
    """(B, T, H, K) -> (1, B T, H, K)."""
    return x.reshape(1, -1, *x.shape[2:])


def _launch(x: Tensor, config: Config, most: int) -> tuple[int, tuple[int, int, int], dict[str, Any]]:
    """How many programs; tokens, blocks of a program and programs of a head; and options."""
    groups, M, H, K = x.shape
    block = triton.next_power_of_2(K)
    rows_of_block, steps, parts = split_rows(M, block, config, most // (groups * H))
    options = {"H": H, "K": K, "BLOCK": block, "ROWS": rows_of_block, "num_warps": config.num_warps}
    return groups * H * parts, (M, steps, parts), options


def _sums(x: Tensor, programs: int) -> tuple[Tensor, ...]:
    groups, _, H, K = x.shape
    shape = (groups * H, programs // (groups * H), K)
    return tuple(torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(3))


def _totals(sums: tuple[Tensor, ...], *weights: Tensor) -> list[Tensor]:
    totals = zip(sum_all(sums, torch.float32), weights, strict=True)
    return [total.view(weight.shape).to(weight.dtype) for total, weight in totals]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _keys_gradients(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.zoo.rwkv7_keys_backward(*ctx.saved_tensors, *slopes, ctx.eps), None


def _readout_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.zoo.rwkv7_readout_backward(*ctx.saved_tensors, dy, ctx.eps), None


_keys.register_autograd(_keys_gradients, setup_context=_setup_context)
_readout.register_autograd(_readout_gradients, setup_context=_setup_context)
for _op in (_keys, _keys_backward, _readout, _readout_backward):
    fold_batch(_op)
