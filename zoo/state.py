"""The recurrent state: what a decode carries from one token to the next, counted, serialised, restored.

A state is a tensor, or a (named) tuple, list or dict of states, or None. Sizes are read off the tensors of a real
decode; there is no formula here.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = Any


class TensorSize(NamedTuple):
    """One tensor of a state, for one sequence (the batch axis divided out)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    bytes: int


class StateSize(NamedTuple):
    """A state's size for one sequence."""

    elements: int
    bytes: int
    tensors: tuple[TensorSize, ...]


def named_tensors(state: State, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in `state` with a dotted name, in a fixed order. Raises TypeError on anything that is no state."""
    if state is None:
        return
    if isinstance(state, Tensor):
        yield prefix or "state", state
        return
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        items = list(zip(state._fields, state, strict=True))
    elif isinstance(state, tuple | list):
        items = [(str(i), value) for i, value in enumerate(state)]
    elif isinstance(state, dict):
        items = list(state.items())
    else:
        raise TypeError(
            f"{prefix or 'state'} is a {type(state).__name__}; a state is made of tensors in (named) tuples, lists or "
            "dicts, so that it can be counted and saved."
        )
    for name, value in items:
        yield from named_tensors(value, f"{prefix}.{name}" if prefix else str(name))


def map_tensors(function: Any, state: State) -> State:
    """`state` with `function` applied to every tensor, structure kept."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(map_tensors(function, value) for value in state))
    if isinstance(state, tuple | list):
        return type(state)(map_tensors(function, value) for value in state)
    if isinstance(state, dict):
        return {name: map_tensors(function, value) for name, value in state.items()}
    raise TypeError(f"a {type(state).__name__} is no state; see zoo.state.")


def measure_state(state: State) -> StateSize:
    """Elements and bytes of one sequence's share of `state`: every tensor's first axis is the batch.

    Raises TypeError on a state that holds anything but tensors, ValueError on tensors that disagree on the batch.
    """
    sizes = []
    batch = None
    for name, tensor in named_tensors(state):
        if tensor.dim() == 0:
            raise ValueError(f"state tensor {name!r} has no axes; its first axis must be the batch.")
        if batch is None:
            batch = tensor.shape[0]
        if tensor.shape[0] != batch or batch == 0:
            raise ValueError(
                f"state tensor {name!r} has batch {tensor.shape[0]}, others {batch}; they must agree, and not be 0."
            )
        elements = tensor.numel() // batch
        sizes.append(
            TensorSize(
                name,
                tuple(tensor.shape[1:]),
                str(tensor.dtype).removeprefix("torch."),
                elements,
                elements * tensor.element_size(),
            )
        )
    return StateSize(sum(s.elements for s in sizes), sum(s.bytes for s in sizes), tuple(sizes))


def state_to_bytes(state: State) -> bytes:
    """The state's tensors, and nothing else, as bytes."""
    buffer = io.BytesIO()
    # contiguous().clone(): a view would drag its whole storage along.
    torch.save({name: t.detach().contiguous().clone().cpu() for name, t in named_tensors(state)}, buffer)
    return buffer.getvalue()


def state_from_bytes(data: bytes, like: State) -> State:
    """A state with the structure (and device) of `like` and the tensors in `data`. Raises ValueError on other names."""
    tensors = torch.load(io.BytesIO(data), weights_only=True)
    expected = [name for name, _ in named_tensors(like)]
    if list(tensors) != expected:
        raise ValueError(f"the saved state holds {list(tensors)}, this module's state {expected}.")
    values = iter(tensors.values())
    return map_tensors(lambda t: next(values).to(t.device), like)
