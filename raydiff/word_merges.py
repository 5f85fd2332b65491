"""Merges of a byte-pair encoding under which chosen words are one token each."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise


def merges_of(words: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """Return merges, by rank, under which each of `words`, given as its symbols, is one token.

    A word's own merges come after those of the words before it: what these have joined in it stays
    joined, and its pieces are joined from left to right.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        left, *rest = _pieces(word, ranks)
        for right in rest:
            ranks[left, right] = len(ranks)
            left += right
    return list(ranks)


def _pieces(word: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Spell a word under merges, as BPE does: the pair of the lowest rank is joined first."""
    pieces = [*word]
    while known := [pair for pair in pairwise(pieces) if pair in ranks]:
        best = min(known, key=lambda pair: ranks[pair])
        place = list(pairwise(pieces)).index(best)
        pieces[place : place + 2] = ["".join(best)]
    return pieces
