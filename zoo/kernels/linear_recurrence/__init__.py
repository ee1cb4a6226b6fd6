"""The linear recurrence with a diagonal decay: linear attention, RetNet, Mamba-2, GLA and RWKV-6 are cases of it."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend

IMPLS = ("reference", "chunked")


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A sum of outer products that decays: an associative memory of fixed size, read by q.

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
        o_t = S_t^T q_t                                 without bonus
        o_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t       with bonus u

    Nothing is scaled or normalised; scale q before the call.

    Args:
        q, k: (B, T, H, K), T >= 1.
        v: (B, T, H, V).
        decay: g, the *logarithm* of what is kept, <= 0 (not checked; -inf, to forget all, is not supported). None for
            g = 0; (H,) a constant per head; (B, T, H) per step; (B, T, H, K) per step and channel.
        bonus: u (H, K), the weight of the current token in place of 1.
        initial_state: S_0 (B, H, K, V); None for zeros.
        return_state: False where S_T is not needed, which spares its computation; S is then None.
        impl: "reference", "chunked", or None to choose by device.

    Returns:
        o (B, T, H, V) in v's dtype, and S_T (B, H, K, V) in fp32 (fp64 for fp64 v).

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.

    References:
        Linear attention: arXiv 2006.16236, eq. 18. RetNet: 2307.08621, eq. 6. Mamba-2: 2405.21060, eq. 16.
        GLA: 2312.06635, eq. 3. RWKV-6, with the bonus: 2404.05892, eq. 15 and 16.
    """
    _check(q, k, v, decay, bonus, initial_state)
    module = backend(__name__, IMPLS, impl, q.device)
    return module.linear_recurrence(q, k, v, decay, bonus=bonus, initial_state=initial_state, return_state=return_state)


def _check(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, initial_state: Tensor | None
) -> None:
    if q.dim() != 4 or 0 in q.shape:
        raise UnsupportedError(f"linear_recurrence: q is {tuple(q.shape)}; it must be (B, T, H, K), no axis empty.")
    B, T, H, K = q.shape
    if k.shape != q.shape:
        raise UnsupportedError(f"linear_recurrence: k is {tuple(k.shape)}, q {tuple(q.shape)}; they must be the same.")
    if v.dim() != 4 or v.shape[:3] != (B, T, H) or v.shape[3] == 0:
        raise UnsupportedError(f"linear_recurrence: v is {tuple(v.shape)}; for this q it must be {(B, T, H)} + (V,).")
    allowed = [(H,), (B, T, H), (B, T, H, K)]
    if decay is not None and tuple(decay.shape) not in allowed:
        raise UnsupportedError(
            f"linear_recurrence: decay is {tuple(decay.shape)}; for this q it must be one of {allowed}, or None."
        )
    if bonus is not None and tuple(bonus.shape) != (H, K):
        raise UnsupportedError(f"linear_recurrence: bonus is {tuple(bonus.shape)}; for this q it must be {(H, K)}.")
    state = (B, H, K, v.shape[3])
    if initial_state is not None and tuple(initial_state.shape) != state:
        raise UnsupportedError(
            f"linear_recurrence: initial_state is {tuple(initial_state.shape)}; for these q and v it must be {state}."
        )
