"""The one table of tolerances. An entry states what rounding can cost; it is never raised to let something pass."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    # Two algorithms for one function: chunked against step by step, prefill against forward.
    "two forms": {torch.float32: 1e-4, torch.float64: 1e-9},
    # One algorithm on other shapes, strides or storage: only the order of sums inside a matmul may differ.
    "same form": {torch.float32: 1e-5},
    # The output's rate of change over a step of 1e-10 (rounding) against one of 1e-6 (curvature).
    "slope": {torch.float64: 1e-2},
    # A gradient against a central difference of the loss, as a fraction of the gradient's norm.
    "finite difference": {torch.float64: 1e-5},
    # A fused op against its reference in fp64, measured as `zoo.testing.ops.op_errors` does, gradients included. 16-bit
    # dtypes round each operand of a product and each result: 2^-9 (bf16) and 2^-12 (fp16), a few times over.
    "linear_recurrence": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "delta_rule": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "generalized_delta_rule": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "wkv": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "taylor_attention": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "short_conv": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "selective_scan": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "long_conv": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "residual_norm": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "gated_norm": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "outer_conv": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "hyena_conv": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "mingru": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "projections": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "ssd_inputs": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "activation": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "rwkv7": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "shifted_projections": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "token_shift": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "token_embedding": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "linear": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "ssm_kernel": {torch.float32: 1e-5},
    "implicit_filter": {torch.float32: 1e-5},
    "gather_rows": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "attention": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    "answer_loss": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
}


def relative_error(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| elementwise, over the root mean square of `want`; not a number counts as infinitely wrong."""
    got, want = got.detach().double(), want.detach().double()
    scale = want.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    error = (got - want).abs() / scale
    return torch.where(error.isnan(), torch.inf, error)
