"""RWKV-4's weighted average of values: softmax over keys of its own in each channel, which fade with their age."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, state_dtype, step_backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton", "step", "step_triton")
# The largest exponent where there is no token yet, as the official code has it.
NO_TOKEN = -1e38


class WKVState(NamedTuple):
    """Each (B, D): the sum of weighted values and that of weights, both over e^largest."""

    numerator: Tensor
    denominator: Tensor
    largest: Tensor


def empty_state(like: Tensor, batch_size: int) -> WKVState:
    """The state before the first token, of as many channels as the last axis of `like`, on its device."""
    zeros = like.new_zeros(batch_size, like.shape[-1], dtype=state_dtype(like.dtype))
    return WKVState(zeros, zeros.clone(), torch.full_like(zeros, NO_TOKEN))


def wkv(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    *,
    initial_state: WKVState | None = None,
    return_state: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, WKVState | None]:
    """The average of the values so far, each channel by itself, with weights that fade; the last one has a bonus.

        o_t = (sum_{i<t} e^{(t-1-i) g + k_i} v_i + e^{u + k_t} v_t) / (sum_{i<t} e^{(t-1-i) g + k_i} + e^{u + k_t})

    All exponents are taken relative to the largest one so far: no key and no decay overflows.

    Args:
        k, v: (B, T, D), T >= 1.
        decay: g (D,), the log decay, at most 0; the paper's -w.
        bonus: u (D,).
        initial_state: the state before the first token; None: no tokens.
        return_state: False: None is returned for the final state.
        impl: "reference", "chunked", "triton", "step" or "step_triton" (one token), or None to choose.

    Returns:
        o (B, T, D) in v's dtype, and the state after the last token in fp32 (fp64 for fp64 v). `largest` is the largest
        exponent so far, faded like its token.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.

    Source: RWKV-4 (arXiv 2305.13048), eq. 16, and the state as its official code keeps it.
    """
    a, b, p = (None, None, None) if initial_state is None else initial_state
    sizes = check_shapes(
        "wkv",
        k=(k, "BTD"),
        v=(v, "BTD"),
        decay=(decay, "D"),
        bonus=(bonus, "D"),
        numerator=(a, "BD"),
        denominator=(b, "BD"),
        largest=(p, "BD"),
    )
    if 0 in sizes.values():
        raise UnsupportedError(f"wkv: k is {tuple(k.shape)}; no axis may be empty.")
    impl = impl or step_backend(sizes["T"], a, return_state, k, v, decay, bonus, a, b, p)
    module = backend(__name__, IMPLS, impl, k.device)
    o, state = module.wkv(k, v, decay, bonus, initial_state, return_state)
    return o, WKVState(*state) if return_state else None
