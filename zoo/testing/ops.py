"""Does a fused op compute what its reference does: every output, every state, and the gradient of every input?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zoo.state import map_tensors, named_tensors

Op = Callable[..., Any]
# One element may be off by this many times as much as the tensor as a whole: enough for the largest of a million
# normal numbers to be rounded like the rest, too little for one row that was never written.
PEAK = 32


def run_op(op: Op, inputs: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """What `op(**inputs)` returns, tensor by tensor, and the gradient of each input tensor that requires one.

    The loss is a fixed random sum of all outputs at once. Outputs are named output, or output.0, output.S ...;
    gradients d<input>, or d<input>.S ... for an input that is a state.
    """
    outputs = dict(named_tensors(op(**inputs), "output"))
    leaves = dict(_tensors(inputs))
    leaves = {name: t for name, t in leaves.items() if t.requires_grad}
    device = next(iter(outputs.values())).device
    # Another seed than the inputs may have been drawn from: the gradients would be sums of squares.
    draw = torch.Generator(device).manual_seed(2**32 + seed)
    # Rounded to what every dtype can hold: the reference and the op get the same weights.
    weights = [torch.randn(o.shape, device=device, generator=draw).bfloat16().to(o) for o in outputs.values()]
    gradients: tuple[Tensor, ...] = ()
    if leaves:
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    return outputs | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def op_errors(reference: Op, fused: Op, inputs: Mapping[str, Any], seed: int = 0) -> dict[str, float]:
    """The error of every output and gradient of `fused`, against `reference` on the same inputs in fp64.

    Inputs are tensors, states (tuples of tensors) or None. The error is the larger of |got - want| / |want| over the
    whole tensor and the maximum of |got - want| / max(|want|, PEAK * root mean square of want); infinite where a number
    is missing or is none. Raises AssertionError where the two differ in what they return, its shape, or the dtype of a
    gradient.
    """
    got = run_op(fused, inputs, seed)
    want = run_op(reference, _map(lambda t: in_double(t).requires_grad_(t.requires_grad), inputs), seed)
    assert list(got) == list(want), f"returned {list(got)}, the reference {list(want)}"
    given = dict(_tensors(inputs))
    errors = {}
    for name, g in got.items():
        assert g.shape == want[name].shape, f"{name} is {tuple(g.shape)}, the reference's {tuple(want[name].shape)}"
        if not name.startswith("output"):
            assert g.dtype == given[name[1:]].dtype, f"{name} is {g.dtype}, its input {given[name[1:]].dtype}"
        errors[name] = _error(g, want[name])
    return errors


def check_op(reference: Op, fused: Op, inputs: Mapping[str, Any], tolerance: float, seed: int = 0) -> None:
    """Raises AssertionError naming every output and gradient whose error (`op_errors`) exceeds `tolerance`.

    What `fused` allocates is filled with NaN first, so that an element that is never written cannot pass.
    """
    with poisoned():
        errors = op_errors(reference, fused, inputs, seed)
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, "; ".join(f"{name} is off by {error:.2e} > {tolerance:.0e}" for name, error in wrong.items())


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty, torch.empty_like and Tensor.new_empty is full of NaN (integers: the largest value)."""
    owners: list[tuple[Any, str]] = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in owners]

    def poison(allocate: Any) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **options: Any) -> Tensor:
            memory = allocate(*args, **options)
            return memory.fill_(float("nan") if memory.is_floating_point() else torch.iinfo(memory.dtype).max)

        return allocate_poisoned

    for (owner, name), original in zip(owners, originals, strict=True):
        setattr(owner, name, poison(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(owners, originals, strict=True):
            setattr(owner, name, original)


def in_double(t: Tensor) -> Tensor:
    """t without its history, in fp64 if it is in floating point."""
    return t.detach().double() if t.is_floating_point() else t.detach()


def _error(got: Tensor, want: Tensor) -> float:
    difference, want = (got.double() - want.double()).abs(), want.double()
    if difference.isnan().any() or want.isnan().any():
        return float("inf")
    if not want.any():
        return 0.0 if not difference.any() else float("inf")
    whole = (difference.norm() / want.norm()).item()
    # An element that is itself larger than that is measured against itself: rounding it alone may cost more.
    peak = (difference / want.abs().clamp_min(PEAK * want.square().mean().sqrt())).max().item()
    return max(whole, peak)


def _tensors(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in inputs.items():
        if isinstance(value, Tensor | tuple):
            yield from named_tensors(value, name)


def _map(function: Callable[[Tensor], Tensor], inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: map_tensors(function, v) if isinstance(v, Tensor | tuple) else v for k, v in inputs.items()}
