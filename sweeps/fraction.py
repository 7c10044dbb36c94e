"""Regular two-level fractions of a factorial design, at the highest resolution that their size allows.

A fraction of k factors in 2**b cells takes all combinations of b factors; each other factor is the product of some of
them, in the code -1, +1. The products that are constant are the defining words. The resolution is the length of the
shortest: effects are mixed with others whose orders add up to it (Box, Hunter and Hunter, Statistics for Experimenters,
chapter 6).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

ROMAN = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII")


@dataclass(frozen=True)
class Fraction:
    """A fraction, or with no generators the whole design.

    Attributes:
        rows: one tuple of k levels per cell, false for low and true for high; all high is one of them.
        generators: factor to the factors of which it is the product, by index.
        resolution: length of the shortest defining word; 0 for the whole design.
    """

    rows: list[tuple[bool, ...]]
    generators: dict[int, tuple[int, ...]]
    resolution: int


def regular_fraction(factors: int, most: int) -> Fraction | None:
    """The largest regular design of two-level factors with at most `most` cells; None below resolution III."""
    base = min(factors, max(most, 1).bit_length() - 1)
    extra = factors - base
    if not extra:
        return Fraction(list(product((False, True), repeat=factors)), {}, 0)
    room = {3: factors < 2**base, 4: factors <= 2 ** (base - 1)}  # more do not fit, whatever the choice
    masks = sorted(
        (m for m in range(1, 2**base) if m.bit_count() > 1), key=lambda m: (m.bit_count() % 2 == 0, -m.bit_count(), m)
    )
    for resolution in range(base + 1, 2, -1):
        fits = room.get(resolution, 1 + factors + factors * (factors - 1) // 2 <= 2**base)
        sums = [{0}, *({0} for _ in range(resolution - 2))]
        for i in range(base):
            sums = _extended(sums, 1 << i)
        words = next(_chosen(masks, extra, sums), None) if fits else None
        if words is not None:
            return _built(words, base, resolution)
    return None


def _chosen(masks: list[int], extra: int, sums: list[set[int]]) -> Iterator[list[int]]:
    """Choices of products for `extra` more factors, such that no word becomes too short.

    Args:
        sums: products of at most 0, 1, 2, ... of the factors so far; a word is too short if a new factor is one of the
            last.
    """
    if not extra:
        yield []
        return
    for i, mask in enumerate(masks):
        if mask not in sums[-1]:
            for rest in _chosen(masks[i + 1 :], extra - 1, _extended(sums, mask)):
                yield [mask, *rest]


def _extended(sums: list[set[int]], mask: int) -> list[set[int]]:
    """`sums` with one factor more."""
    return [{0}, *(same | {x ^ mask for x in fewer} for fewer, same in pairwise(sums))]


def _built(masks: list[int], base: int, resolution: int) -> Fraction:
    generators = {base + i: tuple(j for j in range(base) if mask >> j & 1) for i, mask in enumerate(masks)}
    rows = []
    for row in product((False, True), repeat=base):
        signs = [sum(not row[j] for j in members) % 2 == 0 for members in generators.values()]
        rows.append((*row, *signs))
    return Fraction(rows, generators, resolution)
