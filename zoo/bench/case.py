"""What `zoo bench kernels` measures and checks: one `Case` an op and variant, registered by the modules of `cases/`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.errors import ConfigError, did_you_mean
from zoo.kernels.launch import Config

Op = Callable[..., Any]


class Shape(NamedTuple):
    B: int
    T: int
    H: int
    D: int

    def __str__(self) -> str:
        return f"B{self.B}_T{self.T}_H{self.H}_D{self.D}"


SMALL = Shape(256, 256, 1, 64)
# More programs than the second axis of a grid may have.
MANY_HEADS = Shape(70_000, 16, 1, 16)
# Each tensor has more than 2^31 elements.
MANY_ELEMENTS = Shape(8_200, 4096, 1, 64)
SHAPES = (SMALL, Shape(256, 64, 1, 64), Shape(256, 256, 2, 32), Shape(8, 4096, 16, 64))


class Cost(NamedTuple):
    """The least a pass can do: elements of 16 bits and of 32 bits read or written once, and operations."""

    halves: float
    words: float
    flops: float

    def bytes(self, half: int = 2) -> float:
        return half * self.halves + 4 * self.words


class Draw:
    """Fresh random inputs on a device, in a dtype, from a seed."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, device=self.device, generator=self._generator) * scale
        return x.to(self.dtype).requires_grad_()

    def log_decay(self, *shape: int) -> Tensor:
        """fp32, log-normal: half of them keep more than e^-0.1, one in a thousand less than e^-8."""
        x = torch.randn(shape, device=self.device, generator=self._generator)
        return (-0.1 * (1.4 * x).exp()).requires_grad_()

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64, from `low` to `high` - 1."""
        return torch.randint(low, high, shape, device=self.device, generator=self._generator)


@dataclass(frozen=True)
class Case:
    """One op in one variant.

    inputs: (shape, draw) -> the arguments of ours, reference, torch and peers, by name.
    ours, reference, torch: the op; `reference` is run in fp64, `torch` (plain torch) is timed.
    peers: name -> a function that imports the peer and returns a function of the same arguments; an ImportError means
        that it is not installed.
    forward, both: the least cost of the forward pass and of forward and backward; `both` is None where there is
        no backward pass.
    large: what --large checks.
    configs: shape -> for each kernel that then runs, what --sweep-configs tries in place of its rule; a kernel whose
        name ends in "forward" is timed in the forward pass alone.
    """

    name: str
    tolerance: str
    inputs: Callable[[Shape, Draw], dict[str, Any]]
    ours: Op
    reference: Op
    torch: Op | None
    forward: Callable[[Shape], Cost]
    both: Callable[[Shape], Cost] | None
    peers: Mapping[str, Callable[[], Op]] = field(default_factory=dict)
    shapes: tuple[Shape, ...] = SHAPES
    large: tuple[Shape, ...] = (MANY_HEADS, MANY_ELEMENTS)
    configs: Callable[[Shape], Mapping[str, Sequence[Config]]] = lambda shape: {}


CASES: dict[str, Case] = {}


def register(case: Case) -> None:
    assert case.name not in CASES, case.name
    CASES[case.name] = case


def load_cases() -> dict[str, Case]:
    """Every case, in the order of the modules' names."""
    import zoo.bench.cases as package

    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")
    return CASES


def select(names: str | None) -> list[Case]:
    """The cases whose name is, or begins with, one of `names` (comma-separated); None: all.

    Raises ConfigError for a name that selects none.
    """
    cases = load_cases()
    if names is None:
        return list(cases.values())
    chosen: dict[str, Case] = {}
    for name in names.split(","):
        found = {n: c for n, c in cases.items() if n == name or n.startswith(name)}
        if not found:
            raise ConfigError(f"no case {name!r}.{did_you_mean(name, cases)} Known: {', '.join(cases)}.")
        chosen |= found
    return list(chosen.values())
