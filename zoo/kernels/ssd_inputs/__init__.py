"""What Mamba-2 makes of its projections: queries and keys for each head, keys times the step, and the decay."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def ssd_inputs(
    BC: Tensor, dt: Tensor, bias: Tensor, log_A: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q_h = C_g, k_h = d_h B_g and log decay -exp(log_A_h) d_h, with d = softplus(dt + bias), g the group of head h.

    As in arXiv 2405.21060, sections 7.1 and 7.2; in fp32 (fp64 for fp64 dt), rounded once.

    Args:
        BC: (B, T, 2, G, N), B before C: in one tensor, so that their gradients need not be put together.
        dt: (B, T, H), H a multiple of G: the first H / G heads are of the first group.
        bias, log_A: (H,).
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        q and k (B, T, H, N) in BC's dtype; decay (B, T, H) in fp32 (fp64 for fp64 dt).

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    sizes = check_shapes("ssd_inputs", BC=(BC, "BTSGN"), dt=(dt, "BTH"), bias=(bias, "H"), log_A=(log_A, "H"))
    if sizes["S"] != 2:
        raise UnsupportedError(f"ssd_inputs: BC has shape {tuple(BC.shape)}; expected (B, T, 2, G, N), B before C.")
    if sizes["H"] % sizes["G"]:
        raise UnsupportedError(f"ssd_inputs: {sizes['H']} heads in {sizes['G']} groups; give as many heads to each.")
    module = backend(__name__, IMPLS, impl, BC.device)
    with full_precision(BC):
        return module.ssd_inputs(BC, dt, bias, log_A)
