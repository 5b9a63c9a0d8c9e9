"""Layouts: packing, statistics by vector, and cutting, against NumPy's plain loops."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.kernels.layout import Layout

CASES = [((5, 3, 9), 4), ((7,), 4), ((1, 1, 300, 129), 128), ((10, 20), 1), ((64, 128), 64)]
over_layouts = pytest.mark.parametrize(("sizes", "row"), CASES)


def vectors_of(sizes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=n).astype(np.float32) for n in sizes]


def blocks_of(vectors, block):
    return [v[i : i + block] for v in vectors for i in range(0, len(v), block)]


@over_layouts
def test_packing_loses_nothing_and_pads_with_zeros(sizes, row):
    layout, vectors = Layout(sizes, row), vectors_of(sizes)
    flat = layout.pack(vectors).numpy()
    assert layout.size == len(flat) == sum(-(-n // row) * row for n in sizes)
    for found, vector in zip(layout.unpack(flat), vectors, strict=True):
        np.testing.assert_array_equal(found, vector)
    for start, vector in zip(layout.starts, vectors, strict=True):
        np.testing.assert_array_equal(flat[start : start + len(vector)], vector)
        flat[start : start + len(vector)] = 0
    assert not flat.any()


@over_layouts
def test_only_padding_is_cleared(sizes, row):
    layout = Layout(sizes, row)
    expected = layout.pack([np.ones(n, np.float32) for n in sizes])
    np.testing.assert_array_equal(layout.without_padding(tf.ones([layout.size])), expected)


@pytest.mark.parametrize("rows", [None, 1, 2])
@over_layouts
def test_statistics_are_those_of_each_vector_or_block(sizes, row, rows):
    block = rows and rows * row
    vectors = vectors_of(sizes)
    layout = Layout(sizes, row)
    flat = layout.pack(vectors)
    layout = layout.blocks(block)
    parts = blocks_of(vectors, block) if block else vectors
    assert layout.sizes == tuple(map(len, parts))
    assert Layout(sizes, row).num_blocks(block) == len(parts)
    means = [np.abs(part).mean() for part in parts]
    np.testing.assert_allclose(layout.mean_magnitude(flat), means, rtol=1e-6)
    largest = [np.abs(part).max() for part in parts]
    np.testing.assert_array_equal(layout.max_magnitude(flat), largest)
    norms = [np.linalg.norm(part) for part in parts]
    np.testing.assert_allclose(layout.norms(flat), norms, rtol=1e-6)
    spread = layout.flat(layout.rows(tf.ones([layout.size])) * layout.spread(tf.constant(largest)))
    for found, part, value in zip(layout.unpack(spread), parts, largest, strict=True):
        np.testing.assert_array_equal(found, np.full(len(part), value))


@pytest.mark.parametrize("owners", [1, 2, 3, 7])
@over_layouts
def test_parts_hold_all_elements_once(sizes, row, owners):
    layout = Layout(sizes, row)
    flat = layout.pack(vectors_of(sizes)).numpy()
    seen = [np.zeros(n) for n in sizes]
    parts = layout.cut(owners)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == layout.size
    longest = max(part.stop - part.start for part in parts)
    assert longest <= -(-sum(layout.row_counts) // owners) * row
    for part in parts:
        assert part.layout.size == part.stop - part.start
        found = part.layout.unpack(flat[part.start : part.stop]) if part.segments else []
        for values, segment in zip(found, part.segments, strict=True):
            vector = vectors_of(sizes)[segment.vector]
            np.testing.assert_array_equal(values, vector[segment.start : segment.stop])
            seen[segment.vector][segment.start : segment.stop] += 1
    assert all((counts == 1).all() for counts in seen)


def test_a_vector_on_its_own_has_no_padding():
    layout = Layout((300,), 128, padded=False)
    assert layout.size == 300
    assert layout.blocks(128).sizes == (128, 128, 44)
    x = tf.range(300, dtype=tf.float32)
    np.testing.assert_array_equal(layout.blocks(128).max_magnitude(x), [127, 255, 299])


def test_what_a_maximum_is_of_large_vectors_compiled_or_not():
    """NaN and infinities are above all, denormals above zero."""
    for bad in (np.nan, np.inf, 1e-45):
        x = np.zeros(1 << 20, np.float32)
        x[777_777] = -bad
        layout = Layout((1 << 19, 1 << 19), 128)
        for function in (layout.max_magnitude, tf.function(layout.max_magnitude, jit_compile=True)):
            found = function(tf.constant(x)).numpy().view(np.int32)
            np.testing.assert_array_equal(found, [0, abs(np.float32(bad)).view(np.int32)])
