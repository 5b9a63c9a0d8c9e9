"""Each replica averages one chunk for all: 2 (W - 1) / W p bytes, whatever W is.

    phase 1   all-to-all of the encoded chunks to their owners;  decode, mean
    phase 2   the owner adds its residual, re-encodes, and all gather the chunks

The compressed all-reduce of 1-bit Adam (arXiv 2102.02888); for a compressed *update* it is
Efficient-Adam's two-way error feedback (arXiv 2205.14473).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import tensorflow as tf

from tfqcomm.aggregators.base import Aggregate, Aggregator, decode_mean, health_word, split_words
from tfqcomm.kernels import numerics


@dataclasses.dataclass(frozen=True)
class Segment:
    """The part [start, stop) of a tensor: what a chunk holds of it, encoded on its own."""

    tensor: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Elements."""
        return self.stop - self.start


def partition(sizes: Sequence[int], owners: int) -> list[list[Segment]]:
    """Cuts the concatenation of all tensors into equal chunks, one for each owner.

    At most one tensor is cut at each boundary, so there are no more than T + W - 1 segments.
    """
    total = sum(sizes)
    chunks: list[list[Segment]] = [[] for _ in range(owners)]
    begin = 0
    for tensor, size in enumerate(sizes):
        for owner in range(owners):
            low = max(begin, total * owner // owners)
            high = min(begin + size, total * (owner + 1) // owners)
            if low < high:
                chunks[owner].append(Segment(tensor, low - begin, high - begin))
        begin += size
    return chunks


class TwoPhaseMean(Aggregator):
    """Averages with a second lossy step, which has a residual of its own at the chunk's owner.

    Everyone, the owner too, goes on with the re-encoded mean. Scales and top-k are per segment:
    those of a tensor that lies across a boundary are finer than the tensor.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._owner_codec = self.compressor.for_owner()
        self.chunks = partition(self.sizes, self.transport.world)
        self._chunk_words = 1 + max(sum(self._lengths(chunk)) for chunk in self.chunks)

    def exchange(self, targets, healthy, step):
        sent, updates = [], []
        for replica, vectors in enumerate(targets):
            with tf.device(self.transport.devices[replica]):
                rows, residuals = self._encode_worker(replica, vectors, healthy[replica], step)
                sent.append(rows)
                updates += residuals
        received = self.transport.all_to_all(sent)  # L times [W, c]
        chunks = []
        for replica, rows in enumerate(received):
            with tf.device(self.transport.devices[replica]):
                words, residuals = self._encode_owner(replica, rows, step)
                chunks.append(words)
                updates += residuals
        gathered = self.transport.all_gather(chunks)  # [W, c]
        with tf.device(self.transport.device):
            means = self._decode(gathered)
            all_healthy = tf.reduce_all(tf.equal(gathered[:, 0], 0))
        cost = self.transport.bytes_all_to_all(self._chunk_words)
        cost += self.transport.bytes_all_gather(self._chunk_words)
        return Aggregate(means, all_healthy, updates, cost)

    def _encode_worker(self, replica, targets, healthy, step):
        """int32[W, c], row j for owner j; and the new residuals."""
        rows, decoded = [], [[] for _ in targets]
        for chunk in self.chunks:
            words = []
            for segment in chunk:
                seed = self.codec_seed(step, segment.tensor, replica, start=segment.start)
                part = targets[segment.tensor][segment.start : segment.stop]
                words.append(self.compressor.encode(part, seed))
                if self.residuals is not None:
                    decoded[segment.tensor].append(self.compressor.decode(words[-1], segment.size))
            rows.append(self._pad(tf.concat([health_word(healthy), *words], 0)))
        updates = []
        for index, (target, parts) in enumerate(zip(targets, decoded, strict=True)):
            if parts:
                sent = functools.partial(tf.concat, parts, 0)
                updates += self.left_out(replica, self.slots("worker", index), target, sent)
        return tf.stack(rows), updates

    def _encode_owner(self, replica, rows, step):
        """int32[c]: the mean of everyone's chunk, encoded again; and the owner's residuals."""
        chunk = self.chunks[self.transport.ranks[replica]]
        healthy = tf.reduce_all(tf.equal(rows[:, 0], 0))
        payload, updates = [], []
        received = split_words(rows, self._lengths(chunk), start=1)
        for segment, words in zip(chunk, received, strict=True):
            slots = self.slots("owner", segment.tensor, segment.start, segment.stop)
            mean = decode_mean(self.compressor, words, segment.size)
            target = mean + self.owed(replica, slots)
            healthy &= numerics.all_finite([target])
            seed = self.codec_seed(
                step, segment.tensor, replica, start=segment.start, phase="owner"
            )
            payload.append(self._owner_codec.encode(target, seed))
            decode = functools.partial(self._owner_codec.decode, payload[-1], segment.size)
            updates += self.left_out(replica, slots, target, decode)
        return self._pad(tf.concat([health_word(healthy), *payload], 0)), updates

    def _decode(self, gathered):
        """float32[n] of every tensor, from int32[W, c]."""
        parts = [[] for _ in self.sizes]
        for owner, chunk in enumerate(self.chunks):
            words = split_words(gathered[owner], self._lengths(chunk), start=1)
            for segment, one in zip(chunk, words, strict=True):
                parts[segment.tensor].append(self._owner_codec.decode(one, segment.size))
        return [tf.concat(p, 0) if p else tf.zeros([0]) for p in parts]

    def _lengths(self, chunk):
        return [self.compressor.num_words(segment.size) for segment in chunk]

    def _pad(self, words):
        return tf.pad(words, [[0, self._chunk_words - words.shape[0]]])
