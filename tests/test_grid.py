"""YAML, axes and overrides: from text to the points of a grid."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from sweep_cases import plugin  # noqa: F401

from zoo.config import ModelConfig, Trial
from zoo.errors import ConfigError, UnknownNameError
from zoo.grid import apply_override, expand, merge, read_yaml


class Inner(BaseModel):
    width: int = 1
    names: tuple[str, ...] = ()


class Outer(BaseModel):
    size: int = 1
    inner: Inner | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    kind: Literal["a", "b"] = "a"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("7", 7),
        ("-7", -7),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("2020-01-01", "2020-01-01"),
        ("null", None),
        ("~", None),
        ("'1'", "1"),
    ],
)
def test_scalars_are_read_as_in_yaml_1_2(text, value):
    read = read_yaml(f"x: {text}", "f.yaml")["x"]
    assert read == value
    assert type(read) is type(value)


def test_special_numbers():
    assert read_yaml("[.inf, -.inf]", "f.yaml") == [math.inf, -math.inf]
    assert math.isnan(read_yaml(".nan", "f.yaml"))


def test_anchors_and_merge_keys():
    assert read_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", "f.yaml")["d"] == {"b": 1, "c": 3}


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "f.yaml, line 3", "expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", "f.yaml, line 2", "cannot start any token"),
        ("a: 1\nb: 2\na: 3\n", "f.yaml, line 3", "'a' is given twice"),
        ("x: 1\na: [1", "f.yaml, line 2", "stream end"),
        ("? [1, 2]\n: 3\n", "f.yaml, line 1", "plain text"),
        ("a: !!python/object:os.system x\n", "f.yaml, line 1", "could not determine a constructor"),
        ("a: \x01", "f.yaml", "special characters"),
    ],
)
def test_a_syntax_error_names_file_line_and_reason(text, where, why):
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "f.yaml")
    assert str(caught.value).startswith(f"{where}")
    assert why in str(caught.value)


def test_a_syntax_error_shows_the_line():
    with pytest.raises(ConfigError, match=r"\n    b: 2: 3"):
        read_yaml("a: 1\nb: 2: 3\n", "f.yaml")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (
            {"optimizer": {"lr": {"logspace": [-4, -1, 10**9]}}},
            r"1,000,000,000 trials \(logspace \[-4, -1, 1000000000\]\)",
        ),
        ({"seed": list(range(30_000))}, r"30,000 trials \(seed 30000\)"),
        ({"seed": [0, 1, 2], "optimizer": {"lr": [0.1] * 100, "clip": [1] * 101}}, r"\(lr 100, clip 101\)|seed 3"),
        (
            {"model": {"layers": [{"mixer": "based", "feature_dim": list(range(1, 101))}] * 4}},
            r"\(100 x 100 x 100 x 100\)",
        ),
    ],
)
def test_a_grid_that_nobody_means_is_refused_before_its_points_are_made(data, what):
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=rf"{what}.* more than the 20,000 .* split it into several sweeps"):
        expand(data, Trial)
    assert time.monotonic() - begin < 2


def test_merge_is_deep_and_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1, "c": [1, 2]}, "d": 4}, {"a": {"c": [3]}, "e": {"f": 5}}
    merged = merge(base, over)
    assert merged == {"a": {"b": 1, "c": [3]}, "d": 4, "e": {"f": 5}}
    merged["a"]["c"].append(0)
    merged["e"]["f"] = 0
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert over == {"a": {"c": [3]}, "e": {"f": 5}}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a.b=64", 64),
        ("a.b=64,128", [64, 128]),
        ("a.b=1e-3", 1e-3),
        ("a.b=x y", "x y"),
        ("a.b=null", None),
        ("a.b=[p, q]", ["p", "q"]),
        ("a.b=[p],[q, r]", [["p"], ["q", "r"]]),
        ("a.b={logspace: [-4, -2, 3]}", {"logspace": [-4, -2, 3]}),
        ("a.b='1,2'", "1,2"),
        ("a.b=c=d", "c=d"),
    ],
)
def test_override_values(override, value):
    data = {"a": {"b": 0, "c": 1}}
    apply_override(data, override)
    assert data == {"a": {"b": value, "c": 1}}


def test_override_paths():
    data: dict[str, Any] = {"layers": ["x", {"mixer": "y"}], "mlp": None}
    apply_override(data, "layers.1.window=8")
    apply_override(data, "layers.0=z")
    apply_override(data, "mlp.expand=2")
    apply_override(data, "new.path=1")
    assert data == {
        "layers": ["z", {"mixer": "y", "window": 8}],
        "mlp": {"expand": 2},
        "new": {"path": 1},
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_model", "not of the form path.to.key=value"),
        ("=64", "not of the form path.to.key=value"),
        ("model.d_model=", "has no value; write null"),
        ("model.d_model=[1", "not valid YAML"),
        ("size.width=1", "'width' is below the plain value 3; shorten the path"),
        ("layers.2=x", "'2' is no index into a list of 2; use 0 to 1"),
        ("layers.first=x", "'first' is no index into a list of 2"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        apply_override({"size": 3, "layers": ["a", "b"]}, override)
    assert repr(override) in str(caught.value)


def test_every_list_is_an_axis_and_the_first_is_slowest():
    points = expand({"size": [1, 2], "kind": ["a", "b"]}, Outer)
    assert [(p["size"], p["kind"]) for p in points] == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]


def test_axes_below_and_of_a_nested_model():
    assert expand({"inner": {"width": [1, 2]}}, Outer) == [{"inner": {"width": 1}}, {"inner": {"width": 2}}]
    points = expand({"inner": [None, {"width": [1, 2]}]}, Outer)
    assert points == [{"inner": None}, {"inner": {"width": 1}}, {"inner": {"width": 2}}]


def test_a_list_field_takes_a_list_as_its_value_and_a_list_of_lists_as_an_axis():
    assert expand({"betas": [0.9, 0.95]}, Outer) == [{"betas": [0.9, 0.95]}]
    assert expand({"betas": [[0.9, 0.95], [0.8, 0.9]]}, Outer) == [{"betas": [0.9, 0.95]}, {"betas": [0.8, 0.9]}]
    assert expand({"inner": {"names": ["a", "b"]}}, Outer) == [{"inner": {"names": ["a", "b"]}}]


def test_logspace():
    (lrs,) = zip(*(p.values() for p in expand({"size": {"logspace": [-4, -2, 5]}}, Outer)), strict=True)
    assert lrs == pytest.approx([10 ** (-4 + i / 2) for i in range(5)], rel=1e-7)
    # Few digits, so that the key does not depend on how a machine rounds.
    assert all(float(f"{lr:.8g}") == lr for lr in lrs)
    assert expand({"size": {"logspace": [-3, -1, 1]}}, Outer) == [{"size": 1e-3}]
    assert [p["size"] for p in expand({"size": [5, {"logspace": [0, 1, 2]}]}, Outer)] == [5, 1.0, 10.0]


@pytest.mark.parametrize(
    "value", [[-4, -2], [-4, -2, 0], [-4, -2, 2.5], ["a", 1, 2], [0, 400, 2], [0, math.inf, 2], 3, None]
)
def test_bad_logspace(value):
    with pytest.raises(ConfigError, match=r"logspace: .* must be \[first exponent, last exponent, count\]"):
        expand({"size": {"logspace": value}}, Outer)


@pytest.mark.parametrize("data", [{"size": []}, {"inner": {"width": []}}, {"size": [1, 2], "kind": []}])
def test_an_axis_without_values_is_an_error_that_names_it(data):
    with pytest.raises(ConfigError, match=r"the grid is empty: '(size|width|kind)' is an axis without values"):
        expand(data, Outer)


@pytest.mark.usefixtures("plugin")
def test_a_layers_options_are_axes_by_the_mixers_own_fields():
    layers = ["attention", {"mixer": "running_mean", "seconds": [0.0, 0.5], "behaviour": ["good", "raise"]}]
    points = expand({"d_model": 8, "layers": layers}, ModelConfig)
    assert len(points) == 4
    assert all(p["layers"][0] == "attention" for p in points)
    assert [p["layers"][1]["seconds"] for p in points] == [0.0, 0.0, 0.5, 0.5]


@pytest.mark.usefixtures("plugin")
def test_the_mixer_and_the_pattern_are_axes_too():
    by_mixer = expand({"layers": [{"mixer": ["attention", "running_mean"]}]}, ModelConfig)
    assert [p["layers"][0]["mixer"] for p in by_mixer] == ["attention", "running_mean"]
    by_pattern = expand({"layers": [["attention"], ["running_mean", "attention"]]}, ModelConfig)
    assert [p["layers"] for p in by_pattern] == [["attention"], ["running_mean", "attention"]]


@pytest.mark.usefixtures("plugin")
def test_a_slices_options_and_its_number_of_examples_are_axes():
    train = [{"task": "first_token", "seq_len": [8, 16], "examples": [64, 128]}]
    points = expand({"data": {"train": train}}, Trial)
    assert [(e["seq_len"], e["examples"]) for p in points for e in p["data"]["train"]] == [
        (8, 64),
        (8, 128),
        (16, 64),
        (16, 128),
    ]


def test_an_unknown_mixer_in_a_grid():
    with pytest.raises(UnknownNameError, match=r"unknown mixer 'atention'. Did you mean 'attention'?"):
        expand({"layers": [{"mixer": "atention"}]}, ModelConfig)
