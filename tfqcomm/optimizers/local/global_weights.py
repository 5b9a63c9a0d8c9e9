"""The weights that all replicas start from, their fragments, and the outer step that moves them."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

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


def deal(sizes: Sequence[int], fragments: int) -> list[list[int]]:
    """Deals variables greedily, the largest first, into fragments of nearly equal size.

    Returns:
        For each fragment the positions of its variables, ascending; of too few some get none.
    """
    dealt: list[list[int]] = [[] for _ in range(fragments)]
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        min(dealt, key=lambda fragment: sum(sizes[i] for i in fragment)).append(place)
    return [sorted(fragment) for fragment in dealt]


def wide(variable) -> tf.DType:
    """What global weights, and differences to them, are computed in."""
    return tf.float64 if variable.dtype == tf.float64 else tf.float32


class GlobalWeights:
    """Global weights and their momentum, once in each process and equal in all of them.

    A variable is named by its key; `copies` are those of the local replicas.

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

    def differences(self, key: str, copies: Sequence[tf.Variable]) -> list[tf.Tensor]:
        """Global minus own weights, of each local replica: its outer gradient."""
        weights, found = self.shared[_weights(key)], []
        for copy in copies:
            with tf.device(copy.device):
                found.append(weights - tf.cast(copy, weights.dtype))
        return found

    def move(self, key: str, delta: tf.Tensor) -> None:
        """The outer step of one variable."""
        weights, buffer = self.shared[_weights(key)], self.shared[_momentum(key)]
        delta = tf.cast(delta, weights.dtype)
        moved, kept = outer_step(weights, buffer, delta, self.learning_rate, self.momentum)
        weights.assign(moved)
        buffer.assign(kept)

    def give(self, key: str, copies: Sequence[tf.Variable]) -> None:
        """Puts the local replicas where the global weights are."""
        weights = self.shared[_weights(key)].read_value()
        for copy in copies:
            with tf.device(copy.device):
                copy.assign(tf.cast(weights, copy.dtype))

    def merge_into(self, key: str, copies: Sequence[tf.Variable], taken: tf.Tensor) -> None:
        """What local replicas do after an exchange: (1 - merge) own + merge global weights.

        Args:
            taken: bool scalar; after a round that was lost they go on from the global weights
                alone, whatever `merge` says, for one of them has gone wrong.
        """
        if self.merge == 1:
            self.give(key, copies)
            return
        weights = self.shared[_weights(key)].read_value()
        for copy in copies:
            with tf.device(copy.device):
                own = tf.cast(copy, weights.dtype)
                merged = (1 - self.merge) * own + self.merge * weights
                copy.assign(tf.cast(tf.where(taken, merged, weights), copy.dtype))


def _weights(key: str) -> str:
    return f"global/{key}"


def _momentum(key: str) -> str:
    return f"outer_momentum/{key}"


def _start(copy: tf.Variable):
    dtype = wide(copy)
    return lambda: tf.cast(copy, dtype), lambda: tf.zeros(copy.shape, dtype)
