"""Accuracy by test slice, in the parallel form or through the recurrent state; the state's measured size."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from zoo.config import DataConfig, DataEntry
from zoo.errors import ConfigError
from zoo.graphs import Pool, Replay
from zoo.model import Model, ModelState
from zoo.pack import Pack
from zoo.record import Agreement, LayerState, MeasuredState, SliceResult, StateTensor
from zoo.state import measure_state
from zoo.tasks import IGNORE, Split

Through = Literal["parallel", "state"]
Dtype = Literal["float32", "bfloat16"]

# Sequences are judged in batches: few enough tokens at once for a GPU's memory, and for a CPU's caches.
GPU_TOKENS = 1 << 21
CPU_BATCH = 256


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


def evaluate(model: Model, slices: Sequence[Slice], through: Through = "parallel") -> list[SliceResult]:
    """Accuracy and mean loss of every slice; through="state" decodes token by token, carrying only the state.

    Raises ConfigError on an unknown `through`.
    """
    if through not in get_args(Through):
        raise ConfigError(f"through={through!r} is not allowed; use 'parallel' or 'state'.")
    evaluation = PackEvaluation(Pack([model], batched=False), slices, through=through)
    evaluation.run()
    return evaluation.results()[0]


class PackEvaluation:
    """Accuracy and mean loss of every member of a pack on every slice, again and again."""

    def __init__(
        self,
        pack: Pack,
        slices: Sequence[Slice],
        dtype: Dtype = "float32",
        *,
        through: Through = "parallel",
        pool: Pool | None = None,
    ) -> None:
        device = slices[0].tokens.device
        self._pack, self._slices, self._dtype, self._through = pack, slices, dtype, through
        self._losses = torch.zeros(len(slices), len(pack), dtype=torch.float64, device=device)
        self._hits = torch.zeros(len(slices), len(pack), dtype=torch.int64, device=device)
        self._counts = [int((part.answers != IGNORE).sum()) for part in slices]
        judge = [functools.partial(self._judge, s) for s in range(len(slices))]
        self._replays = [Replay(one, device, rehearse=one, pool=pool) for one in judge]

    def run(self) -> None:
        """Start it; a GPU may still be at work when this returns."""
        for replay in self._replays:
            replay()

    def results(self) -> list[list[SliceResult]]:
        """Of the last run: for each member, the result of every slice."""
        losses, hits = self._losses.cpu(), self._hits.cpu()
        return [
            [
                SliceResult(
                    name=part.name,
                    accuracy=int(hits[s, i]) / self._counts[s],
                    loss=float(losses[s, i]) / self._counts[s],
                    examples=len(part.tokens),
                    answers=self._counts[s],
                )
                for s, part in enumerate(self._slices)
            ]
            for i in range(len(self._pack))
        ]

    @torch.no_grad()
    def _judge(self, s: int) -> None:
        _, *part = self._slices[s]
        members = len(self._pack)
        on_gpu = part[0].is_cuda
        size = max(1, GPU_TOKENS // (members * part[0].shape[1])) if on_gpu else CPU_BATCH
        function = functools.partial(_answers, through=self._through)
        losses, hits = [], []
        with torch.autocast(part[0].device.type, torch.bfloat16, enabled=self._dtype == "bfloat16"):
            for start in range(0, len(part[0]), size):
                loss, hit = self._pack.call(
                    function, *(x[None, start : start + size].expand(members, -1, -1) for x in part)
                )
                losses.append(loss)
                hits.append(hit)
        self._losses[s] = torch.stack(losses).sum(0)
        self._hits[s] = torch.stack(hits).sum(0)


def _answers(
    model: Model, tokens: Tensor, positions: Tensor, answers: Tensor, through: Through
) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and how many answers are right."""
    features = model.features(tokens, positions) if through == "parallel" else _decode(model, tokens, positions)[0]
    loss, prediction = model.judge(features, answers)
    return loss.sum(dtype=torch.float64), (prediction == answers.flatten()).sum()


@torch.no_grad()
def decode_through_state(
    model: Model, slices: Sequence[Slice], examples: int = 32
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
