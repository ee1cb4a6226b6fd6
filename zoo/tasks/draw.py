"""Random draws for tasks: vectorised over examples, and the same bytes on any machine and with any numpy.

numpy promises that a bit generator's raw words stay the same, but not what `Generator.integers` or `choice` make of
them. Everything here is made of raw words by integer and IEEE arithmetic, which leave no freedom in the last bit; a
library's logarithm does.
"""

from __future__ import annotations

import decimal
import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[Any]


def words(rng: np.random.Generator, bits: int, size: int) -> Integers:
    """`size` random words of `bits` bits (16 or 32)."""
    raw = rng.bit_generator.random_raw(-(-size * bits // 64))
    return raw.astype("<u8", copy=False).view(f"<u{bits // 8}")[:size]


def uniform(rng: np.random.Generator, high: int, shape: tuple[int, ...]) -> Integers:
    """Independent integers, each exactly uniform in [0, high), high <= 2**32 (arXiv 1805.10941, algorithm 5)."""
    # 16-bit words cost half, and below 2**13 fewer than one in eight is drawn again.
    bits, wide = (16, np.uint32) if high <= 2**13 else (32, np.uint64)
    product: Integers = words(rng, bits, math.prod(shape)).astype(wide)
    product *= wide(high)
    out = product >> wide(bits)
    biased = 2**bits % high
    if biased:
        product &= wide(2**bits - 1)
        again = np.flatnonzero(product < biased)
        if again.size:
            out[again] = uniform(rng, high, again.shape)
    return out.reshape(shape)


def distinct(
    rng: np.random.Generator, low: int, high: int, rows: int, n: int, others: int = 0, vocabulary: int = 1
) -> Integers:
    """(rows, n + others): in each row first `n` different integers of [low, high), uniform over ordered choices, then
    `others` independent ones, uniform over those of [0, vocabulary) that are not among the `n`.
    """
    # Each value carries its column in its lowest bits, so that sorting a row shows which columns are equal.
    bits = (n + others).bit_length()
    kind = np.uint32 if max(high, vocabulary) << bits <= 2**32 else np.uint64

    def tag(value: Integers, column: Integers) -> Integers:
        tagged: Integers = value.astype(kind)
        tagged <<= kind(bits)
        tagged |= column.astype(kind)
        return tagged

    many = 6 * n > high - low
    value: Integers = np.empty((rows, n + others), kind)
    value[:, :n] = _permutations(rng, high - low, rows)[:, :n] if many else uniform(rng, high - low, (rows, n))
    value[:, :n] += kind(low)
    value[:, n:] = uniform(rng, vocabulary, (rows, others))
    tagged = tag(value, np.arange(n + others))
    ordered = np.sort(tagged, axis=1)
    i, j = np.divmod(np.flatnonzero((ordered[:, 1:] ^ ordered[:, :-1]) < 2**bits), max(n + others - 1, 1))
    column = ordered[i, j + 1] & kind(2**bits - 1)

    # All but one of equal first values are drawn again until they differ. Which ones depends on what is equal, never
    # on the values themselves, so no choice of values is favoured over another.
    first = column < n
    redrawn = row, at = i[first], column[first]
    while row.size:
        tagged[row, at] = tag(low + uniform(rng, high - low, row.shape), at)
        clash = ((tagged[row, :n] ^ tagged[row, at, None]) < 2**bits).sum(axis=1) > 1
        row, at = row[clash], at[clash]

    # Others are drawn again while they equal a first one: those that did in the beginning, or do since a redraw.
    row, at = i[~first], column[~first]
    if others:
        new = (tagged[redrawn[0], n:] ^ tagged[redrawn][:, None]) < 2**bits
        j, k = np.divmod(np.flatnonzero(new), others)
        row, at = np.concatenate([row, redrawn[0][j]]), np.concatenate([at, (n + k).astype(kind)])
    while row.size:
        clash = ((tagged[row, :n] ^ tagged[row, at, None]) < 2**bits).any(axis=1)
        row, at = row[clash], at[clash]
        tagged[row, at] = tag(uniform(rng, vocabulary, row.shape), at)
    tagged >>= kind(bits)
    return tagged


def _permutations(rng: np.random.Generator, high: int, rows: int) -> Integers:
    """(rows, high): random permutations of [0, high), by sorting random words; equal words are drawn again."""
    tagged: Integers = words(rng, 32, rows * high).reshape(rows, high).astype(np.uint64)
    tagged <<= np.uint64(32)
    tagged |= np.arange(high, dtype=np.uint64)
    tagged.sort(axis=1)
    tied = np.flatnonzero(((tagged[:, 1:] ^ tagged[:, :-1]) < 2**32).any(axis=1))
    tagged &= np.uint64(2**32 - 1)
    if tied.size:
        tagged[tied] = _permutations(rng, high, tied.size)
    return tagged


def power_law_order(rng: np.random.Generator, exponent: float, rows: int, m: int) -> NDArray[np.int64]:
    """(rows, m): all of 0 .. m-1 in the order of draws without replacement, i drawn with weight (i + 1)**exponent.

    A race: the i-th runner needs a time Exponential(1) / weight, and the order of arrival is that of the draws.
    Uniforms of 32 bits and a logarithm within 1e-9 stand behind each time; the probabilities are right to 1e-8.
    """
    time = exponential(words(rng, 32, rows * m)).reshape(rows, m)
    time *= _inverse_weights(exponent, m)
    # The index goes into the lowest mantissa bits: plain values sort fast, and alike whatever the algorithm.
    tag = (1 << (m - 1).bit_length()) - 1
    order = time.view(np.int64)
    order &= ~tag
    order |= np.arange(m)
    order.sort(axis=1)
    order &= tag
    return order


_LN2 = 0.6931471805599453
_CENTRE = 0.7071067811865476


def exponential(word: Integers) -> NDArray[np.float64]:
    """-ln((w + 1) / 2**32) within 1e-9 for 32-bit words w, by exactly rounded operations alone."""
    # w + 1 = m 2^e with m in [1/2, 1); -ln m = -ln c + 2 atanh(y), y = (c - m) / (c + m), with c = sqrt(1/2).
    m, e = np.frexp(word + 1.0)
    y = _CENTRE - m
    m += _CENTRE
    y /= m
    square = np.multiply(y, y, out=m)
    series = square * (2 / 9)
    for k in (7, 5, 3):
        series += 2 / k
        series *= square
    series += 2
    series *= y
    series += np.multiply(32.5 - e, _LN2, out=y)
    return series


@lru_cache(maxsize=256)
def _inverse_weights(exponent: float, m: int) -> NDArray[np.float64]:
    # decimal, because the last bit of a float power differs between C libraries.
    with decimal.localcontext(decimal.Context(prec=20)):
        return np.array([float(decimal.Decimal(i) ** -decimal.Decimal(exponent)) for i in range(1, m + 1)])
