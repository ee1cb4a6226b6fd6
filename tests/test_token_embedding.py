"""token_embedding: the lookup and its gradient, with rare, absent and frequent tokens, alone and as a pack."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from zoo.errors import UnsupportedError
from zoo.kernels.token_embedding import token_embedding
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["token_embedding"][torch.float32]


def tokens_of(*shape: int, V: int, filler: float = 0.0, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, shape, generator=draw, dtype=torch.int32)
    return torch.where(torch.rand(shape, generator=draw) < filler, 0, tokens)


def table_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("shape", "V", "D"), [((1,), 1, 1), ((3, 17), 40, 20), ((2, 2, 9), 3, 64)])
def test_rows_and_gradients(impl: str, shape: tuple[int, ...], V: int, D: int) -> None:
    op = partial(token_embedding, tokens_of(*shape, V=V))
    check_op(partial(op, impl="reference"), partial(op, impl=impl), {"table": table_of(V, D)}, FP32)


@pytest.mark.parametrize("filler", [0.0, 0.5, 1.0])
def test_frequent_tokens_are_added_up_by_blocks(filler: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("zoo.kernels.token_embedding.triton"), "LIMIT", 8)
    for V in (2, 5, 30):
        op = partial(token_embedding, tokens_of(61, V=V, filler=filler))
        check_op(partial(op, impl="reference"), partial(op, impl="triton"), {"table": table_of(V, 6)}, FP32)


def test_a_pack_has_tables_of_its_own() -> None:
    pytest.importorskip("triton")
    tokens = tokens_of(3, 4, 10, V=12)

    def each(table: torch.Tensor) -> torch.Tensor:
        return torch.stack([token_embedding(t, one, impl="reference") for t, one in zip(tokens, table, strict=True)])

    def pack(table: torch.Tensor) -> Any:
        return torch.func.vmap(partial(token_embedding, impl="triton"))(tokens, table)

    check_op(each, pack, {"table": table_of(3, 12, 8)}, FP32)


def test_what_does_not_fit() -> None:
    with pytest.raises(UnsupportedError, match=r"tokens are torch.float32; give torch.int32 or torch.int64"):
        token_embedding(torch.rand(3), table_of(2, 2))
    with pytest.raises(UnsupportedError, match="table has shape"):
        token_embedding(tokens_of(3, V=2), table_of(2, 2, 2))
