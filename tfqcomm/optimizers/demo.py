"""DeMo: momenta that stay with the workers, which send the largest of their frequencies."""

from __future__ import annotations

import dataclasses
import math
import re

import tensorflow as tf

from tfqcomm import checks, compressors
from tfqcomm.kernels import cosine_transform
from tfqcomm.optimizers.base import CompressedOptimizer
from tfqcomm.optimizers.shared_arguments import register
from tfqcomm.step.message import path_of
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.step.step import distributed_step


@register
class DeMo(CompressedOptimizer):
    """Signed steps along what stands out of the workers' momenta, of which little is sent.

    Use it where the network is slow and a step is all there is to send for: with its defaults a
    message has 32 of the 4,096 entries of a block. On worker i, and then everywhere, with F the
    cosine transform of each block of a matrix:

        delta_i = decay * delta_i + learning_rate * g_i
        message_i = the `top` largest of each block of F(delta_i)
        delta_i = delta_i - F^-1(message_i)
        variable -= learning_rate * sign(F^-1(mean message_i))

    What is left over is all the momentum there is: delta_i is the residual of error feedback, kept
    as F(delta_i), which is the same, since F keeps norms and sums. Decoupled weight decay
    (`weight_decay`) comes before the step. Blocks with no more than `top` entries are sent whole.

    Args:
        learning_rate: float or learning-rate schedule: how far every entry moves in every step.
        decay: in (0, 1], of the momenta; lower => old gradients are forgotten sooner.
        top: entries of a block that are sent; fewer => less traffic.
        chunk: most rows, and most columns, of a block: they are the largest divisors of a kernel's
            rows and columns up to this. All axes but the last are rows; vectors are one row.
        value_dtype: as of `tfqcomm.compressors.TopK`; fewer bits => less traffic.
        **options: shared with all that compress, and with Keras' optimizers.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Differences from the authors' code: a frequency is the mean over all replicas, of which some may
    not have sent it, as in the paper; there it is the mean over those that have. Kernels of
    convolutions are matrices, too. A step in which any worker's gradient is not finite is skipped
    by all. Every replica transforms the mean by itself: on processors of different makes, the signs
    of what is zero but for rounding may differ.

    Example:
    >>> optimizer = DeMo(1e-3, top=16)
    >>> optimizer.options.compressor
    TopK(ratio=0.00390625, value_dtype='float32', chunk=4096)

    References:
        Peng, Quesnelle, Kingma: DeMo: Decoupled Momentum Optimization,
        https://arxiv.org/abs/2411.19870, Algorithm 1
    """

    decides = frozenset(
        {
            "compressor",
            "error_feedback",
            "granularity",
            "min_size",
            "residual_decay",
            "scale_residual",
            "schedule",
        }
    )

    def __init__(
        self,
        learning_rate=1e-3,
        decay: float = 0.999,
        top: int = 32,
        chunk: int = 64,
        *,
        value_dtype: str = "float32",
        name: str = "demo",
        **options,
    ):
        checks.ratio(decay, "decay")
        checks.positive_integer("top", top)
        checks.positive_integer("chunk", chunk)
        if top >= chunk * chunk:
            raise ValueError(
                "Argument `top` must be below chunk * chunk, or all is sent. "
                f"Received: top={top}, chunk={chunk}"
            )
        self._refuse_unknown(options)
        compressor = _codec(chunk * chunk, top, value_dtype)
        super().__init__(learning_rate, compressor=compressor, name=name, **options)
        self.options = dataclasses.replace(
            self.options, schedule="all_gather", min_size=0, residual_decay=decay
        )
        self.decay = decay
        self.top = top
        self.chunk = chunk
        self.value_dtype = value_dtype

    def worker_step(self, gradient, state, iteration):
        """The worker's half: frequencies of what the gradient adds to its momentum."""
        rate = tf.cast(tf.convert_to_tensor(self.learning_rate), gradient.dtype)
        return cosine_transform.to_frequencies(rate * gradient, self.chunk), state

    def distributed_step(self, gradients, variables, learning_rate):
        """Exchanges the messages of all replicas and updates `variables`."""
        variables = list(variables)
        options = self.options_for(variables)
        distributed_step(self, options, gradients, variables, learning_rate, worker=self)

    def options_for(self, variables) -> ExchangeOptions:
        """`options`, with a codec for each variable: one that selects from its blocks."""
        rules = {}
        for variable in variables:
            entries = math.prod(cosine_transform.block_shape(variable.shape, self.chunk))
            rules[re.escape(path_of(variable))] = _codec(entries, self.top, self.value_dtype)
        return dataclasses.replace(self.options, compressor=rules)

    def update_step(self, gradient, variable, learning_rate):
        """The server's half, for one variable: `gradient` is the mean message."""
        frequencies = tf.cast(gradient, tf.float32)
        direction = tf.sign(cosine_transform.from_frequencies(frequencies, self.chunk))
        rate = tf.cast(learning_rate, variable.dtype)
        self.assign_sub(variable, rate * tf.cast(direction, variable.dtype))

    def get_config(self):
        """Serializable arguments."""
        return {
            **super().get_config(),
            "decay": self.decay,
            "top": self.top,
            "chunk": self.chunk,
            "value_dtype": self.value_dtype,
        }


def _codec(entries: int, top: int, value_dtype: str):
    """Of tensors whose blocks have so many entries."""
    if entries <= top:
        return compressors.Identity()
    return compressors.TopK(top / entries, value_dtype=value_dtype, chunk=entries)
