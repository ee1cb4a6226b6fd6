"""Selective scan: a diagonal linear recurrence whose decay, input and output may depend on the token."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision, step_backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton", "step", "step_triton")


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = C_t . h_t + D x_t;  times silu(z_t) where there is a gate.

    Each of the D channels has N states of its own, and none meets another channel. All the exponents dt A must be <= 0.

    Args:
        x: (B, T, D).
        dt: (B, T, D), or (D,) for the same step at each token; > 0, after its softplus; or before it, given dt_bias.
        A: (D, N), negative.
        B, C: (B, T, N), or (D, N) for the same at each token.
        D: (D,), the skip.
        z: (B, T, D), the gate.
        dt_bias: (D,); the step is softplus(dt + dt_bias). None: it is dt.
        initial_state: (B, D, N); None: zeros.
        return_state: False: None is returned for the final state.
        impl: "reference", "chunked", "triton", "step" or "step_triton" (one token), or None to choose.

    Returns:
        y (B, T, D) in x's dtype and the final state (B, D, N) in fp32 (fp64 for fp64), the precision of all sums.

    Raises:
        UnsupportedError: an unknown backend, or shapes that do not fit.

    Source: Mamba (arXiv 2312.00752), equation 2a with the discretisation of its algorithm 2 (zero-order hold for A,
    Euler for B).
    """
    sizes = check_shapes("selective_scan", x=(x, "BTD"), A=(A, "DN"), D=(D, "D"), z=(z, "BTD"), dt_bias=(dt_bias, "D"))
    if 0 in sizes.values():
        raise UnsupportedError(f"selective_scan: x is {tuple(x.shape)} and A {tuple(A.shape)}; no axis may be empty.")
    shape = tuple(sizes[axis] for axis in "BTD")
    if tuple(dt.shape) not in (shape, shape[2:]):
        raise UnsupportedError(
            f"selective_scan: dt has shape {tuple(dt.shape)}; expected (B, T, D) = {shape} or (D,) = {shape[2:]}."
        )
    if dt_bias is not None and dt.dim() == 1:
        raise UnsupportedError("selective_scan: dt_bias needs a dt of shape (B, T, D); add it to a dt of shape (D,).")
    for name, tensor in (("B", B), ("C", C)):
        if tuple(tensor.shape) not in ((*shape[:2], sizes["N"]), tuple(A.shape)):
            raise UnsupportedError(
                f"selective_scan: {name} has shape {tuple(tensor.shape)}; expected (B, T, N) = "
                f"{(*shape[:2], sizes['N'])} or (D, N) = {tuple(A.shape)}."
            )
    expected = (sizes["B"], sizes["D"], sizes["N"])
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise UnsupportedError(
            f"selective_scan: initial_state has shape {tuple(initial_state.shape)}; expected (B, D, N) = {expected}."
        )
    impl = impl or step_backend(sizes["T"], initial_state, return_state, x, dt, A, B, C, D, z, dt_bias, initial_state)
    module = backend(__name__, IMPLS, impl, x.device)
    # Autocast would take products in half precision.
    with full_precision(x):
        return module.selective_scan(x, dt, A, B, C, D, z, dt_bias, initial_state, return_state)
