"""Models of one shape as one: every parameter has the members as its first axis, and one call runs them all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zoo.kernels.linear import linear
from zoo.model import Model
from zoo.state import State, map_tensors, named_tensors

Function = Callable[..., Any]
"""What a pack computes: of one member's model and its share of the inputs."""


class Pack:
    """Models that differ in the values of their parameters alone, such as by seed or learning rate.

    batched: all members run as one, each operation on all of them (torch.func.vmap), which a GPU needs to be busy. If
    not, they run one after another, with the same bits as alone. Members never see each other.
    """

    def __init__(self, models: Sequence[Model], *, batched: bool) -> None:
        self.models = list(models)
        self.batched = batched
        self.stacks: dict[str, Tensor] = {}
        self.gradient_stacks: dict[str, Tensor] = {}
        self.parameters = [[p for p in model.parameters() if p.requires_grad] for model in models]
        self.gradient_lists: list[tuple[Tensor, ...]] = []
        self._buffers: dict[str, Tensor] = {}
        if not batched:
            return
        named = [dict(model.named_parameters()) for model in models]
        for name in named[0]:
            stack = torch.stack([parameters[name].detach() for parameters in named]).requires_grad_()
            self.stacks[name] = stack
            # The models live on, in the stack's memory.
            for i, parameters in enumerate(named):
                parameters[name].data = stack.detach()[i]
        buffers = [dict(model.named_buffers()) for model in models]
        self._buffers = {name: torch.stack([b[name] for b in buffers]) for name in buffers[0]}

    def __len__(self) -> int:
        return len(self.models)

    def call(self, function: Function, *inputs: State) -> State:
        """function(model, *inputs) of every member, stacked.

        Inputs and result are made of tensors as a state is (zoo.state); all have the members as their first axis.
        """
        if not self.batched:
            results = [function(m, *map_tensors(lambda t, i=i: t[i], inputs)) for i, m in enumerate(self.models)]
            columns = zip(*([t for _, t in named_tensors(result)] for result in results), strict=True)
            return _rebuilt(results[0], [torch.stack(column) for column in columns])
        caller = _Caller(self.models[0], function)
        parameters = {f"model.{name}": stack for name, stack in (self.stacks | self._buffers).items()}
        shape: list[State] = []

        def call_one(parameters: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
            shape[:] = [functional_call(caller, parameters, _rebuilt(inputs, tensors))]
            return tuple(t for _, t in named_tensors(shape[0]))

        with _PackedLinear(), warnings.catch_warnings():
            # Of an operation that vmap can only run member by member: right all the same.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return _rebuilt(shape, vmap(call_one)(parameters, *(t for _, t in named_tensors(inputs))))[0]

    def gradients(self, function: Function, *inputs: Tensor) -> Tensor:
        """Losses (members,) of function, as in `call`.

        Gradients are left in `gradient_stacks` of a batched pack, in `gradient_lists` of another, in the order of
        `parameters`, with zeros where the loss does not depend on one.
        """
        if self.batched:
            losses = self.call(function, *inputs)
            found = torch.autograd.grad(losses.sum(), list(self.stacks.values()), materialize_grads=True)
            self.gradient_stacks = dict(zip(self.stacks, found, strict=True))
            return losses.detach()
        alone: list[Tensor] = []
        self.gradient_lists = []
        for i, (model, parameters) in enumerate(zip(self.models, self.parameters, strict=True)):
            loss = function(model, *(x[i] for x in inputs))
            self.gradient_lists.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
            alone.append(loss.detach())
        return torch.stack(alone)


@contextmanager
def evaluating(models: Iterable[Model]) -> Iterator[None]:
    """Models in evaluation mode without gradients, and as they were afterwards."""
    before = [(model, model.training) for model in models]
    try:
        for model, _ in before:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for model, training in before:
            model.train(training)


def _rebuilt(like: State, tensors: Iterable[Tensor]) -> State:
    """Tensors in the order of `named_tensors` -> a state of the structure of `like`."""
    values = iter(tensors)
    return map_tensors(lambda _: next(values), like)


class _PackedLinear(TorchFunctionMode):
    """Linear layers of 16 bits, also those that autocast makes so, as one op for the whole pack.

    vmap would take a layer apart before autocast sees it: the bias stayed in fp32, in a kernel of its own.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            given = (*args, *(kwargs or {}).values())
            x, parameters = given[0], given[1:]
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            if dtype in (torch.bfloat16, torch.float16):
                with torch.autocast(device, enabled=False):
                    return linear(x.to(dtype), *parameters)
        return func(*args, **(kwargs or {}))


class _Caller(nn.Module):
    """`function` of a model as a module, so that functional_call finds the model's parameters."""

    def __init__(self, model: Model, function: Function) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.model, *inputs)
