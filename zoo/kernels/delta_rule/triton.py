"""The fused delta rules: what no state enters is made for all chunks at once, then one program per sequence, head and
block of columns walks the chunks with its state in registers.

Every tensor of the custom ops has the batch as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.delta_rule import channel_kernels, scalar_kernels
from zoo.kernels.launch import Config, check_launch, configured, fold_batch, padded, rows

LARGEST_HEAD = 256


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    min_decay: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    dtype = _check("delta_rule", q, k, v)
    if decay is not None and decay.dim() == 4:
        # In fp32 or wider than k: the factors are rounded to k's dtype only after their product.
        written = beta.float()[..., None] * k
        a = decay.float().exp() * k
        return generalized_delta_rule(
            q, written.to(dtype), v, a.to(dtype), -written.to(dtype), decay,
            initial_state=initial_state, return_state=return_state,
        )  # fmt: skip
    S = None if initial_state is None else initial_state.float()
    o, S, _ = torch.ops.zoo.delta_rule(q.to(dtype), k.to(dtype), v.to(dtype), beta, decay, S, return_state)
    return o.to(v.dtype), S if return_state else None


def generalized_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None = None,
    *,
    min_decay: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    dtype = _check("generalized_delta_rule", q, k, v, a, b)
    if decay is None:
        decay = q.new_zeros(1, dtype=torch.float32)
    elif decay.dim() == 3:
        decay = decay[..., None]
    S = None if initial_state is None else initial_state.float()
    o, S, _ = torch.ops.zoo.generalized_delta_rule(
        q.to(dtype), k.to(dtype), v.to(dtype), a.to(dtype), b.to(dtype), decay.expand(q.shape), S, return_state
    )
    return o.to(v.dtype), S if return_state else None


@torch.library.custom_op("zoo::delta_rule", mutates_args=())
def _delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the last state, and w, which the walk back needs."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    q, k, v = rows(q), rows(k), rows(v)
    o, w = _empty_like(v, q), _empty_like(v, q)
    last = torch.empty(_state_shape(q, v, return_state), dtype=torch.float32, device=q.device)
    config = configured("delta_rule.forward", scalar_forward_config, q, v)
    squares = _delta_squares(q, k, beta, decay, config.chunk)
    block = min(config.block, padded(V))
    g = beta if decay is None else decay
    scalar_kernels.forward_kernel[(B * H * triton.cdiv(V, block),)](
        q, k, v, beta, g, q if initial_state is None else initial_state.contiguous(), squares, o, w, last, T, H,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *beta.stride(), *g.stride(),
        K=K, V=V, BLOCK_K=padded(K), BLOCK=block, C=config.chunk, DECAYS=decay is not None,
        HAS_FIRST=initial_state is not None, HAS_LAST=return_state, PRECISION=_precision(q),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return o, last, w


@_delta.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake(q, v, return_state)


@torch.library.custom_op("zoo::delta_rule_backward", mutates_args=())
def _delta_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    w: Tensor,
    do: Tensor,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbeta, ddecay and dS_0; the last two without elements if there is none."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    q, k, do, w = rows(q), rows(k), rows(do), w.contiguous()
    config = configured("delta_rule.backward", walk_config, q, v)
    squares = _delta_squares(q, k, beta, decay, config.chunk)
    block = min(config.block, padded(V))
    blocks = triton.cdiv(V, block)
    dv, dfirst = _empty_like(v, q), _empty_like(initial_state, q)
    parts = [_parts(x, q, blocks) for x in (q, k, beta, decay)]
    g = beta if decay is None else decay
    scalar_kernels.backward_kernel[(B * H * blocks,)](
        q, k, beta, g, q if initial_state is None else initial_state.contiguous(), w, squares, do,
        q if dlast is None else dlast.contiguous(), _states(q, blocks, block, config.chunk),
        parts[0], parts[1], dv, parts[2], parts[3], dfirst, T, H, B * T * H,
        *q.stride()[:3], *k.stride()[:3], *beta.stride(), *g.stride(), *do.stride()[:3],
        K=K, V=V, BLOCK_K=padded(K), BLOCK=block, C=config.chunk, DECAYS=decay is not None,
        HAS_FIRST=initial_state is not None, HAS_LAST=dlast is not None, PRECISION=_precision(q),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    dq, dk, dbeta, dg = (_sum(x, part, q, blocks) for x, part in zip((q, k, beta, decay), parts, strict=True))
    return dq, dk, dv, dbeta, dg, dfirst


@_delta_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    w: Tensor,
    do: Tensor,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(_empty_like(x, q) for x in (q, k, v, beta, decay, initial_state))  # type: ignore[return-value]


@torch.library.custom_op("zoo::generalized_delta_rule", mutates_args=())
def _generalized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the last state, and u, which the walk back needs."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    v = rows(v)
    o, u = _empty_like(v, q), _empty_like(v, q)
    last = torch.empty(_state_shape(q, v, return_state), dtype=torch.float32, device=q.device)
    config = configured("generalized_delta_rule.forward", walk_config, q, v)
    decayed, scores, totals = _generalized_chunks(q, k, a, b, decay, config.chunk)
    block = min(config.block, padded(V))
    channel_kernels.forward_kernel[(B * H * triton.cdiv(V, block),)](
        v, decayed, scores, totals, q if initial_state is None else initial_state.contiguous(), o, u, last, T, H,
        *v.stride()[:3],
        K=K, V=V, BLOCK_K=padded(K), BLOCK=block, C=config.chunk,
        HAS_FIRST=initial_state is not None, HAS_LAST=return_state, PRECISION=_precision(q),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return o, last, u


@_generalized.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake(q, v, return_state)


@torch.library.custom_op("zoo::generalized_delta_rule_backward", mutates_args=())
def _generalized_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    u: Tensor,
    do: Tensor,
    dlast: Tensor | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, da, db, ddecay and dS_0; an unwanted ddecay and dS_0 without an S_0 have no elements."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    q, k, v, a, b, do, u = rows(q), rows(k), rows(v), rows(a), rows(b), rows(do), u.contiguous()
    config = configured("generalized_delta_rule.backward", walk_config, q, v)
    C = config.chunk
    decayed, scores, totals = _generalized_chunks(q, k, a, b, decay, C)
    block = min(config.block, padded(V))
    blocks = triton.cdiv(V, block)
    dv, dfirst = _empty_like(v, q), _empty_like(initial_state, q)
    d_decayed, d_scores, across = (x.new_empty(blocks, *x.shape) for x in (decayed, scores, totals))
    precision = _precision(q)
    channel_kernels.backward_kernel[(B * H * blocks,)](
        v, u, decayed, scores, totals, q if initial_state is None else initial_state.contiguous(), do,
        q if dlast is None else dlast.contiguous(), _states(q, blocks, block, C),
        dv, d_decayed, d_scores, across, dfirst, T, H, B * H, *v.stride()[:3], *do.stride()[:3],
        K=K, V=V, BLOCK_K=padded(K), BLOCK=block, C=C,
        HAS_FIRST=initial_state is not None, HAS_LAST=dlast is not None, PRECISION=precision,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    dq, dk, da, db = (_empty_like(x, q) for x in (q, k, a, b))
    dg = _empty_like(decay if decay_gradient else None, q)
    config = configured("generalized_delta_rule.finish", prepare_config, q, C)
    channel_kernels.finish_kernel[(B * H * triton.cdiv(T, C),)](
        q, k, a, b, decay, d_decayed, d_scores, across, dq, dk, da, db, dg, T, H, B * H,
        *q.stride()[:3], *k.stride()[:3], *a.stride()[:3], *b.stride()[:3], *decay.stride(),
        K=K, BLOCK_K=padded(K), C=C, HALVINGS=C.bit_length() - 1, PARTS=blocks, DECAY_GRADIENT=decay_gradient,
        PRECISION=precision, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dq, dk, dv, da, db, dg, dfirst


@_generalized_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    u: Tensor,
    do: Tensor,
    dlast: Tensor | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = (q, k, v, a, b, decay if decay_gradient else None, initial_state)
    return tuple(_empty_like(x, q) for x in wanted)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1], output[2])
    ctx.return_state = inputs[-1]
    ctx.set_materialize_grads(False)


def _delta_gradients(ctx: Any, do: Tensor | None, dlast: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, w = ctx.saved_tensors
    do = torch.zeros_like(w) if do is None else do
    gradients = torch.ops.zoo.delta_rule_backward(*inputs, w, do, dlast if ctx.return_state else None)
    return _wanted(ctx, gradients)


def _generalized_gradients(
    ctx: Any, do: Tensor | None, dlast: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, u = ctx.saved_tensors
    do = torch.zeros_like(u) if do is None else do
    gradients = torch.ops.zoo.generalized_delta_rule_backward(
        *inputs, u, do, dlast if ctx.return_state else None, ctx.needs_input_grad[5]
    )
    return _wanted(ctx, gradients)


def _wanted(ctx: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), None)


_delta.register_autograd(_delta_gradients, setup_context=_setup_context)
_generalized.register_autograd(_generalized_gradients, setup_context=_setup_context)
for _op in (_delta, _delta_backward, _generalized, _generalized_backward):
    fold_batch(_op)


def walk_config(q: Tensor, v: Tensor) -> Config:
    """Wider blocks or longer chunks spill registers; with four warps come the products that Triton miscompiles."""
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    return Config(chunk=16, block=32 if widest <= 128 else 16, num_warps=2, num_stages=1)


def scalar_forward_config(q: Tensor, v: Tensor) -> Config:
    config = walk_config(q, v)
    return config if q.dtype == torch.float32 else config._replace(chunk=32, num_stages=2)


def prepare_config(q: Tensor, chunk: int) -> Config:
    """For the kernels of one program per chunk, whose lengths are those of the walks."""
    return Config(chunk=chunk, block=padded(q.shape[-1]), num_warps=1 if q.shape[-1] <= 32 else 4, num_stages=1)


def _delta_squares(q: Tensor, k: Tensor, beta: Tensor, decay: Tensor | None, C: int) -> Tensor:
    """What `scalar_kernels.prepare_kernel` makes."""
    B, T, H, K = q.shape
    chunks = triton.cdiv(T, C)
    squares = torch.empty(B, H, chunks, 2, C, C, dtype=q.dtype, device=q.device)
    g = beta if decay is None else decay
    config = configured("delta_rule.prepare", prepare_config, q, C)
    scalar_kernels.prepare_kernel[(B * H * chunks,)](
        q, k, beta, g, squares, T, H, *q.stride()[:3], *k.stride()[:3], *beta.stride(), *g.stride(),
        K=K, BLOCK_K=padded(K), C=C, HALVINGS=C.bit_length() - 1, DECAYS=decay is not None, PRECISION=_precision(q),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return squares


def _generalized_chunks(
    q: Tensor, k: Tensor, a: Tensor, b: Tensor, decay: Tensor, C: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `channel_kernels.prepare_kernel` makes."""
    B, T, H, K = q.shape
    q, k, a, b = rows(q), rows(k), rows(a), rows(b)
    chunks = triton.cdiv(T, C)
    decayed = torch.empty(B, H, 4, T, K, dtype=q.dtype, device=q.device)
    scores = torch.empty(B, H, chunks, 4, C, C, dtype=q.dtype, device=q.device)
    totals = torch.empty(B, H, chunks, K, dtype=torch.float32, device=q.device)
    config = configured("generalized_delta_rule.prepare", prepare_config, q, C)
    channel_kernels.prepare_kernel[(B * H * chunks,)](
        q, k, a, b, decay, decayed, scores, totals, T, H,
        *q.stride()[:3], *k.stride()[:3], *a.stride()[:3], *b.stride()[:3], *decay.stride(),
        K=K, BLOCK_K=padded(K), C=C, HALVINGS=C.bit_length() - 1, PRECISION=_precision(q),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return decayed, scores, totals


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> torch.dtype:
    dtype = check_launch(op, q, k, v, *others)
    K, V = q.shape[-1], v.shape[-1]
    if max(K, V) > LARGEST_HEAD:
        raise UnsupportedError(
            f"{op}: heads of {K} and {V} channels; the Triton backend has up to {LARGEST_HEAD}. Use more heads or pass "
            "impl='chunked'."
        )
    return dtype


def _states(q: Tensor, blocks: int, block: int, C: int) -> Tensor:
    """Memory for the states before every chunk."""
    B, T, H, K = q.shape
    return torch.empty(B * H * blocks, triton.cdiv(T, C), block, padded(K), dtype=q.dtype, device=q.device)


def _parts(x: Tensor | None, q: Tensor, blocks: int) -> Tensor:
    """Memory for the gradient of x, or for its parts from several blocks of columns."""
    if x is None or blocks == 1:
        return _empty_like(x, q)
    return torch.empty(blocks, *x.shape, dtype=torch.float32, device=x.device)


def _sum(x: Tensor | None, parts: Tensor, q: Tensor, blocks: int) -> Tensor:
    return parts if x is None or blocks == 1 else parts.sum(0).to(x.dtype)


def _empty_like(x: Tensor | None, q: Tensor) -> Tensor:
    """Contiguous memory for the gradient of x; without an x, no elements, but q's batch, as vmap needs it."""
    if x is None:
        return q.new_empty(q.shape[0], 0)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake(q: Tensor, v: Tensor, return_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    last = q.new_empty(_state_shape(q, v, return_state), dtype=torch.float32)
    return v.new_empty(v.shape), last, v.new_empty(v.shape)


def _state_shape(q: Tensor, v: Tensor, return_state: bool) -> tuple[int, ...]:
    B, _, H, K = q.shape
    return (B, H, K, v.shape[-1]) if return_state else (B, 0)


def _precision(x: Tensor) -> str:
    """Three tf32 products are as good as one in fp32; 16-bit operands have nothing to lose."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
