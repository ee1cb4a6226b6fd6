"""What stands between the read-out of a state and the output projection: a gate and a norm of each head."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")
Kind = Literal["layer", "rms"]


def gated_norm(
    x: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: Kind = "rms",
    gate_first: bool = False,
    scale: float = 1.0,
    eps: float = 1e-5,
    impl: str | None = None,
) -> Tensor:
    """Each head on its own, over its V channels, in fp32 (fp64 for fp64 inputs) whatever the dtypes.

        norm(u) = scale * weight * u / sqrt(mean(u^2) + eps) + bias       kind="rms" (arXiv 1910.07467, eq. 4)
        y = norm(x) * silu(gate)
        y = norm(x * silu(gate))                                          gate_first, as in Mamba-2

    With kind="layer" the mean is first subtracted from u, as a group norm does (arXiv 1803.08494). The length 1 is
    a norm too: u / sqrt(|u|^2 + e) is scale = V^-1/2, eps = e / V.

    Args:
        x, gate: (B, T, H, V). Without a gate, silu(gate) is 1.
        weight, bias: (V,), the same for all heads, or (H, V).
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        y (B, T, H, V) in x's dtype.

    Raises:
        UnsupportedError: shapes do not fit, the kind is unknown, or there is no such backend.
    """
    letters = {1: "V"}
    check_shapes(
        "gated_norm",
        x=(x, "BTHV"),
        gate=(gate, "BTHV"),
        weight=(weight, letters.get(0 if weight is None else weight.dim(), "HV")),
        bias=(bias, letters.get(0 if bias is None else bias.dim(), "HV")),
    )
    if kind not in ("layer", "rms"):
        raise UnsupportedError(f"gated_norm: kind {kind!r} is unknown; use 'layer' or 'rms'.")
    module = backend(__name__, IMPLS, impl, x.device)
    with full_precision(x):
        return module.gated_norm(x, gate, weight, bias, kind, gate_first, scale, eps)
