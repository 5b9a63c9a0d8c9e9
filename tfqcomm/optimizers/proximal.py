"""What QCMD and QRDA Adagrad have in common: arguments, slots, and l1 that gives exact zeros."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.optimizers.base import CompressedOptimizer


def soft_threshold(x, threshold):
    """sign(x) max(|x| - threshold, 0): exactly zero up to the threshold."""
    return tf.sign(x) * tf.maximum(tf.abs(x) - threshold, 0.0)


class ProximalAdagrad(CompressedOptimizer):
    """Abstract base: Adagrad on the mean of quantized gradients, with l1 handled exactly.

    A subclass names its `slots`, the first of which is the sum of squares, and defines `proximal`.
    """

    slots: tuple[str, ...]

    def __init__(
        self,
        learning_rate,
        l1: float,
        delta: float,
        *,
        l1_on_vectors: bool,
        **options,
    ):
        checks.non_negative("l1", l1)
        checks.positive("delta", delta)
        checks.boolean("l1_on_vectors", l1_on_vectors)
        super().__init__(learning_rate, **options)
        self.l1 = l1
        self.delta = delta
        self.l1_on_vectors = l1_on_vectors

    def build(self, variables):
        """Creates the slots of each variable."""
        if self.built:
            return
        super().build(variables)
        self._slots = self.add_optimizer_variables(variables, list(self.slots))

    def update_step(self, gradient, variable, learning_rate):
        """The server's half, for one variable: `gradient` is the mean of quantized gradients."""
        index = self.index_of(variable)
        slots = [slot[index] for slot in self._slots]
        regularized = self.l1_on_vectors or len(variable.shape) > 1
        x, state = self.proximal(
            tf.convert_to_tensor(gradient),
            tf.convert_to_tensor(variable),
            [tf.convert_to_tensor(slot) for slot in slots],
            tf.cast(learning_rate, variable.dtype),
            self.l1 if regularized else 0.0,
        )
        for slot, value in zip(slots, state, strict=True):
            self.assign(slot, value)
        self.assign(variable, x)

    def proximal(self, gradient, x, state, learning_rate, l1):
        """The new variable and slots (abstract)."""
        raise TypeError(f"{type(self).__name__} must define `proximal`")

    def get_config(self):
        """Serializable arguments."""
        return {
            **super().get_config(),
            "l1": self.l1,
            "delta": self.delta,
            "l1_on_vectors": self.l1_on_vectors,
        }
