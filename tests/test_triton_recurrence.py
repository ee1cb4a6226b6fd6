"""The Triton backend of linear_recurrence, in the interpreter, against the recurrence in fp64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from triton_cases import EXTREME_DECAYS, LENGTHS, decays, inputs

from zoo.errors import UnsupportedError
from zoo.kernels.linear_recurrence import linear_recurrence
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

pytest.importorskip("zoo.kernels.linear_recurrence.triton")

from zoo.kernels.launch import INTERPRETED, Config, forced
from zoo.kernels.linear_recurrence import scalar

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton is imported"),
    # Scores of pairs that are then masked out may be infinite.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in matmul:RuntimeWarning"),
]

DECAYS = {"none": None, "head": "H", "step": "BTH", "channel": "BTHK", "bonus": "BTHK"}
TOLERANCE = TOLERANCES["linear_recurrence"]


def arguments(kind, T, *, extreme=None, state=True, dtype=torch.float32, seed=0, **sizes):
    """kind: a key of DECAYS; "bonus" is RWKV-6, whose channels decay too."""
    sizes = {"B": 1, "H": 1, "K": 17, "V": 5} | sizes
    shapes = {"q": "BTHK", "k": "BTHK", "v": "BTHV", "skip": "H"} | ({"bonus": "HK"} if kind == "bonus" else {})
    x = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs(T, shapes, seed=seed, **sizes).items()}
    if state:
        x |= inputs(T, {"initial_state": "BHKV"}, seed=seed + 1, **sizes)
    if DECAYS[kind]:
        x["decay"] = decays(*({"T": T, **sizes}[letter] for letter in DECAYS[kind]), extreme=extreme, seed=seed)
    return x


def check(x, dtype=torch.float32):
    check_op(
        partial(linear_recurrence, impl="reference"), partial(linear_recurrence, impl="triton"), x, TOLERANCE[dtype]
    )


@pytest.mark.parametrize("kind", ["none", "step", "bonus"])
@pytest.mark.parametrize("T", LENGTHS)
def test_is_the_recurrence(T, kind):
    check(arguments(kind, T))


@pytest.mark.parametrize("kind", ["head", "channel"])
@pytest.mark.parametrize("T", [1, 17, 33])
def test_the_other_decays(T, kind):
    check(arguments(kind, T))


@pytest.mark.parametrize("extreme", EXTREME_DECAYS)
@pytest.mark.parametrize("kind", ["head", "step", "channel", "bonus"])
def test_extreme_decays(kind, extreme):
    check(arguments(kind, 33, extreme=extreme))


@pytest.mark.parametrize("kind", ["step", "bonus"])
@pytest.mark.parametrize("chunk", [32, 64])
def test_every_chunk(kind, chunk):
    """The chunks of 16-bit inputs, which the interpreter would only meet in fp16."""
    config = Config(chunk=chunk, block=32, num_warps=1, num_stages=1)
    kernel = "channel_prepare" if kind == "bonus" else "scalar_forward"
    with forced(f"linear_recurrence.{kernel}", config):
        check(arguments(kind, chunk + 2))
        check(arguments(kind, chunk + 2, extreme=-20.0))


@pytest.mark.parametrize("kind", DECAYS)
def test_several_sequences_heads_and_blocks(kind):
    check(arguments(kind, 3, B=2, H=2, K=65 if kind in ("step", "bonus") else 3, V=33))


@pytest.mark.parametrize("kind", DECAYS)
def test_without_states_and_with_any_strides(kind):
    x = arguments(kind, 18, H=2, state=False)
    # Heads before time, and channels not next to each other.
    for name in set(x) - {"bonus", "skip"} - ({"decay"} if kind == "head" else set()):
        x[name] = x[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    x["v"] = x["v"].detach().mT.contiguous().mT.requires_grad_()

    def output(impl, **tensors):
        return linear_recurrence(**tensors, impl=impl, return_state=False)[0]

    check_op(partial(output, "reference"), partial(output, "triton"), x, TOLERANCE[torch.float32])


@pytest.mark.parametrize("kind", DECAYS)
def test_half_precision(kind):
    check(arguments(kind, 66, dtype=torch.float16), torch.float16)


@pytest.mark.parametrize("kind", ["head", "step"])
def test_bonus_with_any_decay(kind):
    x = arguments(kind, 18, H=2)
    x["bonus"] = inputs(1, {"bonus": "HK"}, H=2, K=17)["bonus"]
    check(x)


@pytest.mark.parametrize("kind", ["head", "step"])
@pytest.mark.parametrize("V", [5, 65])
def test_a_decay_that_needs_no_gradient(V, kind):
    """Small heads take one walk back then, large ones do not."""
    x = arguments(kind, 34, K=3, V=V)
    x["decay"].requires_grad_(False)
    check(x)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(("kind", "alone"), [("none", True), ("head", True), ("head", False), ("step", False)])
def test_one_program_or_two_walk_back(kind, alone, copy, monkeypatch):
    """With tiles that the GPU copies (whole, of 16 bits; forward where programs are many), and with others."""
    monkeypatch.setattr(scalar, "walks_alone", lambda q: alone)
    monkeypatch.setattr(scalar, "crowded", lambda q: alone)
    dtype, T = (torch.float16, 128) if copy else (torch.float32, 34)
    x = arguments(kind, T, K=32, V=16, dtype=dtype)
    if kind != "none":
        x["decay"].requires_grad_(False)
    assert scalar.copies_tiles(64, x["q"], x["k"], x["v"]) == copy
    check(x, dtype)


@pytest.mark.parametrize("T", [64, 128])
def test_gradient_of_a_decay_from_copied_tiles(T, monkeypatch):
    """Heads next to each other, and two chunks a program; one chunk with fewer registers."""
    monkeypatch.setattr(scalar, "chunks_of_a_program", lambda q, v, chunks: math.gcd(chunks, 2))
    monkeypatch.setattr(scalar, "crowded", lambda q: True)
    x = arguments("step", T, H=2, K=32, V=16, dtype=torch.float16)
    assert scalar.copies_tiles(64, x["q"], x["k"], x["v"])
    check(x, torch.float16)


def test_states_that_were_not_kept(monkeypatch):
    """Nothing but a decay per head needs them then, and only for its own gradient."""
    monkeypatch.setattr(scalar, "walks_alone", lambda q: False)
    x = arguments("head", 34, H=2, K=3)
    assert (
        torch.ops.zoo.linear_recurrence(x["q"], x["k"], x["v"], x["decay"][None], None, None, False, True)[2].numel()
        == 0
    )
    check(x)


def test_rows_that_no_copy_can_have():
    q = torch.zeros(2, 64, 2, 32, dtype=torch.float16)
    assert scalar.copies_tiles(64, q, q[..., :16], q[:, :, :1].expand(-1, -1, 2, -1))
    assert not scalar.copies_tiles(64, q.float())
    assert not scalar.copies_tiles(128, q)
    assert not scalar.copies_tiles(64, q[..., :24])
    assert not scalar.copies_tiles(64, q.new_zeros(q.numel() + 1)[1:].view_as(q))
    assert not scalar.copies_tiles(64, q.transpose(1, 2).contiguous().transpose(1, 2))
    assert not scalar.copies_tiles(64, q[:1].expand(2, -1, -1, -1))
    assert not scalar.copies_tiles(64, q[:1, :1].expand(2, 64, -1, -1))


def test_large_heads_without_a_decay():
    check(arguments("none", 34, K=65, V=3))


@pytest.mark.parametrize("kind", ["step", "channel", "bonus"])
def test_no_bit_of_an_output_depends_on_later_tokens(kind):
    T = 18
    x, other = (arguments(kind, T, state=False, seed=seed) for seed in range(2))
    # A sequence has other tokens from its place on; the last has none.
    places = (1, 3, 6, 12, 17, T)
    changed = (torch.arange(T) >= torch.tensor(places)[:, None])[:, :, None, None]
    for name in ("q", "k", "v", "decay"):
        each = changed if x[name].dim() == 4 else changed[..., 0]
        x[name] = torch.where(each, other[name], x[name])
    with torch.no_grad():
        o, _ = linear_recurrence(**x, impl="triton")
    for n, place in enumerate(places):
        assert torch.equal(o[n, :place], o[-1, :place]), place


def test_less_than_e_to_the_minus_20_is_nothing():
    """Channels that forget all: finite, and as the recurrence has it but for what e^-20 keeps."""
    x = arguments("channel", 18)
    x["decay"] = torch.full_like(x["decay"], -200.0)
    with torch.no_grad():
        o, S = linear_recurrence(**x, impl="triton")
        expected_o, expected_S = linear_recurrence(**x, impl="reference")
    torch.testing.assert_close(o, expected_o)
    torch.testing.assert_close(S, expected_S)


@pytest.mark.parametrize("kind", ["none", "step", "bonus"])
def test_vmap_folds_the_batch(kind):
    """A pack of models: forward and gradients."""
    packs = [arguments(kind, 3, K=3, V=3, seed=seed) for seed in range(2)]
    names = list(packs[0])

    def run(*tensors):
        return linear_recurrence(**dict(zip(names, tensors, strict=True)), impl="triton")

    def loss(o, S):
        return o.square().sum() + S.sin().sum()

    stacked = [torch.stack([pack[name].detach() for pack in packs]).requires_grad_() for name in names]
    together = torch.autograd.grad(loss(*torch.func.vmap(run)(*stacked)), stacked)
    for n, pack in enumerate(packs):
        alone = torch.autograd.grad(loss(*run(*pack.values())), list(pack.values()))
        for name, one, both in zip(names, alone, together, strict=True):
            torch.testing.assert_close(both[n], one, msg=name)


@pytest.mark.parametrize("kind", ["none", "step"])
def test_opcheck_scalar(kind):
    x = arguments(kind, 2, B=2, K=3, V=3)
    skip = x["skip"].detach().expand(2, 1).requires_grad_()
    given = (x["q"], x["k"], x["v"], x.get("decay"), skip, x["initial_state"], True, True)
    torch.library.opcheck(torch.ops.zoo.linear_recurrence.default, given)


def test_opcheck_channels():
    x = arguments("bonus", 2, K=3, V=3)
    bonus = x["bonus"].detach()[None].requires_grad_()
    given = (x["q"], x["k"], x["v"], x["decay"], bonus, x["initial_state"], True, True)
    torch.library.opcheck(torch.ops.zoo.linear_recurrence_channels.default, given)


def test_refuses_what_the_kernels_cannot_do():
    with pytest.raises(UnsupportedError, match="257"):
        linear_recurrence(**arguments("none", 1, K=257), impl="triton")
    double = {name: t.detach().double() for name, t in arguments("step", 1).items()}
    with pytest.raises(UnsupportedError, match="float64"):
        linear_recurrence(**double, impl="triton")
