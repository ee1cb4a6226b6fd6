"""Accuracy by test slice, in the parallel form or through the recurrent state; the state's measured size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zoo.config import DataConfig, DataEntry
from zoo.errors import ConfigError
from zoo.model import Model, ModelState
from zoo.record import Agreement, LayerState, MeasuredState, SliceResult, StateTensor
from zoo.state import measure_state
from zoo.tasks import IGNORE, Split

Through = Literal["parallel", "state"]


class Slice(NamedTuple):
    """One slice of a mixture as tensors on a device: tokens (N, T), positions and answers (N, Q)."""

    name: str
    tokens: Tensor
    positions: Tensor
    answers: Tensor


def load_slices(entries: Iterable[DataEntry], seed: int, split: Split, device: str | torch.device) -> list[Slice]:
    """The slices of one mixture; entries of the same task settings draw different examples of one stream."""
    slices: list[Slice] = []
    drawn: dict[str, int] = {}
    for entry in entries:
        identity = f"{entry.task} {entry.options.model_dump_json()}"
        start = drawn.get(identity, 0)
        drawn[identity] = start + entry.examples
        batch = entry.options.sample(entry.examples, seed, split, start)
        slices.append(
            Slice(
                entry.options.slice_name,
                torch.from_numpy(batch.tokens).to(torch.int32).to(device),
                torch.from_numpy(batch.positions).to(device),
                torch.from_numpy(batch.answers).to(device),
            )
        )
    return slices


def mean_accuracy(results: Iterable[SliceResult]) -> float:
    """The mean over slices of their accuracies."""
    accuracies = [result.accuracy for result in results]
    return sum(accuracies) / len(accuracies)


@torch.no_grad()
def evaluate(
    model: Model, slices: Iterable[Slice], through: Through = "parallel", batch_size: int = 256
) -> list[SliceResult]:
    """Accuracy and mean loss of every slice; through="state" decodes token by token, carrying only the state.

    Raises ConfigError on an unknown `through`.
    """
    if through not in ("parallel", "state"):
        raise ConfigError(f"through={through!r} is not allowed; use 'parallel' or 'state'.")
    was_training = model.training
    model.eval()
    results = []
    for name, tokens, positions, answers in slices:
        losses, hits = [], []
        for rows in torch.arange(len(tokens), device=tokens.device).split(batch_size):
            asked = answers[rows]
            if through == "parallel":
                features = model.features(tokens[rows], positions[rows])
            else:
                features = _decode(model, tokens[rows], positions[rows])[0]
            loss, prediction = model.judge(features, asked)
            losses.append(loss.sum(dtype=torch.float64))
            hits.append((prediction == asked.flatten()).sum())
        count = int((answers != IGNORE).sum())
        results.append(
            SliceResult(
                name=name,
                accuracy=int(torch.stack(hits).sum()) / count,
                loss=float(torch.stack(losses).sum()) / count,
                examples=len(tokens),
                answers=count,
            )
        )
    model.train(was_training)
    return results


@torch.no_grad()
def decode_through_state(
    model: Model, slices: list[Slice], examples: int = 32
) -> tuple[list[MeasuredState], Agreement]:
    """Decode the longest slice token by token: the state's size at every slice's length, and how far the answers agree.

    The state after t tokens is counted from the tensors that the decode carries at that moment, for one sequence.
    """
    was_training = model.training
    model.eval()
    longest = max(slices, key=lambda s: s.tokens.shape[1])
    tokens, positions, answers = (part[:examples] for part in longest[1:])
    lengths = sorted({s.tokens.shape[1] for s in slices})
    features, states = _decode(model, tokens, positions, lengths)
    parallel = model.features(tokens, positions)
    asked = answers.flatten() != IGNORE
    weight = model.embedding.weight
    logits_parallel = (parallel.flatten(0, 1)[asked] @ weight.T).float()
    logits_state = (features.flatten(0, 1)[asked] @ weight.T).float()
    wanted = answers.flatten()[asked]
    answer_parallel, answer_state = logits_parallel.argmax(-1), logits_state.argmax(-1)
    model.train(was_training)
    return states, Agreement(
        slice_name=longest.name,
        examples=len(tokens),
        answers=len(wanted),
        accuracy_parallel=float((answer_parallel == wanted).float().mean()),
        accuracy_state=float((answer_state == wanted).float().mean()),
        same_answers=float((answer_parallel == answer_state).float().mean()),
        max_logit_error=float((logits_parallel - logits_state).abs().max()),
    )


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


def check_data(data: DataConfig) -> None:
    """Raise ConfigError when two slices of one mixture have the same name: a table could not tell them apart."""
    for mixture in (data.validation, data.test):
        names = [entry.options.slice_name for entry in mixture]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"two slices of a mixture are both called {twice!r}; give each slice once.")


def _decode(
    model: Model, tokens: Tensor, positions: Tensor, lengths: Iterable[int] = ()
) -> tuple[Tensor, list[MeasuredState]]:
    """Features (B, Q, D) at `positions`, carrying only the state; its size after each of `lengths` tokens."""
    state = model.init_state(len(tokens))
    wanted = set(lengths)
    outputs, sizes = [], []
    for t in range(tokens.shape[1]):
        y, state = model.step(tokens[:, t], state)
        outputs.append(y)
        if t + 1 in wanted:
            sizes.append(measure_model_state(model, state, t + 1))
    features = torch.stack(outputs, dim=1)
    return features.gather(1, positions[..., None].expand(-1, -1, features.shape[-1])), sizes
