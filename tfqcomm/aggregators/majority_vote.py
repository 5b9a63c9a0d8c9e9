"""The sign that most replicas have, one bit each way: 2 (W - 1) / W p bytes, whatever W is.

    phase 1   all-to-all of the signs of a chunk to its owner;  votes = sum of signs
    phase 2   the owner encodes the signs of the votes, and all gather the chunks

signSGD with majority vote (Bernstein et al., ICML 2018, arXiv 1802.04434, algorithm 2), with the
mean of the replicas' magnitudes in place of 1.
"""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.aggregators.error_feedback import encode_with_feedback
from tfqcomm.aggregators.health import all_healthy
from tfqcomm.aggregators.two_phase import TwoPhaseMean
from tfqcomm.kernels import rounding


class MajorityVoteMean(TwoPhaseMean):
    """Every replica has one vote for each element, however large its gradient is.

    A replica whose block is all zeros abstains. Where votes are equal, as they may be of an even
    number, the owner tosses a coin: one bit cannot say zero, and zero is then the expectation.
    Nothing is lost on the way back, so the owner owes nothing.
    """

    def _encode_owner(self, replica, rows, step):
        chunk = self.chunks[self.transport.ranks[replica]]
        received = rows[:, 1 : 1 + self.compressor.bucket_words(chunk.layout)]
        seed = self.codec_seed(step, replica, start=chunk.start, phase="owner")
        if chunk.layout.size:
            codec, layout = self.compressor, chunk.layout
            received = tf.bitcast(received, tf.int32)
            elected = codec.kernel(_elected, layout.size, codec, layout)(received, seed)
        else:
            elected = tf.zeros([0])
        encoded = encode_with_feedback(self._owner_codec, chunk.layout, elected, None, seed)
        payload = self._payload(all_healthy(rows) & encoded.finite, encoded.words)
        return payload, []


def _elected(codec, layout, words, seed):
    """The sign of most messages, times their mean magnitude: int32[W, w] -> float32[size]."""
    world = words.shape[0]
    votes = magnitude = tf.zeros([layout.size])
    for message in tf.unstack(words):
        decoded = codec.decode_bucket(message, layout)
        votes += tf.sign(decoded)
        magnitude += tf.abs(decoded) * (1 / world)
    coin = tf.cast(2 * (rounding.draw(seed, layout.size) % 2) - 1, tf.float32)
    return layout.without_padding(tf.where(tf.equal(votes, 0), coin, tf.sign(votes)) * magnitude)
