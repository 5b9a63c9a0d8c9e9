"""COMP-AMS: compressed gradient averaging with error feedback, then AMSGrad."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.kernels import numerics
from tfqcomm.optimizers.base import CompressedOptimizer
from tfqcomm.optimizers.shared_arguments import register


def comp_ams_update(gradient, state, learning_rate, *, beta_1, beta_2, epsilon, epsilon_inside):
    """The server's half of COMP-AMS (arXiv 2205.05632, Algorithm 2, lines 9 to 12).

    Args:
        gradient: mean of the decoded messages, `g`.
        state: (`m`, `v`, `vhat`), of the gradient's shape.

    Returns:
        What to subtract from the variable, and the new state.
    """
    g, (m, v, vhat) = numerics.squarable(gradient), state
    m = beta_1 * m + (1 - beta_1) * g  # first moment
    v = beta_2 * v + (1 - beta_2) * g * g  # second moment
    vhat = tf.maximum(vhat, v)  # its maximum so far
    root = tf.sqrt(vhat + epsilon) if epsilon_inside else tf.sqrt(vhat) + epsilon
    return learning_rate * m / root, (m, v, vhat)


@register
class CompAMS(CompressedOptimizer):
    """AMSGrad on the mean of compressed gradients, with error feedback on every worker.

    Use it as a drop-in for Adam when gradients cross a network that is slower than the machines.
    On worker i, and then everywhere:

        message_i = C(g_i + e_i);  e_i = e_i + g_i - message_i
        g = mean message_i
        m = beta_1 m + (1 - beta_1) g
        v = beta_2 v + (1 - beta_2) g^2;  vhat = max(vhat, v)
        variable -= learning_rate * m / sqrt(vhat + epsilon)

    Args:
        learning_rate: float or learning-rate schedule, `eta` in the paper.
        beta_1: decay of the first moment.
        beta_2: decay of the second moment.
        epsilon: positive; inside the root it keeps steps below `learning_rate * m / 1e-4`.
        compressor: a `tfqcomm.compressors.Compressor`, its name or its config; the paper's are
            `TopK(0.01)` and `BlockSign()`.
        epsilon_inside: `sqrt(vhat + epsilon)` as in the paper, or `sqrt(vhat) + epsilon` as in
            Keras' AMSGrad.
        **options: shared with all that compress, and with Keras' optimizers.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Differences from the paper: small and rank <= 1 tensors are not compressed unless
    `min_size=0`; `schedule="all_gather"` is the paper's server; a step in which any worker's
    gradient is not finite is skipped by all.

    Example:
    >>> optimizer = CompAMS(1e-3, compressor="block_sign")
    >>> optimizer.options.compressor
    BlockSign(block=None)

    References:
        Li, Karimi, Li: On Distributed Adaptive Optimization with Gradient Compression,
        ICLR 2022, https://arxiv.org/abs/2205.05632
    """

    def __init__(
        self,
        learning_rate=1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        *,
        compressor="top_k",
        epsilon_inside: bool = True,
        name: str = "comp_ams",
        **options,
    ):
        checks.fraction("beta_1", beta_1)
        checks.fraction("beta_2", beta_2)
        checks.positive("epsilon", epsilon)
        super().__init__(
            learning_rate,
            compressor=compressor,
            name=name,
            **options,
        )
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.epsilon_inside = epsilon_inside

    def build(self, variables):
        """Creates the moments `m`, `v` and `vhat` of each variable."""
        if self.built:
            return
        super().build(variables)
        self._moments, self._velocities, self._velocity_maxima = self.add_optimizer_variables(
            variables, ["momentum", "velocity", "velocity_maximum"]
        )

    def update_step(self, gradient, variable, learning_rate):
        """Applies the mean message to one variable; rows of embeddings are made dense."""
        index = self.index_of(variable)
        slots = [slot[index] for slot in (self._moments, self._velocities, self._velocity_maxima)]
        step, state = comp_ams_update(
            tf.convert_to_tensor(gradient),
            [tf.convert_to_tensor(slot) for slot in slots],
            tf.cast(learning_rate, variable.dtype),
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            epsilon=self.epsilon,
            epsilon_inside=self.epsilon_inside,
        )
        for slot, value in zip(slots, state, strict=True):
            self.assign(slot, value)
        self.assign_sub(variable, step)

    def get_config(self):
        """Serializable arguments."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "epsilon_inside": self.epsilon_inside,
        }
