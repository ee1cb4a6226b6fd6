"""The linear recurrence with a diagonal decay: linear attention, RetNet, Mamba-2, GLA and RWKV-6 are cases of it."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision, step_backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton", "step", "step_triton")


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A sum of outer products that decays: an associative memory of fixed size, read by q.

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
        o_t = S_t^T q_t                                 without bonus
        o_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t       with bonus u

    and D v_t besides with a skip D.

    Nothing is scaled or normalised; scale q before the call.

    Args:
        q, k: (B, T, H, K), T >= 1.
        v: (B, T, H, V).
        decay: g, the *logarithm* of what is kept, <= 0 (not checked; -inf, to forget all, is not supported). None for
            g = 0; (H,) a constant per head; (B, T, H) per step; (B, T, H, K) per step and channel, where the fused
            kernels take less than -20.1 for -20.1, which keeps 2e-9.
        bonus: u (H, K), the weight of the current token in place of 1.
        skip: D (H,).
        initial_state: S_0 (B, H, K, V); None for zeros.
        return_state: False where S_T is not needed, which spares its computation; S is then None.
        impl: "reference", "chunked", "triton", "step" or "step_triton" (one token), or None to choose.

    Returns:
        o (B, T, H, V) in v's dtype, and S_T (B, H, K, V) in fp32 (fp64 for fp64 v).

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.

    References:
        Linear attention: arXiv 2006.16236, eq. 18. RetNet: 2307.08621, eq. 6. Mamba-2: 2405.21060, eq. 16.
        GLA: 2312.06635, eq. 3. RWKV-6, with the bonus: 2404.05892, eq. 15 and 16.
    """
    op = "linear_recurrence"
    letters = {1: "H", 3: "BTH"}.get(0 if decay is None else decay.dim(), "BTHK")
    sizes = check_shapes(
        op,
        q=(q, "BTHK"),
        k=(k, "BTHK"),
        v=(v, "BTHV"),
        decay=(decay, letters),
        bonus=(bonus, "HK"),
        skip=(skip, "H"),
        initial_state=(initial_state, "BHKV"),
    )
    if 0 in sizes.values():
        raise UnsupportedError(f"{op}: q is {tuple(q.shape)} and v {tuple(v.shape)}; no axis may be empty.")
    impl = impl or step_backend(sizes["T"], initial_state, return_state, q, k, v, decay, bonus, skip, initial_state)
    run = backend(__name__, IMPLS, impl, q.device).linear_recurrence
    # Autocast would take the products in half precision.
    with full_precision(q):
        return run(q, k, v, decay, bonus=bonus, skip=skip, initial_state=initial_state, return_state=return_state)
