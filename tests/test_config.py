"""Trials and sweeps: what is accepted, what is refused and how the error reads, and what a key depends on."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from sweep_cases import plugin, sweep  # noqa: F401

import zoo.config
from zoo.config import Sweep, Trial
from zoo.errors import ConfigError, UnknownNameError
from zoo.registry import load_plugins
from zoo.train import validate

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def mqar(**changes):
    entry = {"task": "mqar", "seq_len": 16, "num_pairs": 2, "vocab_size": 16, "examples": 64, **changes}
    return {
        "data": {"train": [entry], "test": [entry]},
        "model": {"d_model": 8, "layers": ["attention"]},
        "optimizer": {"lr": 0.01},
        "training": {"epochs": 1, "batch_size": 32},
    }


def write(folder: Path, text: str) -> Path:
    file = folder / "grid.yaml"
    file.write_text(text)
    return file


SLICE = "{task: mqar, seq_len: 16, num_pairs: 2, vocab_size: 16, examples: 64}"
YAML = f"""\
data:
  train: [{SLICE}]
  test: [{SLICE}]
model: {{d_model: [8, 16], layers: [attention]}}
optimizer: {{lr: {{logspace: [-3, -2, 2]}}}}
training: {{epochs: 1, batch_size: 32}}
"""


# --- grids -----------------------------------------------------------------------------------------------------------


def test_a_file_gives_the_product_of_its_axes(tmp_path):
    loaded = Sweep.load(write(tmp_path, YAML))
    assert loaded.name == "grid"
    points = [(t.model.d_model, t.optimizer.lr) for t in loaded.trials]
    assert points == [(8, 1e-3), (8, 1e-2), (16, 1e-3), (16, 1e-2)]


def test_overrides_replace_and_add_axes(tmp_path):
    file = write(tmp_path, YAML)
    points = [(t.model.d_model, t.seed) for t in Sweep.load(file, ["optimizer.lr=0.1", "seed=0,1"]).trials]
    assert points == [(8, 0), (8, 1), (16, 0), (16, 1)]
    assert {t.model.mlp.expand for t in Sweep.load(file, ["model.mlp.expand=2,4"]).trials if t.model.mlp} == {2, 4}


def test_overrides_reach_into_every_variant():
    data = mqar() | {"variants": [{"model": {"d_model": 8}}, {"model": {"d_model": 16}}]}
    trials = Sweep.from_dict(data, ["model.d_model=32,64", "model.layers=[attention, attention]"]).trials
    # Both variants now say the same: each trial is there once.
    assert [t.model.d_model for t in trials] == [32, 64]
    assert all(len(t.model.layers) == 2 for t in trials)


def test_an_override_changes_one_use_of_a_yaml_anchor(tmp_path):
    text = YAML.replace(f"train: [{SLICE}]", f"train: [&slice {SLICE}]").replace(f"test: [{SLICE}]", "test: [*slice]")
    trial = Sweep.load(write(tmp_path, text), ["data.train.0.examples=128"]).trials[0]
    assert (trial.data.train[0].examples, trial.data.test[0].examples) == (128, 64)


def test_variants_are_laid_over_the_shared_settings():
    data = mqar() | {
        "seed": [0, 1],
        "variants": [
            {"model": {"layers": [{"mixer": "attention", "num_heads": [1, 2]}]}},
            {"model": {"d_model": 16}, "optimizer": {"weight_decay": 0.0}},
        ],
    }
    trials = Sweep.from_dict(data).trials
    assert len(trials) == 2 * 2 + 2
    assert [t.optimizer.weight_decay for t in trials] == [0.1] * 4 + [0.0] * 2
    assert {t.optimizer.lr for t in trials} == {0.01}


def test_duplicates_are_dropped():
    data = mqar() | {"seed": [0, 0, 1], "variants": [{}, {"model": {"d_model": 8}}]}
    assert [t.seed for t in Sweep.from_dict(data).trials] == [0, 1]


def test_fields_that_are_lists_are_not_axes():
    trials = Sweep.from_dict(mqar(), ["optimizer.betas=[0.9, 0.95]"]).trials
    assert [t.optimizer.betas for t in trials] == [(0.9, 0.95)]
    trials = Sweep.from_dict(mqar(), ["optimizer.betas=[0.9, 0.95],[0.8, 0.9]"]).trials
    assert [t.optimizer.betas for t in trials] == [(0.9, 0.95), (0.8, 0.9)]


def test_the_layers_repeat_over_the_depth():
    (trial,) = Sweep.from_dict(mqar(), ["model.layers=[attention, sliding_window]", "model.depth=3"]).trials
    assert [b.mixer for b in trial.model.blocks] == ["attention", "sliding_window", "attention"]
    assert trial.model.family == "attention+sliding_window"


def test_validation_data_are_the_test_mixture_unless_given():
    (trial,) = Sweep.from_dict(mqar()).trials
    assert trial.data.validation == trial.data.test
    data = mqar()
    data["data"]["validation"] = [data["data"]["test"][0] | {"examples": 32}]
    (other,) = Sweep.from_dict(data).trials
    assert other.data.validation[0].examples == 32
    assert other.data.test[0].examples == 64


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_grid_that_comes_with_the_suite_loads(path):
    beside = path.with_suffix(".py")
    load_plugins([str(beside)] if beside.exists() else [])
    trials = Sweep.load(path).trials
    assert len(trials) >= 4
    assert all(Trial.model_validate(t.model_dump(mode="json")) == t for t in trials[:: max(1, len(trials) // 8)])


# --- what is refused -------------------------------------------------------------------------------------------------


def change(path, value):
    """`mqar()` with one value changed, or added."""
    data = mqar()
    *parents, last = path
    node = data
    for part in parents:
        node = node[part]
    node[last] = value
    return data


ENTRY = ("data", "train", 0)


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        (change(["modle"], {}), ["unknown key 'modle'", "Did you mean 'model'?", "variants"]),
        (change(["model", "d_modle"], 8), ["unknown key 'model.d_modle'", "Did you mean 'd_model'?"]),
        (change(["model", "mlp"], {"expnd": 2}), ["unknown key 'model.mlp.expnd'", "Did you mean 'expand'?"]),
        (
            change(["model", "layers"], [{"mixer": "attention", "num_head": 2}]),
            ["attention", "'num_head'", "'num_heads'"],
        ),
        (change([*ENTRY, "n_pairs"], 2), ["task mqar", "unknown key 'n_pairs'", "Did you mean 'num_pairs'?"]),
        (change([*ENTRY, "num_pairs"], 5), ["num_pairs 5", "seq_len 16", "num_pairs <= 4", "seq_len >= 20"]),
        (change([*ENTRY, "seq_len"], 15), ["seq_len 15 is odd", "14 or 16"]),
        (change([*ENTRY, "vocab_size"], 4), ["vocab_size 4 is too small", "vocab_size >= 6"]),
        (
            change(["model", "layers"], ["atention"]),
            ["unknown mixer 'atention'", "Did you mean 'attention'?", "--plugin"],
        ),
        (change([*ENTRY, "task"], "mqra"), ["unknown task 'mqra'", "Did you mean 'mqar'?"]),
        (change(["model", "layers"], [3]), ["3 is no layer"]),
        (change(["model", "layers"], [{"num_heads": 2}]), ["is no layer", "{mixer: NAME"]),
        (change(["model", "layers"], "attention"), ["model.layers", "'attention' is not allowed"]),
        (change(["model", "layers"], []), ["model.layers"]),
        (change([*ENTRY[:2]], [{"task": "mqar"}]), ["is no slice", "examples: N"]),
        (change(["model", "d_model"], "wide"), ["model.d_model", "'wide' is not allowed"]),
        (change(["model", "depth"], 1_000_000), ["model.depth: 1000000 is not allowed", "less than or equal to 1000"]),
        (change(["model", "d_model"], 10**6), ["model.d_model", "less than or equal to 16384"]),
        (
            change(["variants"], [{"seed": list(range(i, i + 15_000))} for i in (0, 15_000)]),
            ["30,000 trials (variants 2)"],
        ),
        (change(["training", "epochs"], True), ["training.epochs: True is not allowed: it takes a number"]),
        (change(["optimizer", "lr"], True), ["optimizer.lr: True is not allowed"]),
        (change(["optimizer"], {"lr": 0.01, "clip": False}), ["optimizer.clip: False is not allowed"]),
        (change(["optimizer"], {"lr": 0.01, "betas": [False, 0.9]}), ["optimizer.betas: [False, 0.9] is not allowed"]),
        (
            change(["model", "layers"], [{"mixer": "attention", "num_heads": True}]),
            ["mixer attention", "num_heads: True"],
        ),
        (change([*ENTRY, "num_pairs"], True), ["task mqar", "num_pairs: True is not allowed"]),
        (change(["training", "epochs"], 1.5), ["training.epochs: 1.5 is not allowed"]),
        (change(["model", "d_model"], 0), ["model.d_model", "0 is not allowed", "greater than 0"]),
        (change(["model", "positions"], "sine"), ["model.positions", "'sine'", "'rotary'"]),
        (change(["optimizer"], {}), ["optimizer.lr: is missing"]),
        (change(["optimizer", "lr"], float("nan")), ["optimizer.lr: nan is not allowed"]),
        (
            change(["model", "layers"], [{"mixer": "hyena", "filter_frequency": float("inf")}]),
            ["mixer hyena", "finite"],
        ),
        (change(["optimizer", "lr"], float("inf")), ["optimizer.lr: inf is not allowed", "finite"]),
        (change(["optimizer"], {"lr": 0.01, "betas": [0.9, 1.5]}), ["optimizer.betas.1: 1.5 is not allowed"]),
        (change(["optimizer"], {"lr": 0.01, "betas": [-2, 0.5]}), ["optimizer.betas.0: -2 is not allowed"]),
        (change(["training", "stop_accuracy"], 99), ["training.stop_accuracy", "less than or equal to 1"]),
        (change(["seed"], 2**63), ["seed", "must be below 2**63"]),
        (change(["seed"], -1), ["seed: -1 is not allowed"]),
        (change(["seed"], []), ["the grid is empty", "'seed'"]),
        (change(["variants"], []), ["the grid is empty", "variants"]),
        (change(["variants"], {"model": {}}), ["variants", "must be a list of mappings"]),
        (change(["model"], None), ["model: None is not allowed"]),
        *((change(["name"], name), ["name: ", "--run FOLDER"]) for name in ("", "../x", "/x", "..", None, ["a", "b"])),
    ],
)
def test_bad_settings(data, messages):
    with pytest.raises(ConfigError) as caught:
        Sweep.from_dict(data)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize("source", [None, 3, "model", ["model"]])
def test_a_sweep_must_be_a_mapping(source):
    with pytest.raises(ConfigError, match="a sweep is a mapping with the keys name, data, model"):
        Sweep.from_dict(source)


def test_every_error_of_a_trial_is_told_at_once():
    data = mqar()
    data["model"]["d_model"] = -1
    data["training"]["epoch"] = 3
    with pytest.raises(ConfigError) as caught:
        Sweep.from_dict(data)
    assert "model.d_model" in str(caught.value)
    assert "unknown key 'training.epoch'. Did you mean 'epochs'?" in str(caught.value)


def test_heads_that_do_not_divide_d_model_are_found_before_training():
    data = mqar()
    data["model"]["layers"] = [{"mixer": "attention", "num_heads": 3}]
    (trial,) = Sweep.from_dict(data).trials
    with pytest.raises(ConfigError, match=r"d_model 8 is not divisible by num_heads 3; use one of \[1, 2, 4, 8\]"):
        validate(trial)


def test_too_few_examples_for_a_batch_are_found_before_training():
    (trial,) = Sweep.from_dict(mqar(), ["training.batch_size=128"]).trials
    with pytest.raises(ConfigError, match="64 examples, fewer than one batch of 128"):
        validate(trial)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("data.train.0.seq_len=100000000", "examples of 100,000,000 tokens are too long .* at most 262,144 tokens"),
        ("data.test.0.vocab_size=1000000000", "1,000,000,000 tokens by d_model 8 has 8,000,000,000 numbers, more than"),
        (
            "data.train.0.examples=10000000000",
            "data.train: 160,000,000,000 tokens, .* the 2,147,483,648 of one mixture",
        ),
        (
            "model.layers=[{mixer: mamba, d_state: 100000000}]",
            "the model takes more than 2,147,483,648 numbers, with a tensor of 200,000,001 x 16; lower .* of a layer",
        ),
        (
            "model.layers=[{mixer: based, feature_dim: 100000}]",
            "the state of one sequence takes more than 67,108,864 numbers, with a tensor of .*; lower the option",
        ),
    ],
)
def test_what_no_memory_holds_is_found_before_it_is_made(override, why):
    (trial,) = Sweep.from_dict(mqar(), [override]).trials
    with pytest.raises(ConfigError, match=why):
        validate(trial)


def test_a_warm_up_that_never_ends_is_found_before_training():
    (trial,) = Sweep.from_dict(mqar(), ["optimizer.warmup_steps=9", "training={epochs: 2, batch_size: 16}"]).trials
    with pytest.raises(ConfigError, match=r"warmup_steps: 9 are more than the trial's 8 steps.* raise training.epochs"):
        validate(trial)
    (trial,) = Sweep.from_dict(mqar(), ["optimizer.warmup_steps=8", "training={epochs: 2, batch_size: 16}"]).trials
    assert validate(trial) > 0


def test_an_error_in_a_file_names_the_file_and_the_line(tmp_path):
    file = write(tmp_path, YAML + "seed: [0, 1\nname: x\n")
    with pytest.raises(ConfigError, match="line 8") as caught:
        Sweep.load(file)
    assert str(file) in str(caught.value)
    file = write(tmp_path, YAML.replace("d_model", "d_modle"))
    with pytest.raises(ConfigError, match=r"Did you mean 'd_model'\?") as caught:
        Sweep.load(file)
    assert str(file) in str(caught.value)


def test_an_unknown_mixer_in_a_file_is_still_an_unknown_name(tmp_path):
    with pytest.raises(UnknownNameError, match=r"grid\.yaml: unknown mixer 'atention'"):
        Sweep.load(write(tmp_path, YAML.replace("attention", "atention")))


@pytest.mark.parametrize(
    "text", ["seed: &a [*a]\n", "variants: &v [{variants: *v}]\n", f"seed: {'[' * 3000}{']' * 3000}"]
)
def test_a_value_without_end_is_an_error(tmp_path, text):
    with pytest.raises(ConfigError, match=r"grid.yaml: a value is nested too deeply, or is an alias of what holds it"):
        Sweep.load(write(tmp_path, YAML + text))


def test_an_item_that_is_refused_is_one_error_in_the_words_of_a_file():
    with pytest.raises(ConfigError) as caught:
        Sweep.from_dict(change([*ENTRY, "examples"], 6.5))
    assert "data.train.0.examples: 6.5 is not allowed" in str(caught.value)
    assert "at least 1 item" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"data.train: \[\] is not allowed: list should have at least 1 item"):
        Sweep.from_dict(change(["data", "train"], []))


def test_files_that_are_no_grids(tmp_path):
    write(tmp_path, YAML)
    with pytest.raises(ConfigError, match=r"does not exist\. Did you mean '.*grid\.yaml'"):
        Sweep.load(tmp_path / "grd.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        Sweep.load(tmp_path / "no" / "grid.yaml")
    with pytest.raises(ConfigError, match="a sweep is a mapping"):
        Sweep.load(write(tmp_path, ""))
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        Sweep.load(tmp_path / "latin.yaml")


# --- keys ------------------------------------------------------------------------------------------------------------


def key(data) -> str:
    (trial,) = Sweep.from_dict(data).trials
    return trial.key


def test_a_key_is_the_same_however_the_trial_is_written():
    plain = mqar()
    # Defaults written out, another order, other spellings of the same numbers.
    spelled = {name: plain[name] for name in reversed(plain)} | {"seed": 0}
    spelled = copy.deepcopy(spelled)
    spelled["optimizer"] = {"weight_decay": 0.10, "lr": "1e-2", "betas": [0.9, 0.999]}
    spelled["model"]["layers"] = [{"mixer": "attention", "num_heads": 1.0}]
    spelled["data"]["validation"] = spelled["data"]["test"]
    assert key(spelled) == key(plain)


def test_a_trial_survives_json_with_its_key():
    (trial,) = Sweep.from_dict(mqar(), ["optimizer.lr=0.00031622777", "model.mlp={expand: 2}"]).trials
    again = Trial.model_validate(json.loads(trial.model_dump_json()))
    assert again == trial
    assert again.key == trial.key
    assert Trial.model_validate(trial.model_dump(mode="json")).key == trial.key


def test_every_setting_changes_the_key():
    (trial,) = Sweep.from_dict(mqar()).trials
    changes = [
        "seed=1",
        "data.seed=1",
        "data.train.0.examples=128",
        "data.test.0.examples=128",
        "data.train.0.vocab_size=32",
        "model.d_model=16",
        "model.layers=[sliding_window]",
        "model.layers=[{mixer: attention, num_heads: 2}]",
        "model.depth=2",
        "model.mlp={}",
        "model.positions=learned",
        "model.norm=rms",
        "optimizer.lr=0.02",
        "optimizer.weight_decay=0",
        "optimizer.betas=[0.9, 0.99]",
        "optimizer.schedule=constant",
        "optimizer.warmup_steps=1",
        "optimizer.clip=null",
        "training.epochs=2",
        "training.batch_size=16",
        "training.stop_accuracy=null",
        "training.dtype=bfloat16",
    ]
    keys = {change: Sweep.from_dict(mqar(), [change]).trials[0].key for change in changes}
    assert len({trial.key, *keys.values()}) == len(changes) + 1


def test_versions_are_part_of_the_key(monkeypatch):
    from zoo.mixers.attention import Attention
    from zoo.tasks.mqar import MQAR

    before = key(mqar())
    (trial,) = Sweep.from_dict(mqar()).trials
    assert set(trial.versions) == {"engine", "mixer attention", "task mqar"}
    for target, name in ((Attention, "version"), (MQAR, "version"), (zoo.config, "ENGINE_VERSION")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, 999)
            assert key(mqar()) != before
    assert key(mqar()) == before


def test_a_plugins_source_is_part_of_the_key(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from zoo.mixers.attention import Attention\n\n\nclass Mine(Attention):\n    pass\n")
    data = mqar()
    data["model"]["layers"] = [f"{file}:Mine"]
    first = key(data)
    assert key(data) == first
    file.write_text(file.read_text() + "\n# an edit\n")
    assert key(data) != first


@pytest.mark.usefixtures("plugin")
def test_labels_tell_trials_apart():
    labels = [t.label for t in sweep(lr=[0.001, 0.01], d_model=[8, 16], seconds=[0.0, 0.5]).trials]
    assert len(set(labels)) == 8
    assert labels[0] == "running_mean d=8 lr=0.001 seed=0"
    assert labels[2] == "running_mean d=8 seconds=0.5 lr=0.001 seed=0"


def test_a_label_has_what_sets_the_state_also_at_its_default():
    based, window = Sweep.from_dict(mqar(), ["model.layers=[gated_conv, based],[sliding_window]"]).trials
    assert based.label == "based d=8 feature_dim=16 lr=0.01 seed=0"
    assert window.label == "sliding_window d=8 window=64 lr=0.01 seed=0"


def test_a_sweeps_labels_tell_any_two_of_its_trials_apart():
    data = mqar() | {"seed": [0, 1]}
    data["training"]["epochs"] = [1, 2]
    data["optimizer"]["weight_decay"] = [0.1, 0.2]
    data["variants"] = [
        {"model": {"layers": [["attention"], ["gated_conv", "attention"]], "depth": [None, 4]}},
        {"model": {"layers": ["based"], "positions": ["none", "learned"]}},
        {"model": {"layers": ["based"], "mlp": {"expand": 2}}, "data": {"seed": 7}},
    ]
    grid = Sweep.from_dict(data)
    assert len(set(grid.labels.values())) == len(grid.trials) == 8 * (4 + 2 + 1)
    assert {key.count("layers=") for key in grid.labels.values() if key.startswith("based")} == {0}
    assert grid.labels[grid.trials[0].key] == (
        "attention d=8 lr=0.01 seed=0 layers=attention data.seed=0 weight_decay=0.1 epochs=1"
    )


@pytest.mark.parametrize(
    "override",
    ["optimizer.lr=0.01,0.01001", "model.layers=[gated_conv, based],[{mixer: gated_conv, conv_width: 4}, based]"],
)
def test_labels_that_are_too_short_to_tell_trials_apart_have_the_keys(override):
    grid = Sweep.from_dict(mqar(), [override])
    assert len(grid.trials) == 2
    assert [label.split()[-1] for label in grid.labels.values()] == [f"key={trial.key[:8]}" for trial in grid.trials]


def test_a_sweeps_labels_name_the_data_where_they_differ():
    slices = [{**mqar()["data"]["test"][0], "num_pairs": n} for n in (2, 3)]
    grid = Sweep.from_dict(mqar() | {"variants": [{"data": {"train": [s], "test": [s]}} for s in slices]})
    names = [trial.data.test[0].options.slice_name for trial in grid.trials]
    assert [label.partition(" on ")[2] for label in grid.labels.values()] == names
    smaller = Sweep.from_dict(mqar(), ["data.train.0.examples=64,128"])
    assert [label.split()[-1] for label in smaller.labels.values()] == [f"data.train.0.examples={n}" for n in (64, 128)]
