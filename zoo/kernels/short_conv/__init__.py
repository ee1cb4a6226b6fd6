"""Short causal depthwise convolution, with the cache that a decode carries."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, step_backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton", "step", "step_triton")
MAX_WIDTH = 8


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = gate_t * act(bias + sum_{j<W} weight[:, W-1-j] * x_{t-j}), channel by channel.

    The weight is laid out as torch's `Conv1d` has it: its last tap meets the present token.

    Args:
        x: (B, T, D).
        weight: (D, W), W <= 8.
        bias: (D,).
        activation: None or "silu".
        gate: (B, T, D), in x's dtype; None: 1.
        initial_state: (B, W-1, D), the W-1 inputs before x in time order; None: zeros.
        return_state: False: the cache is not made, and None is returned for it.
        impl: "reference", "chunked", "triton", "step" or "step_triton" (one token), or None to choose.

    Returns:
        y (B, T, D) in x's dtype, summed in fp32 (fp64 for fp64), and the cache (B, W-1, D): the last W-1 inputs in
        time order, in x's dtype.

    Raises:
        UnsupportedError: W > 8, an unknown activation or backend, or shapes that do not fit.

    Source: the conv1d of Mamba (arXiv 2312.00752, section 3.4); the short filters of Hyena (arXiv 2302.10866).
    """
    sizes = check_shapes("short_conv", x=(x, "BTD"), weight=(weight, "DW"), bias=(bias, "D"), gate=(gate, "BTD"))
    if not 1 <= sizes["W"] <= MAX_WIDTH:
        raise UnsupportedError(
            f"short_conv: a width of {sizes['W']} taps is not supported, 1 to {MAX_WIDTH} are; use long_conv for more."
        )
    if 0 in sizes.values():
        raise UnsupportedError(f"short_conv: x is {tuple(x.shape)}; no axis may be empty.")
    if initial_state is not None:
        expected = (sizes["B"], sizes["W"] - 1, sizes["D"])
        if tuple(initial_state.shape) != expected:
            raise UnsupportedError(
                f"short_conv: initial_state has shape {tuple(initial_state.shape)}; expected (B, W-1, D) = {expected}."
            )
    if activation not in (None, "silu"):
        raise UnsupportedError(f"short_conv: activation {activation!r} is not supported; use None or 'silu'.")
    impl = impl or step_backend(sizes["T"], initial_state, return_state, x, weight, bias, gate, initial_state)
    module = backend(__name__, IMPLS, impl, x.device)
    # Autocast would take products in half precision.
    with torch.autocast(x.device.type, enabled=False):
        return module.short_conv(x, weight, bias, activation, gate, initial_state, return_state)
