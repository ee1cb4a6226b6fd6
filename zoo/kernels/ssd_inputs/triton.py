"""One pass over memory, all gradients in another.

Every tensor of the custom ops has the members of a pack, each with a bias and a log_A of its own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Config, check_launch, configured, fold_batch, rows, split_rows
from zoo.kernels.parts import sum_all
from zoo.kernels.ssd_inputs import kernels

# Programs: enough to keep the memory of a GPU busy, and, where each leaves a sum of its own, not many more.
PROGRAMS = 16384
SUMMING_PROGRAMS = 4096


def ssd_inputs(BC: Tensor, dt: Tensor, bias: Tensor, log_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_launch("ssd_inputs", BC, dt, bias, log_A)
    if BC.numel() == 0 or dt.numel() == 0:
        keys = BC.new_empty(*dt.shape, BC.shape[4])
        return keys, keys, dt.float()
    BC_1, dt_1 = (x.flatten(0, 1)[None] for x in (BC, dt))
    q, k, decay = torch.ops.zoo.ssd_inputs(BC_1, dt_1, bias[None], log_A[None])
    shape = (*dt.shape, BC.shape[4])
    return q.view(shape), k.view(shape), decay.view(dt.shape)


@torch.library.custom_op("zoo::ssd_inputs", mutates_args=())
def _forward(BC: Tensor, dt: Tensor, bias: Tensor, log_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """BC (members, M, 2, G, N), dt (members, M, H), bias and log_A (members, H)."""
    q, k = (BC.new_empty(*dt.shape, BC.shape[4]) for _ in range(2))
    decay = torch.empty(dt.shape, dtype=torch.float32, device=dt.device)
    BC, dt = rows(BC), rows(dt)
    programs, split, options = _launch(BC, dt, configured("ssd_inputs.forward", config_of, BC), PROGRAMS)
    kernels.forward_kernel[(programs,)](
        BC, dt, bias.contiguous(), log_A.contiguous(), q, k, decay, *split, *BC.stride()[:4], *dt.stride()[:2],
        **options,
    )  # fmt: skip
    return q, k, decay


@_forward.register_fake
def _(BC: Tensor, dt: Tensor, bias: Tensor, log_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k = (BC.new_empty(*dt.shape, BC.shape[4]) for _ in range(2))
    return q, k, dt.new_empty(dt.shape, dtype=torch.float32)


@torch.library.custom_op("zoo::ssd_inputs_backward", mutates_args=())
def _backward(
    BC: Tensor, dt: Tensor, bias: Tensor, log_A: Tensor, dq: Tensor, dk: Tensor, ddecay: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dBC, ddt = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (BC, dt))
    BC, dt = rows(BC), rows(dt)
    config = configured("ssd_inputs.backward", backward_config, BC)
    programs, split, options = _launch(BC, dt, config, SUMMING_PROGRAMS)
    members, _, _, G, _ = BC.shape
    parts = [torch.empty(members * G, split[3], options["R"], dtype=torch.float32, device=BC.device) for _ in range(2)]
    kernels.backward_kernel[(programs,)](
        BC, dt, bias.contiguous(), log_A.contiguous(), dq.contiguous(), dk.contiguous(), ddecay.contiguous(),
        dBC, ddt, *parts, *split, *BC.stride()[:2], BC.stride(3), *dt.stride()[:2], **options,
    )  # fmt: skip
    dbias, dlog_A = (total.view(bias.shape) for total in sum_all(parts, bias.dtype))
    return dBC, ddt, dbias, dlog_A.to(log_A.dtype)


@_backward.register_fake
def _(
    BC: Tensor, dt: Tensor, bias: Tensor, log_A: Tensor, dq: Tensor, dk: Tensor, ddecay: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (BC, dt, bias, log_A))  # type: ignore[return-value]


def config_of(BC: Tensor) -> Config:
    """block: elements of a program's block; chunk is unused."""
    return Config(chunk=1, block=2048, num_warps=4, num_stages=1)


def backward_config(BC: Tensor) -> Config:
    """With 16 elements a thread, of 2048 by 4 warps, a layout is chosen that takes three times as long."""
    return Config(chunk=1, block=2048, num_warps=2, num_stages=1)


def _launch(BC: Tensor, dt: Tensor, config: Config, most: int) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """How many programs; tokens, groups, blocks of a program and programs of a member's group; and options."""
    members, M, _, G, N = BC.shape
    R = dt.shape[2] // G
    block_r, block_n = triton.next_power_of_2(R), triton.next_power_of_2(N)
    rows_of_block, steps, parts = split_rows(M, block_r * block_n, config, most // (members * G))
    options = {"R": R, "N": N, "BLOCK_R": block_r, "BLOCK_N": block_n, "ROWS": rows_of_block}
    options |= {"num_warps": config.num_warps}
    return members * G * parts, (M, G, steps, parts), options


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dq: Tensor, dk: Tensor, ddecay: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.zoo.ssd_inputs_backward(*ctx.saved_tensors, dq, dk, ddecay)


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
