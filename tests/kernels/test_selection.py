"""The largest entries of each segment, against a stable sort of each."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from tests.compressors.test_top_k import PATTERNS, reference, rng
from tfqcomm.kernels import counting, numerics, selection

RATIOS = (1e-3, 0.01, 0.1, 0.5, 1.0)
MANY = [(7919 * i) % 1021 for i in range(500)]  # one of them is empty
SIZES = {
    "one": [40_009],
    "all are smaller than a row": [1, 2, 3, 7, 8, 9, 31, 101],
    "some are empty": [0, 40_000, 0, 0, 512, 0],
    "whole rows": [512, 1024, 51_200],
    "primes": [100_003, 2, 3, 65_537, 509, 511, 4093],
    "hundreds": MANY,
    "sizes of one": [1] * 300 + [30_000] + [1] * 300,
}


def kept_of(sizes, ratio):
    return [min(n, max(1, round(ratio * n))) for n in sizes]


def joined(sizes, patterns):
    """Each segment with a pattern of its own, at a scale of its own."""
    names = list(patterns)
    parts = [PATTERNS[names[i % len(names)]](n) * 0.1 ** (i % 7) for i, n in enumerate(sizes) if n]
    return np.concatenate(parts).astype(np.float32)


def expected(x, sizes, ks):
    starts = np.cumsum(sizes) - sizes
    kept = [s + reference(x[s : s + n], k) for s, n, k in zip(starts, sizes, ks, strict=True)]
    return np.concatenate(kept)


def check(x, sizes, ks):
    positions, values = selection.largest_of_segments(tf.constant(x), sizes, ks)
    np.testing.assert_array_equal(positions, expected(x, sizes, ks))
    np.testing.assert_array_equal(values, x[expected(x, sizes, ks)])


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", SIZES)
def test_equals_a_stable_sort_of_each_segment(name, ratio):
    sizes = SIZES[name]
    for patterns in (["normal"], PATTERNS, ["all zero", "few non-zeros"], ["NaN and inf", "huge"]):
        check(joined(sizes, patterns), sizes, kept_of(sizes, ratio))


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_compiled_for_a_gpu_it_is_the_same(name, monkeypatch):
    """By sorting, in one kernel; here XLA makes it for the CPU."""
    monkeypatch.setattr(numerics, "on_gpu", lambda tensor: True)
    sizes = tuple(SIZES[name])
    for ratio in (0.01, 0.5):
        ks = tuple(kept_of(sizes, ratio))
        select = numerics.fuse_on_gpu(_compiled_only, sum(sizes), sizes, ks)
        for patterns in (["normal"], PATTERNS, ["all zero", "few non-zeros"], ["NaN and inf"]):
            x = joined(sizes, patterns)
            positions, values = select(tf.constant(x))
            np.testing.assert_array_equal(positions, expected(x, sizes, ks))
            np.testing.assert_array_equal(values, x[expected(x, sizes, ks)])


def _compiled_only(sizes, ks, x):
    assert numerics.compiling()
    return selection.largest_of_segments(x, sizes, ks)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_beside_ordinary_data(name):
    sizes = [3001, 20_011, 777, 9001]
    for ratio in RATIOS:
        check(joined(sizes, ["normal", name]), sizes, kept_of(sizes, ratio))


def test_each_segment_keeps_a_number_of_its_own():
    sizes = [5000, 64, 5000, 1, 20_000]
    check(joined(sizes, ["normal"]), sizes, [5000, 1, 7, 1, 12_345])


@pytest.mark.parametrize("name", ["normal", "many ties", "few non-zeros", "NaN and inf"])
def test_segments_where_kernels_are_fused(name):
    sizes = [numerics.FUSE_FROM // 2, 33, 1, 70_001, numerics.FUSE_FROM // 2 + 12_345]
    check(joined(sizes, ["normal", name]), sizes, kept_of(sizes, 0.01))


def test_random_sizes_and_numbers():
    generator = rng(7)
    for _ in range(40):
        number = generator.integers(1, 40)
        sizes = (10 ** generator.uniform(0, 4, size=number)).astype(int).tolist()
        ks = [int(generator.integers(1, n + 1)) for n in sizes]
        names = generator.choice(list(PATTERNS), size=3).tolist()
        check(joined(sizes, names), sizes, ks)


def test_the_graph_has_the_same_size_for_any_number_of_segments():
    def ops(sizes):
        def select(x):
            return selection.largest_of_segments(x, sizes, kept_of(sizes, 0.01))

        signature = tf.TensorSpec([sum(sizes)], tf.float32)
        graph = tf.function(select, autograph=False).get_concrete_function(signature).graph
        return len(graph.get_operations())

    assert ops([1000] * 2) == ops([1000] * 200) == ops([100, 1900] * 100)


@functools.cache
def largest_of_any_number():
    """Traced once for all patterns."""
    return tf.function(selection.largest_of_any_number)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_number_that_is_known_at_run_time(name):
    select = largest_of_any_number()
    for n in (1, 7, 1000, 40_009):
        x = PATTERNS[name](n).astype(np.float32)
        for k in {1, -(-n // 100), -(-n // 4), n}:
            positions, values = select(tf.constant(x), tf.constant(k))
            np.testing.assert_array_equal(positions, reference(x, k))
            np.testing.assert_array_equal(values, x[reference(x, k)])


def test_digits_are_counted_by_segment():
    digits = tf.constant([3, 0, 3, 8, 1, 1, 2])  # 8 is out of range
    counts = counting.tally_segments(digits, tf.constant([0, 2, 2, 7]), 4)
    np.testing.assert_array_equal(counts, [[1, 0, 0, 1], [0, 0, 0, 0], [0, 2, 1, 1]])
    digit, larger = counting.kth_digits(counts, tf.constant([2, 1, 3]))
    assert digit.numpy().tolist() == [0, 0, 1]
    assert larger.numpy()[[0, 2]].tolist() == [1, 2]
