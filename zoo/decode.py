"""Decoding token by token: how far the answers agree with the parallel form's, and the state's measured size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.graphs import Replay
from zoo.model import Model, ModelState
from zoo.pack import Pack, evaluating
from zoo.record import Agreement, LayerState, MeasuredState, StateTensor
from zoo.state import State, map_tensors, measure_state, named_tensors
from zoo.tasks import IGNORE

if TYPE_CHECKING:
    from zoo.evaluate import Slice

DECODED = 32
"""Sequences that each trial decodes."""

Step = Callable[[Tensor, State, Tensor | None], tuple[Tensor, State]]
"""Tokens, the state and, where it has room for all tokens, how many are in it -> outputs, the next state."""
OnState = Callable[[int, State], None]


def decode_through_state(
    pack: Pack, slices: Sequence[Slice], examples: int = DECODED
) -> list[tuple[list[MeasuredState], Agreement]]:
    """Decode the longest slice token by token: each member's state at every slice's length, and how its answers agree.

    The state after t tokens is counted from the tensors that the decode carries at that moment, for one sequence.
    """
    longest = max(slices, key=lambda s: s.tokens.shape[1])
    tokens, positions, answers = (part[:examples] for part in longest[1:])
    lengths = {s.tokens.shape[1] for s in slices}
    with evaluating(pack.models):
        return [
            (states, _agreement(longest.name, model, features, model.features(tokens, positions), answers))
            for model, (features, states) in zip(
                pack.models, _decode_members(pack, tokens, positions, lengths), strict=True
            )
        ]


def decode(model: Model, tokens: Tensor, positions: Tensor) -> Tensor:
    """tokens (B, T), positions (B, Q) -> the head's input there (B, Q, D), carrying nothing but the state."""
    return _at(_decode(model.step, _start(model, tokens), tokens, (), lambda t, state: None), positions)


def measure_model_state(model: Model, state: ModelState, seq_len: int) -> MeasuredState:
    """Count the tensors of a model's state, for one sequence, layer by layer; learned positions' counter included."""
    layers = []
    for index, (spec, layer_state) in enumerate(zip(model.config.blocks, state.layers, strict=True)):
        size = measure_state(layer_state)
        layers.append(
            LayerState(
                layer=index,
                mixer=spec.mixer,
                elements=size.elements,
                bytes=size.bytes,
                tensors=tuple(StateTensor(**tensor._asdict()) for tensor in size.tensors),
            )
        )
    whole = measure_state(state)
    return MeasuredState(seq_len=seq_len, elements=whole.elements, bytes=whole.bytes, layers=tuple(layers))


def _decode_members(
    pack: Pack, tokens: Tensor, positions: Tensor, lengths: Collection[int]
) -> list[tuple[Tensor, list[MeasuredState]]]:
    members = len(pack)
    if not pack.batched:
        return [_decode_one(model, tokens, positions, lengths) for model in pack.models]
    states: list[list[MeasuredState]] = [[] for _ in range(members)]

    def measure(t: int, state: State) -> None:
        for i, model in enumerate(pack.models):
            states[i].append(measured(model, map_tensors(lambda x, i=i: x[i], state), t))

    def step(token: Tensor, state: State, at: Tensor | None) -> tuple[Tensor, State]:
        return pack.call(lambda model, token, state: model.step(token, state, at), token, state)

    tokens, positions = (x.expand(members, -1, -1) for x in (tokens, positions))
    features = _decode(step, pack.call(_start, tokens), tokens, lengths, measure)
    return list(zip(_at(features, positions), states, strict=True))


def _decode_one(
    model: Model, tokens: Tensor, positions: Tensor, lengths: Collection[int]
) -> tuple[Tensor, list[MeasuredState]]:
    states: list[MeasuredState] = []
    features = _decode(
        model.step,
        _start(model, tokens),
        tokens,
        lengths,
        lambda t, state: states.append(measured(model, state, t)),
    )
    return _at(features, positions), states


def _start(model: Model, tokens: Tensor) -> ModelState:
    """The state before tokens (B, T), on a GPU with room for them."""
    return model.init_state(len(tokens), reserve=tokens.shape[1] if tokens.is_cuda else 0)


def measured(model: Model, state: ModelState, t: int) -> MeasuredState:
    """The size of the state after t tokens, without the room that it has for more."""
    with_room = iter(_shapes(model.init_state(1, reserve=1)))
    without = iter(_shapes(model.init_state(1)))

    def filled(x: Tensor) -> Tensor:
        for axis, (more, less) in enumerate(zip(next(with_room), next(without), strict=True)):
            if more != less:
                return x.narrow(axis, 0, t)
        return x

    return measure_model_state(model, map_tensors(filled, state), t)


def _decode(step: Step, state: State, tokens: Tensor, lengths: Collection[int], on_state: OnState) -> Tensor:
    """tokens (..., T) -> step's outputs (..., T, D). on_state hears of the state after each of `lengths` tokens."""
    T = tokens.shape[-1]
    index = torch.zeros(1, dtype=torch.int64, device=tokens.device) if tokens.is_cuda else None
    outputs, t, constant = [], 0, False
    while t < T and not constant:
        before = state
        y, state = step(tokens[..., t], before, index)
        outputs.append(y)
        t += 1
        if t in lengths:
            on_state(t, state)
        if index is not None:
            index += 1
            constant = _shapes(before) == _shapes(state)
    whole = torch.stack(outputs, dim=-2)
    if t == T or index is None:
        return whole
    # A state whose shapes stay does so in one place, and the steps are a graph.
    whole = torch.cat([whole, whole.new_empty(*whole.shape[:-2], T - t, whole.shape[-1])], dim=-2)
    state = map_tensors(lambda x: x.clone(), state)

    def advance() -> Tensor:
        y, after = step(tokens.index_select(-1, index).squeeze(-1), state, index)
        for (_, place), (_, value) in zip(named_tensors(state), list(named_tensors(after)), strict=True):
            place.copy_(value)
        whole.index_copy_(whole.dim() - 2, index, y.unsqueeze(-2))
        index.add_(1)
        return y

    def rehearse() -> None:
        step(tokens[..., 0], state, index)

    replay = Replay(advance, tokens.device, rehearse)
    for after in range(t + 1, T + 1):
        replay()
        if after in lengths:
            on_state(after, state)
    return whole


def _shapes(state: State) -> list[torch.Size]:
    return [t.shape for _, t in named_tensors(state)]


def _at(features: Tensor, positions: Tensor) -> Tensor:
    """features (..., T, D), positions (..., Q) -> (..., Q, D)."""
    return features.gather(-2, positions[..., None].expand(*positions.shape, features.shape[-1]))


def _agreement(name: str, model: Model, features: Tensor, parallel: Tensor, answers: Tensor) -> Agreement:
    asked = answers.flatten() != IGNORE
    weight = model.embedding.weight
    logits_parallel = (parallel.flatten(0, 1)[asked] @ weight.T).float()
    logits_state = (features.flatten(0, 1)[asked] @ weight.T).float()
    wanted = answers.flatten()[asked]
    answer_parallel, answer_state = logits_parallel.argmax(-1), logits_state.argmax(-1)
    return Agreement(
        slice_name=name,
        examples=len(answers),
        answers=len(wanted),
        accuracy_parallel=float((answer_parallel == wanted).float().mean()),
        accuracy_state=float((answer_state == wanted).float().mean()),
        same_answers=float((answer_parallel == answer_state).float().mean()),
        max_logit_error=float((logits_parallel - logits_state).abs().max()),
    )
