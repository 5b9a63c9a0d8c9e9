"""Vectors one by one: what is compiled says the same as what is not."""

import numpy as np
import pytest
import tensorflow as tf

from tests.catalogue import COMPRESSORS
from tests.rungs import slow_unless
from tfqcomm.aggregators import vectors

SIZE = vectors.FUSE_FROM + 33
CASES = [case for case in COMPRESSORS if not case.compressor.low_rank]


@pytest.mark.parametrize(
    "case", slow_unless(lambda case: not case.slow, CASES), ids=lambda case: str(case.compressor)
)
def test_what_is_sent_and_what_is_left_out_are_all_there_was(case):
    codec = case.compressor
    rng = np.random.default_rng(0)
    message, residual = rng.normal(size=[2, SIZE]).astype(np.float32)
    seed = tf.constant([3, 4])
    words, left_out = vectors.encode_with_feedback(
        codec, tf.constant(message), tf.constant(residual), seed
    )
    sent = vectors.decode(codec, words, SIZE).numpy()
    assert words.shape == [codec.num_words(SIZE)]
    np.testing.assert_allclose(sent + left_out, message + residual, rtol=1e-5, atol=1e-5)
    target = tf.constant(message + residual)
    expected = codec.decode(codec.encode(target, seed), SIZE)
    np.testing.assert_allclose(sent, expected, rtol=1e-5, atol=1e-6)
    mean = vectors.decode_mean(codec, tf.stack([words, words, words]), SIZE)
    np.testing.assert_allclose(mean, sent, rtol=1e-6)
