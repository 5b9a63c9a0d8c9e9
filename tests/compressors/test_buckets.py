"""Several tensors at once: as each by itself, in a graph whose size is that of one."""

import numpy as np
import pytest
import tensorflow as tf

from tests.catalogue import COMPRESSORS, over_compressors
from tfqcomm.compressors import QSGD, BlockInt8, Compressor, RandomK, Ternary, TopK
from tfqcomm.kernels.layout import Layout

SIZES = (1, 70, 300, 4096)
SEED = tf.constant([3, 4])


def layout_of(compressor, sizes=SIZES):
    return Layout(sizes, compressor.row(sum(sizes)))


def tensors_of(sizes=SIZES):
    rng = np.random.default_rng(0)
    return [
        np.float32(10.0**i) * rng.normal(size=n).astype(np.float32) for i, n in enumerate(sizes)
    ]


def decoded(compressor, layout, tensors):
    words = compressor.encode_bucket(layout.pack(tensors), layout, SEED)
    assert words.shape == [compressor.bucket_words(layout)]
    return layout.unpack(compressor.decode_bucket(words, layout))


@pytest.mark.parametrize("owners", [1, 2, 4, 8])
def test_a_small_models_blocks_are_hardly_padded(owners):
    """Biases took a block each, and owners whole blocks: 23,400 bytes, and on eight 24,960."""
    layout = layout_of(BlockInt8(), (250, 10, 5000, 20, 16_000, 50, 500, 10))  # the CNN of MNIST
    words = max(BlockInt8().bucket_words(chunk.layout) for chunk in layout.cut(owners))
    scales = 4 * (90 + owners)  # of blocks, of which some begin with one owner and end with another
    assert 21_840 < 4 * words * owners < 21_840 + scales + 8 * (8 + owners)


@over_compressors()
def test_a_tensor_among_others_is_decoded_as_by_itself(case):
    codec, tensors = case.compressor, tensors_of()
    found = decoded(codec, layout_of(codec), tensors)
    for mine, tensor in zip(found, tensors, strict=True):
        alone = codec.decode(codec.encode(tensor), len(tensor)).numpy()
        if codec.deterministic:
            # A sum of floats depends on how it is cut into runs, by a unit in the last place.
            np.testing.assert_allclose(mine, alone, rtol=2e-7)
            continue
        # Random roundings differ; what they choose from does not.
        assert np.isfinite(mine).all()
        largest = np.abs(tensor).max() * (1 if isinstance(codec, Ternary) else np.sqrt(len(tensor)))
        factor = len(tensor) / codec.num_kept(len(tensor)) if isinstance(codec, RandomK) else 2
        assert np.abs(mine).max() <= max(factor, 2) * largest


@pytest.mark.parametrize(("codec", "levels"), [(QSGD(3), 3), (Ternary(clip=None), 1)], ids=str)
def test_random_roundings_of_a_bucket_are_unbiased(codec, levels):
    tensors, layout = tensors_of((70, 300)), layout_of(codec, (70, 300))
    flat = layout.pack(tensors)

    @tf.function
    def round_trip(step):
        words = codec.encode_bucket(flat, layout, tf.stack([7, step]))
        return codec.decode_bucket(words, layout)

    draws = np.mean([round_trip(tf.constant(step)) for step in range(400)], axis=0, dtype=float)
    for mean, x in zip(layout.unpack(draws), tensors, strict=True):
        step = (np.linalg.norm(x) if levels > 1 else np.abs(x).max()) / levels
        deviation = np.sqrt(step * np.abs(x) / 400)  # of a rounding up or down by one step
        assert (np.abs(mean - x) <= 5 * deviation + 2.0**-16 * step).all()


def test_tensors_of_a_bucket_draw_independently():
    codec, ones = Ternary(clip=None), np.full(4096, 0.5, np.float32)
    ones[0] = 1.0
    first, second = decoded(codec, layout_of(codec, (4096, 4096)), [ones, ones])
    assert 0.4 < np.mean(first.numpy() == second.numpy()) < 0.6


def test_random_k_keeps_its_share_of_every_tensor():
    codec = RandomK(0.1)
    found = decoded(codec, layout_of(codec), [np.ones(n, np.float32) for n in SIZES])
    assert [np.count_nonzero(x) for x in found] == [codec.num_kept(n) for n in SIZES]


@over_compressors()
def test_a_mean_is_that_of_the_decoded_messages(case):
    codec = case.compressor
    layout = layout_of(codec)
    words = []
    for worker in range(3):
        tensors = [(worker + 1) * tensor for tensor in tensors_of()]
        words.append(codec.encode_bucket(layout.pack(tensors), layout, SEED))
    parts = [layout.unpack(codec.decode_bucket(one, layout)) for one in words]
    mean = layout.unpack(codec.decode_bucket_mean(tf.stack(words), layout))
    for found, decoded_parts in zip(mean, zip(*parts, strict=True), strict=True):
        expected = np.sum(decoded_parts, axis=0) * np.float32(1 / 3)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_many_messages_are_added_up_in_a_loop_and_give_the_same():
    codec, layout = TopK(0.1), Layout(SIZES)
    words = tf.stack([codec.encode_bucket(layout.pack(tensors_of()), layout, SEED)] * 12)
    expected = layout.unpack(codec.decode_bucket(words[0], layout))
    found = layout.unpack(codec.decode_bucket_mean(words, layout))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def _ops(codec, tensors):
    layout = layout_of(codec, (300,) * tensors)

    @tf.function(autograph=False)
    def step(x, words):
        encoded = codec.encode_bucket(x, layout, SEED)
        return encoded, codec.decode_bucket_mean(words, layout)

    graph = step.get_concrete_function(
        tf.TensorSpec([layout.size]), tf.TensorSpec([2, codec.bucket_words(layout)], tf.int32)
    ).graph
    return len(graph.get_operations())


# Those that go from tensor to tensor, and may.
BY_TENSOR = {"AdaptiveTopK", "PowerSGD", "ThresholdQuantizer(threshold=optimal)"}


@pytest.mark.parametrize(
    "codec",
    [
        case.compressor
        for case in COMPRESSORS
        if type(case.compressor).__name__ not in BY_TENSOR and str(case) not in BY_TENSOR
    ],
    ids=str,
)
def test_the_graph_does_not_grow_with_the_number_of_tensors(codec):
    assert _ops(codec, 40) <= 1.1 * _ops(codec, 4)


def test_a_codec_of_ones_own_goes_from_tensor_to_tensor():
    class Halves(Compressor):
        def num_words(self, n):
            return n

        def encode_implementation(self, x, seed):
            return tf.bitcast(x / 2, tf.int32)

        def decode_implementation(self, words, n):
            return tf.bitcast(words, tf.float32)

    for found, tensor in zip(
        decoded(Halves(), Layout(SIZES), tensors_of()), tensors_of(), strict=True
    ):
        np.testing.assert_array_equal(found, tensor / 2)
