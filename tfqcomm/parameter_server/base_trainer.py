"""The loop of `fit` on a cluster, which Keras 3 does not have."""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from tfqcomm import _tf_private, checks
from tfqcomm.parameter_server import copies, data, optimizers
from tfqcomm.parameter_server.callback_list import callback_list
from tfqcomm.parameter_server.cluster import connect
from tfqcomm.parameter_server.driver import Copy, Driver, Memories, staleness_logs
from tfqcomm.parameter_server.flat import assign_flat
from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.local_state import LocalState
from tfqcomm.parameter_server.loss_scale import LossScale
from tfqcomm.parameter_server.watch import Watch, check_timeout
from tfqcomm.state.ledger import new_ledger
from tfqcomm.state.traffic import Meter, Route
from tfqcomm.transport.local import LocalTransport


class BaseTrainer(abc.ABC):
    """A model, a cluster, and epochs of rounds: one step of each worker on average.

    Args:
        build_model, optimizer, loss, metrics, loss_weights, weighted_metrics, cluster_resolver,
            workers, parameter_servers, timeout_seconds: see `Trainer`.

    Attributes:
        model: a plain Keras model, as of the end of the last epoch.
    """

    _fleet: Fleet
    _copy: Copy
    _memories: Memories
    _meter: Meter

    def __init__(
        self,
        build_model: Callable[[], keras.Model],
        *,
        optimizer: keras.optimizers.Optimizer,
        loss,
        metrics: Sequence | None,
        loss_weights,
        weighted_metrics: Sequence | None,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None,
        workers: int,
        parameter_servers: int,
        timeout_seconds: float | None,
    ):
        copies.check_function(build_model)
        checks.positive_integer("workers", workers)
        checks.positive_integer("parameter_servers", parameter_servers)
        check_timeout(timeout_seconds)
        if tf.distribute.has_strategy():
            raise ValueError(
                f"A {type(self).__name__} must not be made in the scope of a strategy. "
                f"Received: strategy={type(tf.distribute.get_strategy()).__name__}"
            )
        # Connecting gives TensorFlow new devices: what was made before must be made again.
        makers = copies.makers((optimizer, metrics, weighted_metrics))
        self._cluster = connect(cluster_resolver, workers, parameter_servers, timeout_seconds)
        self._watch = Watch(self._cluster, timeout_seconds, self)
        optimizer, metrics, weighted_metrics = copies.make(makers)
        with self._building():
            self.model = copies.checked_model(build_model())
        self.model.compile(
            optimizer=optimizer,
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            jit_compile=False,
        )
        self._ready = False  # whether there are servers and workers

    def _building(self) -> contextlib.AbstractContextManager:
        """Scope in which layers may be built."""
        return contextlib.nullcontext()

    def _build_optimizer(self) -> None:
        """Before there are servers and workers; the model is built."""
        if not self.optimizer.built:
            self.optimizer.build(self.model.trainable_variables)

    @abc.abstractmethod
    def _make(
        self, makers: Sequence[Callable], loss_scale: LossScale
    ) -> tuple[Fleet, Copy, Memories, Meter]:
        """Servers and workers, for the first `fit`, with the model's present weights.

        Args:
            makers: of each worker's dataset.
            loss_scale: by which they multiply losses.

        Returns:
            The fleet; what moves weights between it and `model`; workers' memories; the meter.
        """

    @abc.abstractmethod
    def _driver(self) -> Driver:
        """What lets the workers take steps, for one `fit`."""

    @property
    def _applied_per_iteration(self) -> int:
        """What `Fleet.applied` counts for each of the optimizer's iterations."""
        return 1

    @property
    def optimizer(self) -> keras.optimizers.Optimizer:
        """The model's, with the iterations that were trained."""
        return self.model.optimizer

    @property
    def _inner_optimizer(self) -> keras.optimizers.Optimizer:
        return optimizers.inner(self.model.optimizer)

    @property
    def workers(self) -> list[dict[str, int]]:
        """What each worker has done, sent and received so far."""
        return [worker.summary() for worker in (self._fleet.workers if self._ready else [])]

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
        class_weight: dict[int, float] | None = None,
    ) -> keras.callbacks.History:
        """Trains, as `keras.Model.fit` does.

        Args:
            dataset_fn: `dataset_fn(context)` returns the batches of one worker, which it is to
                shard or shuffle by the `tf.distribute.InputContext` it is given; a function of no
                arguments gives all workers the same. It is repeated as often as needed. A batch
                is a worker's: W of them make the global batch.
            epochs, initial_epoch, verbose, class_weight: as in Keras.
            steps_per_epoch: rounds of an epoch, each with one batch of every worker; None for the
                length of the first worker's dataset.
            validation_data: evaluated on the chief: a dataset, or (x, y), as in Keras.
            validation_steps, validation_freq: as in Keras.
            callbacks: Keras'. In the middle of an epoch they see the weights of its beginning;
                only `tfqcomm.callbacks.BackupAndRestore` saves those of the moment.

        Returns:
            The `History`; in mode "async" also with an epoch's mean `staleness`, `max_staleness`.

        Raises:
            ValueError: for arguments that do not fit.
            ServerLost: when a server is gone, or silent; RuntimeError: when a worker is silent.
        """
        self._watch.call_roll()
        makers = data.datasets(dataset_fn, len(self._cluster.workers), class_weight)
        spec, length = data.inspect_dataset(makers[0])
        steps = data.steps_of_epoch(steps_per_epoch, length)
        self._prepare(makers, spec)
        called = callback_list(callbacks, self.model, epochs=epochs, steps=steps, verbose=verbose)
        self.model.stop_training = False
        called.on_train_begin()
        self._watch.run(self._send)
        self._fleet.applied = int(self.optimizer.iterations) * self._applied_per_iteration
        self._counted = self._fleet.traffic(self._applied_per_iteration)
        driver = self._driver()
        logs = {}
        try:
            for epoch in range(_tf_private.first_epoch(self.model, initial_epoch), epochs):
                called.on_epoch_begin(epoch)
                logs = self._epoch(driver, steps, called)
                logs |= staleness_logs(driver)
                if validation_data is not None and (epoch + 1) % validation_freq == 0:
                    self._watch.call_roll()
                    logs |= self._evaluate(
                        data.validate, self.model, validation_data, validation_steps
                    )
                called.on_epoch_end(epoch, logs)
                if self.model.stop_training:
                    break
        except tf.errors.OpError as error:
            self._fleet.check_servers(error)
            raise
        finally:
            driver.close()
        called.on_train_end(logs)
        self._ledger.end_serving()
        return self.model.history

    def evaluate(self, *args, **kwargs):
        """`keras.Model.evaluate` of `model`, on the chief, with the servers' weights."""
        self._watch.call_roll()
        if self._ready:
            self._watch.run(self._fetch)
        return self._evaluate(self.model.evaluate, *args, **kwargs)

    def _evaluate(self, call: Callable, *args, **kwargs):
        """What a call returns that evaluates `model`."""
        return call(*args, **kwargs)

    def _prepare(self, makers: list[Callable], spec) -> None:
        """Makes servers and workers for the first `fit`; for a later one, new data."""
        if not self._ready:
            with self._building():
                _tf_private.build_from_spec(self.model, spec)
            self.model.reset_metrics()  # of an `evaluate` before: workers begin with their states
            copies.check_weights(self.model)
            self._watch.run(self._build_optimizer)
            made = self._watch.run(self._make, makers, LossScale(self.optimizer))
            self._fleet, self._copy, self._memories, self._meter = made
            self._local = LocalState(self._fleet)
            self._ready = True
            self._trained = (self.optimizer, *self.model.trainable_variables)
            return
        copies.check_unchanged(self._trained, (self.optimizer, *self.model.trainable_variables))
        for worker, maker in zip(self._fleet.workers, makers, strict=True):
            worker.dataset_fn = maker
            self._fleet.attempt(worker, worker.read)
        self._serve()  # if the chief took steps itself

    def _send(self) -> None:
        """Gives servers and workers what the chief has."""
        self._fleet.loss_scale.load()
        self._copy.send()
        self._local.send()

    def _fetch(self) -> None:
        self._copy.fetch()
        self._local.fetch()

    def _capture(self, directory: str | None) -> None:
        """For a backup within an epoch: all of one moment, while the others go on."""
        with self._fleet.still():
            self._fetch()
            self._memories.capture()
            if directory is not None and self._ledger.tables is not None:
                self._ledger.tables.save(directory)

    def _register(self, routes: Sequence[Route], **memories) -> Meter:
        """Makes the callbacks of this package find what they show and keep.

        Args:
            routes: of the model's trainable variables.
            **memories: of the workers; see `Ledger.serve`.
        """
        self._ledger = new_ledger(self._inner_optimizer, LocalTransport())
        self._serve = functools.partial(self._ledger.serve, routes, **memories)
        self._serve()
        return self._ledger.meter

    def _epoch(self, driver, steps, called) -> dict[str, float]:
        logs = {}
        self.model.reset_metrics()
        for worker in self._fleet.workers:
            worker.reset_metrics()
        send_rate = functools.partial(self._watch.run, self._copy.send_learning_rate)
        self._ledger.refresh = functools.partial(self._watch.run, self._capture)  # for backups
        learning_rate = send_rate(None)  # before the first step begins
        driver.begin_epoch(steps)
        try:
            for step in range(steps):
                called.on_train_batch_begin(step)
                learning_rate = send_rate(learning_rate)
                driver.round()
                self._count()
                iterations = self._fleet.applied // self._applied_per_iteration
                self.optimizer.iterations.assign(iterations)
                self._fleet.loss_scale.store()
                logs = self._logs()
                called.on_train_batch_end(step, logs)
                if self.model.stop_training:
                    break
        finally:
            self._ledger.refresh = None
            self._memories.release()
        driver.end_epoch()
        self._count()
        self._watch.run(self._fetch)
        self._fleet.loss_scale.store()
        return dict(logs)

    def _logs(self) -> dict[str, float]:
        """The metrics of all workers together."""
        assign_flat(self.model.metrics_variables, self._fleet.metrics())
        return {name: float(value) for name, value in self.model.get_metrics_result().items()}

    def _count(self) -> None:
        """Adds to the meter what an average worker has sent and received since the last call."""
        before, self._counted = self._counted, self._fleet.traffic(self._applied_per_iteration)
        self._meter.add(self._counted.since(before))
