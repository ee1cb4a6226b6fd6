"""Records as a sweep would leave them, without training: for the tests of the store, the frontier and the figures."""

from __future__ import annotations

import hashlib
import json
import math
import random
from typing import Any

from zoo.record import (
    Agreement,
    Epoch,
    Failure,
    LayerState,
    MeasuredState,
    Outcome,
    Provenance,
    Record,
    SliceResult,
    StateTensor,
    Timing,
)

SLICES = ((64, 4), (128, 8), (256, 16))


def mqar(seq_len: int, num_pairs: int, examples: int) -> dict[str, Any]:
    return {"task": "mqar", "examples": examples, "seq_len": seq_len, "num_pairs": num_pairs, "vocab_size": 8192}


def make_trial(
    mixer: str = "based",
    options: dict[str, Any] | None = None,
    *,
    d_model: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    seed: int = 0,
    slices: tuple[tuple[int, int], ...] = SLICES,
    data_seed: int = 0,
    epochs: int = 8,
) -> dict[str, Any]:
    layers: list[dict[str, Any]] = [{"mixer": "gated_conv", "kernel_size": 3}]
    if mixer != "gated_conv":
        layers.append({"mixer": mixer, **(options or {})})
    return {
        "data": {
            "train": [mqar(t, n, 20_000) for t, n in slices],
            "test": [mqar(t, n, 1000) for t, n in slices],
            "validation": [mqar(t, n, 1000) for t, n in slices],
            "seed": data_seed,
        },
        "model": {
            "d_model": d_model,
            "layers": layers,
            "depth": 2,
            "mlp": None,
            "positions": "none",
            "norm": "layer",
        },
        "optimizer": {"lr": lr, "weight_decay": weight_decay, "betas": [0.9, 0.999], "schedule": "cosine"},
        "training": {"epochs": epochs, "batch_size": 64, "stop_accuracy": 0.99, "dtype": "float32"},
        "seed": seed,
    }


def make_record(
    trial: dict[str, Any] | None = None,
    *,
    validation: float = 0.8,
    test: float | tuple[float, ...] = 0.8,
    state_bytes: int = 4096,
    grows: bool = False,
    status: str = "ok",
    agreement: float = 1.0,
    versions: dict[str, str] | None = None,
    started: str = "2025-01-01T00:00:00+00:00",
) -> Record:
    """A record with these results; `test` is one accuracy for all slices or one each, the mean is reported."""
    trial = make_trial() if trial is None else trial
    names = {f"mixer {layer['mixer']}": "1" for layer in trial["model"]["layers"]}
    versions = {"engine": "1", **names, "task mqar": "1"} | (versions or {})
    key = hashlib.sha256(json.dumps([trial, versions], sort_keys=True).encode()).hexdigest()
    lengths = [(entry["seq_len"], entry["num_pairs"]) for entry in trial["data"]["test"]]
    accuracies = test if isinstance(test, tuple) else (test,) * len(lengths)
    parts = [
        SliceResult(name=f"T={t} n={n}", accuracy=a, loss=-math.log(max(a, 1e-4)), examples=1000, answers=1000 * n)
        for (t, n), a in zip(lengths, accuracies, strict=True)
    ]
    longest = max(t for t, _ in lengths)
    sizes = {t: state_bytes * t // longest if grows else state_bytes for t, _ in lengths}
    states = [
        MeasuredState(
            seq_len=t,
            elements=size // 4,
            bytes=size,
            layers=(
                LayerState(
                    layer=0,
                    mixer=trial["model"]["layers"][-1]["mixer"],
                    elements=size // 4,
                    bytes=size,
                    tensors=(
                        StateTensor(name="S", shape=(size // 4,), dtype="float32", elements=size // 4, bytes=size),
                    ),
                ),
            ),
        )
        for t, size in sorted(sizes.items())
    ]
    ok, failed = status == "ok", status == "failed"
    outcome = Outcome(
        status="ok" if ok else "diverged",
        message="all epochs done" if ok else "diverged: the training loss became nan at step 17, epoch 0",
        parameters=600_000,
        steps=1000,
        history=tuple(
            Epoch(
                epoch=e,
                step=125 * (e + 1),
                learning_rate=1e-3,
                train_loss=2.0,
                validation_loss=1.0,
                validation_accuracy=validation * (e + 1) / 8,
                seconds=1.5,
            )
            for e in range(8 if ok else 0)
        ),
        validation=tuple(p.model_copy(update={"accuracy": validation, "loss": 1 - validation}) for p in parts)
        if ok
        else (),
        test=tuple(parts) if ok else (),
        validation_accuracy=validation if ok else None,
        test_accuracy=sum(accuracies) / len(accuracies) if ok else None,
        state=tuple(states),
        agreement=Agreement(
            slice_name=parts[-1].name,
            examples=32,
            answers=512,
            accuracy_parallel=parts[-1].accuracy,
            accuracy_state=parts[-1].accuracy,
            same_answers=agreement,
            max_logit_error=1e-5,
        )
        if ok
        else None,
        timing=Timing(data=0.1, train=10.0, evaluate=1.0),
    )
    return Record(
        key=key,
        status=status,
        trial=trial,
        versions=versions,
        outcome=None if failed else outcome,
        failure=Failure(
            error="RuntimeError", message="shapes <2> & <3> differ", traceback="Traceback ...\n  File <x>, line 1"
        )
        if failed
        else None,
        provenance=Provenance(
            zoo="0.1.0",
            git="abc1234",
            torch="2.13.0",
            python="3.11.9",
            device="cpu",
            threads=1,
            executor="inline",
            started=started,
            seconds=12.5,
        ),
    )


# Families with the sizes (bytes at d 64) of their dial, half-saturation in bytes, and steepness of the rise.
ZOO: dict[str, tuple[list[tuple[int, dict[str, Any], int]], float, float]] = {
    "attention": ([(32, {}, 131_072), (64, {}, 262_144)], 9_000, 2.0),
    "sliding_window": ([(64, {"window": w}, 768 + 512 * w) for w in (8, 32, 128)], 26_000, 1.3),
    "based": ([(64, {"feature_dim": f}, 256 * (1 + f + f * (f + 1) // 2)) for f in (4, 8, 16)], 7_000, 1.2),
    "linear_attention": ([(64, {"feature_dim": f}, 768 + 260 * f) for f in (16, 64)], 26_000, 0.8),
    "mamba": ([(64, {"d_state": n}, 512 * n + 2000) for n in (8, 16, 32)], 9_500, 0.9),
    "mamba2": ([(64, {"d_state": n}, 512 * n + 2300) for n in (16, 64)], 14_000, 1.0),
    "hyena": ([(64, {}, 131_072), (128, {}, 262_144)], 900_000, 0.6),
    "h3": ([(64, {"d_state": n}, 512 * n) for n in (4, 16, 64)], 200_000, 0.55),
    "rwkv6": ([(64, {"num_heads": h}, 16_384 // h + 512) for h in (4, 1)], 9_000, 1.1),
    "rwkv7": ([(64, {"num_heads": h}, 16_384 // h + 512) for h in (4, 1)], 5_000, 1.2),
    "gated_delta_net": ([(d, {}, d * d * 4 + 768) for d in (32, 64, 128)], 3_200, 1.2),
    "delta_net": ([(d, {}, d * d * 4 + 512) for d in (32, 64, 128)], 4_600, 1.2),
    "gated_conv": ([(64, {}, 1024), (128, {}, 2048)], 10_000_000, 0.4),
}


def make_zoo(seeds: int = 2, noise: float = 0.02, rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)) -> list[Record]:
    """A sweep over every family: accuracy rises with state, test slices get harder, two learning rates are bad."""
    draw = random.Random(0)
    records = []
    for mixer, (sizes, half, steep) in ZOO.items():
        for d_model, options, size in sizes:
            for seed in range(seeds):
                for lr in rates:
                    base = 1 / (1 + (half / size) ** steep) - abs(math.log(lr / 1e-3)) * 0.15
                    slices = tuple(
                        min(1.0, max(0.0, base + 0.12 * (1 - i) * base * (1 - base) * 4 + draw.gauss(0, noise)))
                        for i in range(len(SLICES))
                    )
                    trial = make_trial(mixer, options, d_model=d_model, lr=lr, seed=seed)
                    records.append(
                        make_record(
                            trial,
                            validation=max(0.0, min(1.0, base + draw.gauss(0, noise / 2))),
                            test=slices,
                            state_bytes=size,
                            grows=mixer in ("attention", "hyena"),
                            status="diverged" if mixer == "mamba" and lr == max(rates) else "ok",
                        )
                    )
    return records
