"""A matrix whose rows live on servers, in ranges: read, written, looked up; held nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from tfqcomm.parameter_server.cluster import on

BLOCK_ELEMENTS = 1 << 22  # of what is moved at a time: 16 MiB


def rows_of_block(width: int) -> int:
    """How many rows are moved, or initialised, at a time: the same on any number of servers."""
    return max(1, BLOCK_ELEMENTS // max(1, width))


def blocks(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """The ranges of rows of which `start` to `stop` consists, each within one block."""
    rows = rows_of_block(width)
    while start < stop:
        end = min(stop, (start // rows + 1) * rows)
        yield start, end
        start = end


def spread(rows: int, servers: int) -> list[tuple[int, int]]:
    """The range of rows of each server: start and stop; fewer than servers if rows are few."""
    parts = min(servers, rows)
    bounds = [rows * i // parts for i in range(parts + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some of the rows.

    Attributes:
        device: of the server.
        start, stop: which rows of the matrix.
        variable: with these rows, [stop - start, ...].
    """

    device: str
    start: int
    stop: int
    variable: tf.Variable

    @property
    def width(self) -> int:
        """Elements of a row."""
        return int(np.prod(self.variable.shape[1:]))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows of the matrix, one after the other, none of them large."""
        return blocks(self.start, self.stop, self.width)

    def rows(self, start: int, stop: int) -> tf.Tensor:
        """Rows of the matrix, on the server: these alone are copied."""
        return tf.gather(self.variable, tf.range(start - self.start, stop - self.start))

    def set_rows(self, start: int, value) -> None:
        """Puts others in their place, from the matrix' row `start` on."""
        first = start - self.start
        places = tf.range(first, first + len(value))
        value = tf.cast(value, self.variable.dtype)
        self.variable.scatter_update(tf.IndexedSlices(value, places))


class Stored:
    """All rows of a matrix: the store of a variable of the chief's model.

    Args:
        shards: in the order of the rows.
    """

    def __init__(self, shards: Sequence[Shard]):
        self.shards = tuple(shards)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole matrix."""
        return (self.shards[-1].stop, *self.shards[0].variable.shape[1:])

    @property
    def devices(self) -> list[str]:
        """Of the servers, in the order of the rows."""
        return [shard.device for shard in self.shards]

    def numpy(self) -> np.ndarray:
        """All rows, fetched block by block: there is no second copy."""
        whole = np.empty(self.shape, self.shards[0].variable.dtype.as_numpy_dtype)
        for start, stop, block in self.fetched():
            whole[start:stop] = block
        return whole

    def fetched(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Blocks of rows, in their order: the first row, the one after the last, and the rows."""
        for shard in self.shards:
            for start, stop in shard.blocks():
                with on(shard.device):
                    block = shard.rows(start, stop).numpy()
                yield start, stop, block

    def tensor(self) -> tf.Tensor:
        """All rows, in a graph."""
        found = []
        for shard in self.shards:
            with tf.device(shard.device):
                found.append(shard.variable.read_value())
        return tf.concat(found, 0)

    def write(self, value: np.ndarray) -> None:
        """Sends all rows, block by block."""
        for shard in self.shards:
            for start, stop in shard.blocks():
                with on(shard.device):
                    shard.set_rows(start, value[start:stop])

    def lookup(self, ids) -> tf.Tensor:
        """Rows of these ids, each of the matrix: int64[n] -> [n, ...]."""
        stops = tf.constant([shard.stop for shard in self.shards], ids.dtype)
        server = tf.searchsorted(stops, ids, side="right")
        orders, found = [], []
        for index, shard in enumerate(self.shards):
            order = tf.where(tf.equal(server, index))[:, 0]
            with tf.device(shard.device):
                found.append(tf.gather(shard.variable, tf.gather(ids, order) - shard.start))
            orders.append(tf.cast(order, tf.int32))
        return tf.dynamic_stitch(orders, found)
