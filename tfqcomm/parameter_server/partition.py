"""Which part of which variable lives on which parameter server."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import tensorflow as tf

MIN_SHARD_BYTES = 4 << 20  # of the default partitioner: variables of twice this size are split
# Elements from which on a piece is by itself: below, a transfer, a variable or a bucket of its own
# costs more than a copy.
ALONE_FROM = 1 << 16


@dataclasses.dataclass(frozen=True)
class Piece:
    """A variable, or some of its rows, on one server.

    Attributes:
        variable: its place among the model's trainable variables.
        start, stop: the rows; all of them, and 0 to 1 of a scalar, where it is not split.
        shape: of the piece.
        server: where it lives.
    """

    variable: int
    start: int
    stop: int
    shape: tuple[int, ...]
    server: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """The same in every run."""
        return f"variable{self.variable}_row{self.start}"

    def cut(self, value):
        """This piece of a whole variable's value, in its shape."""
        return value[self.start : self.stop] if self.shape else value


def partition(
    shapes: Sequence[tuple[int, ...]],
    servers: int,
    variable_partitioner: Callable | None = None,
    whole: Mapping[int, str] | None = None,
    elsewhere: Collection[int] = (),
) -> list[Piece]:
    """Splits large variables, and spreads the pieces: the largest first, to the emptiest server.

    Args:
        shapes: of the variables.
        servers: how many there are.
        variable_partitioner: as TensorFlow's: (shape, dtype) -> partitions of each axis, of which
            the first alone may be split. None splits what is larger than 8 MiB among the servers.
        whole: variables that must not be split, and why.
        elsewhere: variables of which there are no pieces: tables whose rows travel.

    Returns:
        The pieces, in the order of the variables.

    Raises:
        ValueError: if `variable_partitioner` splits what it must not.
    """
    partitioners = tf.distribute.experimental.partitioners
    partitioner = variable_partitioner or partitioners.MinSizePartitioner(
        MIN_SHARD_BYTES, max_shards=servers
    )
    whole = whole or {}
    pieces = []
    for i, shape in enumerate(shapes):
        if i in elsewhere:
            continue
        rows = _rows(shape, partitioner)
        if len(rows) > 1 and i in whole:
            if variable_partitioner is not None:
                raise ValueError(
                    f"Argument `variable_partitioner` must leave variable {i} whole: {whole[i]}. "
                    f"Received: {len(rows)} parts for a variable of shape {shape}"
                )
            rows = [(0, shape[0])]
        pieces += [Piece(i, *r, (r[1] - r[0], *shape[1:]) if shape else (), server=0) for r in rows]
    load = np.zeros([servers], np.int64)
    placed = {}
    for piece in sorted(pieces, key=lambda piece: -piece.size):
        server = int(np.argmin(load))
        load[server] += piece.size
        placed[piece] = dataclasses.replace(piece, server=server)
    return [placed[piece] for piece in pieces]


def assemble(pieces: Sequence[Piece], values: Mapping[Piece, tf.Tensor]) -> list[tf.Tensor]:
    """Whole variables, out of the values of all pieces, given in the order of the variables."""
    parts: dict[int, list[tf.Tensor]] = {}
    for piece in pieces:
        parts.setdefault(piece.variable, []).append(values[piece])
    return [part[0] if len(part) == 1 else tf.concat(part, 0) for part in parts.values()]


def _rows(shape, partitioner) -> list[tuple[int, int]]:
    """First and last + 1 of the rows of each piece."""
    if not shape:
        return [(0, 1)]
    partitions = list(partitioner(shape=tf.TensorShape(shape), dtype=tf.float32))
    if any(p != 1 for p in partitions[1:]):
        raise ValueError(
            "Argument `variable_partitioner` must split the first axis only. "
            f"Received: partitions={partitions} for a variable of shape {shape}"
        )
    parts = max(1, min(int(partitions[0]), shape[0]))
    bounds = [shape[0] * i // parts for i in range(parts + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))
