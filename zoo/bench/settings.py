"""What `zoo bench train` trains: packs of trials, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.bench import peers
from zoo.config import Sweep, Trial, parse
from zoo.errors import ConfigError, did_you_mean
from zoo.train import pack_identity

Packs = Mapping[str, Sequence[Trial]]


def _mqar(seq_len: int, num_pairs: int, examples: int = 1000) -> dict[str, Any]:
    return {"task": "mqar", "seq_len": seq_len, "num_pairs": num_pairs, "random_filler": True, "examples": examples}


# Figure 2 of BASED (arXiv 2402.18668), as experiments/based_figure2.yaml has it.
FIGURE2: dict[str, Any] = {
    "data": {
        "train": [
            _mqar(64, 4, 100_000),
            _mqar(128, 8, 20_000),
            _mqar(256, 16, 20_000),
            _mqar(256, 32, 20_000),
            _mqar(256, 64, 20_000),
        ],
        "test": [
            _mqar(64, 4),
            _mqar(64, 8),
            _mqar(64, 16),
            _mqar(128, 32),
            _mqar(256, 64),
            _mqar(512, 128),
            _mqar(1024, 256),
        ],
    },
    "optimizer": {"weight_decay": 0.1, "schedule": "cosine_per_epoch", "clip": None},
    "training": {"epochs": peers.EPOCHS, "batch_size": 256, "dtype": "bfloat16"},
}
RATES = (0.001, 0.0031622777, 0.01, 0.031622777)
MODELS: dict[str, tuple[int, list[Any]]] = {
    "attention-d64": (64, ["gated_conv", "attention"]),
    "based-d128-f24": (128, ["gated_conv", {"mixer": "based", "feature_dim": 24}]),
    "swa-d128-w64": (128, ["gated_conv", {"mixer": "sliding_window", "window": 65}]),
    "hyena-d128": (128, ["hyena"]),
    "h3-d128": (128, [{"mixer": "h3", "d_state": 32, "head_dim": 2}]),
    "mamba2-d128-s16": (128, [{"mixer": "mamba2", "d_state": 16}]),
    "gla-d128": (128, ["gated_conv", {"mixer": "gla", "num_heads": 2}]),
    "delta_net-d128": (128, ["gated_conv", "delta_net"]),
    "mamba-d128-s16": (128, [{"mixer": "mamba", "d_state": 16}]),
    "gated_delta_net-d128": (128, ["gated_conv", {"mixer": "gated_delta_net", "gate": False}]),
    "rwkv7-d128": (128, ["gated_conv", {"mixer": "rwkv7", "head_dim": 64}]),
}


def figure2_packs(size: int) -> Packs:
    """For each model one pack: the published learning rates with seed 0, then with seed 1, and so on."""
    return {
        name: [
            parse(
                Trial,
                {
                    **FIGURE2,
                    "model": {"d_model": d_model, "layers": layers, "depth": 2},
                    "optimizer": {**FIGURE2["optimizer"], "lr": RATES[i % len(RATES)]},
                    "seed": i // len(RATES),
                },
                name,
            )
            for i in range(size)
        ]
        for name, (d_model, layers) in MODELS.items()
    }


def grid_packs(path: str, size: int) -> Packs:
    """Of the trials in a grid that can train together the first `size`, by a name for what they share."""
    alike: dict[str, list[Trial]] = {}
    for trial in Sweep.load(path).trials:
        alike.setdefault(pack_identity(trial), []).append(trial)
    packs: dict[str, list[Trial]] = {}
    for trials in alike.values():
        name = trials[0].label.partition(" lr=")[0].replace(" ", "-")
        packs[f"{name}#{len(packs)}" if name in packs else name] = trials[:size]
    return packs


def choose(packs: Packs, names: str | None) -> Packs:
    """The packs whose name is, or begins with, one of `names` (comma-separated); None: all.

    Raises ConfigError for a name that chooses none.
    """
    if names is None:
        return packs
    chosen: dict[str, Sequence[Trial]] = {}
    for name in names.split(","):
        found = {n: trials for n, trials in packs.items() if n.startswith(name)}
        if not found:
            raise ConfigError(f"no setting {name!r}.{did_you_mean(name, packs)} Known: {', '.join(packs)}.")
        chosen |= {name: found[name]} if name in found else found
    return chosen


def lasting(trial: Trial, epochs: int | None) -> Trial:
    """The trial with another number of epochs, if one is given, and no early stop. Raises ConfigError below two."""
    epochs = trial.training.epochs if epochs is None else epochs
    if epochs < 2:
        raise ConfigError(f"training.epochs {epochs} is too few: the first one also starts up; use --epochs 2 or more.")
    plain = trial.model_dump()
    return parse(Trial, {**plain, "training": {**plain["training"], "epochs": epochs, "stop_accuracy": None}}, "")
