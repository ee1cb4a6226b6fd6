"""Causal softmax attention, full or over a sliding window."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "flash", "triton")


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    positions: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Softmax attention to the past.

        o_t = sum_s p_ts v_s,  p_t = softmax_s(scale q_t^T k_s),  over s <= t, and over s > t - window with a window.

    The queries stand at the last Tq of the Tk key positions, a decode step passes one query with all it may look at; or
    each stands where `positions` says.

    Args:
        q: (B, Tq, H, K).
        k: (B, Tk, G, K), Tk >= Tq, H a multiple of G: query head h reads key head h // (H / G).
        v: (B, Tk, G, V).
        window: how many keys a query sees, itself among them; None for all.
        scale: of the scores; None for K**-0.5.
        positions: (B, Tq), the queries' positions t among the keys, in any order; no fused kernel takes them.
        impl: "reference", "chunked", "flash", "triton", or None to choose by device and by what each can do.

    Returns:
        o (B, Tq, H, V) in v's dtype; the softmax is taken in fp32 (fp64 for fp64 v).

    Raises:
        UnsupportedError: shapes do not fit, a window below 1, or there is no such backend.

    References:
        arXiv 1706.03762, eq. 1. The window: 2004.05150, section 3.1. Grouped key heads: 2305.13245.
    """
    sizes = check_shapes("causal_attention", k=(k, "BSGK"), v=(v, "BSGV"), q=(q, "BTHK"), positions=(positions, "BT"))
    if sizes["T"] > sizes["S"] and positions is None:
        raise UnsupportedError(
            f"causal_attention: {sizes['T']} queries but {sizes['S']} keys; every query needs its own key."
        )
    if sizes["H"] % sizes["G"]:
        raise UnsupportedError(
            f"causal_attention: {sizes['H']} query heads cannot share {sizes['G']} key heads; use a divisor."
        )
    if window is not None and window < 1:
        raise UnsupportedError(
            f"causal_attention: window {window} sees nothing; use 1 or more (a query sees itself), or None for all."
        )
    if scale is None:
        scale = sizes["K"] ** -0.5
    if impl is None:
        impl = _fused(q, k, v, window) if q.is_cuda and positions is None else "chunked"
    module = backend(__name__, IMPLS, impl, q.device)
    if positions is None:
        return module.causal_attention(q, k, v, window=window, scale=scale)
    if impl in ("flash", "triton"):
        raise UnsupportedError(f"causal_attention: the {impl} backend takes no positions; pass impl='chunked'.")
    return module.attention_at(q, k, v, positions, window=window, scale=scale)


def _fused(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> str:
    """The faster backend on a GPU of those that take such tensors."""
    near = backend(__name__, IMPLS, "triton", q.device)
    return "triton" if near.takes(q, k, v) and near.is_faster(q, window) else "flash"
