"""The learning rate for which residuals were left out: a message is worth its step's rate.

SGD with error feedback keeps the weights that it owes, rate times residual, as they are when the
rate changes: residual = residual * old rate / new rate, which is what the theory of error feedback
takes for granted where it puts the rate into the message (arXiv 1901.09847, Algorithm 2).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private


class ResidualRate:
    """A keeper of the ledger: the rate of the last step that left something out."""

    def __init__(self):
        self._last = _tf_private.local_variable(  # 0: there was none yet
            np.float32(0), name="residual_rate", device="CPU:0"
        )

    def scale(self, rate: tf.Tensor) -> tf.Tensor:
        """What residuals are to be multiplied by in a step of this rate.

        1 where a rate is zero: a step that moves nothing leaves open what a residual is worth.
        """
        known = (self._last > 0) & (rate > 0)
        return tf.where(known, self._last / tf.where(known, rate, 1.0), 1.0)

    def remember(self, rate: tf.Tensor, left_out: tf.Tensor) -> None:
        """Called in a step that is taken.

        Args:
            rate: float32 scalar.
            left_out: bool scalar: whether the step made residuals anew.
        """
        self._last.assign(tf.where(left_out & (rate > 0), rate, self._last))

    def state(self) -> dict[str, np.ndarray]:
        """What a backup keeps."""
        return {"last": self._last.numpy()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Inverse of `state`; now, not in every step of a graph that is being traced."""
        if "last" in state:
            with tf.init_scope():
                self._last.assign(state["last"])
