"""Parameters to taps in one launch, and back in another.

Every tensor of the custom ops has the groups, systems of their own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import check_launch, fold_batch
from zoo.kernels.ssm_kernel import kernels

BLOCK = 64


def ssm_kernel(log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, length: int) -> Tensor:
    check_launch("ssm_kernel", log_dt, log_A_real, A_imag, C)
    return torch.ops.zoo.ssm_kernel(log_dt[None], log_A_real[None], A_imag[None], C[None], length).squeeze(0)


@torch.library.custom_op("zoo::ssm_kernel", mutates_args=())
def _forward(log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, length: int) -> Tensor:
    """log_dt (groups, H), log_A_real and A_imag (groups, H, N), C (groups, H, N, 2), all in fp32."""
    K = log_dt.new_empty(*log_dt.shape, length)
    blocks = triton.cdiv(length, BLOCK)
    kernels.forward_kernel[(log_dt.numel() * blocks,)](
        *(x.contiguous() for x in (log_dt, log_A_real, A_imag, C)), K, length, blocks, **_options(A_imag)
    )
    return K


@_forward.register_fake
def _(log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, length: int) -> Tensor:
    return log_dt.new_empty(*log_dt.shape, length)


@torch.library.custom_op("zoo::ssm_kernel_backward", mutates_args=())
def _backward(
    log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, dK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = [x.contiguous() for x in (log_dt, log_A_real, A_imag, C)]
    gradients = tuple(torch.empty_like(x) for x in inputs)
    kernels.backward_kernel[(log_dt.numel(),)](*inputs, dK.contiguous(), *gradients, dK.shape[2], **_options(A_imag))
    return gradients  # type: ignore[return-value]


@_backward.register_fake
def _(
    log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, dK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (log_dt, log_A_real, A_imag, C))  # type: ignore[return-value]


def _options(A_imag: Tensor) -> dict[str, Any]:
    N = A_imag.shape[2]
    return {"N": N, "BLOCK_N": triton.next_power_of_2(N), "BLOCK": BLOCK, "num_warps": 4}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _gradients(ctx: Any, dK: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.zoo.ssm_kernel_backward(*ctx.saved_tensors, dK), None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
