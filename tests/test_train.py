"""The model, the training loop and evaluation: what a trial computes, and that it computes it the same again."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from zoo.config import Trial, parse
from zoo.decode import decode_through_state, measure_model_state, measured
from zoo.errors import ConfigError
from zoo.evaluate import evaluate, load_slices
from zoo.fit import learning_rate, shuffled, turns
from zoo.model import Model, build_model
from zoo.optimizer import decayed
from zoo.pack import Pack
from zoo.record import Epoch
from zoo.state import map_tensors, measure_state, named_tensors
from zoo.tasks import IGNORE
from zoo.train import run_trial, validate

SLICE = {"task": "mqar", "seq_len": 16, "num_pairs": 2, "vocab_size": 16}


def trial(**changes: Any) -> Trial:
    settings: dict[str, Any] = {
        "data": {
            "train": [{**SLICE, "examples": 256}, {**SLICE, "seq_len": 24, "examples": 100}],
            "test": [{**SLICE, "examples": 64}, {**SLICE, "seq_len": 32, "num_pairs": 4, "examples": 48}],
        },
        "model": {"d_model": 16, "layers": ["gated_conv", "attention"]},
        "optimizer": {"lr": 1e-2},
        "training": {"epochs": 2, "batch_size": 32},
        "seed": 0,
    }
    for name, value in changes.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    return parse(Trial, settings, "")


def comparable(outcome: Any) -> dict[str, Any]:
    """An outcome without its clock readings."""
    dump = outcome.model_dump(exclude={"timing"})
    for epoch in dump["history"]:
        del epoch["seconds"]
    return dump


def test_a_trial_repeats_to_the_last_bit_whatever_ran_before() -> None:
    first = run_trial(trial())
    torch.rand(7)
    run_trial(trial(seed=5))
    assert comparable(run_trial(trial())) == comparable(first)


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build_model(trial().model, trial().data, 0)
    assert torch.equal(torch.rand(4), expected)


def test_seeds_give_different_models_and_orders() -> None:
    a, b = (build_model(trial().model, trial().data, seed) for seed in (0, 1))
    assert not torch.equal(a.embedding.weight, b.embedding.weight)
    orders = [shuffled([256, 100], 32, seed, 0) for seed in (0, 1)]
    assert not torch.equal(orders[0][0], orders[1][0])


def test_an_epoch_visits_every_full_batch_of_every_slice_once() -> None:
    rows = shuffled([256, 100], 32, seed=0, epoch=3)
    assert [r.shape for r in rows] == [(8, 32), (3, 32)]
    assert sorted(rows[0].flatten().tolist()) == list(range(256))
    assert len(set(rows[1].flatten().tolist())) == 96
    assert sorted(turns([8, 3], epoch=3)) == [0] * 8 + [1] * 3
    assert turns([8, 3], epoch=3) != turns([8, 3], epoch=4)


@pytest.mark.parametrize("positions", ["none", "learned", "rotary"])
@pytest.mark.parametrize(
    "mlp", [None, {"expand": 2}, {"expand": 2, "activation": "swiglu"}, {"activation": "identity"}]
)
def test_features_prefill_and_step_agree(positions: str, mlp: Any) -> None:
    config = trial(model={"positions": positions, "mlp": mlp, "norm": "rms" if mlp else "layer", "depth": 3})
    model = build_model(config.model, config.data, 1).double()
    part = load_slices(config.data.test, 0, "test", "cpu")[1]
    tokens, asked = part.tokens[:4], part.positions[:4]
    features = model.features(tokens, asked)
    whole, state = model.prefill(tokens)
    expected = whole.gather(1, asked[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
    decoded = model.init_state(4)
    for t in range(tokens.shape[1]):
        y, decoded = model.step(tokens[:, t], decoded)
    torch.testing.assert_close(y, whole[:, -1], rtol=1e-10, atol=1e-10)
    for (name, a), (_, b) in zip(named_tensors(state), named_tensors(decoded), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


def test_the_head_is_tied_and_logits_are_where_answers_are_asked() -> None:
    config = trial(model={"d_model": 24})
    model = build_model(config.model, config.data, 0)
    part = load_slices(config.data.test, 0, "test", "cpu")[0]
    logits = model(part.tokens, part.positions)
    assert logits.shape == (64, 2, 16)
    result = model.answer(part.tokens, part.positions, part.answers)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part.answers.flatten(), reduction="none")
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.prediction, logits.flatten(0, 1).argmax(-1))
    assert sum(p.shape == model.embedding.weight.shape for p in model.parameters()) == 1


def test_evaluation_through_the_state_agrees_with_the_parallel_form() -> None:
    config = trial()
    model = build_model(config.model, config.data, 0)
    slices = load_slices(config.data.test, 0, "test", "cpu")
    for parallel, state in zip(evaluate(model, slices), evaluate(model, slices, through="state"), strict=True):
        assert parallel.accuracy == state.accuracy
        assert parallel.loss == pytest.approx(state.loss, rel=1e-5)
        assert parallel.answers == int((next(s for s in slices if s.name == parallel.name).answers != IGNORE).sum())
    with pytest.raises(ConfigError, match="'recurrent' is not allowed; use 'parallel' or 'state'"):
        evaluate(model, slices, through="recurrent")  # type: ignore[arg-type]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_state_is_measured_at_the_length_of_every_slice(batched: bool) -> None:
    config = trial()
    model = build_model(config.model, config.data, 0)
    slices = load_slices(config.data.test, 0, "test", "cpu")
    ((states, agreement),) = decode_through_state(Pack([model], batched=batched), slices, examples=8)
    assert [s.seq_len for s in states] == [16, 32]
    for state in states:
        conv, attention = state.layers
        # The formulas stand here, as expectations: a cache of two inputs; keys and values of every token.
        assert (conv.elements, attention.elements) == (2 * 16, 2 * 16 * state.seq_len)
        assert state.bytes == 4 * state.elements == conv.bytes + attention.bytes
    assert agreement.same_answers == 1.0
    assert agreement.examples == 8
    assert 0 < agreement.max_logit_error < 1e-4


@pytest.mark.parametrize("positions", ["none", "rotary", "learned"])
@pytest.mark.parametrize(
    "mixer",
    [
        "hyena",
        {"mixer": "attention", "num_heads": 4, "num_kv_heads": 2},
        {"mixer": "sliding_window", "window": 5},
        "delta_net",
    ],
)
def test_steps_in_a_state_with_room_are_the_same_and_of_the_same_size(mixer: Any, positions: str) -> None:
    config = trial(model={"layers": ["gated_conv", mixer], "positions": positions})
    models = [build_model(config.model, config.data, seed).double() for seed in (0, 1)]
    pack = Pack(models, batched=True)
    tokens = load_slices(config.data.test, 0, "test", "cpu")[0].tokens[:6].view(2, 3, 16)
    roomy = pack.call(lambda model, tokens: model.init_state(len(tokens), reserve=16), tokens)
    states = [model.init_state(3) for model in models]
    with torch.no_grad():
        for t in range(16):
            step = functools.partial(Model.step, at=torch.tensor([t]))
            together, roomy = pack.call(step, tokens[..., t], roomy)
            for i, model in enumerate(models):
                y, states[i] = model.step(tokens[i, :, t], states[i])
                torch.testing.assert_close(together[i], y, rtol=1e-10, atol=1e-10)
                of_one = map_tensors(lambda x, i=i: x[i], roomy)
                assert measured(model, of_one, t + 1) == measure_model_state(model, states[i], t + 1)


def test_the_counter_of_learned_positions_is_part_of_the_state() -> None:
    config = trial(model={"positions": "learned"})
    model = build_model(config.model, config.data, 0)
    _, state = model.prefill(torch.zeros(2, 5, dtype=torch.int32))
    names = [tensor.name for tensor in measure_state(state).tensors]
    assert "position" in names


def test_training_stops_on_validation_accuracy() -> None:
    easy = trial(training={"epochs": 5, "stop_accuracy": 1e-9})
    outcome = run_trial(easy)
    assert len(outcome.history) == 1
    assert outcome.message == "validation accuracy reached 1e-09"
    assert len(run_trial(trial(training={"stop_accuracy": None})).history) == 2


def test_divergence_is_an_outcome() -> None:
    heard: list[Epoch] = []
    outcome = run_trial(trial(optimizer={"lr": 1e30, "clip": None}, training={"epochs": 3}), on_epoch=heard.append)
    assert outcome.status == "diverged"
    assert outcome.message.startswith("diverged: the training loss became nan")
    assert outcome.test_accuracy is None
    assert outcome.state[0].bytes > 0


def test_learning_rate_schedules() -> None:
    cosine = trial(optimizer={"lr": 1.0, "warmup_steps": 2}).optimizer
    rates = [learning_rate(cosine, step, 5, 2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5 * (1 + math.cos(math.pi * 4 / 8)))
    per_epoch = trial(optimizer={"lr": 1.0, "schedule": "cosine_per_epoch"}).optimizer
    assert [learning_rate(per_epoch, s, 5, 2) for s in (0, 4, 5, 9)] == pytest.approx([1.0, 1.0, 0.5, 0.5])
    assert learning_rate(trial(optimizer={"schedule": "constant"}).optimizer, 9, 5, 2) == 1e-2


def test_weight_decay_spares_norms_biases_and_what_a_mixer_exempts() -> None:
    config = trial(model={"layers": ["mamba"], "mlp": {}})
    model = build_model(config.model, config.data, 0)
    names = decayed(model)
    sizes = {name: p.dim() for name, p in model.named_parameters()}
    assert all(sizes[name] >= 2 for name in names)
    assert {"embedding.weight", "blocks.0.mlp.up.weight", "blocks.0.mixer.in_proj.weight"} <= names
    assert not names & {"norm.weight", "blocks.0.mlp.up.bias", "blocks.0.mixer.A_log"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"layers": [{"mixer": "attention", "num_heads": 3}]}}, "d_model 16 is not divisible by num_heads 3"),
        ({"training": {"batch_size": 512}}, "fewer than one batch of 512"),
        ({"data": {"test": [{**SLICE, "examples": 8}, {**SLICE, "examples": 9}]}}, "give each slice once"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(trial(**changes))


def test_the_recipe_learns_to_recall() -> None:
    """The published recipe (gated convolution, then attention) solves a small MQAR in seconds."""
    entry = {"task": "mqar", "seq_len": 32, "num_pairs": 4, "vocab_size": 64}
    config = trial(
        data={"train": [{**entry, "examples": 8192}], "test": [{**entry, "examples": 256}]},
        model={"d_model": 32},
        optimizer={"lr": 1e-2},
        training={"epochs": 8, "batch_size": 64},
    )
    outcome = run_trial(config)
    assert outcome.test_accuracy is not None
    assert outcome.test_accuracy > 0.95
    assert outcome.agreement is not None
    assert outcome.agreement.same_answers > 0.99


def test_half_precision_trains_on_a_cpu() -> None:
    """The head's gradient included, which is made in chunks where the vocabulary is large."""
    entry = {"task": "mqar", "seq_len": 64, "num_pairs": 8, "vocab_size": 8192}
    config = trial(
        data={"train": [{**entry, "examples": 128}], "test": [{**entry, "examples": 8}]},
        training={"dtype": "bfloat16"},
    )
    losses = [epoch.train_loss for epoch in run_trial(config).history]
    assert losses[1] < losses[0]
