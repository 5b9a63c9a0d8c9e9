"""Leader SGD without rounds: workers that never wait for one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from tfqcomm import compressors
from tfqcomm.parameter_server import optimizers
from tfqcomm.parameter_server.alone import Pace
from tfqcomm.parameter_server.base_trainer import BaseTrainer
from tfqcomm.parameter_server.fleet import make_fleet
from tfqcomm.parameter_server.free_running import FreeRunning
from tfqcomm.parameter_server.leader.average import ChiefAverage, Momenta
from tfqcomm.parameter_server.leader.board import Buffer, LeaderBoard
from tfqcomm.parameter_server.leader.errands import LeaderErrands
from tfqcomm.parameter_server.leader.server import LeaderServer
from tfqcomm.parameter_server.leader.worker import LeaderProgram, LeaderWorker
from tfqcomm.parameter_server.partition import partition
from tfqcomm.parameter_server.payload import Format, weight_codec
from tfqcomm.state.traffic import Route
from tfqcomm.step.options import ExchangeOptions


class LeaderTrainer(BaseTrainer):
    """Trains by asynchronous Leader SGD: every worker on its own, at its own pace.

    Each worker holds weights of its own and takes local steps. When the steps of all workers
    together come to a multiple of W * `global_period`, the worker with the lowest mean loss is
    elected: after its next step it shows its weights on the parameter servers, and each of the
    others moves towards them after its own. Groups, with `local_period`, likewise. Nobody waits: a
    worker that is five times slower takes a fifth of the steps, and is pulled as often as others.
    A pull costs one model to the servers, and one from there to each of the other workers, encoded
    by `weight_compressor`; losses travel in the report of each step to the chief.

    An epoch has `steps_per_epoch` steps for each worker on average, whoever takes them. At its end
    workers finish the step they are at, and `model` becomes the average of all of them, in float32,
    which `TrafficLogger` does not count; the next epoch goes on with each one's own weights. The
    optimizer's `iterations`, on which schedules depend, are the steps of an average worker.

    Args:
        build_model, loss, metrics, loss_weights, weighted_metrics: as of `Trainer`.
        cluster_resolver, workers, parameter_servers, variable_partitioner, timeout_seconds:
            likewise.
        optimizer: a `tfqcomm.optimizers.LeaderSGD` without a `leader_compressor`; the trainer
            makes one like it. `groups` must divide the number of workers.
        weight_compressor: of the leaders' weights, which are stored as they are encoded:
            `BFloat16()`, `BlockInt8()`, `UniformGrid(8)` or their names; None for float32.
        min_size: smaller tensors, and those of rank <= 1, are not encoded.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Attributes:
        model: a plain Keras model: the average of the workers at the end of the last epoch. What
            is loaded into it before `fit` is what all workers start from.
        workers: for each of them whether it is `alive`, its `steps`, how often it was the leader of
            all, `times_led`, and its `bytes_pushed` and `bytes_pulled` so far.

    `fit` and `evaluate` are those of `Trainer`; the `staleness` in the History is the age of the
    weights pulled to, in steps of all workers since they were shown.

    Worker faults: the others go on without one that is killed; if it was elected, the next best
    leads. Started again, it begins with the average of the last epoch. If a parameter server is
    lost, `fit` raises `ServerLost`; what is stopped but not gone is an error as of `Trainer`.

    Differences from the paper: losses are compared when the total count comes to the period, by the
    chief, which sees each worker's steps; weights are shown and pulled a step later.

    Example:
    >>> import tfqcomm
    >>> trainer = tfqcomm.parameter_server.LeaderTrainer(
    ...     lambda: keras.Sequential([keras.Input([8]), keras.layers.Dense(1)]),
    ...     optimizer=tfqcomm.optimizers.LeaderSGD(0.1, global_pull=0.5),
    ...     loss="mse",
    ...     weight_compressor="block_int8",
    ... )  # doctest: +SKIP

    References:
        Teng et al.: Leader Stochastic Gradient Descent for Distributed Training of Deep Learning
        Models, NeurIPS 2019, https://arxiv.org/abs/1905.10395
    """

    def __init__(
        self,
        build_model: Callable[[], keras.Model],
        *,
        optimizer,
        loss=None,
        metrics: Sequence | None = None,
        loss_weights=None,
        weighted_metrics: Sequence | None = None,
        weight_compressor=None,
        min_size: int = 1024,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        workers: int = 2,
        parameter_servers: int = 1,
        variable_partitioner: Callable | None = None,
        timeout_seconds: float | None = 60.0,
    ):
        optimizer = keras.optimizers.get(optimizer)
        optimizers.check_leader(optimizer)
        self._options = ExchangeOptions(compressors.get(None), min_size=min_size)
        self._weight_codec = weight_codec(weight_compressor, optimizers.inner(optimizer))
        self._partitioner = variable_partitioner
        super().__init__(
            build_model,
            optimizer=optimizer,
            loss=loss,
            metrics=metrics,
            loss_weights=loss_weights,
            weighted_metrics=weighted_metrics,
            cluster_resolver=cluster_resolver,
            workers=workers,
            parameter_servers=parameter_servers,
            timeout_seconds=timeout_seconds,
        )
        if len(self._cluster.workers) % self._inner_optimizer.groups:
            raise ValueError(
                f"Argument `groups` of the optimizer must divide the number of workers, "
                f"{len(self._cluster.workers)}. Received: groups={self._inner_optimizer.groups}"
            )

    @property
    def workers(self) -> list[dict[str, int]]:
        """What each worker has done, sent and received so far."""
        times_led = self._board.times_led if self._ready else []
        return [
            {**worker, "times_led": times}
            for worker, times in zip(super().workers, times_led, strict=True)
        ]

    def _make(self, makers, loss_scale):
        model, cluster = self.model, self._cluster
        shapes = [tuple(v.shape) for v in model.trainable_variables]
        pieces = partition(shapes, len(cluster.servers), self._partitioner)
        servers = [
            LeaderServer(
                device,
                Format(
                    tuple(p for p in pieces if p.server == index),
                    0,
                    self._options,
                    self._weight_codec,
                ),
            )
            for index, device in enumerate(cluster.servers)
        ]
        program = LeaderProgram(model, servers, pieces, loss_scale)
        run = self._watch.run
        self._board = LeaderBoard(
            self._inner_optimizer.levels,
            len(cluster.workers),
            lambda: Buffer([run(server.make_room) for server in servers]),
        )
        fleet = make_fleet(
            self._cluster, self._watch, LeaderWorker, program, servers, makers, loss_scale
        )
        momenta = Momenta(fleet)
        routes = [
            Route(v.path, tuple(v.shape), "leader's, shown and pulled", self._codec_of(v))
            for v in model.trainable_variables
        ]
        meter = self._register(routes, worker_state=momenta)
        return fleet, ChiefAverage(model, fleet), momenta, meter

    def _driver(self):
        pace = Pace(self._fleet, self._inner_optimizer)
        return FreeRunning(self._fleet, LeaderErrands(self._fleet, self._board, pace))

    @property
    def _applied_per_iteration(self) -> int:
        return len(self._cluster.workers)

    def _codec_of(self, variable: keras.Variable) -> str:
        shape = tuple(variable.shape)
        large = self._options.reaches(shape, int(tf.TensorShape(shape).num_elements()))
        return str(self._weight_codec) if large else "float32"
