"""zoo bench kernels, as far as it goes without a GPU: its cases, its arguments, its files."""

from __future__ import annotations

import csv

import pytest
import torch
from click.testing import CliRunner

from zoo.bench import kernels
from zoo.bench.case import Draw, Shape, load_cases, select
from zoo.bench.cases import answer_loss
from zoo.bench.check import Result
from zoo.bench.kernels import Clock, Timing, Trial, command, parse_dtypes, parse_shape, table_line
from zoo.bench.output import csv_lines
from zoo.bench.tuning import share_of_tuning
from zoo.errors import ConfigError, UnsupportedError
from zoo.kernels.launch import Config, configured, forced
from zoo.testing.ops import op_errors
from zoo.testing.tolerances import TOLERANCES

TINY = Shape(1, 18, 2, 16)


@pytest.mark.parametrize("name", load_cases())
def test_a_case_compares_one_function_with_itself(name, monkeypatch):
    """ours, reference and torch take the case's inputs and agree on them; its costs are those of its shapes."""
    # The interpreter would take half a minute for the real vocabulary.
    monkeypatch.setattr(answer_loss, "V", 256)
    (case,) = [c for c in select(name) if c.name == name]
    inputs = case.inputs(TINY, Draw("cpu", torch.float32, 0))
    tolerance = TOLERANCES[case.tolerance][torch.float32]
    for op in (case.ours, case.torch):
        if op is not None:
            assert max(op_errors(case.reference, op, inputs).values()) <= 10 * tolerance
    for shape in case.shapes:
        forward = case.forward(shape)
        assert min(forward.bytes(), forward.flops) > 0
        if case.both is not None:
            both = case.both(shape)
            assert both.bytes() > forward.bytes()
            assert both.flops > forward.flops
        for configs in case.configs(shape).values():
            assert len(set(configs)) == len(configs) > 1
    other = case.inputs(TINY, Draw("cpu", torch.float32, 1))
    assert any(not torch.equal(inputs[n], other[n]) for n in inputs)


def test_a_check_that_raises_has_failed_and_the_others_go_on(monkeypatch, capsys):
    def check(case, shape, dtype, seeds):
        if dtype == torch.float16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.\nMore.")
        yield Result(case.name, shape, "bfloat16", "fp64 reference", seeds, "dq", 1e-3, 1e-2)

    monkeypatch.setattr(kernels, "check_seeds", check)
    dtypes = (torch.float16, torch.bfloat16)
    first, second = kernels.checks(select("wkv"), [TINY], dtypes, 2, False, Clock(60))
    assert (first.passed, second.passed) == (False, True)
    assert first.worst == "OutOfMemoryError: CUDA out of memory. Tried to allocate 8 GiB."
    assert capsys.readouterr().out.startswith("FAIL wkv")


def test_selection():
    names = [c.name for c in select("linear_recurrence.gla,taylor_attention.f")]
    assert names == ["linear_recurrence.gla", *(f"taylor_attention.f{K}" for K in (8, 24, 32))]
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
    assert "--device cpu" in str(result.exception)


def test_a_forced_config_holds_for_its_kernel_and_its_time():
    def rule(size: int) -> Config:
        return Config(size, 64, 4, 2)

    other = Config(16, 16, 1, 1)
    with forced("a", other):
        assert configured("a", rule, 32) == other
        assert configured("b", rule, 32) == rule(32)
    assert configured("a", rule, 32) == rule(32)


def test_a_line_is_on_disk_as_soon_as_it_is_added(tmp_path):
    file = tmp_path / "sweep.csv"

    def rows() -> list[dict[str, str]]:
        return list(csv.DictReader(file.read_text().splitlines()))

    with csv_lines(file) as add:
        assert rows() == []
        add(Trial("case", TINY, "kernel", "16 64 4 2", 0.123456789))
        assert rows() == [
            {
                "case": "case",
                "shape": str(TINY),
                "kernel": "kernel",
                "config": "16 64 4 2",
                "ms": "0.123457",
                "why": "",
            }
        ]
        add(Trial("case", TINY, "k", "1 2 3 4", None, "no, not so"))
        assert [row["ms"] for row in rows()] == ["0.123457", ""]
    assert rows()[1]["why"] == "no, not so"


def test_the_table_compares_with_the_fastest_peer_and_the_floor():
    timing = Timing("case", TINY, "bfloat16", "fwd", "graph", "zoo", 0.5, 0.1, 0.25)
    slow, fast = timing._replace(who="slow", ms=3.0), timing._replace(who="fast", ms=1.0)
    refused = timing._replace(who="picky", ms=None, why="RuntimeError: not here")
    first, *others = table_line([timing, slow, refused, fast, timing._replace(who="torch", ms=4.0)]).splitlines()
    assert " ".join(first.split()) == f"case {TINY} fwd graph 0.5000 1.0000 4.0000 0.2500 2.00 2.0 fast"
    assert [line.strip() for line in others] == ["picky: RuntimeError: not here"]
    assert " ".join(table_line([timing]).split()[4:]) == "0.5000 - - 0.2500 - 2.0"
    failed = table_line([timing._replace(ms=None, why="failed"), fast])
    assert " ".join(failed.split()[4:10]) == "- 1.0000 - 0.2500 - -"


def test_every_shape_has_a_line_of_all_contenders(monkeypatch, capsys):
    def time_one(case, shape, who, load, eager, rates):
        for which in ("fwd", "fwdbwd"):
            yield Timing(case.name, shape, "bfloat16", which, "graph", who, 1.0 if who == "zoo" else 2.0, 0.5, 0.1)

    monkeypatch.setattr(kernels, "time_one", time_one)
    (gla,) = select("linear_recurrence.gla")
    measured = list(kernels.timings([gla], [TINY], True, False, {}, Clock(60)))
    assert [t.who for t in measured] == [who for who in ("zoo", "fla chunk_gla") for _ in range(2)]
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split()[:6] == ["case", "shape", "pass", "mode", "ours", "ms"]
    assert [line.split()[2] for line in lines] == ["fwd", "fwdbwd"]
    assert all(line.endswith("1.0000   2.0000        -   0.5000      2.00        2.0  fla chunk_gla") for line in lines)
    plain = list(kernels.timings([gla], [TINY], False, False, {}, Clock(60)))
    assert [t.who for t in plain] == [who for who in ("zoo", "torch") for _ in range(2)]
    assert "1.0000        -   2.0000   0.5000" in capsys.readouterr().out
    assert list(kernels.timings([gla], [TINY], True, False, {}, Clock(0))) == []


def test_a_missing_number_fails_a_check():
    passed = Result("case", TINY, "bfloat16", "check", 1, "dq", 0.01, 0.01)
    assert passed.passed
    assert not passed._replace(error=float("nan")).passed
    assert not passed._replace(error=0.011).passed


def test_processes_share_what_a_peer_tunes():
    """Each runs its part of the configs, once; together they run all."""
    triton = pytest.importorskip("triton")
    tl = triton.language
    tried = []

    def note(arguments):
        tried.append(arguments["BLOCK"])

    configs = [triton.Config({"BLOCK": 2**i}, pre_hook=note) for i in range(5)]

    @triton.autotune(configs, key=["n"], cache_results=True)
    @triton.jit
    def fill(x, n, BLOCK: tl.constexpr):
        tl.store(x + tl.arange(0, BLOCK), BLOCK)

    parts = []
    for part in range(3):
        fill.cache.clear()
        with share_of_tuning(part, 3):
            fill[(1,)](torch.zeros(16), 16)
        # The one that is chosen runs once more.
        parts.append(set(tried))
        tried.clear()
    assert parts == [{1, 8}, {2, 16}, {4}]
