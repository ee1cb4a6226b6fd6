"""One token of a decode in plain torch."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import check_step, state_dtype


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
) -> tuple[Tensor, Tensor]:
    """S = (I - beta k k^T) diag(e^g) S + beta k v^T; o = S^T q. See `zoo.kernels.delta_rule`."""
    S = _decayed(check_step("delta_rule", q.shape[1], initial_state), decay, v)
    q_BHK, k_BHK, v_BHV = (x[:, 0].to(S.dtype) for x in (q, k, v))
    held = (k_BHK[..., None, :] @ S).squeeze(-2)
    change = beta[:, 0, :, None].to(S.dtype) * (v_BHV - held)
    S = S + k_BHK[..., None] * change[..., None, :]
    return (q_BHK[..., None, :] @ S).squeeze(-2)[:, None].to(v.dtype), S


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
) -> tuple[Tensor, Tensor]:
    """S = diag(e^g) S + b (a^T S) + k v^T; o = S^T q. See `zoo.kernels.delta_rule`."""
    before = check_step("generalized_delta_rule", q.shape[1], initial_state)
    S = _decayed(before, decay, v)
    q_BHK, k_BHK, v_BHV, a_BHK, b_BHK = (x[:, 0].to(S.dtype) for x in (q, k, v, a, b))
    read = (a_BHK[..., None, :] @ before.to(S.dtype)).squeeze(-2)
    S = S + b_BHK[..., None] * read[..., None, :] + k_BHK[..., None] * v_BHV[..., None, :]
    return (q_BHK[..., None, :] @ S).squeeze(-2)[:, None].to(v.dtype), S


def _decayed(S: Tensor, decay: Tensor | None, v: Tensor) -> Tensor:
    S = S.to(state_dtype(v.dtype))
    if decay is None:
        return S
    kept = decay[:, 0].to(S.dtype).exp()
    return S * (kept[..., None, None] if kept.dim() == 2 else kept[..., None])
