"""The delta rule: a linear-attention state that overwrites what a key held before; and its low-rank generalisation."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision, step_backend
from zoo.kernels.gated_norm import gated_norm
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton", "step", "step_triton")


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
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """An associative memory that moves the value it holds under k_t towards v_t, by beta_t.

        S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
        o_t = S_t^T q_t

    Nothing is scaled or normalised; the recurrence is stable for |k_t| = 1 and beta_t in [0, 2].

    Args:
        q, k: (B, T, H, K), T >= 1.
        v: (B, T, H, V).
        beta: (B, T, H).
        decay: g, the *logarithm* of what is kept, <= 0 (not checked; -inf is not supported). None for g = 0;
            (B, T, H) per step; (B, T, H, K) per step and channel.
        min_decay: a bound that the caller knows, g >= min_decay everywhere (not checked: a g far below overflows). With
            it a backend may exponentiate sums of -g, which spares work where g is per channel.
        initial_state: S_0 (B, H, K, V); None for zeros.
        return_state: False where S_T is not needed, which spares its computation; S is then None.
        impl: "reference", "chunked", "triton", "step" or "step_triton" (one token), or None to choose.

    Returns:
        o (B, T, H, V) in v's dtype, and S_T (B, H, K, V) in fp32 (fp64 for fp64 v).

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.

    References:
        DeltaNet: arXiv 2406.06484, eq. 4. Gated DeltaNet: 2412.06464, eq. 10. Per channel: 2510.26692, eq. 1.
    """
    sizes = check_shapes(
        "delta_rule",
        q=(q, "BTHK"),
        k=(k, "BTHK"),
        v=(v, "BTHV"),
        beta=(beta, "BTH"),
        decay=(decay, _decay_letters(decay)),
        initial_state=(initial_state, "BHKV"),
    )
    _check("delta_rule", sizes["T"], min_decay)
    impl = impl or step_backend(sizes["T"], initial_state, return_state, q, k, v, beta, decay, initial_state)
    run = backend(__name__, IMPLS, impl, v.device).delta_rule
    # Autocast would take the products in half precision.
    with full_precision(v):
        return run(q, k, v, beta, decay, min_decay=min_decay, initial_state=initial_state, return_state=return_state)


def packed_delta_rule(
    qkv: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    key_dim: int,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    return_state: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`delta_rule` of q / (sqrt(K) |q|), k / |k| and v that lie side by side, as one linear layer makes them.

    |x| is sqrt(sum x^2 + eps), so that nothing is divided by 0.

    Args:
        qkv: (B, T, H (2 K + V)), T >= 1: q of all heads, then k, then v.
        beta: (B, T, H).
        decay: (B, T, H), or None.
        key_dim: K.
        initial_state, return_state, impl: as in `delta_rule`.

    Returns:
        o (B, T, H, V) in qkv's dtype, and S_T (B, H, K, V) in fp32 (fp64 for fp64 qkv).

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.

    References:
        arXiv 2406.06484, section 3.3.
    """
    sizes = check_shapes("packed_delta_rule", qkv=(qkv, "BTC"), beta=(beta, "BTH"), decay=(decay, "BTH"))
    H, C = sizes["H"], sizes["C"]
    if C % H or 2 * H * key_dim >= C:
        raise UnsupportedError(
            f"packed_delta_rule: qkv has {C} channels; {H} heads with keys of {key_dim} need {2 * H * key_dim} and a "
            f"multiple of {H} for the values."
        )
    q, k, v = split_heads(qkv, H, key_dim)
    check_shapes("packed_delta_rule", q=(q, "BTHK"), v=(v, "BTHV"), initial_state=(initial_state, "BHKV"))
    _check("packed_delta_rule", sizes["T"], None)
    impl = impl or step_backend(sizes["T"], initial_state, return_state, qkv, beta, decay, initial_state)
    module = backend(__name__, IMPLS, impl, qkv.device)
    if hasattr(module, "packed_delta_rule"):
        with full_precision(qkv):
            return module.packed_delta_rule(qkv, beta, decay, key_dim, eps, initial_state, return_state)
    plain = impl if impl in ("reference", "chunked") else None
    # An rms norm makes the length sqrt(K).
    q = gated_norm(q, scale=1 / key_dim, eps=eps / key_dim, impl=plain)
    k = gated_norm(k, scale=key_dim**-0.5, eps=eps / key_dim, impl=plain)
    return delta_rule(q, k, v, beta, decay, initial_state=initial_state, return_state=return_state, impl=impl)


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
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A linear recurrence whose transition is diagonal plus low rank.

        S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
        o_t = S_t^T q_t

    `delta_rule` is a_t = exp(g_t) k_t, b_t = -beta_t k_t, with the key beta_t k_t. RWKV-7 is a_t = -kappa_t,
    b_t = eta_t kappa_t, with its receptance for q. Nothing is scaled or normalised.

    Args:
        q, k, a, b: (B, T, H, K), T >= 1.
        v: (B, T, H, V).
        decay, min_decay, initial_state, return_state, impl: as in `delta_rule`.

    Returns:
        o (B, T, H, V) in v's dtype, and S_T (B, H, K, V) in fp32 (fp64 for fp64 v).

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.

    References:
        RWKV-7: arXiv 2503.14456, eq. 17 to 19. The general form: 2406.06484, section 6.
    """
    sizes = check_shapes(
        "generalized_delta_rule",
        q=(q, "BTHK"),
        k=(k, "BTHK"),
        v=(v, "BTHV"),
        a=(a, "BTHK"),
        b=(b, "BTHK"),
        decay=(decay, _decay_letters(decay)),
        initial_state=(initial_state, "BHKV"),
    )
    _check("generalized_delta_rule", sizes["T"], min_decay)
    impl = impl or step_backend(sizes["T"], initial_state, return_state, q, k, v, a, b, decay, initial_state)
    run = backend(__name__, IMPLS, impl, v.device).generalized_delta_rule
    with full_precision(v):
        return run(q, k, v, a, b, decay, min_decay=min_decay, initial_state=initial_state, return_state=return_state)


def split_heads(qkv: Tensor, num_heads: int, key_dim: int) -> list[Tensor]:
    """q, k (B, T, H, K) and v (B, T, H, V) of what `packed_delta_rule` takes."""
    keys = num_heads * key_dim
    parts = qkv.split([keys, keys, qkv.shape[2] - 2 * keys], dim=2)
    return [part.unflatten(2, (num_heads, -1)) for part in parts]


def _decay_letters(decay: Tensor | None) -> str:
    return "BTH" if decay is not None and decay.dim() == 3 else "BTHK"


def _check(op: str, T: int, min_decay: float | None) -> None:
    if T == 0:
        raise UnsupportedError(f"{op}: T is 0; give at least one step.")
    if min_decay is not None and min_decay > 0:
        raise UnsupportedError(f"{op}: min_decay {min_decay} is above 0; give the logarithm of a decay, or None.")
