"""What every fused op is tried on, in the interpreter on the CPU (tests/conftest.py) in fp32.

A test of an op makes inputs with `inputs` and hands them to `zoo.testing.ops.check_op`:

    a = inputs(T, {"q": "BTHK", "k": "BTHK", "v": "BTHV", "initial_state": "BHKV"}, B=1, H=2, K=17, V=5)
    check_op(partial(op, impl="reference"), partial(op, impl="triton"), a, TOLERANCES["op"][torch.float32])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

# One short of, at and one past each chunk of 16 and 64, a single token, and several chunks with a rest.
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130)
# Nothing forgotten, a factor that rounds to 1 in fp32, and e^-20 in one step.
EXTREME_DECAYS = (0.0, -1e-6, -20.0)


def inputs(
    T: int, shapes: Mapping[str, str], *, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int
) -> dict[str, Tensor]:
    """Normal numbers of the shapes spelt by `shapes` (letters of `sizes`, and T), each requiring its gradient."""
    draw = torch.Generator().manual_seed(seed)
    sizes["T"] = T
    return {
        name: torch.randn([sizes[letter] for letter in letters], generator=draw).to(dtype).requires_grad_()
        for name, letters in shapes.items()
    }


def decays(*shape: int, extreme: float | None = None, seed: int = 0) -> Tensor:
    """Log decays: `extreme` everywhere, or from -1e-6 to -20 and 0, log-uniform, mixed."""
    draw = torch.Generator().manual_seed(seed)
    if extreme is not None:
        return torch.full(shape, extreme).requires_grad_()
    g = -(20.0 * 10 ** (-7.3 * torch.rand(shape, generator=draw)))
    return torch.where(torch.rand(shape, generator=draw) < 0.1, 0.0, g).requires_grad_()


def count_launches(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType) -> Counter[str]:
    """How often each kernel of the module is launched from now on."""
    launches: Counter[str] = Counter()

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            launches[self.name] += 1
            return self.kernel[grid]

    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Counted(name, getattr(kernels, name)))
    return launches
