"""zoo bench kernels, as far as it goes without a GPU: its cases, its arguments, its files."""

from __future__ import annotations

import csv

import pytest
import torch
from click.testing import CliRunner

from zoo.bench.case import Draw, Shape, load_cases, select
from zoo.bench.check import Result
from zoo.bench.kernels import Trial, command, parse_dtypes, parse_shape, write
from zoo.errors import ConfigError, UnsupportedError
from zoo.kernels.launch import Config, configured, forced
from zoo.testing.ops import op_errors
from zoo.testing.tolerances import TOLERANCES

TINY = Shape(1, 18, 2, 16)


@pytest.mark.parametrize("name", load_cases())
def test_a_case_compares_one_function_with_itself(name):
    """ours, reference and torch take the case's inputs and agree on them; its costs are those of its shapes."""
    (case,) = [c for c in select(name) if c.name == name]
    inputs = case.inputs(TINY, Draw("cpu", torch.float32, 0))
    tolerance = TOLERANCES[case.tolerance][torch.float32]
    for op in (case.ours, case.torch):
        if op is not None:
            assert max(op_errors(case.reference, op, inputs).values()) <= 10 * tolerance
    for shape in case.shapes:
        forward, both = case.forward(shape), case.both(shape)
        assert 0 < forward.bytes() < both.bytes()
        assert 0 < forward.flops < both.flops
        for kernel, configs in case.configs(shape).items():
            assert kernel.endswith(("forward", "backward", "prepare", "finish"))
            assert len(set(configs)) == len(configs) > 1
    other = case.inputs(TINY, Draw("cpu", torch.float32, 1))
    assert any(not torch.equal(inputs[n], other[n]) for n in inputs)


def test_selection():
    names = [c.name for c in select("linear_recurrence.gla,taylor")]
    assert names == ["linear_recurrence.gla", "taylor_attention"]
    with pytest.raises(ConfigError, match=r"no case 'linear_recurence.gla'. Did you mean 'linear_recurrence.gla'"):
        select("linear_recurence.gla")


def test_shapes_and_dtypes_from_the_command_line():
    assert parse_shape("B256_T64_H2_D32") == Shape(256, 64, 2, 32)
    assert str(parse_shape("B256_T64_H2_D32")) == "B256_T64_H2_D32"
    for text in ("256_64_2_32", "B1_T2_H3", "B0_T2_H3_D4", "B1_T2_H3_Dx"):
        with pytest.raises(ConfigError, match=text):
            parse_shape(text)
    assert parse_dtypes("float16,bfloat16") == (torch.float16, torch.bfloat16)
    with pytest.raises(ConfigError, match="float8"):
        parse_dtypes("float8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    result = CliRunner().invoke(command, ["--out", str(tmp_path)])
    assert isinstance(result.exception, UnsupportedError)
    assert "CUDA" in str(result.exception)


def test_a_forced_config_holds_for_its_kernel_and_its_time():
    def rule(size: int) -> Config:
        return Config(size, 64, 4, 2)

    other = Config(16, 16, 1, 1)
    with forced("a", other):
        assert configured("a", rule, 32) == other
        assert configured("b", rule, 32) == rule(32)
    assert configured("a", rule, 32) == rule(32)


def test_files(tmp_path):
    lines = [
        Trial("case", TINY, "kernel", Config(16, 64, 4, 2), 0.5),
        Trial("case", TINY, "k", Config(1, 2, 3, 4), None, "no"),
    ]
    write(tmp_path / "sweep.csv", lines)
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["ms"] for r in rows] == ["0.5", ""]
    assert rows[0]["config"] == "16 64 4 2"
    assert rows[0]["shape"] == str(TINY)


def test_a_missing_number_fails_a_check():
    passed = Result("case", TINY, "bfloat16", "check", 1, "dq", 0.01, 0.01)
    assert passed.passed
    assert not passed._replace(error=float("nan")).passed
    assert not passed._replace(error=0.011).passed
