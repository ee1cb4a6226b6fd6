"""Chunk by chunk: the largest exponents, then all weights at once, then both sums, one operation a step.

Letters: C steps of a chunk (time first: each step is one contiguous block), B batch, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype
from zoo.kernels.wkv import empty_state

# Elements of a chunk: what is made of them fits in cache.
CHUNK_ELEMENTS = 1 << 16
MIN_CHUNK = 8


def wkv(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, initial_state: tuple[Tensor, ...] | None, return_state: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    dtype = state_dtype(v.dtype)
    g, u = decay.to(dtype), bonus.to(dtype)
    a, b, p = (x.to(dtype) for x in initial_state or empty_state(v[:, 0], len(v)))
    k_TBD, v_TBD = (x.to(dtype).transpose(0, 1).contiguous() for x in (k, v))

    # What sums are relative to changes no output: it needs a gradient only where it comes in and where it goes out.
    top = p.detach()
    sums_2BD = torch.stack([a, b]) * torch.exp(p - top)
    outputs = []
    chunk = max(MIN_CHUNK, CHUNK_ELEMENTS // p.numel())
    for k_CBD, v_CBD in zip(k_TBD.split(chunk), v_TBD.split(chunk), strict=True):
        o_CBD, sums_2BD, top, *_ = _Chunk.apply(k_CBD, v_CBD, g, u, sums_2BD, top)
        outputs.append(o_CBD)
    o = torch.cat(outputs).transpose(0, 1).to(v.dtype)
    if not return_state:
        return o, None
    ages = torch.arange(len(k_TBD), -1, -1, device=k.device, dtype=dtype)
    largest = (torch.cat([p[None], k_TBD]) + ages[:, None, None] * g).amax(0)
    return o, (*(sums_2BD * torch.exp(top - largest)).unbind(0), largest)


class _Chunk(torch.autograd.Function):
    """k, v (C, B, D), g, u (D,), sums (2, B, D) relative to e^top (B, D) -> o (C, B, D), sums and top after the chunk.

    With the weights that the past keeps and the token adds, a <- kept a + added v, and o = (past a + now v) / (past b +
    now). The slopes x, y of a and b are such a recurrence too, back in time. What else it returns is for backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(k: Tensor, v: Tensor, g: Tensor, u: Tensor, sums: Tensor, top: Tensor) -> tuple[Tensor, ...]:
        tops = [top]
        for k_t in k.unbind(0):
            tops.append(torch.maximum(tops[-1] + g, k_t))
        before, after = torch.stack(tops[:-1]), torch.stack(tops[1:])
        kept, added = torch.exp(before - after + g), torch.exp(k - after)
        every = [sums]
        for kept_t, added_t in zip(kept.unbind(0), torch.stack([added * v, added], 1).unbind(0), strict=True):
            every.append(torch.addcmul(added_t, kept_t, every[-1]))
        a, b = torch.stack(every[:-1], 1).unbind(0)
        largest = torch.maximum(before, u + k)
        past, now = torch.exp(before - largest), torch.exp(u + k - largest)
        total = past * b + now
        return (past * a + now * v) / total, every[-1], tops[-1], kept, added, a, b, past / total, now / total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(inputs[1], output[0], *output[3:])

    @staticmethod
    def backward(ctx: Any, do: Tensor, slope: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        v, o, kept, added, a, b, past, now = ctx.saved_tensors
        through_past = do * past
        entering = torch.stack([through_past, -through_past * o], 1)
        slopes = []
        for kept_t, entering_t in zip(kept.unbind(0)[::-1], entering.unbind(0)[::-1], strict=True):
            slopes.append(slope)
            slope = torch.addcmul(entering_t, kept_t, slope)
        x, y = torch.stack(slopes[::-1], 1).unbind(0)
        # v - o would lose what the past has to say where the token outweighs it.
        through_now = through_past * now * torch.addcmul(-a, v, b)
        dk = torch.addcmul(through_now, added, torch.addcmul(y, x, v))
        dv = torch.addcmul(do * now, added, x)
        dg = (kept * torch.addcmul(b * y, a, x)).sum((0, 1))
        return dk, dv, dg, through_now.sum((0, 1)), slope, None
