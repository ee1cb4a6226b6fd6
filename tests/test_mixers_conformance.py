"""Every built-in mixer, with its defaults and with other options, keeps the whole contract."""

from __future__ import annotations

import pytest

from zoo.mixers import get_mixer, mixers
from zoo.testing import check_mixer, render

# Options beside the defaults: other heads and widths, and each branch that an option switches on.
OPTIONS: dict[str, list[dict]] = {
    "attention": [{"num_heads": 4, "num_kv_heads": 2, "rotary": True}],
    "based": [{"feature_dim": 5, "num_heads": 2}],
    "gated_conv": [],
    "h3": [{"d_state": 4, "head_dim": 4}],
    "hyena": [],
    "linear_attention": [
        {"feature_map": "relu", "num_heads": 4},
        {"feature_map": "hedgehog", "feature_dim": 8},
        {"feature_map": "taylor", "feature_dim": 4, "num_heads": 2},
    ],
    "mamba": [],
    "mamba2": [{"d_state": 8, "head_dim": 16, "num_groups": 2, "conv_width": 1}],
    "rwkv6": [{"head_dim": 16, "mix_rank": 4, "decay_rank": 4}],
    "rwkv7": [],
    "sliding_window": [{"window": 16, "num_heads": 2, "rotary": True}],
}
CASES = [(name, options) for name, others in OPTIONS.items() for options in ({}, *others)]


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[" ".join([n, *(f"{k}={v}" for k, v in o.items())]) for n, o in CASES]
)
def test_conformance(name, options):
    checks = check_mixer(name, options)
    assert all(check.passed for check in checks), "\n" + render([c for c in checks if not c.passed])


def test_no_built_in_is_left_out():
    assert sorted(OPTIONS) == [name for name in mixers.names() if mixers.is_builtin(name)]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_described_and_the_mixer_cites_its_source(name):
    cls = get_mixer(name)
    assert [field for field, info in cls.Config.model_fields.items() if not info.description] == []
    assert "arXiv" in cls.__doc__
