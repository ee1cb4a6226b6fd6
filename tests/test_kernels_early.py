"""Kernels that start early are right only if each waits before it reads: all do so in their first line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import zoo.kernels

FILES = sorted(p for p in Path(zoo.kernels.__file__).parent.rglob("*.py") if "@kernel" in p.read_text())


def functions(path: Path) -> list[ast.FunctionDef]:
    return [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]


def decorators(function: ast.FunctionDef) -> list[str]:
    return [ast.unparse(d).partition("(")[0] for d in function.decorator_list]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_kernel_waits_for_earlier_ones_before_anything_else(path):
    for function in functions(path):
        if "kernel" in decorators(function):
            body = function.body[1:] if ast.get_docstring(function) else function.body
            assert ast.unparse(body[0]) == "wait_for_earlier()", f"{function.name} touches memory before it waits"


def test_every_kernel_that_is_launched_starts_early():
    for path in Path(zoo.kernels.__file__).parent.rglob("*.py"):
        late = [f.name for f in functions(path) if f.name.endswith("_kernel") and "triton.jit" in decorators(f)]
        assert not late, f"{path}: {late}"
