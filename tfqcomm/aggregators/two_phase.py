"""Each replica averages one chunk for all: 2 (W - 1) / W p bytes, whatever W is.

    phase 1   all-to-all of the encoded chunks to their owners;  decode, mean
    phase 2   the owner adds its residual, re-encodes, and all gather the chunks

The compressed all-reduce of 1-bit Adam (arXiv 2102.02888); for a compressed *update* it is
Efficient-Adam's two-way error feedback (arXiv 2205.14473).
"""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.aggregators.base import Aggregator, BucketMean
from tfqcomm.aggregators.error_feedback import decode_mean, encode_with_feedback
from tfqcomm.aggregators.health import all_healthy, health_word


class TwoPhaseMean(Aggregator):
    """Averages with a second lossy step, which has a residual of its own at the chunk's owner.

    Chunks are equal parts of the bucket's rows. Everyone, the owner too, goes on with the
    re-encoded mean. Scales and top-k are per segment: those of a tensor that lies across a boundary
    are finer than the tensor.
    """

    one_round = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._owner_codec = self.compressor.for_owner()
        self.chunks = self.layout.cut(self.transport.world)
        self._chunk_words = 1 + max(
            self.compressor.bucket_words(chunk.layout) for chunk in self.chunks
        )

    def exchange(self, messages, healthy, step):
        sent, updates, left_out = [], [], []
        for replica, message in enumerate(messages):
            with tf.device(self.transport.devices[replica]):
                rows, rest = self._encode_worker(replica, message, healthy[replica], step)
                sent.append(rows)
            left_out += rest
        received = self.transport.all_to_all(sent)  # L times [W, c]
        chunks = []
        for replica, rows in enumerate(received):
            with tf.device(self.transport.devices[replica]):
                words, kept = self._encode_owner(replica, rows, step)
                chunks.append(words)
                updates += kept
        gathered = self.transport.all_gather(chunks)  # [W, c]
        with tf.device(self.transport.device):
            mean, finite = self._decode(gathered)
            healthy = all_healthy(gathered) & finite
        cost = self.transport.bytes_all_to_all(self._chunk_words)
        cost += self.transport.bytes_all_gather(self._chunk_words)
        return BucketMean(mean, healthy, updates, cost, left_out)

    def _encode_worker(self, replica, message, healthy, step):
        """float32[W, c], row j for owner j; and the new residual, if there is one."""
        owed = self.value_owed(self.residual(replica))
        encoded = []
        for chunk in self.chunks:
            seed = self.codec_seed(step, replica, start=chunk.start)
            part = None if owed is None else owed[chunk.start : chunk.stop]
            encoded.append(
                encode_with_feedback(
                    self.compressor,
                    chunk.layout,
                    message[chunk.start : chunk.stop],
                    part,
                    seed,
                    factor=self.factor,
                )
            )
        finite = tf.reduce_all([one.finite for one in encoded])
        rows = tf.stack([self._payload(healthy & finite, one.words) for one in encoded])
        rest = [part for one in encoded for part in one.left_out(rows)]
        return rows, [tf.concat(rest, 0)] if rest else []

    def _encode_owner(self, replica, rows, step):
        """float32[c]: the mean of everyone's chunk, encoded again; and the owner's residual."""
        chunk = self.chunks[self.transport.ranks[replica]]
        received = rows[:, 1 : 1 + self.compressor.bucket_words(chunk.layout)]
        mean, finite = decode_mean(self.compressor, chunk.layout, received)
        residual = self.owners_residual(replica, chunk)
        owed = self.value_owed(residual)
        seed = self.codec_seed(step, replica, start=chunk.start, phase="owner")
        encoded = encode_with_feedback(self._owner_codec, chunk.layout, mean, owed, seed)
        payload = self._payload(all_healthy(rows) & finite & encoded.finite, encoded.words)
        return payload, [(residual, rest) for rest in encoded.left_out(payload)]

    def _decode(self, gathered):
        """float32[size] of the bucket, from float32[W, c]; and whether it is finite."""
        decoded = []
        for owner, chunk in enumerate(self.chunks):
            words = gathered[
                owner : owner + 1, 1 : 1 + self._owner_codec.bucket_words(chunk.layout)
            ]
            decoded.append(decode_mean(self._owner_codec, chunk.layout, words))
        means, finite = zip(*decoded, strict=True)
        return tf.concat(means, 0), tf.reduce_all(finite)

    def _payload(self, healthy, words):
        return tf.pad(
            tf.concat([health_word(healthy), words], 0),
            [[0, self._chunk_words - 1 - words.shape[0]]],
        )
