"""What Zoology (github.com/HazyResearch/zoology, its own training loop) took for what `zoo bench` measures.

Recorded with torch 2.11 and Triton 3.6, one model at a time, without mixed precision. Gated DeltaNet, RWKV-7 and Mamba
could not be trained there: one refused, one hung, one did not build.
"""

from __future__ import annotations

from typing import NamedTuple

EPOCHS = 32
"""Of a run on the mixture of BASED's Figure 2."""


class Run(NamedTuple):
    """One model trained for EPOCHS epochs: seconds, ms of a step by (seq_len, num_pairs), the peak of GPU memory."""

    seconds: float
    step_ms: dict[tuple[int, int], float]
    peak_mib: int


class Solve(NamedTuple):
    """Seconds, from the fastest seed to the slowest of three, and ms of a step, to .99 on its basic example."""

    hardware: str
    fastest: float
    slowest: float
    step_ms: float | None


def _run(seconds: float, T64: float, T128: float, T256: float, peak_mib: int) -> Run:
    return Run(seconds, {(64, 4): T64, (128, 8): T128, (256, 64): T256}, peak_mib)


GPU = "NVIDIA H200"
RUNS = {
    "attention-d64": _run(242.1, 6.633, 8.831, 15.78, 6607),
    "based-d128-f24": _run(392.2, 8.906, 15.42, 27.88, 7177),
    "swa-d128-w64": _run(352.7, 7.5, 12.44, 24.47, 6778),
    "hyena-d128": _run(403.3, 10.64, 15.34, 26.53, 7328),
    "h3-d128": _run(534.3, 15.5, 19.86, 32.05, 7843),
    # Without the anomaly mode that its code switches on, which doubles the time.
    "mamba2-d128-s16": _run(460.5, 13.2, 17.71, 27.78, 7241),
    "gla-d128": _run(350.6, 8.741, 12.8, 21.7, 6783),
    "delta_net-d128": _run(407.2, 10.03, 14.51, 22.76, 6780),
}
SOLVES = {"cpu": Solve("2 CPU cores", 112, 120, 54), "cuda": Solve(GPU, 10, 23, None)}
