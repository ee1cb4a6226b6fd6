"""Queries and keys that heads share, as Mamba-2's do: written out for each head, the keys times the head's step."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def shared_keys(C: Tensor, B: Tensor, dt: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """q_h = C_g and k_h = dt_h B_g, g the group of head h (arXiv 2405.21060, section 7.2).

    Products in fp32 (fp64 for fp64 B), rounded once.

    Args:
        C, B: (B, T, G, N).
        dt: (B, T, H), H a multiple of G: the first H / G heads are of the first group.
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        q and k (B, T, H, N), in the dtypes of C and B.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    sizes = check_shapes("shared_keys", C=(C, "BTGN"), B=(B, "BTGN"), dt=(dt, "BTH"))
    if sizes["H"] % sizes["G"]:
        raise UnsupportedError(f"shared_keys: {sizes['H']} heads in {sizes['G']} groups; give as many heads to each.")
    module = backend(__name__, IMPLS, impl, B.device)
    with full_precision(B):
        return module.shared_keys(C, B, dt)
