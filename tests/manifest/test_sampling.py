"""Rows as numbers: every combination once, in order, side by side, or sampled without repeats."""

import random
from itertools import product

import numpy as np
import pytest

from raydiff.manifest.sampling import Sampling


def rows(sampling: Sampling, start: int = 0, stop: int | None = None) -> list[tuple[int, ...]]:
    stop = sampling.num_rows if stop is None else stop
    places = sampling.places(start, stop)
    return list(zip(*(place.tolist() for place in places), strict=True))


def test_cartesian_is_the_product_from_any_row_on() -> None:
    rng = random.Random(2)
    for _ in range(20):
        lengths = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 5)))
        expected = list(product(*map(range, lengths)))
        sampling = Sampling(mode="cartesian", lengths=lengths, num_rows=len(expected))
        start = rng.randrange(len(expected))
        assert rows(sampling, start) == expected[start:]


def test_zip_goes_along_and_repeats_single_values() -> None:
    sampling = Sampling(mode="zip", lengths=(4, 1, 4), num_rows=4)
    assert rows(sampling, 1) == [(1, 0, 1), (2, 0, 2), (3, 0, 3)]


@pytest.mark.parametrize("lengths", [(1,), (2, 1), (7, 3), (13, 11, 5), (3, 1000)])
def test_a_sample_of_all_is_a_permutation(lengths: tuple[int, ...]) -> None:
    everything = list(product(*map(range, lengths)))
    sampling = Sampling(mode="random", lengths=lengths, num_rows=len(everything), seed=3)
    found = rows(sampling)
    assert sorted(found) == everything
    if len(everything) > 10:
        assert found != everything
        other = Sampling(mode="random", lengths=lengths, num_rows=len(everything), seed=4)
        assert rows(other) != found
    assert rows(sampling) == found
    half = len(found) // 2
    assert rows(sampling, half, len(found)) == found[half:]


def test_a_sample_of_more_goes_round_in_another_order() -> None:
    sampling = Sampling(mode="random", lengths=(5, 4), num_rows=50)
    found = rows(sampling)
    turns = [found[:20], found[20:40], found[40:]]
    assert sorted(turns[0]) == sorted(turns[1]) == list(product(range(5), range(4)))
    assert turns[0] != turns[1]
    assert len(set(turns[2])) == 10


def test_a_sample_is_even() -> None:
    sampling = Sampling(mode="random", lengths=(1000, 1000, 10), num_rows=20_000)
    places = sampling.places(0, 20_000)
    assert len(set(rows(sampling))) == 20_000
    for place, length in zip(places, sampling.lengths, strict=True):
        counts = np.bincount(place * 10 // length, minlength=10)
        assert counts.min() > 1800
        assert counts.max() < 2200
    assert abs(np.corrcoef(places[0], places[1])[0, 1]) < 0.03


def test_a_sample_of_more_combinations_than_int64_holds() -> None:
    sampling = Sampling(mode="random", lengths=(2**63, 3, 10**30), num_rows=2000)
    found = rows(sampling)
    assert len(set(found)) == 2000
    assert max(row[0] for row in found) > 2**62
    assert {row[1] for row in found} == {0, 1, 2}
    assert max(row[2] for row in found) > 10**29
    assert rows(sampling, 500, 510) == found[500:510]
