"""The engine of TensorFlow's multi-worker strategy."""

from __future__ import annotations

import tensorflow as tf
from tensorflow.python.distribute import (
    collective_all_reduce_strategy,
    distribute_lib,
)
from tensorflow.python.eager import context

from tfqcomm._tf_private.collectives import Launcher, Progress


class WorkerExtended(collective_all_reduce_strategy.CollectiveAllReduceExtended):
    """The multi-worker strategy's engine, with what TensorFlow's constructor cannot set.

    * several logical CPUs per process (TensorFlow takes the first alone);
    * variables that are not sent by the chief one by one as they are made: `on_new_variable` hears
      of each, and sees to it that all workers have the same;
    * no coordination service, which waits for a worker that never comes without limit, and says of
      one that died at most that a heartbeat was missed; nor TensorFlow's own check of its peers'
      health: the package's watch does that and more;
    * collectives of `Launcher`.

    Attributes:
        progress: of the collectives.
        timeout_seconds: how long others are waited for.
    """

    _strategies = 0  # of this process, so far

    def __init__(
        self, strategy, *, devices_per_worker, on_new_variable, communication_options, **kwargs
    ):
        self._devices_per_worker = devices_per_worker
        self._on_new_variable = on_new_variable
        self.timeout_seconds = communication_options.timeout_seconds
        super().__init__(
            strategy, communication_options=_without_timeout(communication_options), **kwargs
        )

    def _initialize_multi_worker(self, cluster_resolver):
        cls = WorkerExtended
        if cls._strategies:
            # One server serves all strategies of a process: starting it again would abort the
            # collectives of whoever is ahead. Each strategy draws keys of its own.
            self._std_server_started = True
            self._collective_key_base = cls._strategies * 1_000_000
        elif context.context().coordination_service is None:
            context.context().configure_coordination_service(service_type="")  # do without
        cls._strategies += 1
        super()._initialize_multi_worker(cluster_resolver)
        self.progress = Progress()
        for ops in (self._cross_device_ops, self._host_cross_device_ops):
            progress = self.progress if len(ops._launchers) == 1 else None
            ops._launchers = [Launcher.like(launcher, progress) for launcher in ops._launchers]

    def _start_check_health_thread(self):
        """Waits until all workers are there; TensorFlow would go on to check their health."""
        nothing = tf.identity([])
        limit = tf.distribute.experimental.CommunicationOptions(
            timeout_seconds=self.timeout_seconds,
            implementation=tf.distribute.experimental.CommunicationImplementation.RING,
        )
        try:
            self._host_cross_device_ops.reduce(
                tf.distribute.ReduceOp.SUM, nothing, nothing, options=limit
            )
        except tf.errors.DeadlineExceededError:
            raise RuntimeError(
                f"Timeout waiting for the cluster, timeout is {self.timeout_seconds:g} seconds"
            ) from None

    def _initialize_local_devices(self, cluster_resolver, worker_device):
        devices, kind = super()._initialize_local_devices(cluster_resolver, worker_device)
        if self._devices_per_worker is not None and kind == "CPU":
            devices = tuple(
                f"{worker_device}/device:CPU:{i}" for i in range(self._devices_per_worker)
            )
        return devices, kind

    def _create_variable(self, next_creator, **kwargs):
        variable = super()._create_variable(next_creator, **kwargs)
        if tf.executing_eagerly() and self._num_workers > 1:
            self._on_new_variable(variable)
        return variable

    def _get_variable_creator_initial_value(self, replica_id, device, primary_var, **kwargs):
        creator = super()._get_variable_creator_initial_value
        if replica_id != 0 or self._num_workers == 1:
            return creator(replica_id, device, primary_var, **kwargs)

        def initial_value():
            value = kwargs["initial_value"]
            value = value() if callable(value) else value
            value = tf.convert_to_tensor(
                getattr(value, "wrapped_value", value), dtype=kwargs.get("dtype")
            )
            if tf.executing_eagerly():
                return value  # compared later, with all that are new
            # In a tf.function (an optimizer that is built in its first step) constants, as zeros
            # are, are equal as the programs are. What is computed comes from the chief.
            if tf.get_static_value(value) is not None:
                return value
            return creator(replica_id, device, primary_var, **{**kwargs, "initial_value": value})()

        return initial_value


def _without_timeout(options):
    return tf.distribute.experimental.CommunicationOptions(
        bytes_per_pack=options.bytes_per_pack, implementation=options.implementation
    )


def copies_of(variable: tf.Variable) -> tuple[tf.Variable, ...]:
    """A distributed variable's copies on this process' replicas; a plain one is its only copy."""
    return getattr(variable, "_values", (variable,))


def init_strategy(strategy: tf.distribute.Strategy, extended: WorkerExtended) -> None:
    """Constructs `strategy` around `extended`.

    `tf.distribute.MultiWorkerMirroredStrategy.__init__` builds its own engine; its parent takes
    one.
    """
    distribute_lib.Strategy.__init__(strategy, extended)


def cross_device_ops(strategy: tf.distribute.Strategy) -> tf.distribute.CrossDeviceOps | None:
    """The cross-device ops a strategy was built with."""
    return getattr(strategy.extended, "_cross_device_ops", None)
