"""The weights that all replicas start from, and the outer step that moves them."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from tfqcomm.optimizers.local.pieces import Piece, wide
from tfqcomm.optimizers.local.pulls import Pullable, SharedState


def outer_step(weights, buffer, delta, learning_rate, momentum):
    """Nesterov SGD on an outer gradient, in PyTorch's form (arXiv 2311.08105, Algorithm 1).

    Args:
        weights: the global ones, Theta.
        buffer: of the momentum; zeros at first.
        delta: the mean of all replicas' (global - own) weights.

    Returns:
        The new weights and the new buffer.
    """
    buf = momentum * buffer + delta
    return weights - learning_rate * (delta + momentum * buf), buf


class GlobalWeights:
    """Global weights and their momentum, once in each process and equal in all of them.

    A variable is named by its key; `copies` are those of the local replicas, `piece` says what part
    of it is meant.

    Args:
        learning_rate: of the outer step.
        momentum: of the outer step, Nesterov's.
        merge: in (0, 1], how much of the global weights a replica takes after an exchange.

    Attributes:
        shared: what a backup keeps of them.
    """

    def __init__(self, learning_rate: float, momentum: float, merge: float = 1.0):
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.merge = merge
        self.shared = SharedState()

    def __contains__(self, key: str) -> bool:
        return _weights(key) in self.shared

    def begin(self, replicas: Pullable, keys: Sequence[str]) -> None:
        """Before the first step: they are where the replicas are, or what was saved of them."""
        for key, copy in zip(keys, replicas.variables[0], strict=True):
            if key not in self:
                start, zeros = _start(copy)
                self.shared.create(_weights(key), start, replicas)
                self.shared.create(_momentum(key), zeros, replicas)

    def differences(self, key: str, piece: Piece, copies: Sequence[tf.Variable]) -> list[tf.Tensor]:
        """Global minus own weights, of each local replica: its outer gradient."""
        weights, found = piece.of(self.shared[_weights(key)]), []
        for copy in copies:
            with tf.device(copy.device):
                found.append(weights - tf.cast(piece.of(copy), weights.dtype))
        return found

    def move(self, key: str, piece: Piece, delta: tf.Tensor) -> None:
        """The outer step."""
        weights, buffer = self.shared[_weights(key)], self.shared[_momentum(key)]
        now = piece.of(weights), piece.of(buffer), tf.cast(delta, weights.dtype)
        moved, kept = outer_step(*now, self.learning_rate, self.momentum)
        piece.put(weights, moved)
        piece.put(buffer, kept)

    def give(self, key: str, copies: Sequence[tf.Variable]) -> None:
        """Puts the local replicas where the global weights of a whole variable are."""
        weights = self.shared[_weights(key)].read_value()
        for copy in copies:
            with tf.device(copy.device):
                copy.assign(tf.cast(weights, copy.dtype))

    def merge_into(
        self, key: str, piece: Piece, copies: Sequence[tf.Variable], taken: tf.Tensor
    ) -> None:
        """What local replicas do after an exchange: (1 - merge) own + merge global weights.

        Args:
            taken: bool scalar; after a round that was lost they go on from the global weights
                alone, whatever `merge` says, for one of them has gone wrong.
        """
        weights = piece.of(self.shared[_weights(key)])
        for copy in copies:
            with tf.device(copy.device):
                merged = weights
                if self.merge != 1:
                    own = tf.cast(piece.of(copy), weights.dtype)
                    merged = (1 - self.merge) * own + self.merge * weights
                    merged = tf.where(taken, merged, weights)
                piece.put(copy, tf.cast(merged, copy.dtype))


def _weights(key: str) -> str:
    return f"global/{key}"


def _momentum(key: str) -> str:
    return f"outer_momentum/{key}"


def _start(copy: tf.Variable):
    dtype = wide(copy)
    return lambda: tf.cast(copy, dtype), lambda: tf.zeros(copy.shape, dtype)
