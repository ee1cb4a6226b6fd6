"""Peers tune themselves over dozens of configs, which Triton compiles one after another: here, in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def share_of_tuning(part: int, parts: int) -> Iterator[None]:
    """Inside, each of Triton's autotuners runs every `parts`-th of its configs, from `part`, once, and keeps no choice.

    What a process so compiles is in Triton's cache on disk for the one that then tunes.
    """
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def some(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(self, kwargs)
        return configs[part::parts] or configs[:1]

    def once(self: Any) -> Callable[..., list[float]]:
        def run(kernel: Callable[[], None], quantiles: Any) -> list[float]:
            kernel()
            return [1.0] * 3

        return run

    def without_disk(self: Any, key: Any, configs: Any, tune: Callable[[], None]) -> bool:
        tune()
        return False

    with (
        patch.object(Autotuner, "prune_configs", some),
        patch.object(Autotuner, "do_bench", property(once)),
        patch.object(Autotuner, "check_disk_cache", without_disk),
    ):
        yield
