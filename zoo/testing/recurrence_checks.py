"""The contract of a mixer, first half: what it computes, in its three forms, and what its state holds.

Each function is one check: it returns what it measured, or raises ConformanceError. Any other exception is a failed
check too (report.run_check).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.mixers import Mixer
from zoo.state import map_tensors, named_tensors, state_from_bytes, state_to_bytes
from zoo.testing.subject import Subject, batch_of, fail, require_close, require_same_bits, scan, summary
from zoo.testing.tolerances import relative_error

# Steps where what is compared would differ at once: rows, sequences, modules or strides that get mixed up.
FEW = 12


@torch.no_grad()
def output(s: Subject) -> str:
    """forward and prefill give a finite (B, T, D), step a finite (B, D), in the input's dtype, on its device."""
    x = s.input()
    for perturb in (False, True):
        mixer = s.build(perturb=perturb)
        y_t, _ = mixer.step(x[:, 0], mixer.init_state(s.batch))
        results = {"forward": (mixer(x), x), "prefill": (mixer.prefill(x)[0], x), "step": (y_t, x[:, 0])}
        for name, (y, like) in results.items():
            if not isinstance(y, Tensor):
                fail(f"{name} returns a {type(y).__name__}; it must return a tensor")
            if y.shape != like.shape or y.dtype != like.dtype or y.device != like.device:
                fail(
                    f"{name} gives {tuple(y.shape)} {y.dtype} on {y.device} for an input of {tuple(like.shape)} "
                    f"{like.dtype} on {like.device}; it must give the same"
                )
            if not y.isfinite().all():
                where = "with perturbed parameters" if perturb else "as initialised"
                fail(f"{name} gives {int((~y.isfinite()).sum())} NaN or infinite elements, {where}")
    return f"{tuple(x.shape)} -> {tuple(x.shape)} {x.dtype}"


@torch.no_grad()
def lengths(s: Subject) -> str:
    """Every length up to max_seq_len works, 1 too, and a longer input leaves the outputs before as they were."""
    mixer, longest = s.build(), s.layer.max_seq_len
    x = s.input(2, longest)
    whole = mixer(x)
    tried = (1, 2, 3, 15, 16, 17, 63, 64, 65, longest)
    for n in tried:
        part = x[:, :n].contiguous()
        for name, y in {"forward": mixer(part), "prefill": mixer.prefill(part)[0]}.items():
            require_close(y, whole[:, :n], "two forms", f"{name} of {n} tokens, against forward of {longest}")
    return f"T = {', '.join(map(str, tried))}"


@torch.no_grad()
def causality(s: Subject) -> str:
    """Exact: whatever happens at position r and later, the outputs before r keep every bit."""
    mixer, total = s.build(), s.length
    x, other = s.input(1), 3 * s.input(1, seed=1)
    position = torch.arange(total, device=s.device)
    # Row r of a batch has its input changed at position r alone, or at r and all later ones. Compared are two runs of
    # one shape, so that equal inputs take equal paths through every kernel.
    changes = {
        "input at position {}": position[None, :] == position[:, None],
        "inputs at positions {} and later": position[None, :] >= position[:, None],
    }
    earlier = position[None, :] < position[:, None]
    batch = x.expand(total, -1, -1).contiguous()
    before = mixer(batch)
    _require_finite("forward gives", before)
    for where, change in changes.items():
        after = mixer(torch.where(change[:, :, None], other, batch))
        if not ((before != after).any(dim=-1) & earlier).any():
            continue
        # Row by row, so that a mixer that mixes the rows of a batch is not blamed for leaks in time.
        alone = torch.cat([mixer(torch.where(row[None, :, None], other, x)) for row in change])
        unchanged = mixer(x).expand_as(alone)
        leaks = ((alone != unchanged).any(dim=-1) & earlier).nonzero()
        if len(leaks):
            r, t = min(leaks.tolist(), key=lambda pair: (pair[1], pair[0]))
            error = relative_error(alone, unchanged).amax(dim=-1)
            largest = error[tuple(leaks.T)].max().item()
            message = (
                f"output at position {t} depends on {where.format(r)}: it changes by {error[r, t].item():.1e} of the "
                f"output's scale; {len(leaks)} of {_pairs(total)} leak, by up to {largest:.1e}"
            )
            if largest < 1e-4:
                message += ". That is rounding: of an FFT, or of a scale that earlier and later positions share"
            fail(message)
    return f"exact for all {_pairs(total)}"


def causality_of_gradients(s: Subject) -> str:
    """Exact: d y_t / d x_r = 0 for r > t, in training mode."""
    mixer, total = s.build().train(), s.length
    x, weight = s.input(1), s.input(1, seed=1)[0]
    position = torch.arange(total, device=s.device)
    later = position[None, :] > position[:, None]
    # Row t of the batch asks for output t alone: one backward pass gives the gradients of all outputs.
    batch = x.expand(total, -1, -1).contiguous().requires_grad_()
    (gradient,) = torch.autograd.grad((mixer(batch)[position, position] * weight).sum(), batch)
    _require_finite("the input's gradient has", gradient)
    if ((gradient != 0).any(dim=-1) & later).any():
        rows: list[Tensor] = []
        for t in range(total):  # as in `causality`
            leaf = x.clone().requires_grad_()
            rows += torch.autograd.grad((mixer(leaf)[0, t] * weight[t]).sum(), leaf)
        gradient = torch.cat(rows)
        leaks = ((gradient != 0).any(dim=-1) & later).nonzero()
        if len(leaks):
            t, r = leaks[0].tolist()
            fail(
                f"output at position {t} depends on input at position {r}: its gradient is "
                f"{gradient[t, r].abs().max().item():.1e}; {len(leaks)} of {_pairs(total)} leak"
            )
    return f"zero for all {_pairs(total)}"


def _require_finite(what: str, x: Tensor) -> None:
    """Not a number differs from itself, which is no leak."""
    bad = int((~x.isfinite()).sum())
    if bad:
        fail(f"{what} {bad} of {x.numel()} elements NaN or infinite; mend that first")


def _pairs(total: int) -> str:
    return f"{total * (total - 1) // 2} (output, later input) pairs"


@torch.no_grad()
def forward_is_scan_of_step(s: Subject) -> str:
    """The parallel form and the recurrent form compute the same; with rotary positions and in a last layer too."""
    # The longest input: what only a second chunk of 128 gets wrong shows here, and in no comparison of shorter ones.
    errors, longest = [], s.layer.max_seq_len
    for dtype in s.dtypes:
        mixer, x = s.build(dtype=dtype), s.input(length=longest, dtype=dtype)
        y, _ = scan(mixer, x)
        errors.append(require_close(y, mixer(x), "two forms", "steps from init_state, against forward", dtype))
    for where, layer in {"with rotary positions": s.at(rotary=True), "as the last of 4 layers": s.last_of(4)}.items():
        mixer, x = s.build(layer=layer), s.input(2, 20)
        require_close(scan(mixer, x)[0], mixer(x), "two forms", f"steps from init_state, against forward, {where}")
        _require_reserved(mixer, x, where)
    return f"{longest} steps, {_errors(s, errors)}"


def _require_reserved(mixer: Mixer, x: Tensor, where: str) -> None:
    """A state of full length, if the mixer has one, keeps its shapes and gives the same outputs."""
    state = mixer.reserve(len(x), x.shape[1])
    shapes = _shapes(state)
    if shapes == _shapes(mixer.init_state(len(x))):
        return
    outputs = []
    for t in range(x.shape[1]):
        y_t, state = mixer.step_at(x[:, t], state, torch.tensor([t], device=x.device))
        outputs.append(y_t)
        if _shapes(state) != shapes:
            fail(f"step_at gives a state of {_shapes(state)} for one of {shapes}; it must keep the shapes")
    require_close(
        torch.stack(outputs, 1), mixer(x), "two forms", f"steps in a reserved state, against forward, {where}"
    )


def _shapes(state: object) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(state)}


@torch.no_grad()
def prefill_then_step_is_forward(s: Subject) -> str:
    """prefill of a prefix, then steps, gives what forward gives."""
    # 53 steps after one of them, so that a cache of either form wraps around where it is going to.
    errors, tried = [], {1: 8, 3: 8, 17: s.length - 17, 64: s.length - 64}
    for dtype in s.dtypes:
        mixer, x = s.build(dtype=dtype), s.input(dtype=dtype)
        whole, worst = mixer(x), 0.0
        for n, steps in tried.items():
            y, state = mixer.prefill(x[:, :n].contiguous())
            rest, _ = scan(mixer, x[:, n : n + steps], state)
            got, what = torch.cat([y, rest], dim=1), f"prefill of {n} tokens and {steps} steps, against forward"
            worst = max(worst, require_close(got, whole[:, : n + steps], "two forms", what, dtype))
        errors.append(worst)
    return f"{', '.join(f'{n} + {steps}' for n, steps in tried.items())} tokens, {_errors(s, errors)}"


@torch.no_grad()
def prefill_in_segments_is_forward(s: Subject) -> str:
    """prefill segment after segment, the state handed on, gives what forward gives."""
    errors, cuttings = [], ((35,), (64,), (1, 3, 6, 16, 32, 49))
    for dtype in s.dtypes:
        mixer, x = s.build(dtype=dtype), s.input(dtype=dtype)
        whole, worst = mixer(x), 0.0
        for cuts in cuttings:
            got, what = _segments(mixer, x, cuts), f"prefill cut at {', '.join(map(str, cuts))}, against forward"
            worst = max(worst, require_close(got, whole, "two forms", what, dtype))
        errors.append(worst)
    return f"{', '.join(str(len(cuts) + 1) for cuts in cuttings)} segments, {_errors(s, errors)}"


def _segments(mixer: Mixer, x: Tensor, cuts: tuple[int, ...]) -> Tensor:
    outputs, state = [], None
    for start, stop in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        y, state = mixer.prefill(x[:, start:stop].contiguous(), state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def _errors(s: Subject, errors: list[float]) -> str:
    names = (str(dtype).removeprefix("torch.") for dtype in s.dtypes)
    return ", ".join(f"error {error:.0e} in {name}" for error, name in zip(errors, names, strict=True))


@torch.no_grad()
def forward_at_is_forward(s: Subject) -> str:
    """forward_at, where the mixer has it, gives what forward gives at those positions."""
    errors = []
    for dtype in s.dtypes:
        mixer, x = s.build(dtype=dtype), s.input(dtype=dtype)
        # In no order, one of them twice, the ends among them.
        asked = torch.tensor([[5, 0, s.length - 1, 40, 5], [0, 1, 2, 3, 4]], device=x.device)
        positions = asked[torch.arange(s.batch) % 2]
        y = mixer.forward_at(x, positions)
        if y is None:
            return "the mixer has no form of its own for single positions"
        want = mixer(x).gather(1, positions[..., None].expand(-1, -1, x.shape[2]))
        errors.append(require_close(y, want, "two forms", "forward_at, against forward at those positions", dtype))
    return f"5 positions, {_errors(s, errors)}"


@torch.no_grad()
def state_is_batch_first(s: Subject) -> str:
    """The state is tensors, the same ones at any time, their first axis the batch: its rows can be reordered."""
    mixer, x, n = s.build(), s.input(), s.length // 2
    start = mixer.init_state(s.batch)
    size = batch_of(start, s.batch, "of init_state")
    expected = _contents(start)
    _, stepped = mixer.step(x[:, 0], start)
    _, state = mixer.prefill(x[:, :n].contiguous())
    for when, reached in {"after a step": stepped, "after prefill": state}.items():
        batch_of(reached, s.batch, when)
        if _contents(reached) != expected:
            fail(f"the state {when} holds {_contents(reached)}, that of init_state {expected}; they must be the same")
    order = torch.arange(s.batch - 1, -1, -1, device=s.device)
    turned, _ = scan(mixer, x[order, n : n + FEW], map_tensors(lambda tensor: tensor[order], state))
    whole, _ = scan(mixer, x[:, n : n + FEW], mixer.prefill(x[:, :n].contiguous())[1])
    require_close(turned, whole[order], "same form", "steps from a state whose rows were put in reverse order")
    return f"{len(expected)} tensor{'s' * (len(expected) != 1)}, {summary(size)} at the start"


def _contents(state: object) -> dict[str, str]:
    return {name: f"{tensor.dtype} on {tensor.device}" for name, tensor in named_tensors(state)}


@torch.no_grad()
def state_round_trip(s: Subject) -> str:
    """The state, through bytes, into a fresh module with the same weights: it goes on as if nothing had happened."""
    mixer, x, n = s.build(), s.input(), s.length // 2
    fresh = s.build(seed=7)
    fresh.load_state_dict(mixer.state_dict())
    like = fresh.init_state(s.batch)
    _, state = mixer.prefill(x[:, :n].contiguous())
    data = state_to_bytes(state)
    want, _ = scan(mixer, x[:, n : n + FEW], state)
    got, _ = scan(fresh, x[:, n : n + FEW], state_from_bytes(data, like))
    worst = require_close(got, want, "same form", "a fresh module with the saved weights and state, against going on")
    return f"{len(data):,} bytes, error {worst:.0e}"


@torch.no_grad()
def no_memory_outside_state(s: Subject) -> str:
    """Two sequences decoded in turns give what each gives alone; forward gives the same when called again."""
    mixer, a, b = s.build(), s.input(length=FEW), s.input(length=FEW, seed=1)
    y_a, y_b, whole = scan(mixer, a)[0], scan(mixer, b)[0], mixer(a)
    mixer(b)
    require_same_bits(mixer(a), whole, "forward called again, another input in between")
    state_a, state_b = mixer.init_state(s.batch), mixer.init_state(s.batch)
    turns_a, turns_b = [], []
    for t in range(a.shape[1]):
        y, state_a = mixer.step(a[:, t], state_a)
        turns_a.append(y)
        y, state_b = mixer.step(b[:, t], state_b)
        turns_b.append(y)
    for turns, alone, which in ((turns_a, y_a, "first"), (turns_b, y_b, "second")):
        require_same_bits(torch.stack(turns, dim=1), alone, f"the {which} of two sequences decoded in turns")
    return f"2 sequences in turns, {a.shape[1]} steps each: the same bits"


@torch.no_grad()
def arguments_are_left_alone(s: Subject) -> str:
    """forward, prefill and step change neither the input nor the state that they are given."""
    mixer, x = s.build(), s.input()
    _, state = mixer.prefill(x.clone())
    calls: dict[str, Callable[[Tensor], object]] = {
        "forward": mixer,
        "prefill": lambda x: mixer.prefill(x, state),
        "step": lambda x: mixer.step(x[:, 0], state),
    }
    for name, call in calls.items():
        given, kept = x.clone(), {k: tensor.clone() for k, tensor in named_tensors(state)}
        call(given)
        require_same_bits(given, x, f"the input after {name}, against before")
        for tensor_name, tensor in named_tensors(state):
            require_same_bits(tensor, kept[tensor_name], f"state tensor {tensor_name!r} after {name}, against before")
    return "input and state keep their bits in forward, prefill and step"


@torch.no_grad()
def state_size(s: Subject) -> str:
    """Counted in real decodes: constant after `state_horizon` tokens, and for one sequence as in a batch."""
    mixer, x = s.build(), s.input()
    horizon = mixer.state_horizon
    if horizon is not None and (not isinstance(horizon, int) or horizon < 0):
        fail(f"state_horizon is {horizon!r}; it must be a number of tokens, 0 or more, or None")
    state = mixer.init_state(s.batch)
    sizes = [batch_of(state, s.batch, "of init_state")]
    for t in range(s.length):
        _, state = mixer.step(x[:, t], state)
        sizes.append(batch_of(state, s.batch, f"after {t + 1} tokens"))
    alone = batch_of(scan(mixer, x[:1, :16])[1], 1, "after 16 tokens")
    if alone.bytes != sizes[16].bytes:
        fail(f"the state is {summary(alone)} for a sequence alone, {summary(sizes[16])} each in a batch of {s.batch}")
    if horizon is None:
        if sizes[-1].bytes <= sizes[1].bytes:
            fail(
                f"state_horizon is None, the state grows with T, but it is {sizes[1].bytes:,} bytes after 1 token and "
                f"{sizes[-1].bytes:,} after {s.length}; return 0, or the number of tokens after which it is constant"
            )
        return f"grows: {sizes[1].bytes:,} bytes after 1 token, {sizes[-1].bytes:,} after {s.length}"
    for t in range(horizon + 1, s.length + 1):
        if sizes[t].bytes != sizes[horizon].bytes:
            fail(
                f"state_horizon is {horizon}, but the state is {summary(sizes[horizon])} after {horizon} tokens, "
                f"{summary(sizes[t])} after {t}"
            )
    longest = max(s.layer.max_seq_len, horizon + 16)
    mixer, x = s.build(layer=s.at(max_seq_len=longest)), s.input(1, longest)
    state = mixer.prefill(x[:, :horizon])[1] if horizon else mixer.init_state(1)
    constant = batch_of(state, 1, f"after {horizon} tokens")
    for n in (longest - 8, longest):
        size = batch_of(mixer.prefill(x[:, :n])[1], 1, f"after prefill of {n} tokens")
        if size.bytes != constant.bytes:
            fail(
                f"state_horizon is {horizon}, but the state is {summary(constant)} after {horizon} tokens, "
                f"{summary(size)} after a prefill of {n}"
            )
    return f"{summary(constant)}, constant from token {horizon} to {longest}"


@torch.no_grad()
def batch_invariance(s: Subject) -> str:
    """A row of the output depends on that row of the input alone, wherever in the batch it stands."""
    mixer, x = s.build(), s.input()
    order = torch.arange(s.batch - 1, -1, -1, device=s.device)
    runs: dict[str, Callable[[Tensor], Tensor]] = {"forward": mixer, "steps": lambda x: scan(mixer, x[:, :FEW])[0]}
    for name, run in runs.items():
        whole = run(x)
        for i in range(s.batch):
            what = f"{name} of row {i} alone, against the batch"
            require_close(run(x[i : i + 1]), whole[i : i + 1], "same form", what)
        require_close(run(x[order]), whole[order], "same form", f"{name} of the rows in reverse order")
    return f"{s.batch} rows alone, together and in reverse order"


def memory_layout(s: Subject) -> str:
    """Strides do not matter, of the input or of the output's gradient."""
    mixer, x = s.build(), s.input()
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "forward": mixer,
        "prefill": lambda x: mixer.prefill(x)[0],
        "steps": lambda x: scan(mixer, x[:, :FEW])[0],
    }
    with torch.no_grad():
        for name, run in runs.items():
            require_close(run(strided), run(x), "same form", f"{name} of an input with strides {strided.stride()}")
    gradients: list[Tensor] = []
    for spread in (True, False):
        leaf = x.clone().requires_grad_()
        y = mixer(leaf)
        ones = torch.ones((), device=s.device, dtype=y.dtype).expand_as(y)
        gradients += torch.autograd.grad(y, leaf, ones if spread else ones.contiguous())
    what = "the input's gradient, for an output's gradient that is an expanded scalar"
    require_close(gradients[0], gradients[1], "same form", what)
    return f"strides {strided.stride()} as {x.stride()}"
