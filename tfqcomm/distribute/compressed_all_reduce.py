"""Gradient compression for `tf.distribute.MirroredStrategy`, through its public seam."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.compressors.base import Compressor
from tfqcomm.distribute import interception, keras_loop
from tfqcomm.step.options import ExchangeOptions


class CompressedAllReduce(tf.distribute.ReductionToOneDevice):
    """Cross-device ops that compress the gradients of any Keras optimizer.

    Everything that is not an optimizer's gradient (metrics, batch-norm statistics, your own
    `all_reduce`) is reduced on one device, uncompressed. Optimizers of `tfqcomm.optimizers` bring
    their own compression and are left alone.

    Clipping (`clipnorm` and friends) acts on the local gradients, before the exchange, as in
    Keras. Each optimizer has residuals of its own.

    Args:
        compressor: a `tfqcomm.compressors.Compressor`, its name or its config.
        error_feedback: add what compression left out to the next gradient. "auto" does so where it
            converges: for compressors whose error is always smaller than what they compress. True
            does so for the others, too ("qsgd" with few bits, "ternary"), and scales what they
            decode down until it converges; False loses what compression leaves out.
        min_size: tensors with fewer elements, and those of rank <= 1, travel dense (fused into
            one buffer); higher => less compression; 0 compresses everything.
        schedule: "auto" (the one that sends the fewest bytes), "dense", "all_gather" or
            "two_phase".
        granularity: "tensor" or "model": what a scale or a top-k ranges over.
        seed: of stochastic compressors.
        verify: compare the replicas' weights after the first step.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Example:
    >>> ops = CompressedAllReduce("block_sign")
    >>> strategy = tf.distribute.MirroredStrategy(["CPU:0"], cross_device_ops=ops)
    """

    def __init__(
        self,
        compressor: Compressor | str | dict,
        *,
        error_feedback: bool | str = "auto",
        min_size: int = 1024,
        schedule: str = "auto",
        granularity: str = "tensor",
        seed: int = 0,
        verify: bool = True,
    ):
        super().__init__()
        self.options = ExchangeOptions(
            compressor,
            error_feedback=error_feedback,
            min_size=min_size,
            schedule=schedule,
            granularity=granularity,
            seed=seed,
            verify=verify,
        )
        interception.install()
        keras_loop.install()
