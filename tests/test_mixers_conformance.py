"""Every built-in mixer, with its defaults and with other options, keeps the whole contract."""

from __future__ import annotations

import pytest

from zoo.mixers import get_mixer, mixers
from zoo.testing import check_mixer, render

# Options beside the defaults: other heads and widths, and each branch that an option switches on.
OPTIONS: dict[str, list[dict]] = {
    "attention": [{"num_heads": 4, "num_kv_heads": 2, "rotary": True}],
    "based": [{"feature_dim": 5, "num_heads": 2}],
    "delta_net": [{"num_heads": 4, "expand_k": 0.5, "conv_width": 1, "allow_neg_eigval": True}],
    "gated_conv": [{"conv_width": 1}],
    "gated_delta_net": [{"num_heads": 4, "expand_v": 1.0, "gate": False}],
    "gla": [{"num_heads": 2, "expand_k": 1.0, "gate_rank": 3}],
    "h3": [{"d_state": 4, "head_dim": 4}],
    "hyena": [{"conv_width": 1, "filter_width": 8, "filter_bands": 2}],
    "linear_attention": [
        {"feature_map": "relu", "num_heads": 4},
        {"feature_map": "hedgehog", "feature_dim": 8},
        {"feature_map": "taylor", "feature_dim": 4, "num_heads": 2},
    ],
    "mamba": [{"d_state": 3, "expand": 1, "dt_rank": 2, "conv_width": 2}],
    "mamba2": [{"d_state": 8, "head_dim": 16, "num_groups": 2, "conv_width": 1}],
    "mingru": [{"expand": 2}],
    "retnet": [{"num_heads": 2, "expand_v": 1}],
    "rwkv6": [{"head_dim": 16, "mix_rank": 4, "decay_rank": 4}],
    "rwkv7": [{"head_dim": 16, "decay_rank": 4, "rate_rank": 4, "gate_rank": 4}],
    "s4d": [{"d_state": 2}],
    "sliding_window": [{"window": 16, "num_heads": 2, "rotary": True}],
}
BUILT_IN = [name for name in mixers.names() if mixers.is_builtin(name)]
CASES = [(name, options) for name in BUILT_IN for options in ({}, *OPTIONS.get(name, []))]


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[" ".join([n, *(f"{k}={v}" for k, v in o.items())]) for n, o in CASES]
)
def test_conformance(name, options):
    checks = check_mixer(name, options)
    assert all(check.passed for check in checks), "\n" + render([c for c in checks if not c.passed])


def test_the_options_are_those_of_built_ins():
    assert set(OPTIONS) <= set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_option_is_described_and_the_mixer_cites_its_source(name):
    cls = get_mixer(name)
    assert [field for field, info in cls.Config.model_fields.items() if not info.description] == []
    assert "arXiv" in cls.__doc__
    assert cls.__doc__.partition("\n")[0].endswith("."), "`zoo list` shows the first line alone"
