"""The index finds what was put in, whatever the batches, and stays small."""

import numpy as np

from raydiff.output.sorted_index import SortedIndex


def test_it_finds_every_value_of_a_key_oldest_first():
    rng = np.random.default_rng(2)
    index, expected = SortedIndex(), {}
    value = 0
    for _ in range(200):
        keys = rng.integers(0, 3000, rng.integers(0, 60)).astype(np.uint64) << np.uint64(50)
        values = np.arange(value, value + len(keys))
        value += len(keys)
        index.extend(keys, values)
        for key, one in zip(keys.tolist(), values.tolist(), strict=True):
            expected.setdefault(key, []).append(one)
    assert len(index) == value
    for key in range(3000):
        assert index.find(key << 50) == expected.get(key << 50, [])
        assert (key << 50 in index) == (key << 50 in expected)


def test_keys_at_the_ends_of_64_bits():
    index = SortedIndex(np.array([2**64 - 1, 0, 2**63], np.uint64), np.array([1, 2, 3]))
    assert [index.find(key) for key in (0, 2**63, 2**64 - 1, 1)] == [[2], [3], [1], []]


def test_a_set_has_no_values():
    index = SortedIndex(np.array([5, 1], np.uint64))
    index.extend(np.array([3], np.uint64))
    assert [key in index for key in range(7)] == [False, True, False, True, False, True, False]
    assert len(index) == 3


def test_many_batches_become_few_runs():
    index = SortedIndex()
    for batch in range(1000):
        index.extend(np.arange(batch, 100_000, 1000).astype(np.uint64))
    assert len(index) == 100_000
    assert len(index._runs) <= 11
