"""Long causal depthwise convolution, with a skip and a gate."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def long_conv(
    u: Tensor,
    kernel: Tensor,
    skip: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    past: Tensor | None = None,
    time_last: bool = False,
    impl: str | None = None,
) -> Tensor:
    """y_t = gate_t * (sum_j kernel[:, j] * u_{t-j} + skip * u_t), channel by channel.

    Args:
        u: (B, T, D).
        kernel: (D, L), its first tap meets the present token. The sum ends with the last tap or the first input.
        skip: (D,).
        gate: (B, T, D).
        past: (B, P, D), the inputs before u in time order, all that a decode has to keep; None: none.
        time_last: give y as (B, D, T), which spares a GPU the way back from how it computes; not with a gate.
        impl: "reference", "chunked", "triton" or None (by device).

    Returns:
        y (B, T, D), or (B, D, T), in u's dtype, summed in fp32 (fp64 for fp64).

    Raises:
        UnsupportedError: an unknown backend, or shapes that do not fit.

    Source: Hyena (arXiv 2302.10866), definition 3.1; S4's convolution form (arXiv 2111.00396), equation 5.
    """
    sizes = check_shapes("long_conv", u=(u, "BTD"), kernel=(kernel, "DL"), skip=(skip, "D"), gate=(gate, "BTD"))
    if 0 in sizes.values():
        raise UnsupportedError(
            f"long_conv: u is {tuple(u.shape)} and kernel {tuple(kernel.shape)}; no axis may be empty."
        )
    check_shapes("long_conv", u=(u, "BTD"), past=(past, "BPD"))
    if time_last and gate is not None:
        raise UnsupportedError(
            "long_conv: time_last goes without a gate, which would have to be turned; apply it after."
        )
    module = backend(__name__, IMPLS, impl, u.device)
    # Autocast would take products in half precision.
    with full_precision(u):
        return module.long_conv(u, kernel, skip, gate, past, time_last)
