"""Random draws: exact distributions, against exact probabilities by chi-square; streams are fixed, so tests repeat."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from zoo.tasks.draw import distinct, exponential, power_law_order, uniform, words


def rng(key: int = 1) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


def surprise(outcomes: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's chi-square of outcome numbers, in standard deviations from its mean: beyond 5 the draw is wrong."""
    expected = len(outcomes) * probabilities
    assert expected.min() > 20, "too few draws for a chi-square"
    statistic = ((np.bincount(outcomes, minlength=len(expected)) - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    return abs(statistic - freedom) / math.sqrt(2 * freedom)


def numbers(rows: np.ndarray, high: int) -> np.ndarray:
    """Each row of integers below `high` as one number."""
    return rows.astype(np.int64) @ (high ** np.arange(rows.shape[1]))


def test_surprise_notices_a_small_bias():
    draws = rng().integers(0, 1000, 400_000) % 12
    assert surprise(draws, np.full(12, 1 / 12)) < 5
    assert surprise(rng().integers(0, 100, 400_000) % 12, np.full(12, 1 / 12)) > 5


def test_words_are_the_raw_stream_in_little_endian():
    raw = rng().bit_generator.random_raw(3)
    assert words(rng(), 16, 10).tolist() == [(int(w) >> s) & 0xFFFF for w in raw for s in (0, 16, 32, 48)][:10]
    assert words(rng(), 32, 5).tolist() == [(int(w) >> s) & 0xFFFFFFFF for w in raw for s in (0, 32)][:5]


@pytest.mark.parametrize("high", [1, 2, 3, 7, 255, 4095, 4096, 7000])
def test_uniform(high):
    draws = uniform(rng(), high, (2000, 200))
    assert draws.shape == (2000, 200)
    assert draws.max() < high
    if high > 1:
        assert surprise(draws.reshape(-1).astype(np.int64), np.full(high, 1 / high)) < 5


@pytest.mark.parametrize("high", [2**13 + 1, 50_000, 3 * 2**30, 2**32])
def test_uniform_over_many(high):
    # 2**32 mod 3 * 2**30 is a quarter of all words: without the rejection the first sixteenths would be too likely.
    draws = uniform(rng(), high, (400_000,)).astype(np.uint64)
    assert draws.max() < high
    part = (draws * np.uint64(16) // np.uint64(high)).astype(np.int64)
    edges = [-(-k * high // 16) for k in range(17)]
    assert surprise(part, np.diff(edges) / high) < 5


@pytest.mark.parametrize(("high", "n"), [(12, 2), (18, 3), (4, 2), (5, 5), (1, 1), (6, 1)])
def test_distinct_is_uniform_over_ordered_choices(high, n):
    # 6 n <= high is drawn by redrawing equals, 6 n > high by permuting.
    draws = distinct(rng(), 3, 3 + high, 200_000, n)
    assert draws.min() >= 3
    assert draws.max() < 3 + high
    choices = sorted(numbers(np.array([c]), high)[0] for c in itertools.permutations(range(high), n))
    found = np.searchsorted(choices, numbers(draws - 3, high))
    assert (np.array(choices)[found] == numbers(draws - 3, high)).all(), "a row holds a value twice"
    if len(choices) > 1:
        assert surprise(found, np.full(len(choices), 1 / len(choices))) < 5


def test_distinct_when_rows_are_long():
    for n in (500, 1500, 2044):
        draws = np.sort(distinct(rng(), 4, 2048, 64, n), axis=1)
        assert (np.diff(draws.astype(np.int64), axis=1) > 0).all()
        assert draws.min() >= 4
        assert draws.max() < 2048
    huge = distinct(rng(), 0, 2**31, 64, 300, 300, 2**31)
    assert (np.diff(np.sort(huge[:, :300].astype(np.int64), axis=1), axis=1) > 0).all()


@pytest.mark.parametrize(("low", "high", "n"), [(1, 13, 2), (1, 5, 3)])
def test_others_are_uniform_over_what_is_left(low, high, n):
    vocabulary = 14
    draws = distinct(rng(), low, high, 300_000, n, 2, vocabulary)
    first, others = draws[:, :n], draws[:, n:]
    assert not (first[:, :, None] == others[:, None, :]).any()
    # The rank of an other among the values that its row's first leave is uniform, and the two are independent.
    rank = others.astype(np.int64) - (first[:, None, :] < others[:, :, None]).sum(axis=2)
    left = vocabulary - n
    assert surprise(numbers(rank, left), np.full(left**2, left**-2.0)) < 5
    # The first stay uniform whatever the others are.
    choices = math.perm(high - low, n)
    order = np.unique(numbers(first, vocabulary), return_inverse=True)[1]
    assert surprise(order, np.full(choices, 1 / choices)) < 5


def test_exponential_is_the_logarithm():
    word = np.concatenate([np.array([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]), words(rng(), 32, 100_000)])
    got = exponential(word.astype(np.uint32))
    np.testing.assert_allclose(got, -np.log((word + 1.0) / 2**32), rtol=0, atol=1e-9)


def successive(weights: np.ndarray, n: int) -> np.ndarray:
    """Probability of every ordered choice of n, in the order of itertools.permutations: the definition."""
    result = []
    for choice in itertools.permutations(range(len(weights)), n):
        left, probability = weights.sum(), 1.0
        for i in choice:
            probability *= weights[i] / left
            left -= weights[i]
        result.append(probability)
    return np.array(result)


@pytest.mark.parametrize("exponent", [-0.99, 0.0, 1.5])
def test_power_law_order_is_drawing_without_replacement(exponent):
    order = power_law_order(rng(), exponent, 300_000, 5)
    assert (np.sort(order, axis=1) == np.arange(5)).all()
    choices = [numbers(np.array([c]), 5)[0] for c in itertools.permutations(range(5), 3)]
    place = np.argsort(choices)
    found = place[np.searchsorted(choices, numbers(order[:, :3], 5), sorter=place)]
    assert surprise(found, successive(np.arange(1, 6) ** exponent, 3)) < 5


def test_power_law_order_first_draws_over_many():
    m = 60
    weights = np.arange(1, m + 1) ** -0.99
    order = power_law_order(rng(), -0.99, 100_000, m)
    probabilities = weights / weights.sum()
    assert surprise(order[:, 0], probabilities) < 5
    # P(second = j) = sum over i != j of p_i p_j / (1 - p_i).
    second = probabilities * ((probabilities / (1 - probabilities)).sum() - probabilities / (1 - probabilities))
    assert surprise(order[:, 1], second) < 5


def test_nothing_to_choose():
    assert power_law_order(rng(), -0.99, 3, 1).tolist() == [[0], [0], [0]]
    assert uniform(rng(), 5, (0,)).shape == (0,)


def test_permutations_with_equal_words_are_drawn_again(monkeypatch):
    # Words of three bits: about half of all rows hold equals, and a stable sort would favour rising indices.
    monkeypatch.setattr("zoo.tasks.draw.words", lambda generator, bits, size: words(generator, bits, size) % 8)
    draws = distinct(rng(), 0, 4, 100_000, 4)
    order = np.unique(numbers(draws, 4), return_inverse=True)[1]
    assert surprise(order, np.full(24, 1 / 24)) < 5
