"""Linear attention with the second-order Taylor features of exp: BASED's."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend
from zoo.kernels.taylor_attention.features import num_features

IMPLS = ("reference", "chunked")


class TaylorState(NamedTuple):
    """S (B, H, F, V): sum of phi(k_t) v_t^T. z (B, H, F): sum of phi(k_t), the normaliser."""

    S: Tensor
    z: Tensor


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: TaylorState | None = None,
    return_state: bool = True,
    impl: str | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, TaylorState | None]:
    """Attention whose weight exp(s) is 1 + s + s^2/2, s = q.k / sqrt(K): a recurrence over F features.

        S_t = S_{t-1} + phi(k_t) v_t^T,   z_t = z_{t-1} + phi(k_t)
        o_t = S_t^T phi(q_t) / (phi(q_t).z_t + eps)

    phi (`features.taylor_features`) keeps each second-order product once, so F = 1 + K + K(K+1)/2.

    Args:
        q, k: (B, T, H, K), T >= 1; K is BASED's feature dimension.
        v: (B, T, H, V).
        initial_state: the state before the first token; None for zeros.
        return_state: False where the state is not needed, which spares its computation; it is then None.
        impl: "reference", "chunked", or None to choose by device.
        eps: added to the normaliser, which is at least t/2 (1 + s + s^2/2 >= 1/2).

    Returns:
        o (B, T, H, V) in v's dtype, and the state after the last token in fp32 (fp64 for fp64 v).

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.

    References:
        BASED, arXiv 2402.18668, section 4.1 and eq. 4.
    """
    _check(q, k, v, initial_state)
    module = backend(__name__, IMPLS, impl, q.device)
    o, state = module.taylor_attention(q, k, v, initial_state=initial_state, return_state=return_state, eps=eps)
    return o, TaylorState(*state) if return_state else None


def _check(q: Tensor, k: Tensor, v: Tensor, initial_state: TaylorState | None) -> None:
    if q.dim() != 4 or 0 in q.shape:
        raise UnsupportedError(f"taylor_attention: q is {tuple(q.shape)}; it must be (B, T, H, K), no axis empty.")
    B, T, H, K = q.shape
    if k.shape != q.shape:
        raise UnsupportedError(f"taylor_attention: k is {tuple(k.shape)}, q {tuple(q.shape)}; they must be the same.")
    if v.dim() != 4 or v.shape[:3] != (B, T, H) or v.shape[3] == 0:
        raise UnsupportedError(f"taylor_attention: v is {tuple(v.shape)}; for this q it must be {(B, T, H)} + (V,).")
    if initial_state is not None:
        S, z = initial_state
        F = num_features(K)
        if tuple(S.shape) != (B, H, F, v.shape[3]) or tuple(z.shape) != (B, H, F):
            raise UnsupportedError(
                f"taylor_attention: initial_state holds S {tuple(S.shape)} and z {tuple(z.shape)}; for these q and v "
                f"they must be {(B, H, F, v.shape[3])} and {(B, H, F)}."
            )
