"""Is a fused op right on this GPU: against its reference in fp64, over fresh seeds, run twice, at extreme sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.bench.case import Case, Draw, Shape
from zoo.state import named_tensors
from zoo.testing.ops import in_double, op_errors, poisoned, run_op
from zoo.testing.tolerances import TOLERANCES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Result(NamedTuple):
    """worst: the tensor with the largest error relative to `tolerance`. seeds: how many were tried."""

    case: str
    shape: Shape
    dtype: str
    check: str
    seeds: int
    worst: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def check_seeds(case: Case, shape: Shape, dtype: torch.dtype, seeds: int) -> Iterator[Result]:
    """Outputs and gradients within tolerance, for every seed; and the same bits when the first is run again."""
    tolerance = TOLERANCES[case.tolerance][dtype]
    worst: dict[str, float] = {}
    for seed in range(seeds):
        inputs = case.inputs(shape, Draw("cuda", dtype, seed))
        with poisoned():
            for name, error in op_errors(case.reference, case.ours, inputs, seed).items():
                worst[name] = max(error, worst.get(name, 0.0))
    name = max(worst, key=lambda n: worst[n])
    yield Result(case.name, shape, _name(dtype), "fp64 reference", seeds, name, worst[name], tolerance)

    inputs = case.inputs(shape, Draw("cuda", dtype, 0))
    first, second = run_op(case.ours, inputs, 0), run_op(case.ours, inputs, 0)
    differing = [n for n in first if not torch.equal(first[n], second[n])]
    yield Result(case.name, shape, _name(dtype), "same bits twice", 1, ",".join(differing), len(differing), 0)


def check_large(case: Case, shape: Shape, dtype: torch.dtype) -> Iterator[Result]:
    """At a size where indices overflow: the first and the last sequence, each against the reference alone."""
    inputs = case.inputs(shape, Draw("cuda", dtype, 0))
    # What has no batch axis would need the whole batch for its gradient.
    shared = {name: t.detach() for name, t in inputs.items() if t.shape[0] != shape.B}
    batched = {name: t for name, t in inputs.items() if name not in shared}
    leaves = [name for name, t in batched.items() if t.requires_grad]
    o = _first(case.ours(**batched, **shared))
    weight = torch.randn_like(o)
    gradients = dict(zip(leaves, torch.autograd.grad(o, [batched[n] for n in leaves], weight), strict=True))
    errors = {}
    for part in (slice(0, 1), slice(-1, None)):
        alone = {name: in_double(t[part]) for name, t in batched.items()}
        alone |= {name: alone[name].requires_grad_() for name in leaves}
        want = _first(case.reference(**alone, **{name: in_double(t) for name, t in shared.items()}))
        want_gradients = torch.autograd.grad(want, [alone[n] for n in leaves], weight[part].double())
        errors[f"output[{part.start}]"] = _relative(o[part], want)
        for name, g in zip(leaves, want_gradients, strict=True):
            errors[f"d{name}[{part.start}]"] = _relative(gradients[name][part], g)
    name = max(errors, key=lambda n: errors[n])
    tolerance = TOLERANCES[case.tolerance][dtype]
    yield Result(case.name, shape, _name(dtype), "large", 1, name, errors[name], tolerance)


def raised(case: Case, shape: Shape, dtype: torch.dtype, why: str) -> Result:
    """Of a check that found nothing: it has failed."""
    return Result(case.name, shape, _name(dtype), "raised", 0, why, math.inf, 0.0)


def _first(outputs: Any) -> Tensor:
    return next(iter(named_tensors(outputs)))[1]


def _relative(got: Tensor, want: Tensor) -> float:
    error = ((got.double() - want).norm() / want.norm()).item()
    return float("inf") if error != error else error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
