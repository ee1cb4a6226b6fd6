"""MQAR and set disjointness against their definitions: every invariant, the distributions, the limits, the errors."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from test_draw import surprise

from zoo.errors import ConfigError
from zoo.tasks import get_task
from zoo.tasks.base import BLOCK, Batch, Task, equivocation_bits
from zoo.tasks.mqar import MQAR
from zoo.tasks.set_disjointness import SetDisjointness
from zoo.tasks.show import render

MQARS = [
    MQAR(),
    MQAR(random_filler=True),
    MQAR(seq_len=256, num_pairs=64, random_filler=True),
    MQAR(seq_len=48, num_pairs=4, num_passes=2, random_filler=True),
    MQAR(seq_len=60, num_pairs=5, num_passes=3),
    MQAR(seq_len=28, num_pairs=7, vocab_size=16, random_filler=True, power_a=1.0),
    MQAR(seq_len=4, num_pairs=1, vocab_size=4, random_filler=True),
    MQAR(seq_len=16, num_pairs=2, vocab_size=100_000, random_filler=True),
]
SETS = [
    SetDisjointness(),
    SetDisjointness(size_a=16, size_b=4),
    SetDisjointness(first="b"),
    SetDisjointness(size_a=1, size_b=32, num_passes=2),
    SetDisjointness(size_a=32, size_b=1, first="b", num_passes=3),
    SetDisjointness(size_a=4, size_b=768),
    SetDisjointness(size_a=6, size_b=6, vocab_size=16),
]


@pytest.mark.parametrize("task", MQARS, ids=lambda t: t.slice_name)
def test_mqar_is_as_defined(task):
    batch = task.sample(1500, 3, "train")
    n, half, context = task.num_pairs, task.vocab_size // 2, 2 * task.num_pairs * task.num_passes
    assert batch.context_len == context
    keys, values = batch.tokens[:, 0 : 2 * n : 2], batch.tokens[:, 1 : 2 * n : 2]
    for drawn, low, high in ((keys, 1, half), (values, half, task.vocab_size)):
        assert drawn.min() >= low
        assert drawn.max() < high
        assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()
    assert (batch.tokens[:, :context] == np.tile(batch.tokens[:, : 2 * n], task.num_passes)).all()

    assert (np.take_along_axis(batch.tokens, batch.positions, axis=1) == keys).all()
    assert (batch.answers == values).all()
    assert batch.positions.min() >= context
    assert ((batch.positions - context) % 2 == 0).all()
    assert (np.diff(np.sort(batch.positions, axis=1), axis=1) > 0).all()

    rest = np.ones(batch.tokens.shape, bool)
    rest[:, :context] = False
    np.put_along_axis(rest, batch.positions, False, axis=1)
    filler = batch.tokens[rest].reshape(1500, task.seq_len - context - n)
    if task.random_filler:
        assert not (filler[:, :, None] == keys[:, None, :]).any()
    else:
        assert (filler == 0).all()


def test_mqar_filler_is_uniform_over_all_tokens_but_the_keys():
    task = MQAR(seq_len=16, num_pairs=2, vocab_size=10, random_filler=True)
    batch = task.sample(60_000, 0, "train")
    row = np.arange(len(batch.tokens))
    for offset in range(4, 16):
        free = ~(batch.positions == offset).any(axis=1)
        token, keys = batch.tokens[row[free], offset], batch.tokens[free, 0:4:2]
        rank = token - (keys < token[:, None]).sum(axis=1)
        assert surprise(rank, np.full(8, 1 / 8)) < 5


def test_mqar_keys_and_values_are_uniform_and_independent():
    task = MQAR(seq_len=16, num_pairs=3, vocab_size=16, num_passes=1)
    tokens = task.sample(100_000, 0, "train").tokens
    for pair in range(3):
        key, value = tokens[:, 2 * pair] - 1, tokens[:, 2 * pair + 1] - 8
        assert surprise(key * 8 + value, np.full(56, 1 / 56)) < 5
    assert surprise((tokens[:, 0] - 1) * 8 + tokens[:, 3] - 8, np.full(56, 1 / 56)) < 5


@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_mqar_queries_follow_the_power_law(power_a):
    task = MQAR(seq_len=64, num_pairs=4, power_a=power_a, vocab_size=64)
    slot = (task.sample(100_000, 0, "train").positions - 8) // 2
    weights = np.arange(1, 29) ** (power_a - 1)
    p = weights / weights.sum()
    assert surprise(slot[:, 0], p) < 5
    assert surprise(slot[:, 1], p * ((p / (1 - p)).sum() - p / (1 - p))) < 5
    # Which slots are taken, against drawing one after the other, each from what is left.
    left, taken = np.tile(p, (100_000, 1)), np.empty((100_000, 4), int)
    for j, u in enumerate(np.random.default_rng(0).random((4, 100_000))):
        share = left.cumsum(axis=1)
        taken[:, j] = (share < (u * share[:, -1])[:, None]).sum(axis=1)
        np.put_along_axis(left, taken[:, j, None], 0.0, axis=1)
    ours, theirs = (np.bincount(s.reshape(-1), minlength=28) / len(s) for s in (slot, taken))
    deviation = np.sqrt(theirs * (1 - theirs) / len(taken) + ours * (1 - ours) / len(slot))
    assert (abs(ours - theirs) < 4.5 * deviation).all()


@pytest.mark.parametrize("task", SETS, ids=lambda t: t.slice_name)
def test_set_disjointness_is_as_defined(task):
    batch = task.sample(1200, 5, "train")
    sizes = (task.size_a, task.size_b) if task.first == "a" else (task.size_b, task.size_a)
    once = sum(sizes) + 2
    assert batch.tokens.shape == (1200, task.num_passes * once + 1)
    assert batch.context_len == task.length - 1
    assert (batch.tokens[:, -1] == 3).all()
    assert (batch.tokens[:, :-1] == np.tile(batch.tokens[:, :once], task.num_passes)).all()
    assert (batch.tokens[:, 0] == 1).all()
    assert (batch.tokens[:, sizes[0] + 1] == 2).all()
    first, second = batch.tokens[:, 1 : sizes[0] + 1], batch.tokens[:, sizes[0] + 2 : once]
    for drawn in (first, second):
        assert drawn.min() >= 4
        assert drawn.max() < task.vocab_size
        assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()
    shared = first[:, :, None] == second[:, None, :]
    assert (shared.sum(axis=(1, 2)) == 1).all()
    assert (batch.positions == task.length - 1).all()
    assert (first[shared.any(axis=2)] == batch.answers[:, 0]).all()


@pytest.mark.parametrize("first", ["a", "b"])
def test_shared_token_stands_anywhere_and_is_any_token(first):
    task = SetDisjointness(size_a=4, size_b=8, vocab_size=20, first=first)
    batch = task.sample(50_000, 0, "train")
    split = 5 if first == "a" else 9
    here = batch.tokens == batch.answers
    place = np.argmax(here[:, 1:split], axis=1) * (13 - split) + np.argmax(here[:, split + 1 : 14], axis=1)
    assert surprise(place, np.full(32, 1 / 32)) < 5
    assert surprise(batch.answers[:, 0] - 4, np.full(16, 1 / 16)) < 5


def with_fixed_halves(task: SetDisjointness, n: int, seed: int) -> Batch:
    """The mistake: the same half of the vocabulary is A's in every example."""
    rng = np.random.default_rng(seed)
    halves = np.array_split(np.arange(4, task.vocab_size), 2)
    a, b = (
        rng.permuted(np.tile(half, (n, 1)), axis=1)[:, :size]
        for half, size in zip(halves, (task.size_a, task.size_b), strict=True)
    )
    shared = a[np.arange(n), rng.integers(task.size_a, size=n)]
    b[np.arange(n), rng.integers(task.size_b, size=n)] = shared
    one, two, ask = (np.full((n, 1), token) for token in (1, 2, 3))
    tokens = np.concatenate([one, a, two, b, ask], axis=1)
    return Batch(tokens, np.full((n, 1), task.length - 1), shared[:, None], task.length - 1)


def shortcut_accuracy(task: SetDisjointness, train: Batch, test: Batch) -> float:
    """Answer the token of B that was seen most in A, and least in B, in training: no look at the test example's A."""
    in_a, in_b = slice(1, task.size_a + 1), slice(task.size_a + 2, task.length - 1)
    count = [np.bincount(train.tokens[:, where].reshape(-1), minlength=task.vocab_size) for where in (in_a, in_b)]
    affinity = np.log(count[0] + 1) - np.log(count[1] + 1)
    b = test.tokens[:, in_b]
    guess = b[np.arange(len(b)), affinity[b].argmax(axis=1)]
    return float((guess == test.answers[:, 0]).mean())


@pytest.mark.parametrize(("size_a", "size_b"), [(4, 8), (8, 4)])
def test_fixed_halves_shortcut_is_closed(size_a, size_b):
    task = SetDisjointness(size_a=size_a, size_b=size_b, vocab_size=128)
    chance = 1 / size_b
    n = 10_000
    open_ = shortcut_accuracy(task, with_fixed_halves(task, n, 0), with_fixed_halves(task, n, 1))
    closed = shortcut_accuracy(task, task.sample(n, 0, "train"), task.sample(n, 0, "test"))
    assert open_ > 0.99
    assert abs(closed - chance) < 4.5 * math.sqrt(chance * (1 - chance) / n)


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        (MQAR(seq_len=256, num_pairs=64, random_filler=True), "25cb3693ae7240e0"),
        (MQAR(seq_len=64, num_pairs=4, num_passes=2, vocab_size=1000), "1f9da2585f851e18"),
        (SetDisjointness(size_a=16, size_b=256), "bd0765924a89cc37"),
        (SetDisjointness(size_a=6, size_b=6, vocab_size=16, first="b"), "c8161d3cb33ce32c"),
    ],
    ids=["mqar", "mqar twice", "sets", "small sets"],
)
def test_bytes_are_the_same_everywhere(task, digest):
    # Fails on another machine or numpy: a draw depends on it. Fails after an edit: raise the task's `version`.
    batch = task.sample(1500, 7, "test", start=1900)
    data = b"".join(a.astype("<i8").tobytes() for a in (batch.tokens, batch.positions, batch.answers))
    assert hashlib.sha256(data).hexdigest()[:16] == digest


def test_any_stretch_of_a_stream_is_the_same():
    task = MQAR()
    whole = task.sample(3 * BLOCK, 0, "train")
    assert len(np.unique(whole.tokens, axis=0)) == 3 * BLOCK
    for start, n in ((0, 0), (2 * BLOCK, 0), (BLOCK - 1, 2), (BLOCK, BLOCK), (5, 2 * BLOCK), (3 * BLOCK - 1, 1)):
        part = task.sample(n, 0, "train", start)
        for name in ("tokens", "positions", "answers"):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[start : start + n])
            assert getattr(part, name).dtype == np.int64


def test_streams_share_no_example():
    streams = [(0, "train"), (0, "validation"), (0, "test"), (1, "train"), (1, "test")]
    rows = np.concatenate([MQAR().sample(1000, seed, split).tokens for seed, split in streams])
    assert len(np.unique(rows, axis=0)) == len(rows)


BAD_MQAR = [
    ({"seq_len": 65}, "mqar: seq_len 65 is odd; pairs and query slots are two tokens wide, so use 64 or 66."),
    (
        {"num_pairs": 17},
        "num_pairs 17 is too large for seq_len 64: the context takes 34 tokens and the queries 34; use",
    ),
    ({"num_pairs": 17}, "use num_pairs <= 16 or seq_len >= 68."),
    ({"num_pairs": 12, "num_passes": 2}, "use num_pairs <= 10 or seq_len >= 72."),
    ({"seq_len": 2, "num_pairs": 1}, "the queries 2; use seq_len >= 4."),
    ({"seq_len": -4}, "too large for seq_len -4: the context takes 8 tokens and the queries 8; use seq_len >= 16."),
    ({"vocab_size": 8}, "vocab_size 8 is too small: it holds 3 keys for num_pairs 4; use vocab_size >= 10."),
    ({"vocab_size": 8191}, "vocab_size 8191 must be even (half keys, half values) and in [4, 2^31]; the published"),
    ({"vocab_size": 2**32}, "vocab_size 4294967296 must be even"),
    ({"num_pairs": 0}, "mqar: num_pairs must be at least 1, got 0."),
    ({"num_passes": 0}, "mqar: num_passes must be at least 1, got 0."),
    ({"power_a": 0.0}, "mqar: power_a 0.0 must be in (0, 10]; 0.01 is published, 1 is uniform."),
    ({"power_a": float("nan")}, "mqar: power_a nan must be in (0, 10]"),
]
BAD_SETS = [
    ({"size_a": 0}, "set_disjointness: size_a must be at least 1, got 0."),
    ({"size_b": -1}, "set_disjointness: size_b must be at least 1, got -1."),
    ({"num_passes": 0}, "set_disjointness: num_passes must be at least 1, got 0."),
    (
        {"vocab_size": 23},
        "vocab_size 23 is not in [24, 2^31]: the sets take 4 + 16 different tokens, and 4 are special",
    ),
    ({"vocab_size": 23}, "use vocab_size >= 24, or smaller sets."),
]


@pytest.mark.parametrize(
    ("task", "settings", "says"), [(MQAR, *case) for case in BAD_MQAR] + [(SetDisjointness, *case) for case in BAD_SETS]
)
def test_bad_settings_are_refused_before_anything_is_drawn(task, settings, says):
    with pytest.raises(ConfigError) as error:
        task(**settings)
    assert says in str(error.value)


@pytest.mark.parametrize("settings", [{"num_kv_pairs": 4}, {"seq_len": "long"}, {"seq_len": 64.5}])
def test_unknown_keys_and_wrong_types_are_refused(settings):
    with pytest.raises(ValidationError):
        MQAR(**settings)


def test_bad_samples_are_refused():
    with pytest.raises(ConfigError, match="unknown split 'dev'; use one of train, validation, test"):
        MQAR().sample(1, 0, "dev")
    with pytest.raises(ConfigError, match="must not be negative, got n=-1, start=0"):
        MQAR().sample(-1, 0, "train")


def test_names_and_slices():
    assert get_task("mqar") is MQAR
    assert get_task("set_disjointness") is SetDisjointness
    assert MQAR().slice_name == "T=64 n=4"
    assert MQARS[3].slice_name == "T=48 n=4 random filler passes=2"
    assert MQARS[5].slice_name == "T=28 n=7 V=16 a=1.0 random filler"
    assert SETS[0].slice_name == "A=4 B=16"
    assert SETS[4].slice_name == "A=32 B=1 B first passes=3"
    assert len({task.slice_name for task in MQARS + SETS}) == len(MQARS + SETS)


@pytest.mark.parametrize(("n", "bits"), [(64, (319, 660, 754, 767)), (256, (1268, 2633, 3009, 3060))])
def test_mqar_limit_known_values(n, bits):
    task = MQAR(seq_len=4 * n, num_pairs=n)
    assert tuple(round(task.information_limit_bits(accuracy)) for accuracy in (0.5, 0.9, 0.99, 1.0)) == bits


def best_accuracy_with_one_bit(firsts, seconds, ask) -> float:
    """The most that any code of `firsts` in two classes allows, the answer being ask(first, second) or None."""
    best = 0.0
    cases = [(i, s, ask(f, s)) for i, f in enumerate(firsts) for s in seconds if ask(f, s) is not None]
    for code in itertools.product((0, 1), repeat=len(firsts) - 1):
        code = (0, *code)
        votes: dict = {}
        for i, second, answer in cases:
            count = votes.setdefault((code[i], second), {})
            count[answer] = count.get(answer, 0) + 1
        best = max(best, sum(max(count.values()) for count in votes.values()) / len(cases))
    return best


def test_limits_hold_for_the_best_of_all_one_bit_states():
    # MQAR with two pairs and three values: the state sees the values (in the keys' order), then a key is asked.
    firsts = list(itertools.permutations(range(3), 2))
    best = best_accuracy_with_one_bit(firsts, range(2), lambda values, key: values[key])
    known = math.log2(6) - 2 * equivocation_bits(3, 1 - best)
    assert 0.5 < best < 1
    assert 0 < known <= 1
    # Sets of two, out of four or five tokens.
    for tokens in (4, 5):
        pairs = list(itertools.combinations(range(tokens), 2))
        best = best_accuracy_with_one_bit(
            pairs, pairs, lambda f, g: next(iter({*f} & {*g})) if len({*f} & {*g}) == 1 else None
        )
        task = SetDisjointness(size_a=2, size_b=2, vocab_size=4 + tokens)
        assert 0.5 < best < 1
        assert 0 < task.information_limit_bits(best) <= 1


@pytest.mark.parametrize("n", [1, 4, 64, 1000])
def test_mqar_limit_allows_what_storing_some_pairs_attains(n):
    task = MQAR(seq_len=4 * n, num_pairs=n)
    for kept in range(0, n + 1, max(1, n // 8)):
        bits = sum(math.log2(4096 - i) for i in range(kept))
        assert task.information_limit_bits(kept / n) <= bits + 1e-6


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize(
    ("size_a", "size_b"), [(1, 32), (4, 768), (768, 4), (16, 256), (256, 16), (1, 1), (32, 1), (1022, 1022)]
)
def test_set_limit_allows_what_storing_some_tokens_attains(size_a, size_b, first):
    task = SetDisjointness(size_a=size_a, size_b=size_b, first=first)
    f = size_a if first == "a" else size_b
    g = size_b if first == "a" else size_a
    limits = []
    for kept in range(0, f + 1, max(1, f // 8)):
        bits = math.log2(math.comb(2044, kept))
        # A second set that holds none of those kept is answered by guessing.
        accuracy = kept / f + (1 - kept / f) / g
        limits.append(task.information_limit_bits(min(1.0, accuracy)))
        assert limits[-1] <= bits + 1e-6
    assert limits == sorted(limits)


def test_set_limit_known_values():
    # Close to log2 C(2044, 4) = 39.4 bits where the first set is small; reading it again asks for little.
    assert 34 < SetDisjointness(size_a=4, size_b=768).information_limit_bits(1.0) < 35
    assert SetDisjointness(size_a=768, size_b=4).information_limit_bits(1.0) > 600
    assert SetDisjointness(size_a=768, size_b=4, num_passes=2).information_limit_bits(1.0) == pytest.approx(2.0)
    swapped = SetDisjointness(size_a=768, size_b=4, first="b").information_limit_bits(0.9)
    assert swapped == SetDisjointness(size_a=4, size_b=768).information_limit_bits(0.9)


@pytest.mark.parametrize("task", [MQAR(seq_len=256, num_pairs=64), SetDisjointness(size_a=64, size_b=16)])
def test_more_accuracy_takes_more_bits(task):
    bits = [task.information_limit_bits(accuracy) for accuracy in (0.3, 0.5, 0.9, 0.999)]
    assert bits == sorted(set(bits))
    with pytest.raises(ConfigError, match=r"accuracy 1\.5 is not in \[0, 1\]"):
        task.information_limit_bits(1.5)


def test_a_task_without_a_limit_has_none():
    class Plain(MQAR):
        information_limit_bits = Task.information_limit_bits

    assert Plain().information_limit_bits(0.9) is None
    assert "bits of state" not in render(Plain(), 1)


def test_equivocation():
    assert equivocation_bits(2, 0.5) == 1
    assert equivocation_bits(8, 0.0) == 0
    assert equivocation_bits(8, 7 / 8) == equivocation_bits(8, 1.0) == 3
    assert equivocation_bits(1, 0.3) == 0
    assert equivocation_bits(5, 0.2) == pytest.approx(-0.2 * math.log2(0.2) - 0.8 * math.log2(0.8) + 0.2 * 2)


def test_shown_mqar_has_every_pair_and_query():
    task = MQAR(seq_len=40, num_pairs=3, random_filler=True)
    batch = task.sample(2, 1, "validation")
    text = render(task, 2, 1, "validation")
    assert "slice 'T=40 n=3 random filler': 40 tokens of a vocabulary of 8192, 6 of them context" in text
    for i, example in enumerate(text.split("\nexample ")[1:]):
        assert example.startswith(f"{i}, 3 questions\n")
        pairs, queries = example.split("queries, ")
        for j in range(3):
            key, value = batch.tokens[i, 2 * j : 2 * j + 2]
            assert f"{key:>4}={value}" in pairs
            assert f"?{key:>4}={value}" in queries
        shown = " ".join(line[8:] for line in queries.splitlines()[1:])
        assert [int(word.strip("?").split("=")[0]) for word in shown.replace("? ", "?").split()] == batch.tokens[
            i, 6:
        ].tolist()


def test_shown_zero_filler_is_a_dot():
    queries = render(MQAR(seq_len=16, num_pairs=2), 1).split("queries, ")[1]
    assert " ".join(line[8:] for line in queries.splitlines()[1:]).split().count(".") == 10


def test_shown_sets_mark_the_shared_token():
    task = SetDisjointness(size_a=3, size_b=20, first="b", num_passes=2)
    batch = task.sample(1, 0, "train")
    text = render(task, 1)
    assert "example 0, 1 question\n" in text
    assert text.count(f"*{batch.answers[0, 0]:>4}") == 4
    assert [line[8] for line in text.splitlines() if line[8:10] in ("A ", "B ")] == ["B", "A", "B", "A"]
    assert text.endswith(f"    50  ? {batch.answers[0, 0]}, the token in both sets, marked *")


def test_any_task_can_be_shown():
    class Plain(MQAR):
        describe = Task.describe

    task = Plain(seq_len=32, num_pairs=2)
    batch = task.sample(1, 0, "train")
    text = render(task, 1)
    assert "context: the first 4 tokens; 7>9 asks for an answer at token 7, and 9 is right" in text
    assert "context: none; 7>9 asks" in task.describe(replace(batch, context_len=0), 0)
    rows = [line.split() for line in text.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["0", "16"]
    cells = rows[0][1:] + rows[1][1:]
    assert [int(cell.split(">")[0]) for cell in cells] == batch.tokens[0].tolist()
    assert {t: int(cell.split(">")[1]) for t, cell in enumerate(cells) if ">" in cell} == dict(
        zip(batch.positions[0].tolist(), batch.answers[0].tolist(), strict=True)
    )
