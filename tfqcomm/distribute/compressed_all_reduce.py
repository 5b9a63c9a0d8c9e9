"""Gradient compression for `tf.distribute.MirroredStrategy`, through its public seam."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.compressors.base import Compressor
from tfqcomm.distribute import automatic, interception, keras_loop
from tfqcomm.step import policy
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.step.shared_arguments import (
    exchange_arguments,
    refuse_unknown,
    takes_exchange_options,
)


@takes_exchange_options
class CompressedAllReduce(tf.distribute.ReductionToOneDevice):
    """Cross-device ops that compress the gradients of any Keras optimizer.

    Everything that is not an optimizer's gradient (metrics, batch-norm statistics, your own
    `all_reduce`) is reduced on one device, uncompressed. Optimizers of `tfqcomm.optimizers` bring
    their own compression and are left alone.

    Clipping (`clipnorm` and friends) acts on the local gradients, before the exchange, as in
    Keras. Each optimizer has residuals of its own.

    With `compressor="auto"` nothing is compressed: there is no link between the devices.

    Args:
        compressor: a `tfqcomm.compressors.Compressor`, its name or its config; or a policy,
            `{".*kernel": "top_k", "*": None}`: regular expressions of variables' whole paths, of
            which the first that matches counts.
        **options: shared with all that compress.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Example:
    >>> ops = CompressedAllReduce("block_sign")
    >>> strategy = tf.distribute.MirroredStrategy(["CPU:0"], cross_device_ops=ops)
    """

    def __init__(
        self,
        compressor: Compressor | str | dict,
        **options,
    ):
        compressor, self.automatic = automatic.told(compressor, options)
        refuse_unknown(type(self), options, exchange_arguments(), TypeError)
        super().__init__()
        self.options = ExchangeOptions(policy.get(compressor), **options)
        interception.install()
        keras_loop.install()
