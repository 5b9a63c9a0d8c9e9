"""The loop of `fit` on a cluster, which Keras 3 does not have."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.aggregators.exchange import exchange_for, exchange_of
from tfqcomm.aggregators.options import ExchangeOptions
from tfqcomm.parameter_server import data
from tfqcomm.parameter_server.base_worker import BaseWorker
from tfqcomm.parameter_server.cluster import connect
from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.model_step import assign_flat
from tfqcomm.traffic import Meter, Route, Traffic
from tfqcomm.transport import LocalTransport


class BaseTrainer(abc.ABC):
    """A model, a cluster, and epochs of rounds: one step of each worker on average.

    A subclass makes servers, workers and the driver that lets them take steps.

    Args:
        build_model, optimizer, loss, metrics, cluster_resolver, workers, parameter_servers: see
            `Trainer`.

    Attributes:
        model: a plain Keras model, as of the end of the last epoch.
    """

    def __init__(
        self,
        build_model: Callable[[], keras.Model],
        *,
        optimizer: keras.optimizers.Optimizer,
        loss,
        metrics: Sequence | None,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None,
        workers: int,
        parameter_servers: int,
    ):
        if not callable(build_model) or isinstance(build_model, keras.Model):
            raise ValueError(
                "Argument `build_model` must be a function that returns a Keras model. "
                f"Received: build_model={build_model!r}"
            )
        for name, value in (("workers", workers), ("parameter_servers", parameter_servers)):
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"Argument `{name}` must be a positive integer. Received: {name}={value!r}"
                )
        if tf.distribute.has_strategy():
            raise ValueError(
                f"A {type(self).__name__} must not be made in the scope of a strategy. "
                f"Received: strategy={type(tf.distribute.get_strategy()).__name__}"
            )
        # Connecting gives TensorFlow new devices: what was made before must be made again.
        optimizer, metrics = tf.nest.map_structure(_maker, (optimizer, metrics))
        self._cluster = connect(cluster_resolver, workers, parameter_servers)
        optimizer, metrics = tf.nest.map_structure(lambda make: make(), (optimizer, metrics))
        self.model = build_model()
        if not isinstance(self.model, keras.Model):
            raise ValueError(
                "Argument `build_model` must return a Keras model. "
                f"Received: {type(self.model).__name__}"
            )
        self.model.compile(optimizer=optimizer, loss=loss, metrics=metrics, jit_compile=False)
        self._fleet: Fleet | None = None

    @abc.abstractmethod
    def _make(self, makers: Sequence[Callable]) -> tuple[Fleet, object, Meter]:
        """Servers and workers, for the first `fit`, with the model's present weights.

        Args:
            makers: of each worker's dataset.

        Returns:
            The fleet; what moves weights between it and `model`, like `ChiefCopy`; and the meter
            of the optimizer's traffic.
        """

    @abc.abstractmethod
    def _driver(self):
        """What lets the workers take steps: see `Synchronous`."""

    @property
    def _applied_per_iteration(self) -> int:
        """What `Fleet.applied` counts for each of the optimizer's iterations."""
        return 1

    @property
    def optimizer(self) -> keras.optimizers.Optimizer:
        """The model's, with the iterations that were trained."""
        return self.model.optimizer

    @property
    def workers(self) -> list[dict[str, int]]:
        """What each worker has done, sent and received so far."""
        return [worker.summary() for worker in (self._fleet.workers if self._fleet else [])]

    def fit(
        self,
        dataset_fn: Callable[..., tf.data.Dataset],
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        validation_data=None,
        validation_steps: int | None = None,
        validation_freq: int = 1,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        initial_epoch: int = 0,
        verbose: int | str = "auto",
    ) -> keras.callbacks.History:
        """Trains, as `keras.Model.fit` does.

        Args:
            dataset_fn: `dataset_fn(context)` returns the batches of one worker, which it is to
                shard or shuffle by the `tf.distribute.InputContext` it is given; a function of no
                arguments gives all workers the same. It is repeated as often as needed. A batch
                is a worker's: W of them make the global batch.
            epochs, initial_epoch, verbose: as in Keras.
            steps_per_epoch: rounds of an epoch, each with one batch of every worker; None for the
                length of the first worker's dataset.
            validation_data: evaluated on the chief: a dataset, or (x, y), as in Keras.
            validation_steps, validation_freq: as in Keras.
            callbacks: Keras'. In the middle of an epoch they see the weights of its beginning;
                only `tfqcomm.callbacks.BackupAndRestore` saves those of the moment.

        Returns:
            The `History`; in mode "async" also with the mean `staleness` of an epoch's messages,
            and `max_staleness`.

        Raises:
            ValueError: for arguments that do not fit.
            ServerLost: when a parameter server is gone.
        """
        makers = data.datasets(dataset_fn, len(self._cluster.workers))
        spec, length = data.inspect_dataset(makers[0])
        steps = data.steps_of_epoch(steps_per_epoch, length)
        self._prepare(makers, spec)
        callback_list = keras.callbacks.CallbackList(
            list(callbacks),
            add_history=True,
            add_progbar=verbose != 0,
            verbose=1 if verbose == "auto" else verbose,
            epochs=epochs,
            steps=steps,
            model=self.model,
        )
        self.model.stop_training = False
        callback_list.on_train_begin()
        self._copy.send()
        self._fleet.applied = int(self.optimizer.iterations) * self._applied_per_iteration
        self._counted = self._traffic()
        driver = self._driver()
        logs = {}
        try:
            for epoch in range(_tf_private.first_epoch(self.model, initial_epoch), epochs):
                callback_list.on_epoch_begin(epoch)
                logs = self._epoch(driver, steps, callback_list)
                if staleness := driver.staleness():
                    logs["staleness"] = sum(staleness) / len(staleness)
                    logs["max_staleness"] = max(staleness)
                if validation_data is not None and (epoch + 1) % validation_freq == 0:
                    logs |= self._validate(validation_data, validation_steps)
                callback_list.on_epoch_end(epoch, logs)
                if self.model.stop_training:
                    break
        except tf.errors.OpError as error:
            self._fleet.check_servers(error)
            raise
        finally:
            driver.close()
        callback_list.on_train_end(logs)
        return self.model.history

    def evaluate(self, *args, **kwargs):
        """`keras.Model.evaluate` of `model`, on the chief, with the servers' weights."""
        if self._fleet is not None:
            self._copy.fetch()
        return self.model.evaluate(*args, **kwargs)

    def _prepare(self, makers: list[Callable], spec) -> None:
        """Makes servers and workers for the first `fit`; for a later one, new data."""
        if self._fleet is None:
            _tf_private.build_from_spec(self.model, spec)
            self._fleet, self._copy, self._meter = self._make(makers)
            return
        for worker, maker in zip(self._fleet.workers, makers, strict=True):
            worker.dataset_fn = maker
            self._fleet.attempt(worker, worker.read)

    def _make_fleet(self, worker: type[BaseWorker], program, servers, makers) -> Fleet:
        """Workers of a kind, each with its data."""
        devices = enumerate(zip(self._cluster.workers, makers, strict=True))
        workers = [worker(index, device, program, maker) for index, (device, maker) in devices]
        return Fleet(self._cluster, servers, workers)

    def _register(self, options: ExchangeOptions, routes: Sequence[Route], **memories) -> Meter:
        """Makes the callbacks of this package find what they show and keep.

        Args:
            routes: of the model's trainable variables.
            **memories: stand in for those attributes of an all-reduce exchange.
        """
        exchange = exchange_for(self.optimizer, options, LocalTransport())
        state = exchange.state()  # of a backup that was restored before
        for name, stand_in in memories.items():
            setattr(exchange, name, stand_in)
        exchange.load_state(state)
        exchange.served = True
        exchange.routes = tuple(routes)
        return exchange.meter

    def _epoch(self, driver, steps, callback_list) -> dict[str, float]:
        logs = {}
        self.model.reset_metrics()
        for worker in self._fleet.workers:
            worker.reset_metrics()
        exchange = exchange_of(self.optimizer)
        exchange.refresh = self._copy.fetch  # for backups within the epoch
        learning_rate = self._copy.send_learning_rate(None)  # before the first step begins
        driver.begin_epoch(steps)
        try:
            for step in range(steps):
                callback_list.on_train_batch_begin(step)
                learning_rate = self._copy.send_learning_rate(learning_rate)
                driver.round()
                self._count()
                iterations = self._fleet.applied // self._applied_per_iteration
                self.optimizer.iterations.assign(iterations)
                logs = self._logs()
                callback_list.on_train_batch_end(step, logs)
                if self.model.stop_training:
                    break
        finally:
            exchange.refresh = None
        driver.end_epoch()
        self._count()
        self._copy.fetch()
        return dict(logs)

    def _logs(self) -> dict[str, float]:
        """The metrics of all workers together."""
        states = sum(worker.metrics for worker in self._fleet.workers)
        assign_flat(self.model.metrics_variables, states)
        return {name: float(value) for name, value in self.model.get_metrics_result().items()}

    def _traffic(self) -> Traffic:
        """All there was so far, of an average worker."""
        fleet, workers = self._fleet, self._fleet.workers
        dense_words = 2 * sum(server.format.dense_words for server in fleet.servers)

        def mean_bytes(words):
            return 4 * sum(words) // len(workers)

        return Traffic(
            steps=(fleet.applied + fleet.skipped) // self._applied_per_iteration,
            skipped_steps=fleet.skipped,
            bytes_sent=mean_bytes(worker.pushed_words for worker in workers),
            bytes_pulled=mean_bytes(worker.pulled_words for worker in workers),
            dense_bytes=mean_bytes(dense_words * worker.steps for worker in workers),
            gradient_norm=workers[0].message_norm,
        )

    def _count(self) -> None:
        """Adds to the meter what an average worker has sent and received since the last call."""
        before, self._counted = self._counted, self._traffic()
        self._meter.add(self._counted.since(before))

    def _validate(self, validation_data, validation_steps) -> dict[str, float]:
        """What `evaluate` says, as `fit` shows it."""
        is_pair = isinstance(validation_data, (tuple, list))
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
            validation_data if is_pair else (validation_data,)
        )
        values = self.model.evaluate(
            x,
            y,
            sample_weight=sample_weight,
            steps=validation_steps,
            verbose=0,
            return_dict=True,
        )
        return {f"val_{name}": value for name, value in values.items()}


def _maker(value) -> Callable:
    """Returns a function that makes an optimizer or metric like this; other values it returns."""
    if not isinstance(value, (keras.optimizers.Optimizer, keras.metrics.Metric)):
        return lambda: value
    try:
        config = value.get_config()
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(
            "An optimizer that was made before the process joined its cluster cannot be used "
            "afterwards: make it together with its Trainer. Received: "
            f"{type(value).__name__}"
        ) from error
    return functools.partial(type(value).from_config, config)
