"""The mixer under test: how it is built, fed and compared, the same way for every check."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from zoo.errors import ConformanceError, UnsupportedError
from zoo.mixers import LayerInfo, Mixer, MixerConfig
from zoo.state import State, StateSize, measure_state, named_tensors
from zoo.testing.tolerances import TOLERANCES, relative_error


@dataclass(frozen=True)
class Subject:
    """A mixer class with a config and a place in the model.

    length crosses the chunk sizes 16, 32 and 64 that parallel forms use; layer.max_seq_len is the longest input tried.
    """

    cls: type[Mixer]
    config: MixerConfig
    layer: LayerInfo
    device: torch.device
    seed: int = 0
    batch: int = 3
    length: int = 70

    def build(
        self, *, seed: int = 0, dtype: torch.dtype = torch.float32, perturb: bool = True, layer: LayerInfo | None = None
    ) -> Mixer:
        """A new mixer in eval mode. `perturb` moves every parameter a little off its initial value: a zero there
        would hide what the parameter does."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed + seed)
            mixer = self.cls(self.config, layer or self.layer)
        mixer = mixer.double() if dtype == torch.float64 else mixer
        mixer = mixer.to(self.device).eval()
        if perturb:
            generator = self._generator(seed + 1)
            with torch.no_grad():
                for parameter in mixer.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(noise.to(parameter), alpha=0.1)
        return mixer

    def input(
        self, batch: int | None = None, length: int | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Standard normal x (B, T, D)."""
        shape = (batch or self.batch, length or self.length, self.layer.d_model)
        x = torch.randn(shape, generator=self._generator(1000 + seed), dtype=torch.float64)
        return x.to(self.device, dtype)

    @functools.cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """fp32 and fp64; fused kernels may leave fp64 out, plain torch on a CPU must not."""
        if self.device.type == "cpu":
            return torch.float32, torch.float64
        try:
            self.build(dtype=torch.float64)(self.input(dtype=torch.float64))
        except UnsupportedError:
            return (torch.float32,)
        return torch.float32, torch.float64

    def at(self, **changes: Any) -> LayerInfo:
        """The subject's place in the model, with changes."""
        return dataclasses.replace(self.layer, **changes)

    def last_of(self, depth: int) -> LayerInfo:
        return self.at(index=depth - 1, depth=depth)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 10_007 + seed)


def scan(mixer: Mixer, x: Tensor, state: State = None) -> tuple[Tensor, State]:
    """`step` over x (B, T, D), from `state` or the initial one."""
    if state is None:
        state = mixer.init_state(x.shape[0])
    outputs = []
    for t in range(x.shape[1]):
        y_t, state = mixer.step(x[:, t], state)
        outputs.append(y_t)
    return torch.stack(outputs, dim=1), state


def fail(message: str) -> NoReturn:
    raise ConformanceError(message)


def require_close(got: Tensor, want: Tensor, form: str, what: str, dtype: torch.dtype = torch.float32) -> float:
    """The largest relative error of got (B, T, D). Raises ConformanceError, with where it is, above the tolerance."""
    if got.shape != want.shape:
        fail(f"{what}: the shapes differ, {tuple(got.shape)} against {tuple(want.shape)}")
    tolerance = TOLERANCES[form][dtype]
    error = relative_error(got, want)
    worst = error.max().item()
    if worst > tolerance:
        wrong = (error > tolerance).any(dim=0).any(dim=-1)
        positions = wrong.nonzero().flatten().tolist()
        b, t, d = (int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        fail(
            f"{what}: {describe(positions, got.shape[1])} differ{' in fp64' * (dtype == torch.float64)}, by up to "
            f"{worst:.1e} of the output's scale (allowed {tolerance:.0e}), at row {b}, position {t}, channel {d}: "
            f"{got[b, t, d].item():.6g} against {want[b, t, d].item():.6g}"
            + (
                ". Something is computed in fp32, or an epsilon differs"
                if worst < 1e-4 and dtype == torch.float64
                else ""
            )
        )
    return worst


def require_same_bits(got: Tensor, want: Tensor, what: str) -> None:
    """Raises ConformanceError, with the first difference, unless got and want are the same to the last bit."""
    if got.shape != want.shape or got.dtype != want.dtype:
        fail(f"{what}: {tuple(got.shape)} {got.dtype} against {tuple(want.shape)} {want.dtype}")
    differs = (got != want) & ~(got.isnan() & want.isnan())
    if differs.any():
        index = tuple(int(i) for i in differs.nonzero()[0])
        worst = relative_error(got, want).max().item()
        fail(
            f"{what}: {int(differs.sum())} of {got.numel()} elements differ, by up to {worst:.1e} of the scale; "
            f"the first at {index}: {got[index].item():.9g} against {want[index].item():.9g}"
        )


def describe(positions: Sequence[int], total: int) -> str:
    """`position 5`, `positions 5, 7, 9 and 4 more`, `all 70 positions`."""
    if len(positions) == total and total > 1:
        return f"all {total} positions"
    shown = ", ".join(str(p) for p in positions[:4])
    more = f" and {len(positions) - 4} more" if len(positions) > 4 else ""
    return f"position{'s' if len(positions) > 1 else ''} {shown}{more}"


def batch_of(state: State, batch: int, when: str) -> StateSize:
    """The size of `state` for one sequence. Raises ConformanceError on a tensor whose first axis is not the batch."""
    for name, tensor in named_tensors(state):
        if tensor.dim() == 0 or tensor.shape[0] != batch:
            fail(
                f"state tensor {name!r} {when} has shape {tuple(tensor.shape)}; "
                f"its first axis must be the batch, {batch}"
            )
    return measure_state(state)


def summary(size: StateSize) -> str:
    """`4,096 bytes (h 16x64 float32)`."""
    tensors = ", ".join(f"{t.name} {'x'.join(map(str, t.shape)) or '1'} {t.dtype}" for t in size.tensors)
    return f"{size.bytes:,} bytes" + (f" ({tensors})" if tensors else "")
