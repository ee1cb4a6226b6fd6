"""The convolution kernel of diagonal state space models, from their parameters."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def ssm_kernel(
    log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, length: int, *, impl: str | None = None
) -> Tensor:
    """K_j = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(j dt A_n): zero-order hold (arXiv 2206.11893, section 3.1).

    A = -exp(log_A_real) + i A_imag, each of the N complex states standing for a conjugate pair.

    Args:
        log_dt: (H,), one step size for each of H systems, in fp32 (or fp64).
        log_A_real, A_imag: (H, N).
        C: (H, N, R), R = 2 for its real and its imaginary part.
        length: how many taps, at least 1.
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        K (H, length).

    Raises:
        UnsupportedError: shapes do not fit, there are no taps, or there is no such backend.
    """
    sizes = check_shapes(
        "ssm_kernel", log_dt=(log_dt, "H"), log_A_real=(log_A_real, "HN"), A_imag=(A_imag, "HN"), C=(C, "HNR")
    )
    if sizes["R"] != 2 or length < 1:
        raise UnsupportedError(
            f"ssm_kernel: C has shape {tuple(C.shape)}, length is {length}; expected (H, N, 2), >= 1."
        )
    return backend(__name__, IMPLS, impl, log_dt.device).ssm_kernel(log_dt, log_A_real, A_imag, C, length)
