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

Step = Callable[[Tensor, State], tuple[Tensor, State]]
OnState = Callable[[int, State], None]


def decode_through_state(
    pack: Pack, slices: Sequence[Slice], examples: int = 32
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
    return _at(_decode(model.step, model.init_state(len(tokens)), tokens, (), lambda t, state: None), positions)


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
            states[i].append(measure_model_state(model, map_tensors(lambda x, i=i: x[i], state), t))

    tokens, positions = (x.expand(members, -1, -1) for x in (tokens, positions))
    start = pack.call(lambda model, first: model.init_state(len(first)), tokens)
    features = _decode(lambda x, state: pack.call(Model.step, x, state), start, tokens, lengths, measure)
    return list(zip(_at(features, positions), states, strict=True))


def _decode_one(
    model: Model, tokens: Tensor, positions: Tensor, lengths: Collection[int]
) -> tuple[Tensor, list[MeasuredState]]:
    states: list[MeasuredState] = []
    features = _decode(
        model.step,
        model.init_state(len(tokens)),
        tokens,
        lengths,
        lambda t, state: states.append(measure_model_state(model, state, t)),
    )
    return _at(features, positions), states


def _decode(step: Step, state: State, tokens: Tensor, lengths: Collection[int], on_state: OnState) -> Tensor:
    """tokens (..., T) -> step's outputs (..., T, D). on_state hears of the state after each of `lengths` tokens."""
    T = tokens.shape[-1]
    outputs, t, constant = [], 0, False
    while t < T and not constant:
        before = state
        y, state = step(tokens[..., t], before)
        outputs.append(y)
        t += 1
        if t in lengths:
            on_state(t, state)
        constant = tokens.is_cuda and _shapes(before) == _shapes(state)
    whole = torch.stack(outputs, dim=-2)
    if t == T:
        return whole
    # A state that does not grow stays in one place, and the steps are a graph.
    whole = torch.cat([whole, whole.new_empty(*whole.shape[:-2], T - t, whole.shape[-1])], dim=-2)
    state = map_tensors(lambda x: x.clone(), state)
    index = torch.full((1,), t, device=tokens.device)

    def advance() -> Tensor:
        y, after = step(tokens.index_select(-1, index).squeeze(-1), state)
        for (_, place), (_, value) in zip(named_tensors(state), list(named_tensors(after)), strict=True):
            place.copy_(value)
        whole.index_copy_(whole.dim() - 2, index, y.unsqueeze(-2))
        index.add_(1)
        return y

    def rehearse() -> None:
        step(tokens[..., 0], state)

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
