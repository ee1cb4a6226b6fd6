"""A recorded step does what the function does, to the last bit; what cannot be repeated is called each time."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo import tape
from zoo.config import Trial, parse
from zoo.evaluate import load_slices
from zoo.fit import Fit, Run
from zoo.mixers import mixers
from zoo.model import build_model
from zoo.tape import CALLS_BEFORE, Arena, Tape

TO_RECORD = CALLS_BEFORE + 2


def recorded(function: Callable[[], object], arena: Arena | None = None) -> Tape:
    """A tape after as many calls as it takes to record the function."""
    made = Tape(function, arena)
    for _ in range(TO_RECORD):
        made()
    return made


def poison(arena: Arena) -> None:
    """NaN everywhere: what is read there before it is written shows."""
    memory = arena.take(0)
    torch.empty(0, dtype=torch.uint8).set_(memory, 0, (memory.nbytes(),), (1,)).fill_(0xFF)


def fit_of(model: dict[str, object]) -> Fit:
    data = {"task": "mqar", "seq_len": 12, "num_pairs": 2, "vocab_size": 16, "examples": 64}
    trial = parse(
        Trial,
        {
            "data": {"train": [data, {**data, "seq_len": 16}], "test": [data]},
            "model": model,
            "optimizer": {"lr": 1e-2, "clip": 1.0},
            "training": {"epochs": 1, "batch_size": 4},
        },
        "",
    )
    train, test = (load_slices(part, 0, "train", "cpu") for part in (trial.data.train, trial.data.test))
    return Fit([Run(trial, build_model(trial.model, trial.data, 0))], train, test, batched=False)


@pytest.mark.parametrize("name", sorted(mixers.names()))
def test_steps_of_every_mixer_are_recorded_and_the_same_to_the_last_bit(name: str) -> None:
    plain, fit = (fit_of({"d_model": 64, "layers": ["gated_conv", name]}) for _ in range(2))
    arena = Arena()
    tapes = [Tape(functools.partial(fit._step, s), arena) for s in range(2)]
    rows, _ = plain._plan(0)
    plain._load(rows, 0)
    fit._load(rows, 0)
    for _ in range(TO_RECORD + 3):
        for s in range(2):
            plain._step(s)
            poison(arena)
            tapes[s]()
    assert all(t.recorded for t in tapes)
    assert torch.equal(plain.losses, fit.losses)
    for (which, p), q in zip(plain.runs[0].model.named_parameters(), fit.runs[0].model.parameters(), strict=True):
        assert torch.equal(p, q), which


def test_training_is_the_same_with_and_without_a_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"d_model": 16, "layers": ["gated_conv", "attention"], "mlp": {"expand": 2}, "positions": "learned"}
    histories = []
    for largest in (tape.LARGEST, 0):
        monkeypatch.setattr(tape, "LARGEST", largest)
        fit = fit_of(model)
        fit.run(lambda run, epoch: None)
        assert [replay._tape is not None and replay._tape.recorded for replay in fit.replays] == [largest > 0] * 2
        histories.append([(e.train_loss, e.validation_loss) for e in fit.runs[0].history])
    assert histories[0] == histories[1]


def test_random_numbers_are_drawn_anew() -> None:
    x, total = torch.ones(100), torch.zeros(100)
    made = recorded(lambda: total.add_(F.dropout(x, 0.5)))
    assert made.recorded
    outcomes = []
    for call in (made, lambda: total.add_(F.dropout(x, 0.5))):
        torch.manual_seed(0)
        total.zero_()
        for _ in range(3):
            call()
        outcomes.append(total.clone())
    assert torch.equal(*outcomes)
    assert len(outcomes[0].unique()) == 4


def test_arguments_of_all_kinds() -> None:
    x, y = torch.randn(2, 3, 4), torch.zeros(2, 3, 4)

    def function() -> None:
        noise = torch.rand_like(x, memory_format=torch.contiguous_format) + torch.full_like(x, 0.5, dtype=torch.float64)
        picked = x[torch.arange(2).neg().abs(), :, 1:].sum((0, 2), keepdim=True, dtype=torch.float64)
        y.copy_(F.pad(noise, (0, 0), value=1.0) * picked.clamp(max=2) + torch.cat([x, x.mean(0, True)])[1:].flip(-1))

    made = recorded(function)
    assert made.recorded
    outcomes = []
    for call in (function, made):
        torch.manual_seed(0)
        call()
        outcomes.append(y.clone())
    assert torch.equal(*outcomes)


def test_complex_numbers_views_and_results_that_are_changed_in_place() -> None:
    x, y = torch.randn(4, 6, dtype=torch.complex64), torch.zeros(6, 4)

    def function() -> None:
        mask = torch.ones(6, 6).tril()
        mask[0].fill_(2)
        z = torch.view_as_real(x.conj().T * (1 + 2j)).mul(3)
        z[:, 1:, 0].mul_(2)
        y.copy_(mask @ z.sum(-1) + y.mean())

    made = recorded(function)
    assert made.recorded
    before = y.clone()
    x.mul_(1j)
    function()
    expected = y.clone()
    y.copy_(before)
    made()
    assert torch.equal(y, expected)


def test_an_arena_holds_what_is_needed_at_a_time() -> None:
    arena, x = Arena(), torch.ones(1000)

    def function() -> None:
        y = x
        for _ in range(50):
            y = y * 1.01
        x.copy_(y / y.mean())

    assert recorded(function, arena).recorded
    assert arena.take(0).nbytes() <= 3 * 4096


def looks(x: Tensor) -> Iterator[Callable[[], object]]:
    """Functions that may do something else when values are others, or when they are called again."""
    calls = itertools.count()
    seen = [x.clone()]
    leaf = x.clone().requires_grad_()

    def attribute() -> None:
        seen[0] = seen[0] + x

    def hidden_writer() -> Tensor:
        y = torch.empty(3)
        y.untyped_storage()[0] = 1
        return x.add_(y)

    yield lambda: x.add_(1) if x[0] > 2 else x.mul_(2)
    yield lambda: x.add_(x.sum().item())
    yield lambda: x.add_(x.tolist()[0])
    yield lambda: x.add_(torch.from_numpy(x.numpy() * 2))
    yield lambda: x.add_(torch.autograd.grad(LooksInBackward.apply(leaf).sum(), leaf)[0])
    yield lambda: x.add_(next(calls))
    yield lambda: x.add_(torch.tensor(float(next(calls))))
    yield lambda: x.add_(x[x > 1].sum())
    yield lambda: x.add_(x.nonzero().sum())
    yield lambda: x.add_(torch.tensor([1.0, 2.0, 3.0]))
    yield lambda: x.add_(torch._foreach_mul([x, x], 2)[1])
    yield attribute
    yield hidden_writer


class LooksInBackward(torch.autograd.Function):
    """A gradient that is cut where the input is large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient if x.numpy().max() < 5 else gradient * 0


@pytest.mark.parametrize("which", range(13))
def test_what_cannot_be_repeated_is_not_recorded(which: int) -> None:
    x = torch.ones(3)
    before = {name: getattr(Tensor, name) for name in ("numpy", "tolist", "__array__")}
    made = recorded(list(looks(x))[which])
    assert not made.recorded
    assert {name: getattr(Tensor, name) for name in before} == before


def test_without_torchscript_functions_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_create_function_from_graph")
    x = torch.ones(3)
    assert not recorded(lambda: x.add_(1)).recorded
    assert torch.equal(x, torch.full((3,), 1.0 + TO_RECORD))


def test_large_results_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1000)
    assert recorded(lambda: x.mul_(2 - x)).recorded
    monkeypatch.setattr(tape, "LARGEST", 3999)
    assert not recorded(lambda: x.mul_(2 - x)).recorded


def test_nothing_is_recorded_beside_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    dynamo = SimpleNamespace(counters={"stats": {"unique_graphs": 1}})
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", dynamo)
    assert not recorded(lambda: x.add_(1)).recorded
    dynamo.counters["stats"]["unique_graphs"] = 0
    assert recorded(lambda: x.add_(1)).recorded
    assert torch.equal(x, torch.full((3,), 1.0 + 2 * TO_RECORD))


def test_an_error_comes_through_and_the_function_is_called_again() -> None:
    x, faulty = torch.ones(3), [True]

    def function() -> None:
        if faulty[0]:
            raise ValueError("no")
        x.add_(1)

    made = Tape(function)
    with pytest.raises(ValueError, match="no"):
        made()
    faulty[0] = False
    for _ in range(TO_RECORD + 1):
        made()
    assert made.recorded
    assert torch.equal(x, torch.full((3,), 2.0 + TO_RECORD))
