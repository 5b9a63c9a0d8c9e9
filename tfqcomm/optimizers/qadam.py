"""Quantized Adam: local moments, quantized updates, quantized weights."""

from __future__ import annotations

import math

import tensorflow as tf

from tfqcomm import _tf_private, checks, compressors
from tfqcomm.kernels import numerics
from tfqcomm.optimizers.base import CompressedOptimizer, complete, per_row
from tfqcomm.optimizers.shared_arguments import register


def qadam_message(gradient, state, *, beta_1, beta_2):
    """The worker's half of Quantized Adam (arXiv 2004.14180, Algorithm 1), before compression.

    The step size is left to the server's half. Quantizers scale with their input, so a residual
    kept without it is the paper's, rescaled by alpha_t / alpha_{t-1} whenever the rate changes.

    Args:
        gradient: the worker's own, at the quantized weights.
        state: `m` and `v`, of the gradient's shape; for "1-1/t" also `t`, the steps so far of this
            tensor, whose first gradient may come late.

    Returns:
        m / sqrt(v), and the new state.
    """
    g, m, v = numerics.squarable(gradient), state["m"], state["v"]
    counted = {}
    if beta_2 == "1-1/t":
        counted = {"t": state["t"] + 1}
        beta_2 = 1 - 1 / counted["t"]
    v = beta_2 * v + (1 - beta_2) * g * g
    m = beta_1 * m + (1 - beta_1) * g
    # With "1-1/t" nothing is left of the initial v after the first step: 0 / sqrt(0) is 0.
    return tf.math.divide_no_nan(m, tf.sqrt(v)), {"m": m, "v": v, **counted}


def mark(value: tf.Tensor) -> tf.Tensor:
    """int64, one for each row: changes when weights do, and is never 0."""
    marks = tf.cast(tf.bitcast(tf.cast(value, tf.float32), tf.int32), tf.int64)
    if value.shape.rank > 1:
        places = 2 * tf.range(value.shape[1:].num_elements(), dtype=tf.int64) + 1
        axes = list(range(1, value.shape.rank))
        marks = tf.reduce_sum(marks * tf.reshape(places, value.shape[1:]), axes, keepdims=True)
    return tf.abs(marks) + 1


@register
class QAdam(CompressedOptimizer):
    """Adam whose workers keep their moments to themselves and send a quantized update.

    Use it to send 2 or 3 bits per entry where plain Adam sends 32. On worker i, and then
    everywhere:

        v_i = beta_2 v_i + (1 - beta_2) g_i^2;  m_i = beta_1 m_i + (1 - beta_1) g_i
        u = alpha m_i / sqrt(v_i) + e_i;  delta_i = Q_g(u);  e_i = u - delta_i
        x = x - mean delta_i;  variable = Q_x(x)

    It is not Adam of the mean gradient, but the mean of the workers' Adams.

    With `schedule="two_phase"` the averaged update is quantized on its way back, too, with error
    feedback there: Efficient-Adam.

    With a `weight_compressor` the model's variables hold the quantized weights, as in the paper:
    gradients are taken at them, and `evaluate`, `predict` and `save` use them. What quantization
    left out is a slot of the optimizer; `float_weights` gives the sum. Weights that were set to
    something else since, such as loaded ones, are taken as they are. Weight decay acts on the sum.
    Under an all-reduce
    strategy this changes the arithmetic only: weights do not travel.

    Args:
        learning_rate: float or learning-rate schedule, `alpha` in the paper.
        beta_1: decay of the first moment, `beta` in the paper.
        beta_2: decay of the second moment, `theta`; or "1-1/t", as in the paper's theory.
        epsilon: initial second moment, positive: there is no other epsilon.
        compressor: of the updates, Q_g: a `tfqcomm.compressors.Compressor`, its name or its
            config; the paper's is `LogGrid(k)`.
        weight_compressor: of the weights, Q_x; None for none. The paper's is
            `UniformGrid(bits, range="fixed")`.
        **options: shared with all that compress, and with Keras' optimizers.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Differences from the paper: the step size is applied after the mean, which is the same with
    error feedback rescaled at a change of the rate; the first gradient is taken at the weights as
    they were initialized; small and rank <= 1 tensors, weights too, are not quantized unless
    `min_size=0`; `schedule="all_gather"` is the paper's server; a step in which any worker's
    gradient is not finite is skipped by all.

    Example:
    >>> optimizer = QAdam(1e-3, compressor="log_grid", weight_compressor="uniform_grid")
    >>> optimizer.weight_compressor.bits
    8

    References:
        Chen, Shen, Huang, Liu: Quantized Adam with Error Feedback,
        https://arxiv.org/abs/2004.14180
        Chen, Shen, Liu: Efficient-Adam, https://arxiv.org/abs/2205.14473
    """

    def __init__(
        self,
        learning_rate=1e-3,
        beta_1: float = 0.9,
        beta_2: float | str = 0.999,
        epsilon: float = 1e-8,
        *,
        compressor="log_grid",
        weight_compressor=None,
        name: str = "qadam",
        **options,
    ):
        checks.fraction("beta_1", beta_1)
        if beta_2 != "1-1/t":
            checks.fraction("beta_2", beta_2, also=' or "1-1/t"')
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
        self.weight_compressor = compressors.get(weight_compressor)
        self.worker_slots = {"m": 0.0, "v": float(epsilon)}
        if beta_2 == "1-1/t":
            self.worker_slots["t"] = 0.0

    def worker_step(self, gradient, state, iteration):
        """The worker's half: see `qadam_message`."""
        return qadam_message(gradient, state, beta_1=self.beta_1, beta_2=self.beta_2)

    def build(self, variables):
        """Creates what quantization leaves out of each weight."""
        if self.built:
            return
        super().build(variables)
        quantized = [self._quantizes(variable) for variable in variables]
        self._left_out = [
            self.add_variable_from_reference(variable, "weight_residual") if is_quantized else None
            for variable, is_quantized in zip(variables, quantized, strict=True)
        ]
        self._marks = [
            self.add_variable(per_row(v.shape), dtype="int64", name=f"{v.name}_weight_mark")
            if is_quantized
            else None
            for v, is_quantized in zip(variables, quantized, strict=True)
        ]

    def decay_step(self, variable, learning_rate):
        """Weight decay acts on the float weights: where there are any, `update_step` does it."""
        if self._left_out[self.index_of(variable)] is None:
            super().decay_step(variable, learning_rate)

    def update_step(self, gradient, variable, learning_rate):
        """The server's half, for one variable: `gradient` is the mean message."""
        gradient = tf.convert_to_tensor(gradient)
        rate = tf.cast(learning_rate, variable.dtype)
        index = self.index_of(variable)
        if self._left_out[index] is None:
            self.assign_sub(variable, rate * gradient)
            return
        x = self._float_weight(variable)
        if _tf_private.decays(self, variable):
            x -= x * rate * tf.cast(self.weight_decay, x.dtype)
        x -= rate * gradient
        quantized = self._quantize(x)
        self.assign(variable, quantized)
        self.assign(self._left_out[index], x - quantized)
        self.assign(self._marks[index], mark(quantized))

    def float_weights(self, variables) -> list[tf.Tensor]:
        """The float32 weights that the server keeps, `x`, for variables it was built with."""
        return [self._float_weight(variable) for variable in variables]

    def _float_weight(self, variable):
        """A weight and what its quantization left out, unless it was set to something else."""
        index, value = self.index_of(variable), tf.convert_to_tensor(variable)
        if self._left_out[index] is None:
            return value
        left_out = tf.convert_to_tensor(self._left_out[index])
        before = tf.convert_to_tensor(self._marks[index])  # 0 where none was made yet
        untouched = tf.equal(before, mark(value)) | tf.equal(before, 0)
        return value + tf.where(untouched, left_out, tf.zeros_like(left_out))

    def load_own_variables(self, store):
        """What was saved before weights were marked is taken to belong together."""
        marks = [slot for slot in self._marks if slot is not None] if self.built else []
        super().load_own_variables(complete(store, self.variables, marks, 0))

    def _quantizes(self, variable) -> bool:
        shape = tuple(variable.shape)
        return not self.weight_compressor.lossless and self.options.reaches(shape, math.prod(shape))

    def _quantize(self, x):
        flat = tf.reshape(tf.cast(x, tf.float32), [-1])
        words = self.weight_compressor.encode(flat, self.options.seed)
        decoded = self.weight_compressor.decode(words, flat.shape[0])
        return tf.cast(tf.reshape(decoded, x.shape), x.dtype)

    def get_config(self):
        """Serializable arguments."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "weight_compressor": compressors.serialize(self.weight_compressor),
        }
