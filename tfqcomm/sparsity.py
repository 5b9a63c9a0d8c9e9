"""How many weights are exactly zero, and what a model takes when only the others are kept."""

from __future__ import annotations

import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class SparseWeight:
    """One weight of a model.

    Attributes:
        path: its Keras path.
        tensor: its non-zero entries, in the order of their positions.
        num_bytes: of its values and the shorter of positions and a bitmap; at most dense.
    """

    path: str
    tensor: tf.SparseTensor
    num_bytes: int

    @property
    def zeros(self) -> float:
        """Share of the entries that are exactly zero."""
        size = math.prod(self.tensor.dense_shape.numpy())
        return 1 - len(self.tensor.values) / size if size else 0.0


def export_sparse(model: keras.Model) -> dict[str, SparseWeight]:
    """The weights of a model as sparse tensors, by path.

    `tf.sparse.to_dense` of a tensor is the weight to the bit, but for the sign of its zeros.

    Example:
    >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
    >>> _ = model.layers[0].kernel.assign([[0, 1], [0, 0], [0, 0], [2, 0]])
    >>> weights = export_sparse(model)
    >>> sum(weight.num_bytes for weight in weights.values())
    9
    """
    exported = {}
    for weight in model.weights:
        value = np.asarray(weight.numpy())
        positions = np.argwhere(value != 0)
        tensor = tf.SparseTensor(
            positions.astype(np.int64), value[tuple(positions.T)], np.array(value.shape, np.int64)
        )
        exported[weight.path] = SparseWeight(
            weight.path, tensor, sparse_bytes(len(positions), value.size, value.itemsize)
        )
    return exported


def sparse_bits(nonzeros: int, size: int, itemsize: int = 4) -> int:
    """Bits of `nonzeros` values among `size`.

    With positions of ceil(log2 size) bits, or with a bitmap of `size` bits, or dense: whichever is
    the least.
    """
    positions = nonzeros * max(size - 1, 0).bit_length()
    return min(8 * itemsize * nonzeros + min(positions, size), 8 * itemsize * size)


def sparse_bytes(nonzeros: int, size: int, itemsize: int = 4) -> int:
    """Likewise in whole bytes."""
    return math.ceil(sparse_bits(nonzeros, size, itemsize) / 8)


def zero_share(weights) -> float:
    """Share of exactly zero entries of all `weights` together; 0 if there are none."""
    values = [np.asarray(w) for w in weights]
    size = sum(value.size for value in values)
    return sum(int((value == 0).sum()) for value in values) / size if size else 0.0
