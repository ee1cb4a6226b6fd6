"""`check_mixer`: does a mixer keep the contract of zoo.mixers.base? Behind `zoo check NAME`; needs no pytest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from zoo.config import parse
from zoo.errors import PluginError
from zoo.mixers import LayerInfo, Mixer, MixerConfig, mixers
from zoo.testing import module_checks, recurrence_checks
from zoo.testing.report import Check, run_check
from zoo.testing.subject import Subject

CHECKS: dict[str, Callable[[Subject], str]] = {
    check.__name__.replace("_", " "): check
    for check in (
        recurrence_checks.output,
        recurrence_checks.lengths,
        recurrence_checks.causality,
        recurrence_checks.causality_of_gradients,
        recurrence_checks.forward_is_scan_of_step,
        recurrence_checks.prefill_then_step_is_forward,
        recurrence_checks.prefill_in_segments_is_forward,
        recurrence_checks.forward_at_is_forward,
        recurrence_checks.state_is_batch_first,
        recurrence_checks.state_round_trip,
        recurrence_checks.no_memory_outside_state,
        recurrence_checks.arguments_are_left_alone,
        recurrence_checks.state_size,
        recurrence_checks.batch_invariance,
        recurrence_checks.memory_layout,
        module_checks.gradients_reach_every_parameter,
        module_checks.gradients_match_finite_differences,
        module_checks.float64,
        module_checks.train_is_eval,
        module_checks.determinism,
        module_checks.no_random_numbers,
        module_checks.config_round_trip,
        module_checks.pickle_and_deepcopy,
        module_checks.every_layer,
    )
}
"""Name -> check, in the order in which they run."""


def mixer_subject(
    mixer: str | type[Mixer],
    config: Mapping[str, Any] | MixerConfig | None = None,
    *,
    d_model: int = 64,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Subject:
    """The mixer under test, as the checks take it.

    Args:
        mixer: a class, a registered name, `file.py:Class` or `module:Class`.
        config: its options; None for the defaults.

    Raises:
        PluginError, UnknownNameError: the mixer cannot be found or loaded.
        ConfigError: its Config refuses the options.
    """
    cls = mixers.get(mixer) if isinstance(mixer, str) else mixer
    if not (isinstance(cls, type) and issubclass(cls, Mixer)):
        raise PluginError(f"{cls!r} is not a subclass of zoo.Mixer; give one, or a mixer's name.")
    options = config if isinstance(config, MixerConfig) else parse(cls.Config, dict(config or {}), cls.__name__)
    layer = LayerInfo(d_model=d_model, index=0, depth=2, max_seq_len=160)
    return Subject(cls, options, layer, torch.device(device), seed)


def check_mixer(
    mixer: str | type[Mixer],
    config: Mapping[str, Any] | MixerConfig | None = None,
    *,
    d_model: int = 64,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> list[Check]:
    """Every check of the contract, in order; one that fails or crashes does not stop the others.

    A mixer that cannot be built gets this as its only finding. Args and Raises are those of `mixer_subject`.
    """
    subject = mixer_subject(mixer, config, d_model=d_model, device=device, seed=seed)
    built = run_check("builds", lambda: _builds(subject))
    if not built.passed:
        return [built]
    return [built, *(run_check(name, functools.partial(check, subject)) for name, check in CHECKS.items())]


def _builds(s: Subject) -> str:
    return f"{sum(p.numel() for p in s.build().parameters()):,} parameters at d_model {s.layer.d_model}"
