"""Top-k of many tensors at once: each as on its own, in one payload."""

import numpy as np
import pytest
import tensorflow as tf

from tests.catalogue import elias_fano, kept
from tests.compressors.test_top_k import rng
from tfqcomm.aggregators import error_feedback
from tfqcomm.compressors import TopK
from tfqcomm.kernels import kept_values, numerics
from tfqcomm.kernels.layout import Layout

SEED = tf.constant([1, 2])
SIZES = (5000, 1, 64, 70_001, 3, 512, 2047)
LARGE = (numerics.FUSE_FROM, 33, 70_001, 1, 4096)  # kernels are fused
VALUE_DTYPES = tuple(kept_values.FORMATS)


def bucket_of(sizes, seed=0):
    """Tensors at scales of their own."""
    generator = rng(seed)
    parts = [generator.normal(size=n) * 0.1 ** (i % 5) for i, n in enumerate(sizes)]
    return np.concatenate(parts).astype(np.float32)


def one_by_one(codec, x, sizes):
    """Each tensor on its own, encoded and decoded."""
    pieces = np.split(x, np.cumsum(sizes)[:-1])
    return np.concatenate([codec.decode(codec.encode(p), len(p)) for p in pieces])


def run(function, *args):
    """In a graph, as in a step."""
    return tf.function(function, autograph=False)(*args)


def payloads(codec, layout, world):
    """One payload of each replica, and what they decode to."""
    words = [codec.encode_bucket(bucket_of(layout.sizes, r), layout, SEED) for r in range(world)]
    return tf.stack(words), [codec.decode_bucket(w, layout).numpy() for w in words]


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize("sizes", [SIZES, LARGE], ids=["small", "large"])
def test_a_bucket_decodes_to_what_its_tensors_do(value_dtype, sizes):
    codec, layout = TopK(0.01, value_dtype=value_dtype), Layout(sizes)
    x = bucket_of(sizes)
    words = run(lambda x: codec.encode_bucket(x, layout, SEED), tf.constant(x))
    assert words.dtype == tf.int32
    assert words.shape == [codec.bucket_words(layout)]
    decoded = run(lambda words: codec.decode_bucket(words, layout), words).numpy()
    np.testing.assert_array_equal(decoded, one_by_one(codec, x, sizes))
    for piece in np.split(decoded, np.cumsum(sizes)[:-1]):
        assert np.count_nonzero(piece) <= kept(0.01, len(piece))


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_words_of_a_bucket_are_the_formula(value_dtype):
    ks = [kept(0.01, n) for n in SIZES]
    values = {
        "float32": sum(ks),
        "bfloat16": -(-sum(ks) // 2),
        "int8": sum(-(-k // 256) for k in ks) + -(-sum(ks) // 4),
        "int4": sum(-(-k // 256) for k in ks) + -(-sum(ks) // 8),
        "table2": 4 * len(ks) + -(-sum(ks) // 16),
    }
    words = TopK(0.01, value_dtype=value_dtype).bucket_words(Layout(SIZES))
    assert words == elias_fano(sum(ks), sum(SIZES)) + values[value_dtype]


@pytest.mark.parametrize(
    ("value_dtype", "bits"),
    [("float32", 40.6), ("int8", 16.6), ("int4", 12.6), ("table2", 10.6)],
)
def test_bits_per_kept_entry(value_dtype, bits):
    """Of the 1% of a ResNet50: 25.6 million elements in 161 tensors, most of them small."""
    codec = TopK(0.01, value_dtype=value_dtype)
    sizes = tuple([2_359_296] * 6 + [1_048_576] * 8 + [65_536] * 47 + [512] * 100)
    number = sum(codec.num_kept(n) for n in sizes)
    assert 32 * codec.bucket_words(Layout(sizes)) / number == pytest.approx(bits, rel=0.01)
    n = 10**7
    assert 32 * codec.num_words(n) / codec.num_kept(n) == pytest.approx(bits, rel=0.01)


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize("sizes", [SIZES, LARGE], ids=["small", "large"])
def test_what_is_left_out_is_what_is_not_decoded(value_dtype, sizes):
    codec, layout = TopK(0.01, value_dtype=value_dtype), Layout(sizes)
    x = bucket_of(sizes)
    words, residual = run(
        lambda x: codec.encode_bucket_with_residual(x, layout, SEED), tf.constant(x)
    )
    np.testing.assert_array_equal(words, codec.encode_bucket(tf.constant(x), layout, SEED))
    np.testing.assert_array_equal(residual, x - codec.decode_bucket(words, layout).numpy())


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [SIZES, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("ratio", "value_dtype"), [(0.01, "float32"), (0.3, "bfloat16"), (0.01, "table2")]
)
def test_mean_is_added_in_rank_order(world, sizes, ratio, value_dtype):
    """Equal to the bit: for three numbers float32 addition depends on the order."""
    codec, layout = TopK(ratio, value_dtype=value_dtype), Layout(sizes)
    words, decoded = payloads(codec, layout, world)
    total = np.zeros(sum(sizes), np.float32)
    for one in decoded:
        total += one
    mean = run(lambda words: codec.decode_bucket_mean(words, layout), words)
    np.testing.assert_array_equal(mean, total * np.float32(1 / world))


def test_another_order_would_be_seen():
    """What the test above relies on."""
    _, decoded = payloads(TopK(0.3), Layout(SIZES), 3)
    one, two, three = decoded
    assert ((one + two) + three != one + (two + three)).any()


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_what_is_not_finite_is_seen_in_words(value_dtype):
    layout, codec = Layout((2000, 70_001)), TopK(0.01, value_dtype=value_dtype)
    for bad, seen in ((np.nan, True), (-np.inf, True), (3e38, False), (1.0, False)):
        x = bucket_of(layout.sizes)
        x[1234] = bad
        words = codec.encode_bucket(tf.constant(x), layout, SEED)
        assert bool(codec.encoded_finite(x, words, layout)) != seen
        assert np.isfinite(codec.decode_bucket(words, layout)).all() != seen


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_means_of_sums_beyond_float32_are_refused(value_dtype, world):
    layout, codec = Layout((200,)), TopK(0.01, value_dtype=value_dtype)
    for value, finite in ((3e38, world == 1), (0.9e38, True), (np.nan, False), (np.inf, False)):
        x = np.full(200, value, np.float32)
        words = tf.stack([codec.encode_bucket(tf.constant(x), layout, SEED)] * world)
        mean = codec.decode_bucket_mean(words, layout)
        assert bool(codec.mean_finite(mean, words, layout)) == finite, value


def test_zeros_decode_to_zeros():
    layout = Layout(SIZES)
    for value_dtype in VALUE_DTYPES:
        codec = TopK(0.01, value_dtype=value_dtype)
        words = codec.encode_bucket(tf.zeros([layout.size]), layout, SEED)
        assert not codec.decode_bucket(words, layout).numpy().any()


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_the_graph_has_the_same_size_for_any_number_of_tensors(value_dtype):
    codec = TopK(0.01, value_dtype=value_dtype)

    def ops(sizes):
        layout = Layout(sizes)

        def step(x, words):
            return (
                codec.encode_bucket_with_residual(x, layout, SEED),
                codec.decode_bucket_mean(words, layout),
            )

        signature = (
            tf.TensorSpec([layout.size], tf.float32),
            tf.TensorSpec([2, codec.bucket_words(layout)], tf.int32),
        )
        graph = tf.function(step, autograph=False).get_concrete_function(*signature).graph
        return len(graph.get_operations())

    assert ops((20_000,) * 2) == ops((200,) * 200)  # as many elements, and as many kept


@pytest.mark.slow
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_one_kernel_for_a_gpu_makes_the_same_words(value_dtype, monkeypatch):
    """Run on the CPU by XLA: so workers with and without a GPU understand each other."""
    codec, layout = TopK(0.01, value_dtype=value_dtype), Layout(SIZES)
    x = [tf.constant(bucket_of(SIZES, seed)) for seed in range(2)]
    one_by_one = _step(codec, layout, x)
    monkeypatch.setattr(numerics, "on_gpu", lambda tensor: True)
    for compiled, expected in zip(_step(codec, layout, x), one_by_one, strict=True):
        np.testing.assert_array_equal(compiled, expected)


def _step(codec, layout, x):
    """Two messages with a residual: their words, what they leave out, and the mean."""
    encoded = [
        error_feedback.encode_with_feedback(codec, layout, one, x[0], SEED, factor=0.5) for one in x
    ]
    words = tf.stack([one.words for one in encoded])
    mean, finite = error_feedback.decode_mean(codec, layout, words)
    assert finite and all(one.finite for one in encoded)
    return tf.bitcast(words, tf.int32), *(one.left_out()[0] for one in encoded), mean
