"""The first values of a table, made on its servers: the same ones on any number of servers.

    block b of rows = the layer's initializer, with a seed made of its own seed and of b

A table's values are so drawn from the same distribution as in plain Keras, and are other ones for
the same seed. What depends on the shape, as a variance by fans does, goes by that of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfqcomm.parameter_server.cluster import on
from tfqcomm.parameter_server.embeddings.stored import Shard, Stored, blocks, rows_of_block, spread

_i = keras.initializers
_BY_ENTRY = (_i.RandomUniform, _i.RandomNormal, _i.TruncatedNormal)
_BY_FANS = (
    *(_i.VarianceScaling, _i.GlorotUniform, _i.GlorotNormal, _i.LecunUniform, _i.LecunNormal),
    *(_i.HeUniform, _i.HeNormal),
)
_CONSTANT = (_i.Zeros, _i.Ones, _i.Constant)


def make(
    shape: tuple[int, int],
    initializer: keras.initializers.Initializer,
    servers: Sequence[str],
    dtype: str,
) -> Stored:
    """A table on the servers, float32.

    Args:
        shape: rows and width.
        initializer: of the layer. One of Keras' own random ones or a constant is evaluated on the
            servers, in blocks of rows; another one once, here, for the whole table.
        servers: their devices.
        dtype: of the layer's weights, for an initializer that is evaluated here.
    """
    rows, width = shape
    shards = []
    ranges = spread(rows, len(servers))
    for device, (start, stop) in zip(servers, ranges, strict=False):
        with on(device):
            zeros = tf.Variable(tf.zeros([stop - start, width]), trainable=False)
        shards.append(Shard(device, start, stop, zeros))
    stored = Stored(shards)
    block_of = _by_blocks(initializer, shape)
    if block_of is None:
        stored.write(np.asarray(initializer(shape, dtype=dtype), np.float32))
    else:
        for shard in shards:
            _fill(shard, shape, block_of)
    return stored


def _fill(shard: Shard, shape: tuple[int, int], block_of: Callable) -> None:
    """Gives a shard its rows; a block that lies on two servers is made on both."""
    rows, width = shape
    size = rows_of_block(width)
    for start, stop in blocks(shard.start, shard.stop, width):
        number = start // size
        first = number * size
        with on(shard.device):
            values = block_of(number)([min(size, rows - first), width], dtype="float32")
            shard.set_rows(start, values[start - first : stop - first])


def _by_blocks(initializer, shape: tuple[int, int]) -> Callable[[int], Callable] | None:
    """From the number of a block its initializer; None where there is no such thing."""
    kind = type(initializer)
    if kind in _CONSTANT and np.ndim(getattr(initializer, "value", 0)) == 0:
        return lambda number: initializer
    if kind not in (*_BY_ENTRY, *_BY_FANS):
        return None
    base = _base_seed(initializer.seed)

    def block_of(number: int):
        seed = int(np.random.SeedSequence([*base, number]).generate_state(1)[0] >> 1)
        if kind in _BY_ENTRY:
            return kind.from_config({**initializer.get_config(), "seed": seed})
        rows = min(rows_of_block(shape[1]), shape[0] - number * rows_of_block(shape[1]))
        fans = _fans(initializer.mode, (rows, shape[1])) / _fans(initializer.mode, shape)
        return _i.VarianceScaling(
            initializer.scale * fans, initializer.mode, initializer.distribution, seed
        )

    return block_of


def _fans(mode: str, shape: tuple[int, int]) -> float:
    """What the scale of an initializer is divided by."""
    return {"fan_in": shape[0], "fan_out": shape[1], "fan_avg": sum(shape) / 2}[mode]


def _base_seed(seed) -> list[int]:
    """Non-negative integers of an initializer's seed; a generator of seeds is drawn from once."""
    if isinstance(seed, keras.random.SeedGenerator):
        return [int(part) % 2**32 for part in np.asarray(seed.next())]
    return [int(seed) % 2**64]
