"""The Triton backend of the delta rules, in the interpreter, against the recurrence in fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_cases import EXTREME_DECAYS, LENGTHS, decays, inputs

from zoo.errors import UnsupportedError
from zoo.kernels.delta_rule import delta_rule, generalized_delta_rule, packed_delta_rule
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

pytest.importorskip("zoo.kernels.delta_rule.triton")

from zoo.kernels.launch import INTERPRETED, Config, forced

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton is imported")

RULES = {"delta_rule": delta_rule, "generalized_delta_rule": generalized_delta_rule}
SHAPES = {"step": "BTH", "channel": "BTHK"}


def arguments(name, T, decay=None, *, extreme=None, state=True, dtype=torch.float32, seed=0, **sizes):
    """Unit keys, beta in [0, 2], and for the generalised rule a = -kappa, b = eta kappa with eta in [0, 1]."""
    sizes = {"B": 1, "H": 1, "K": 17, "V": 5} | sizes
    shapes = {"q": "BTHK", "k": "BTHK", "v": "BTHV"}
    shapes |= {"beta": "BTH"} if name == "delta_rule" else {"a": "BTHK", "b": "BTHK"}
    if state:
        shapes["initial_state"] = "BHKV"
    x = {key: t.detach() for key, t in inputs(T, shapes, seed=seed, **sizes).items()}
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    if name == "delta_rule":
        x["beta"] = 2 * x["beta"].sigmoid()
    else:
        x["a"] = torch.nn.functional.normalize(x["a"], dim=-1)
        x["b"] = -x["a"] * x["b"].sigmoid()
    x = {key: (t if key == "initial_state" else t.to(dtype)).requires_grad_() for key, t in x.items()}
    if decay is not None:
        shape = [{"T": T, **sizes}[letter] for letter in SHAPES[decay]]
        x["decay"] = decays(*shape, extreme=extreme, seed=seed)
    return x


def packed(T, decay=None, *, H=1, K=17, V=5, **sizes):
    """What `packed_delta_rule` takes: queries, keys and values in one, of any length."""
    x = arguments("delta_rule", T, decay, H=H, K=K, V=V, **sizes)
    size = {"H": H, "C": H * (2 * K + V), **sizes}
    return inputs(T, {"qkv": "BTC"}, **{"B": 1} | size) | {key: x[key] for key in x if key not in "qkv"}


def check(name, x, dtype=torch.float32, **options):
    rule = partial(RULES[name], **options)
    check_op(partial(rule, impl="reference"), partial(rule, impl="triton"), x, TOLERANCES[name][dtype])


@pytest.mark.parametrize(("name", "decay"), [("delta_rule", None), ("delta_rule", "step")])
@pytest.mark.parametrize("T", LENGTHS)
def test_delta_rule_is_the_recurrence(T, name, decay):
    check(name, arguments(name, T, decay))


@pytest.mark.parametrize("decay", [None, "step"])
def test_packed_delta_rule_is_the_recurrence(decay):
    rule = partial(packed_delta_rule, key_dim=17)
    x = packed(18, decay, B=2, H=2)
    check_op(partial(rule, impl="reference"), partial(rule, impl="triton"), x, TOLERANCES["delta_rule"][torch.float32])


@pytest.mark.parametrize("T", LENGTHS)
def test_generalized_delta_rule_is_the_recurrence(T):
    check("generalized_delta_rule", arguments("generalized_delta_rule", T, "channel"))


@pytest.mark.parametrize(
    ("name", "T"), [("generalized_delta_rule", 1), ("generalized_delta_rule", 65), ("delta_rule", 33)]
)
def test_decays_with_a_bound(name, T):
    x = arguments(name, T, "channel")
    x["decay"] = (0.03 * x["decay"].detach()).requires_grad_()
    check(name, x, min_decay=-0.6)


@pytest.mark.parametrize(
    ("name", "decay"), [("delta_rule", "channel"), ("generalized_delta_rule", None), ("generalized_delta_rule", "step")]
)
def test_the_other_decays(name, decay):
    check(name, arguments(name, 17, decay))


@pytest.mark.parametrize("extreme", EXTREME_DECAYS)
@pytest.mark.parametrize(("name", "decay"), [("delta_rule", "step"), ("generalized_delta_rule", "channel")])
def test_extreme_decays(name, decay, extreme):
    check(name, arguments(name, 33, decay, extreme=extreme))


@pytest.mark.parametrize(
    ("name", "min_decay"), [("delta_rule", -0.6), ("generalized_delta_rule", -0.6), ("generalized_delta_rule", None)]
)
def test_no_bit_of_an_output_depends_on_later_tokens(name, min_decay):
    T = 18
    x, other = (arguments(name, T, "channel", state=False, seed=seed) for seed in range(2))
    # A sequence has other tokens from its place on; the last has none.
    places = (1, 3, 6, 12, 17, T)
    changed = (torch.arange(T) >= torch.tensor(places)[:, None])[..., None]
    for key in x:
        x[key] = torch.where(changed if key == "beta" else changed[..., None], other[key], x[key])
    x["decay"] = 0.03 * x["decay"]
    with torch.no_grad():
        o, _ = RULES[name](**x, min_decay=min_decay, impl="triton")
    for n, place in enumerate(places):
        assert torch.equal(o[n, :place], o[-1, :place]), place


@pytest.mark.parametrize("V", [70, 96])
@pytest.mark.parametrize(("name", "decay"), [("delta_rule", "step"), ("generalized_delta_rule", "channel")])
def test_several_sequences_heads_and_blocks_of_columns(name, decay, V):
    check(name, arguments(name, 3, decay, B=2, H=2, K=3, V=V))


@pytest.mark.parametrize(("name", "decay"), [("delta_rule", "step"), ("generalized_delta_rule", "channel")])
def test_without_states_and_with_any_strides(name, decay):
    x = arguments(name, 5, decay, H=2, state=False)
    # Heads before time, and channels not next to each other.
    x = {key: t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for key, t in x.items()}
    x["v"] = x["v"].detach().mT.contiguous().mT.requires_grad_()
    rule = partial(RULES[name], return_state=False)

    def output(impl, **tensors):
        return rule(**tensors, impl=impl)[0]

    check_op(partial(output, "reference"), partial(output, "triton"), x, TOLERANCES[name][torch.float32])


@pytest.mark.parametrize(("name", "decay"), [("delta_rule", "step"), ("generalized_delta_rule", "channel")])
def test_half_precision(name, decay):
    check(name, arguments(name, 34, decay, dtype=torch.float16), torch.float16)


@pytest.mark.parametrize(("name", "decay"), [("delta_rule", "step"), ("generalized_delta_rule", "channel")])
def test_forward_is_the_same_where_nothing_is_kept_for_gradients(name, decay):
    x = arguments(name, 18, decay)
    o, S = RULES[name](**x, impl="triton")
    with torch.no_grad():
        for got, want in zip(RULES[name](**x, impl="triton"), (o, S), strict=True):
            assert torch.equal(got, want)


def test_one_key_written_again_and_again():
    # (I + N)^-1 is small here, while the powers of N reach 10^8.
    x = arguments("delta_rule", 32, K=3)
    x["k"] = x["k"].detach()[:, :1].repeat(1, 32, 1, 1).requires_grad_()
    x["beta"] = torch.ones_like(x["beta"]).requires_grad_()
    config = Config(chunk=32, block=32, num_warps=1, num_stages=1)
    with forced("delta_rule.forward", config), forced("delta_rule.backward", config):
        check("delta_rule", x)


@pytest.mark.parametrize(("name", "decay"), [("delta_rule", "step"), ("generalized_delta_rule", "channel")])
def test_vmap_folds_the_batch(name, decay):
    """A pack of models: forward and gradients, and the backward op itself."""
    packs = [arguments(name, 3, decay, K=3, V=3, seed=seed) for seed in range(2)]
    keys = list(packs[0])

    def run(*tensors):
        return RULES[name](**dict(zip(keys, tensors, strict=True)), impl="triton")

    def loss(o, S):
        return o.square().sum() + S.sin().sum()

    stacked = [torch.stack([pack[key].detach() for pack in packs]).requires_grad_() for key in keys]
    together = torch.autograd.grad(loss(*torch.func.vmap(run)(*stacked)), stacked)
    for n, pack in enumerate(packs):
        alone = torch.autograd.grad(loss(*run(*pack.values())), list(pack.values()))
        for key, one, both in zip(keys, alone, together, strict=True):
            torch.testing.assert_close(both[n], one, msg=key)


@pytest.mark.parametrize(("name", "decay"), [("delta_rule", "step"), ("generalized_delta_rule", "channel")])
def test_vmap_of_the_backward_ops(name, decay):
    ops, given = torch.ops.zoo, []
    for seed in range(2):
        x = {key: t.detach() for key, t in arguments(name, 3, decay, K=3, V=3, seed=seed).items()}
        if name == "delta_rule":
            others = x["beta"], x["decay"], x["initial_state"]
            o, S, *kept = ops.delta_rule([x[key] for key in "qkv"], *others, 3, None, True, True)
        else:
            tensors = *(x[key] for key in "qkvab"), None, x["decay"], x["initial_state"]
            o, S, *kept = ops.generalized_delta_rule(*tensors, None, True, True)
        given.append([*x.values(), *kept, o, S])
    places = {key: place for place, key in enumerate(x)}

    def run(*tensors):
        own, rest = {key: tensors[place] for key, place in places.items()}, tensors[len(places) :]
        if name == "delta_rule":
            others = own["beta"], own["decay"], own["initial_state"]
            return ops.delta_rule_backward([own[key] for key in "qkv"], *others, *rest, 3, None)
        before = *(own[key] for key in "qkvab"), None, own["decay"], own["initial_state"]
        return ops.generalized_delta_rule_backward(*before, *rest, None, True)

    together = torch.func.vmap(run)(*map(torch.stack, zip(*given, strict=True)))
    for n, tensors in enumerate(given):
        for both, one in zip(together, run(*tensors), strict=True):
            torch.testing.assert_close(both[n], one)


@pytest.mark.parametrize("decay", [None, "step"])
def test_opcheck_delta_rule(decay):
    x = arguments("delta_rule", 2, decay, K=3, V=3)
    given = ([x["q"], x["k"], x["v"]], x["beta"], x.get("decay"), x["initial_state"], 3, None, True, True)
    torch.library.opcheck(torch.ops.zoo.delta_rule.default, given)


def test_opcheck_packed_delta_rule():
    x = packed(2, "step", K=3, V=3)
    given = ([x["qkv"]], x["beta"], x["decay"], x["initial_state"], 3, 1e-6, True, True)
    torch.library.opcheck(torch.ops.zoo.delta_rule.default, given)


def test_opcheck_generalized_delta_rule():
    x = arguments("generalized_delta_rule", 2, "channel", K=3, V=3)
    given = (*(x[key] for key in "qkvab"), None, x["decay"], x["initial_state"], None, True, True)
    torch.library.opcheck(torch.ops.zoo.generalized_delta_rule.default, given)


@pytest.mark.parametrize("name", RULES)
def test_refuses_what_the_kernels_cannot_do(name):
    wide = arguments(name, 1, K=257)
    with pytest.raises(UnsupportedError, match="257"):
        RULES[name](**wide, impl="triton")
    double = {key: t.detach().double() for key, t in arguments(name, 1).items()}
    with pytest.raises(UnsupportedError, match="float64"):
        RULES[name](**double, impl="triton")
