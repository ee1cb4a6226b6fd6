"""Linear attention with the second-order Taylor features of exp: BASED's."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision, step_backend
from zoo.kernels.shapes import check_shapes
from zoo.kernels.taylor_attention.features import num_features

IMPLS = ("reference", "chunked", "triton", "step", "step_triton")


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
        impl: "reference", "chunked", "triton", "step" or "step_triton" (one token), or None to choose.
        eps: added to the normaliser, which is at least t/2 (1 + s + s^2/2 >= 1/2).

    Returns:
        o (B, T, H, V) in v's dtype, and the state after the last token in fp32 (fp64 for fp64 v).

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.

    References:
        BASED, arXiv 2402.18668, section 4.1 and eq. 4.
    """
    op = "taylor_attention"
    S, z = (None, None) if initial_state is None else initial_state
    sizes = check_shapes(op, q=(q, "BTHK"), k=(k, "BTHK"), v=(v, "BTHV"), S=(S, "BHFV"), z=(z, "BHF"))
    if 0 in sizes.values():
        raise UnsupportedError(f"{op}: q is {tuple(q.shape)} and v {tuple(v.shape)}; no axis may be empty.")
    if sizes.get("F", num_features(sizes["K"])) != num_features(sizes["K"]):
        raise UnsupportedError(
            f"{op}: initial_state has {sizes['F']} features; K={sizes['K']} makes {num_features(sizes['K'])}."
        )
    impl = impl or step_backend(sizes["T"], S, return_state, q, k, v, S, z)
    run = backend(__name__, IMPLS, impl, q.device).taylor_attention
    # Autocast would take the products in half precision.
    with full_precision(q):
        o, state = run(q, k, v, initial_state=initial_state, return_state=return_state, eps=eps)
    return o, TaylorState(*state) if return_state else None
