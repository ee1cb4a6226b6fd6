"""Fused Taylor attention: every pair of tokens where T is short, the recurrence over features where it is long.

Every tensor of the custom ops has the batch as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.launch import Config, check_launch, configured, empty_like, fold_batch, padded, precision, rows
from zoo.kernels.taylor_attention import quadratic_kernels, recurrent_kernels
from zoo.kernels.taylor_attention.features import num_features

LARGEST_HEAD = 256
LARGEST_RECURRENT = 32
# Up to here all pairs cost less than the features do.
QUADRATIC_LENGTH = 2048


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    dtype = check_launch("taylor_attention", q, k, v)
    K, V = q.shape[-1], v.shape[-1]
    stateful = initial_state is not None or return_state
    if max(K, V) > LARGEST_HEAD or (stateful and K > LARGEST_RECURRENT):
        raise UnsupportedError(
            f"taylor_attention: K = {K}, V = {V}; the Triton backend has up to {LARGEST_HEAD} channels, and keeps a "
            f"state for up to {LARGEST_RECURRENT} feature channels. Pass impl='chunked'."
        )
    S, z = (None, None) if initial_state is None else (x.float() for x in initial_state)
    o, _, S, z = torch.ops.zoo.taylor_attention(q.to(dtype), k.to(dtype), v.to(dtype), S, z, return_state, eps)
    return o.to(v.dtype), (S, z) if return_state else None


@torch.library.custom_op("zoo::taylor_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor | None, z: Tensor | None, return_state: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the normaliser (B, T, H; as the form has it), S and z; the last two without elements unless return_state."""
    B, T, H, K = q.shape
    V, F = v.shape[-1], num_features(K)
    q, k, v = rows(q), rows(k), rows(v)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    n = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    last = [torch.empty(shape, dtype=torch.float32, device=q.device) for shape in _state_shapes(q, v, return_state)]
    arguments = (T, H, K**-0.5, eps, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    if _quadratic(q, S, return_state):
        config = configured("taylor_attention.quadratic_forward", quadratic_config, q, v, 3)
        quadratic_kernels.forward_kernel[(B * H * triton.cdiv(T, config.chunk),)](
            q, k, v, o, n, *arguments, **_quadratic_options(q, v, config)
        )
    else:
        config = configured("taylor_attention.recurrent_forward", recurrent_config, q, v)
        block = min(config.block, padded(V))
        first = (q, q) if S is None or z is None else (S.contiguous(), z.contiguous())
        recurrent_kernels.forward_kernel[(B * H * triton.cdiv(V, block),)](
            q, k, v, o, n, *first, *last, *arguments,
            K=K, V=V, F=F, BLOCK_K=padded(K), BLOCK=block, **_feature_tiles(F), C=config.chunk,
            HAS_FIRST=S is not None, HAS_LAST=return_state, PRECISION=precision(q),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return o, n, last[0], last[1]


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor | None, z: Tensor | None, return_state: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    last = [q.new_empty(shape, dtype=torch.float32) for shape in _state_shapes(q, v, return_state)]
    return v.new_empty(v.shape), q.new_empty(q.shape[:3], dtype=torch.float32), last[0], last[1]


@torch.library.custom_op("zoo::taylor_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    o: Tensor,
    n: Tensor,
    do: Tensor,
    dS: Tensor | None,
    dz: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and dS and dz of the initial state; these two without elements if there is none."""
    B, T, H, K = q.shape
    V, F = v.shape[-1], num_features(K)
    q, k, v, do = rows(q), rows(k), rows(v), rows(do)
    dv = empty_like(v, q)
    dS_first, dz_first = empty_like(S, q), empty_like(z, q)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    if _quadratic(q, S, return_state):
        dq, dk, m = empty_like(q, q), empty_like(k, q), torch.empty_like(n)
        config = configured("taylor_attention.quadratic_query_backward", quadratic_config, q, v, 1)
        quadratic_kernels.query_kernel[(B * H * triton.cdiv(T, config.chunk),)](
            q, k, v, o, n, do, m, dq, T, H, K**-0.5, *strides, **_quadratic_options(q, v, config)
        )
        config = configured("taylor_attention.quadratic_key_backward", quadratic_config, q, v, 1)
        quadratic_kernels.key_kernel[(B * H * triton.cdiv(T, config.chunk),)](
            q, k, v, n, do, m, dk, dv, T, H, K**-0.5, *strides, **_quadratic_options(q, v, config)
        )
        return dq, dk, dv, dS_first, dz_first

    config = configured("taylor_attention.recurrent_backward", recurrent_config, q, v)
    block = min(config.block, padded(V))
    blocks = triton.cdiv(V, block)
    parts = torch.empty(2, blocks, B, T, H, K, dtype=torch.float32, device=q.device)
    dz_parts = torch.empty(B, H, blocks, F, dtype=torch.float32, device=q.device)
    first = (q, q) if S is None or z is None else (S.contiguous(), z.contiguous())
    last = (q, q) if dS is None or dz is None else (dS.contiguous(), dz.contiguous())
    recurrent_kernels.backward_kernel[(3 * B * H * blocks,)](
        q, k, v, o, n, *first, do, *last, parts[0], parts[1], dv, dS_first, dz_parts, T, H, K**-0.5, B * T * H * K,
        *strides,
        K=K, V=V, F=F, BLOCK_K=padded(K), BLOCK=block, **_feature_tiles(F), C=config.chunk,
        HAS_FIRST=S is not None, HAS_LAST=dS is not None, PRECISION=precision(q),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    dq, dk = parts.sum(1).to(q.dtype)
    return dq.clone(), dk.clone(), dv, dS_first, dz_first if z is None else dz_parts.sum(2)


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    o: Tensor,
    n: Tensor,
    do: Tensor,
    dS: Tensor | None,
    dz: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(empty_like(x, q) for x in (q, k, v, S, z))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], output[0], output[1])
    ctx.return_state = inputs[5]
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, do: Tensor | None, dn: Tensor | None, dS: Tensor | None, dz: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, S, z, o, n = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    if not ctx.return_state or (dS is None and dz is None):
        dS = dz = None
    else:
        B, H, F, V = q.shape[0], q.shape[2], num_features(q.shape[3]), v.shape[3]
        dS = n.new_zeros(B, H, F, V) if dS is None else dS
        dz = n.new_zeros(B, H, F) if dz is None else dz
    gradients = torch.ops.zoo.taylor_attention_backward(q, k, v, S, z, o, n, do, dS, dz, ctx.return_state)
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)


def quadratic_config(q: Tensor, v: Tensor, num_stages: int) -> Config:
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    if q.dtype == torch.float32:
        return Config(chunk=32, block=widest, num_warps=4, num_stages=1)
    return Config(chunk=64 if widest <= 128 else 32, block=widest, num_warps=4, num_stages=num_stages)


def _quadratic_options(q: Tensor, v: Tensor, config: Config) -> dict[str, Any]:
    K, V = q.shape[-1], v.shape[-1]
    return {
        "K": K, "V": V, "BLOCK_K": padded(K), "BLOCK_V": padded(V), "C": config.chunk,
        "PRECISION": precision(q), "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def recurrent_config(q: Tensor, v: Tensor) -> Config:
    large = num_features(q.shape[-1]) > 160
    if q.dtype == torch.float32:
        return Config(chunk=16, block=16, num_warps=4, num_stages=1)
    return Config(chunk=16, block=16 if large else 64, num_warps=4, num_stages=2)


def _quadratic(q: Tensor, S: Tensor | None, return_state: bool) -> bool:
    stateful = S is not None or return_state
    return not stateful and (q.shape[1] <= QUADRATIC_LENGTH or q.shape[3] > LARGEST_RECURRENT)


def _feature_tiles(F: int) -> dict[str, int]:
    """Two powers of 2 that hold F features."""
    large = max(16, triton.next_power_of_2(F + 1) // 2)
    return {"FA": large, "FB": padded(max(F - large, 1))}


def _state_shapes(q: Tensor, v: Tensor, return_state: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    B, _, H, K = q.shape
    F = num_features(K)
    return ((B, H, F, v.shape[-1]), (B, H, F)) if return_state else ((B, 0), (B, 0))
