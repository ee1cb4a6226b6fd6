"""One token of a decode in plain torch."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import check_step, state_dtype


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
) -> tuple[Tensor, Tensor]:
    S = check_step("linear_recurrence", q.shape[1], initial_state)
    dtype = state_dtype(v.dtype)
    q_BHK, k_BHK, v_BHV = (x[:, 0].to(dtype) for x in (q, k, v))
    kv = k_BHK[..., None] * v_BHV[:, :, None]
    before = S.to(dtype)
    if decay is None:
        S = before + kv
    else:
        kept = (decay if decay.dim() == 1 else decay[:, 0]).to(dtype).exp()[..., None]
        S = (kept if decay.dim() == 4 else kept[..., None]) * before + kv
    read = S if bonus is None else before + bonus.to(dtype)[..., None] * kv
    o = (q_BHK[..., None, :] @ read).squeeze(-2)
    if skip is not None:
        o = o + skip.to(dtype)[:, None] * v_BHV
    return o[:, None].to(v.dtype), S
