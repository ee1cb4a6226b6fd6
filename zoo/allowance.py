"""Tensors that no memory holds, refused before they are made: a slip of the pen in a size is an error, not a crash."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from zoo.dispatch import DispatchMode, tensors_in
from zoo.errors import ConfigError


class Allowance(DispatchMode):
    """While it holds, at most `numbers` may be made, over all new tensors together; `what` and `remedy` are for the
    message.

    Raises ConfigError: before a tensor is made, where its shape is an argument or that of an argument; else behind it.
    """

    def __init__(self, numbers: int, what: str, remedy: str) -> None:
        super().__init__()
        self._numbers, self._left, self._what, self._remedy = numbers, numbers, what, remedy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view, or a change in place, takes no memory.
        takes = isinstance(func, OpOverload) and not any(r.alias_info for r in func._schema.returns)
        if takes:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.name == "size" or isinstance(value, Tensor):
                    self._require(tuple(value.shape if isinstance(value, Tensor) else value))
        result = func(*args, **(kwargs or {}))
        if takes:
            for made in tensors_in(result):
                self._require(tuple(made.shape))
                self._left -= made.numel()
        return result

    def _require(self, shape: tuple[int, ...]) -> None:
        if math.prod(shape) > self._left:
            size = " x ".join(f"{n:,}" for n in shape)
            raise ConfigError(
                f"{self._what} takes more than {self._numbers:,} numbers, with a tensor of {size}; {self._remedy}."
            )
