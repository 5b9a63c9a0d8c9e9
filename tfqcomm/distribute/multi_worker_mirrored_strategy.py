"""`tf.distribute.MultiWorkerMirroredStrategy` that compresses, and on which Keras 3 works."""

from __future__ import annotations

import contextlib

import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.compressors.base import Compressor
from tfqcomm.distribute import automatic, interception, joining, keras_loop
from tfqcomm.distribute.new_variables import NewVariables
from tfqcomm.distribute.scopes import expect_models_of
from tfqcomm.step import empty_shares, policy
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.step.shared_arguments import (
    exchange_arguments,
    refuse_unknown,
    takes_exchange_options,
)
from tfqcomm.transport.of_strategy import transport_for


@takes_exchange_options
class MultiWorkerMirroredStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    """Synchronous training on several machines, with compressed gradients.

    On TensorFlow's own strategy Keras 3's `fit` fails (keras#20585, #20601); on this one `fit`,
    `evaluate` and `predict` work, with or without compression. The cluster comes from `TF_CONFIG`
    or `cluster_resolver`. Create the strategy before any other TensorFlow call.

    Gradients of every Keras optimizer are compressed; metrics, batch-norm statistics and your own
    `all_reduce` are not. Optimizers of `tfqcomm.optimizers` bring their own compression, which
    then replaces the strategy's. Clipping acts on the local gradients, as in Keras.

    With `compressor="auto"` the workers measure link and exchange before an optimizer's first step,
    log what they found, and take the fastest of none, `BFloat16`, `Float8` and `BlockInt8`.

    Args:
        compressor: a `tfqcomm.compressors.Compressor`, its name or its config; a policy,
            `{".*kernel": "top_k", "*": None}`: regular expressions of variables' whole paths, of
            which the first that matches counts; None compresses nothing.
        timeout_seconds: how long a worker waits for the others, at the start and in a collective,
            before it is an error that says what each is doing. Raise it when single steps of some
            workers take longer, for instance to save. Workers that have died, or wait for one
            another in different places, are found in seconds.
        devices_per_worker: logical CPUs per process, for machines without GPUs; all GPUs of a
            machine are used in any case.
        cluster_resolver: as in TensorFlow.
        communication_options: as in TensorFlow; its `timeout_seconds` wins over the one here.
        **options: shared with all that compress.

    Raises:
        ValueError: for arguments that do not fit; and on all workers, saying what differs, where
            they make different variables, or train with other settings or from other weights.
    """

    new_variables: NewVariables

    @joining.checked
    def __init__(
        self,
        compressor: Compressor | str | dict | None = None,
        *,
        timeout_seconds: float = 300.0,
        devices_per_worker: int | None = None,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        communication_options: tf.distribute.experimental.CommunicationOptions | None = None,
        **options,
    ):
        compressor, self.automatic = automatic.told(compressor, options)
        refuse_unknown(type(self), options, exchange_arguments(), TypeError)
        self.options = ExchangeOptions(policy.get(compressor), **options)
        interception.install()
        keras_loop.install()
        defaults = tf.distribute.experimental.CommunicationOptions(timeout_seconds=timeout_seconds)
        extended = _tf_private.WorkerExtended(
            self,
            cluster_resolver=cluster_resolver,
            communication_options=defaults.merge(communication_options),
            devices_per_worker=devices_per_worker,
            on_new_variable=lambda variable: self.new_variables.add(variable),
        )
        _tf_private.init_strategy(self, extended)
        transport = transport_for(self)  # on several workers a watch over them begins
        self.new_variables = NewVariables(transport)
        transport.before_agreement = self.new_variables.agree
        expect_models_of(self)

    @contextlib.contextmanager
    def scope(self):
        """Like TensorFlow's; at its end the workers compare the variables that were made in it."""
        with super().scope() as strategy:
            yield strategy
            self.new_variables.agree()

    @_tf_private.not_to_convert
    def run(self, fn, args=(), kwargs=None, options=None):
        """Like TensorFlow's; a replica whose share of the batch is empty contributes nothing."""
        self.new_variables.agree()
        return super().run(empty_shares.counted(fn), args, kwargs, options)

    def reduce(self, reduce_op, value, axis=None):
        """Like TensorFlow's, but maps over structures and ignores `axis` for scalars.

        These are the two things Keras 3's trainer takes for granted.
        """
        return tf.nest.map_structure(lambda leaf: self._reduce_leaf(reduce_op, leaf, axis), value)

    def _reduce_leaf(self, reduce_op, leaf, axis):
        local = [tf.convert_to_tensor(v) for v in self.experimental_local_results(leaf)]
        if local[0].shape.rank != 0:
            return super().reduce(reduce_op, leaf, axis=axis)
        transport = transport_for(self)
        if local[0].dtype != tf.float32 or len(local) != transport.local:
            return super().reduce(reduce_op, leaf, axis=None)
        # What replicas counted for a metric is read one variable after the other, with every epoch.
        total = transport.all_reduce([v[None] for v in local])[0]
        mean = str(reduce_op).upper().endswith("MEAN")
        return total / transport.world if mean else total

    def agree_on_optimizer(self, optimizer) -> None:
        """Called by `model.compile`, before the optimizer's variables are created."""
        named = optimizer if isinstance(optimizer, str) else type(optimizer).__name__
        transport_for(self).agree("compile", {"optimizer": named.lower()}, {})
