"""embedding_norm: both backends against the two ops it stands for, alone and as a pack."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.embedding_norm import embedding_norm
from zoo.kernels.residual_norm import ResidualNorm, residual_norm
from zoo.kernels.token_embedding import token_embedding
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["residual_norm"][torch.float32]


def tokens_of(*shape: int, V: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(0))


def two(tokens: Tensor, table: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> ResidualNorm:
    x = token_embedding(tokens, table, impl="reference")
    return residual_norm(x, None, weight, bias, impl="reference", **options)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("B", "T", "V", "D"), [(1, 1, 1, 2), (2, 17, 9, 20), (3, 40, 30, 128)])
def test_outputs_and_gradients(impl: str, B: int, T: int, V: int, D: int) -> None:
    tokens = tokens_of(B, T, V=V)
    a = inputs(T, {"table": "VD", "weight": "D", "bias": "D"}, V=V, D=D)
    check_op(partial(two, tokens), partial(embedding_norm, tokens, impl=impl), a, FP32)
    del a["bias"]
    rms = {"kind": "rms", "eps": 1e-6}
    check_op(partial(two, tokens, **rms), partial(embedding_norm, tokens, impl=impl, **rms), a, FP32)


def test_a_pack_is_one_call() -> None:
    pytest.importorskip("triton")
    tokens = tokens_of(3, 2, 9, V=5)
    a = inputs(9, {"table": "PVD", "weight": "PD", "bias": "PD"}, P=3, V=5, D=8)

    def loop(**b: Tensor) -> tuple[Tensor, ...]:
        each = [two(*row) for row in zip(tokens, *b.values(), strict=True)]
        return tuple(torch.stack(column) for column in zip(*each, strict=True))

    def pack(**b: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.func.vmap(partial(embedding_norm, impl="triton"))(tokens, *b.values()))

    check_op(loop, pack, a, FP32)


def test_dtypes_and_what_does_not_fit() -> None:
    tokens = tokens_of(2, 3, V=4)
    table, weight = torch.rand(4, 8), torch.rand(8)
    for impl in ("chunked", "triton"):
        with torch.autocast("cpu", torch.bfloat16):
            assert [x.dtype for x in embedding_norm(tokens, table, weight, impl=impl)] == [
                torch.float32,
                torch.bfloat16,
            ]
    with pytest.raises(UnsupportedError, match=r"tokens are torch\.float32"):
        embedding_norm(tokens.float(), table, weight)
    with pytest.raises(UnsupportedError, match="weight has shape"):
        embedding_norm(tokens, table, weight[:7])


def first_two(
    tokens: Tensor, positions: Tensor | None, table: Tensor, weight: Tensor, after: Tensor, *, impl: str
) -> tuple[Tensor, ...]:
    """Two norms of a stream that a layer's output is added to between them."""
    if impl == "reference":
        x, normed = two(tokens, table, weight)
        return residual_norm(x, normed.sin(), after, positions=positions, impl=impl)
    x, normed = embedding_norm(tokens, table, weight, lookup=True, impl=impl)
    return residual_norm(x, normed.sin(), after, positions=positions, lookup=(tokens, table), impl=impl)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("asked", [False, True])
def test_a_stream_that_is_looked_up_where_it_is_added_to(impl: str, asked: bool) -> None:
    tokens, positions = tokens_of(3, 12, V=9), tokens_of(3, 5, V=12) if asked else None
    a = inputs(12, {"table": "VD", "weight": "D", "after": "D"}, V=9, D=20)
    op = partial(first_two, tokens, positions)
    check_op(partial(op, impl="reference"), partial(op, impl=impl), a, FP32)


def test_a_pack_looks_up_in_tables_of_its_own() -> None:
    pytest.importorskip("triton")
    tokens, positions = tokens_of(3, 2, 12, V=9), tokens_of(3, 2, 5, V=12)
    a = inputs(12, {"table": "PVD", "weight": "PD", "after": "PD"}, P=3, V=9, D=20)

    def each(*b: Tensor) -> tuple[Tensor, ...]:
        results = [first_two(*row, impl="reference") for row in zip(tokens, positions, *b, strict=True)]
        return tuple(torch.stack(column) for column in zip(*results, strict=True))

    def pack(*b: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.func.vmap(partial(first_two, impl="triton"))(tokens, positions, *b))

    def named(op: Any) -> Any:
        return lambda table, weight, after: op(table, weight, after)

    check_op(named(each), named(pack), a, FP32)
