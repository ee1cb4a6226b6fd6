"""The gate and the candidate of a minGRU as a selective scan takes them: an input and a step."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")
# Below, where fp32 ends, the quotient of the gate and its step is 1.
SMALLEST_STEP = 1e-30


def mingru_inputs(candidate: Tensor, gate: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """x and dt with h_t = e^{-dt} h_{t-1} + dt x = (1 - z) h_{t-1} + z c, z = sigmoid(gate) (arXiv 2410.01201, 3.1).

        dt = softplus(gate);   x = candidate * (1 - e^{-dt}) / dt

    In fp32 (fp64 for fp64 inputs) whatever the dtypes.

    Args:
        candidate, gate: (B, T, D).
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        x (B, T, D) in the candidate's dtype, dt (B, T, D) in fp32 (fp64 for fp64 gates).

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    check_shapes("mingru_inputs", candidate=(candidate, "BTD"), gate=(gate, "BTD"))
    module = backend(__name__, IMPLS, impl, gate.device)
    with full_precision(gate):
        return module.mingru_inputs(candidate, gate, SMALLEST_STEP)
