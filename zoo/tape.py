"""A function on a CPU without Python and autograd around its operations: recorded once, then run as a program.

A step of a small model is hundreds of short operations, and more of its time goes into Python, autograd's graph, views
and memory taken and given back than into arithmetic. Where it does the same each time, its operations are recorded
below autograd, and TorchScript's interpreter runs them from then on. Every result has its place in one block of
memory, so that views are made once, results that nothing reads are left out, and what depends on nothing is computed
once. The operations, their order and their values are those of the function: so is the outcome, to the last bit.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import math
import sys
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from zoo.dispatch import DispatchMode, tensors_in

# Calls before it is recorded: a function that is called a few times only would not make up for it.
CALLS_BEFORE = 4
# Bytes of all results beyond which operations are so long that what is around them does not matter.
LARGEST = 1 << 28
# Where torch's own allocator puts a tensor: matrix products may round differently elsewhere.
ALIGNMENT = 64

_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
_COPIES = {"aten::clone", "aten::_to_copy"}
_FILLS = {
    **dict.fromkeys(("aten::zeros", "aten::zeros_like", "aten::new_zeros"), 0),
    **dict.fromkeys(("aten::ones", "aten::ones_like", "aten::new_ones"), 1),
}
# TorchScript's numbers for them.
_MEMORY_FORMATS = {torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2}
# Python that sees a tensor's values may do something else with others.
_LOOKS = ("numpy", "tolist", "data_ptr", "__array__", "__dlpack__")


class Tape:
    """A function without arguments, over tensors that stay where they are; its result is not used.

    It is recorded twice. If the recordings agree, they are run from then on; if not, or if it reads values of tensors
    or makes tensors of Python's, or has results of changing shape or of many bytes, it is called each time. What it
    does in Python, such as setting attributes, is not done again. arena: memory that it may share with others, as
    nothing there outlives a call.
    """

    def __init__(self, function: Callable[[], object], arena: Arena | None = None) -> None:
        self._function = function
        self._arena = Arena() if arena is None else arena
        self._calls = 0
        self._before: Recording | None = None
        self._program: Callable[[], object] | None = None

    @property
    def recorded(self) -> bool:
        """Whether the next call runs the program."""
        return self._program is not None

    def __call__(self) -> None:
        if self._program is not None:
            self._program()
            return
        self._calls += 1
        if self._calls == CALLS_BEFORE + 1 and _has_torchscript() and not _has_compiled():
            self._before = record(self._function)
        elif self._before is not None:
            again = record(self._function)
            if again == self._before:
                self._program = compiled(again, self._arena)
            self._before = None
        else:
            self._function()


def _has_torchscript() -> bool:
    """Whether this torch has what runs a recording; these two names are its own."""
    return hasattr(torch._C, "Graph") and hasattr(torch._C, "_create_function_from_graph")


def _has_compiled() -> bool:
    """Whether torch.compile has been at work, as it is for torch.cond: while something is recorded it would fail."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and dynamo.counters["stats"]["unique_graphs"] > 0


class Arena:
    """Memory for what is needed no longer than a call."""

    def __init__(self) -> None:
        self._memory = _memory(0)

    def take(self, size: int) -> torch.UntypedStorage:
        """Memory of at least `size` bytes, the same as before where that is large enough."""
        if self._memory.nbytes() < size:
            self._memory = _memory(size)
        return self._memory


def _memory(size: int) -> torch.UntypedStorage:
    return torch.empty(size, dtype=torch.uint8).untyped_storage()


class Place(NamedTuple):
    """A tensor: its storage, by number in order of appearance, and how it lies there, counted in elements."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    conjugate: bool
    negative: bool


class Call(NamedTuple):
    """An operation, all its arguments in the order of its schema, and its new results, if these are any.

    Places stand for tensors. reads, writes: numbers of storages.
    """

    operation: OpOverload
    arguments: tuple[Any, ...]
    results: tuple[Place | None, ...]
    reads: frozenset[int]
    writes: frozenset[int]


@dataclass
class Recording:
    """given: storages that were there before, by their numbers. sizes: of each storage, in bytes."""

    calls: list[Call] = field(default_factory=list)
    given: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Recording)
            and self.calls == other.calls
            and self.sizes == other.sizes
            and {n: s._cdata for n, s in self.given.items()} == {n: s._cdata for n, s in other.given.items()}
        )


def record(function: Callable[[], object]) -> Recording | None:
    """Call the function, and write down what it does; None where that cannot be repeated without it."""
    recorder = _Recorder()
    with _watching(recorder), recorder:
        function()
    return recorder.recording if recorder.repeatable else None


@contextlib.contextmanager
def _watching(recorder: _Recorder) -> Iterator[None]:
    """While this holds, a look at any tensor's values ends what can be repeated.

    Not a TorchFunctionMode: that sees nothing of what Python does in a backward pass.
    """
    own = {name: vars(Tensor)[name] for name in _LOOKS if name in vars(Tensor)}

    def watched(look: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(look)
        def watch(*args: Any, **kwargs: Any) -> Any:
            recorder.repeatable = False
            return look(*args, **kwargs)

        return watch

    for name in _LOOKS:
        setattr(Tensor, name, watched(getattr(Tensor, name)))
    try:
        yield
    finally:
        for name in _LOOKS:
            if name in own:
                setattr(Tensor, name, own[name])
            else:
                delattr(Tensor, name)


class _Recorder(DispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self.repeatable = True
        # By address, and kept until the end, so that no two have the same.
        self._storages: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self._unwritten: set[int] = set()
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.repeatable:
            self.repeatable = self._write_down(func, args, kwargs or {}, result)
        return result

    def _write_down(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        """Whether the call can be repeated."""
        if not isinstance(func, OpOverload):
            return False
        specs = func._schema.arguments
        values = [args[i] if i < len(args) else kwargs.get(a.name, a.default_value) for i, a in enumerate(specs)]
        results = tuple(result) if isinstance(result, tuple | list) else (result,)
        if not _repeats_shapes(func, values) or not all(_is_plain(t) for t in tensors_in((values, results))):
            return False
        arguments = tuple(_mapped(self._place, value) for value in values)
        written = {p.storage for a, x in zip(specs, arguments, strict=True) if _is_written(a) for p in _places(x)}
        read = {p.storage for a, x in zip(specs, arguments, strict=True) if not _is_written(a) for p in _places(x)}
        made: tuple[Place | None, ...] = ()
        if not func._schema.is_mutable:
            known = [t.untyped_storage()._cdata in self._storages for t in tensors_in(results)]
            if all(known):
                # A view, or no tensor.
                return True
            if any(known) or any(str(r.type) != "Tensor" for r in func._schema.returns):
                return False
            made = tuple(self._place(t, made=True) if isinstance(t, Tensor) else None for t in results)
            written = {p.storage for p in _places(made)}
            self._bytes += sum(self.recording.sizes[n] for n in written)
            if self._bytes > LARGEST:
                return False
            if func._schema.name in _ALLOCATIONS:
                self._unwritten |= written
                return True
        if read & self._unwritten:
            # Something that does not come by here has written there.
            return False
        self._unwritten -= written
        self.recording.calls.append(Call(func, arguments, made, frozenset(read), frozenset(written)))
        return True

    def _place(self, x: Tensor, made: bool = False) -> Place:
        storage = x.untyped_storage()
        number, _ = self._storages.setdefault(storage._cdata, (len(self._storages), storage))
        if number == len(self.recording.sizes):
            self.recording.sizes.append(storage.nbytes())
            if not made:
                self.recording.given[number] = storage
        return Place(number, int(x.storage_offset()), tuple(x.shape), x.stride(), x.dtype, x.is_conj(), x.is_neg())


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_plain(x: Tensor) -> bool:
    return x.layout is torch.strided and x.device.type == "cpu"


def _repeats_shapes(operation: OpOverload, values: list[Any]) -> bool:
    """Whether shapes are the same for other values, and none become Python's."""
    tags = operation.tags
    if operation is torch.ops.aten.index.Tensor:
        return all(x.dtype not in (torch.bool, torch.uint8) for x in tensors_in(values[1]))
    return not {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view} & {*tags}


def _mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """An argument with function(x) in place of its tensors x, and tuples in place of lists."""
    if isinstance(value, Tensor):
        return function(value)
    return tuple(_mapped(function, item) for item in value) if isinstance(value, list | tuple) else value


def _places(value: Any) -> Iterator[Place]:
    if isinstance(value, Place):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _places(item)


def compiled(recording: Recording, arena: Arena) -> Callable[[], object] | None:
    """What does the same as the recorded function; None where TorchScript lacks an operation."""
    once, each = _needed(recording)
    return _Program(recording, once, [_in_place(call) for call in each], arena).build()


def _needed(recording: Recording) -> tuple[list[Call], list[Call]]:
    """The calls whose results are always the same, and of the others those whose results are read or stay."""
    changed = {n for call in recording.calls if not call.results for n in call.writes}
    fixed: set[int] = set()
    once, others = [], []
    for call in recording.calls:
        random = torch.Tag.nondeterministic_seeded in call.operation.tags
        if call.results and call.reads <= fixed and not call.writes & changed and not random:
            once.append(call)
            fixed |= call.writes
        else:
            others.append(call)
    each, read = [], set(recording.given)
    for call in reversed(others):
        if call.writes & read:
            each.append(call)
            # What is changed in place is read too.
            read |= call.reads if call.results else call.reads | call.writes
    return once, each[::-1]


def _in_place(call: Call) -> Call:
    """The call as one that writes its results where they belong; as it is if there is no such operation."""
    if not call.results or None in call.results:
        return call
    name = call.operation._schema.name
    operation: OpOverload | None
    arguments: tuple[Any, ...]
    if name in _COPIES:
        operation, arguments = torch.ops.aten.copy_.default, (call.results[0], call.arguments[0], False)
    elif name in _FILLS:
        operation, arguments = torch.ops.aten.fill_.Scalar, (call.results[0], _FILLS[name])
    else:
        operation, arguments = _out_variant(call.operation), (*call.arguments, *call.results)
    return call if operation is None else call._replace(operation=operation, arguments=arguments, results=())


@functools.cache
def _out_variant(operation: OpOverload) -> OpOverload | None:
    """The same operation with `out` arguments, if that is more than a copy of its results."""
    schema = operation._schema
    wanted = [(a.name, str(a.type)) for a in schema.arguments]
    for name in operation.overloadpacket.overloads():
        variant = getattr(operation.overloadpacket, name)
        out = [a.is_out for a in variant._schema.arguments]
        others = [(a.name, str(a.type)) for a in variant._schema.arguments if not a.is_out]
        if sum(out) == len(schema.returns) and others == wanted and torch.Tag.generated not in variant.tags:
            return variant
    return None


def _offsets(calls: list[Call], sizes: list[int], elsewhere: Container[int]) -> tuple[dict[int, int], int]:
    """Where in a block of memory each storage lies from the first call that has it to the last; the block's size."""
    last = {n: i for i, call in enumerate(calls) for n in call.reads | call.writes if n not in elsewhere}
    offsets: dict[int, int] = {}
    size = 0
    # (start, end, last call), in order.
    taken: list[tuple[int, int, int]] = []
    for i, call in enumerate(calls):
        taken = [block for block in taken if block[2] >= i]
        for n in sorted((call.reads | call.writes) & last.keys() - offsets.keys()):
            length = -(-sizes[n] // ALIGNMENT) * ALIGNMENT
            gaps = zip([0, *(end for _, end, _ in taken)], [*(start for start, _, _ in taken), math.inf], strict=True)
            # The tightest gap.
            _, offsets[n] = min((end - start, start) for start, end in gaps if end - start >= length)
            bisect.insort(taken, (offsets[n], offsets[n] + length, last[n]))
            size = max(size, offsets[n] + length)
    return offsets, size


class _Program:
    """TorchScript's graph of the calls `each`; its inputs are the tensors where these find and leave values."""

    def __init__(self, recording: Recording, once: list[Call], each: list[Call], arena: Arena) -> None:
        self._memory = {n: (storage, 0) for n, storage in recording.given.items()}
        self._memory |= {n: (_memory(recording.sizes[n]), 0) for call in once for n in call.writes}
        for call in once:
            self._compute(call)
        # What an operation returns in memory of its own stays there, unless there are views of it.
        seen: dict[int, set[Place]] = {}
        for call in each:
            for place in _places((call.arguments, call.results)):
                seen.setdefault(place.storage, set()).add(place)
        self._own = {n for call in each if call.results for n in call.writes if len(seen[n]) == 1}
        offsets, size = _offsets(each, recording.sizes, self._own | self._memory.keys())
        block = arena.take(size)
        self._memory |= {n: (block, offset) for n, offset in offsets.items()}

        self._calls = each
        self._graph: Any = torch._C.Graph()
        self._inputs: list[Tensor] = []
        self._values: dict[Place, Any] = {}

    def build(self) -> Callable[[], object] | None:
        """What runs it; None where TorchScript lacks an operation."""
        if not all(self._add(call) for call in self._calls):
            return None
        self._graph.makeMultiOutputIntoTuple()
        function, inputs = torch._C._create_function_from_graph("tape", self._graph), self._inputs

        def run() -> None:
            # As it is: TorchScript's own passes may fuse operations, and round differently.
            with torch.no_grad(), torch.jit.optimized_execution(False):
                function(*inputs)

        return run

    @torch.no_grad()
    def _compute(self, call: Call) -> None:
        values = [_with_values(self._tensor, x) for x in call.arguments]
        named = {a.name: x for a, x in zip(call.operation._schema.arguments, values, strict=True)}
        result = call.operation(**named)
        for place, x in zip(call.results, result if isinstance(result, tuple) else (result,), strict=True):
            if place is not None:
                self._tensor(place).copy_(x)

    def _tensor(self, place: Place) -> Tensor:
        storage, start = self._memory[place.storage]
        x = torch.empty(0, dtype=place.dtype)
        x.set_(storage, start // x.element_size() + place.offset, place.shape, place.stride)
        x = x.conj() if place.conjugate else x
        return torch._neg_view(x) if place.negative else x

    def _add(self, call: Call) -> bool:
        """Add a call to the graph. Returns whether TorchScript has it."""
        outputs = self._insert(call.operation, call.arguments)
        if outputs is None:
            return False
        for place, output in zip(call.results, outputs if call.results else (), strict=True):
            if place is not None and place.storage in self._own:
                self._values[place] = output
            elif place is not None:
                self._insert(torch.ops.aten.copy_.default, (place, output, False))
        return True

    def _insert(self, operation: OpOverload, arguments: tuple[Any, ...]) -> list[Any] | None:
        schema = operation._schema
        inputs = [self._value(x, a.type) for a, x in zip(schema.arguments, arguments, strict=True)]
        node = self._graph.create(schema.name, inputs, len(schema.returns))
        self._graph.insertNode(node)
        outputs = list(node.outputs())
        for output, returned in zip(outputs, schema.returns, strict=True):
            output.setType(returned.type)
        return None if node.schema() == "(no schema)" else outputs

    def _value(self, x: Any, kind: Any) -> Any:
        """An argument as a value of the graph; kind: its type in the operation's schema."""
        if isinstance(x, torch._C.Value):
            return x
        if isinstance(x, Place):
            if x not in self._values:
                self._values[x] = self._graph.addInput()
                self._inputs.append(self._tensor(x))
            return self._values[x]
        if isinstance(x, tuple):
            while not isinstance(kind, torch._C.ListType):
                kind = kind.getElementType()
            items = [self._value(item, kind.getElementType()) for item in x]
            node = self._graph.insertNode(self._graph.create("prim::ListConstruct", items, 1))
            node.output().setType(torch._C.ListType(kind.getElementType()))
            return node.output()
        return self._graph.insertConstant(_MEMORY_FORMATS[x] if isinstance(x, torch.memory_format) else x)


def _with_values(tensor: Callable[[Place], Tensor], value: Any) -> Any:
    """An argument with tensors in the place of places."""
    if isinstance(value, Place):
        return tensor(value)
    return [_with_values(tensor, item) for item in value] if isinstance(value, tuple) else value
