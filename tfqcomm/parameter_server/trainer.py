"""`fit` with parameter servers, which Keras 3 does not have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private, compressors
from tfqcomm.aggregators.exchange import exchange_for
from tfqcomm.parameter_server import data, memory, optimizers
from tfqcomm.parameter_server.asynchronous import Asynchronous
from tfqcomm.parameter_server.chief import ChiefCopy
from tfqcomm.parameter_server.cluster import connect
from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.partition import partition
from tfqcomm.parameter_server.payload import Format
from tfqcomm.parameter_server.sparse_weights import SparseWeights
from tfqcomm.parameter_server.synchronous import Synchronous
from tfqcomm.parameter_server.worker import Program, Worker
from tfqcomm.traffic import Route, Traffic
from tfqcomm.transport import LocalTransport

MODES = {"sync": Synchronous, "async": Asynchronous}


class Trainer:
    """Trains a Keras model whose weights live on parameter servers.

    The chief runs this object; workers and servers run `python -m tfqcomm.launch --serve`. Without
    a cluster, one is embedded in the process. In every step a worker pulls the weights, encoded
    where they live, computes a gradient on a batch of its own, and pushes the optimizer's message,
    encoded; the server decodes it and runs the optimizer's other half.

    "sync", the papers' algorithm: the servers take one step per round, on the mean of one message
    from each worker. The same as the optimizer under an all-reduce strategy with W replicas.
    "async": each message is a step of its own, scaled by 1 / W, as soon as it arrives. An epoch
    has the same batches, so W times as many iterations. Where a step does not shrink with its
    message, as in Adam or with weight decay, choose a learning rate W times smaller.

    Args:
        build_model: a function that returns a Keras model; called once, on the chief.
        optimizer: CompAMS, QAdam, QCMDAdagrad, QRDAAdagrad or AdaptiveTopKSGD (which keeps its
            average number of entries at every step), with their own compressors; or any of Keras'.
            The trainer makes one like it.
        loss, metrics: as in `compile`; of metrics, too, it makes others like them.
        compressor: of the messages of Keras' optimizers: a `tfqcomm.compressors.Compressor`, its
            name or its config.
        weight_compressor: of the pulled weights: `UniformGrid(8)`, `BlockInt8()`, `BFloat16()` or
            another, without error feedback; or `SparseWeights()`, which is lossless, and the
            default with an optimizer that has `l1`. With a QAdam it defaults to the optimizer's.
        mode: "sync" or "async".
        max_staleness: in mode "async", the most server steps between a pull and the message that
            came of it; at least W - 1. Workers wait for slower ones as far as needed. None for no
            bound.
        error_feedback, min_size, seed: with `compressor`, as in `tfqcomm.distribute`. `min_size`
            says for all optimizers without one of their own which tensors are compressed.
        cluster_resolver: names the cluster; by default TF_CONFIG does, if it is set.
        workers, parameter_servers: of an embedded cluster.
        variable_partitioner: as of `tf.distribute.ParameterServerStrategy`. By default variables
            of 8 MiB and more are split among the servers. A part counts as a tensor of its own:
            scales and top-k range over it.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Attributes:
        model: a plain Keras model. It has the servers' weights, and its optimizer their slots, at
            the end of every epoch; what is loaded into it before `fit` is what `fit` starts from.
        workers: for each of them whether it is `alive`, and its `messages`, `bytes_pushed` and
            `bytes_pulled` so far.

    Worker faults: a worker that is killed takes its last message, residual and moments with it;
    training goes on with the others. Started again, it takes part again, with a new memory. No
    message is applied twice. If a parameter server is lost, `fit` raises an error.

    Differences from training in one process: `train_step` is Keras' own; gradients of embeddings
    are dense; moving statistics of layers are averaged over the workers.

    Example:
    >>> import tfqcomm
    >>> trainer = tfqcomm.parameter_server.Trainer(
    ...     lambda: keras.Sequential([keras.Input([8]), keras.layers.Dense(1)]),
    ...     optimizer=tfqcomm.optimizers.QAdam(1e-3),
    ...     loss="mse",
    ...     weight_compressor="uniform_grid",
    ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        build_model: Callable[[], keras.Model],
        *,
        optimizer="adam",
        loss=None,
        metrics: Sequence | None = None,
        compressor=None,
        weight_compressor=None,
        mode: str = "sync",
        max_staleness: int | None = None,
        error_feedback: bool = True,
        min_size: int = 1024,
        seed: int = 0,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        workers: int = 2,
        parameter_servers: int = 1,
        variable_partitioner: Callable | None = None,
    ):
        if mode not in MODES:
            raise ValueError(
                f"Argument `mode` must be one of {list(MODES)}. Received: mode={mode!r}"
            )
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
                "A parameter-server Trainer must not be made in the scope of a strategy. "
                f"Received: strategy={type(tf.distribute.get_strategy()).__name__}"
            )
        optimizer = keras.optimizers.get(optimizer)
        optimizers.check(optimizer)
        own = getattr(optimizer, "options", None)
        if own is not None and compressor is not None:
            raise ValueError(
                "Argument `compressor` must be None with an optimizer that brings its own. "
                f"Received: compressor={compressor!r}, optimizer={type(optimizer).__name__} with "
                f"{own.compressor}"
            )
        self._arguments = {
            "compressor": compressor,
            "error_feedback": error_feedback,
            "min_size": min_size,
            "seed": seed,
        }
        optimizers.options_of(optimizer, 1, **self._arguments)  # says what is wrong with them
        self._weight_codec = weight_codec(weight_compressor, optimizer)
        # Connecting gives TensorFlow new devices: what was made before must be made again.
        optimizer, metrics = tf.nest.map_structure(_maker, (optimizer, metrics))
        self._cluster = connect(cluster_resolver, workers, parameter_servers)
        optimizer, metrics = tf.nest.map_structure(lambda make: make(), (optimizer, metrics))
        check_staleness(mode, max_staleness, len(self._cluster.workers))
        self._mode = mode
        self._bound = {} if max_staleness is None else {"max_staleness": max_staleness}
        self._partitioner = variable_partitioner
        self.model = build_model()
        if not isinstance(self.model, keras.Model):
            raise ValueError(
                "Argument `build_model` must return a Keras model. "
                f"Received: {type(self.model).__name__}"
            )
        self.model.compile(optimizer=optimizer, loss=loss, metrics=metrics, jit_compile=False)
        self._fleet: Fleet | None = None

    @property
    def optimizer(self) -> keras.optimizers.Optimizer:
        """The model's, with the servers' iterations."""
        return self.model.optimizer

    @property
    def workers(self) -> list[dict[str, int]]:
        """What each worker has sent and received so far."""
        return [
            {
                "alive": worker.alive,
                "messages": worker.messages,
                "bytes_pushed": 4 * worker.pushed_words,
                "bytes_pulled": 4 * worker.pulled_words,
            }
            for worker in (self._fleet.workers if self._fleet else [])
        ]

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
            callbacks: Keras'. In the middle of an epoch they see the weights of its beginning.

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
        self._fleet.applied = int(self.optimizer.iterations)
        self._counted = self._totals()
        driver = MODES[self._mode](self._fleet, **self._bound)
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
        if self._fleet is not None:
            for worker, maker in zip(self._fleet.workers, makers, strict=True):
                worker.dataset_fn = maker
                self._fleet.attempt(worker, worker.read)
            return
        model, cluster = self.model, self._cluster
        _tf_private.build_from_spec(model, spec)
        workers = len(cluster.workers)
        pieces = partition(
            [tuple(v.shape) for v in model.trainable_variables],
            len(cluster.servers),
            self._partitioner,
        )
        options = optimizers.options_of(self.optimizer, 1, **self._arguments)
        large = sum(p.size for p in pieces if options.reaches(p.shape, p.size))
        options = optimizers.options_of(self.optimizer, large, **self._arguments)
        self._copy = ChiefCopy(
            model,
            pieces,
            cluster.servers,
            lambda own, statistics: Format(own, statistics, options, self._weight_codec),
            workers,
            MODES[self._mode].share(workers),
        )
        program = Program(model, self._copy.servers, pieces)
        self._fleet = Fleet(
            cluster,
            self._copy.servers,
            [
                Worker(index, device, program, maker)
                for index, (device, maker) in enumerate(zip(cluster.workers, makers, strict=True))
            ],
        )
        self._register(program)

    def _register(self, program: Program) -> None:
        """Makes the callbacks of this package find what they show and keep."""
        options = program.options
        exchange = exchange_for(self.optimizer, options, LocalTransport())
        state = exchange.state()  # of a backup that was restored before
        exchange.residuals = memory.Residuals(self._fleet, program)
        exchange.worker_state = memory.WorkerState(self._fleet, program)
        exchange.load_state(state)
        exchange.routes = tuple(
            Route(v.path, tuple(v.shape), *self._route(program, index))
            for index, v in enumerate(self.model.trainable_variables)
        )
        self._meter = exchange.meter

    def _route(self, program: Program, variable: int) -> tuple[str, str]:
        large = any(p.variable == variable for p in program.large)
        servers = sorted({p.server for p in program.pieces if p.variable == variable})
        where = f"parameter server {', '.join(map(str, servers))}"
        if not large:
            return where, "float32"
        return where, f"pulled {self._weight_codec}, pushed {program.options.compressor}"

    def _epoch(self, driver, steps, callback_list) -> dict[str, float]:
        logs = {}
        self.model.reset_metrics()
        for worker in self._fleet.workers:
            worker.reset_metrics()
        driver.begin_epoch(steps)
        learning_rate = None
        for step in range(steps):
            callback_list.on_train_batch_begin(step)
            learning_rate = self._copy.send_learning_rate(learning_rate)
            driver.round()
            self._count()
            self.optimizer.iterations.assign(self._fleet.applied)
            logs = self._logs()
            callback_list.on_train_batch_end(step, logs)
            if self.model.stop_training:
                break
        driver.end_epoch()
        self._count()
        self._copy.fetch()
        return dict(logs)

    def _logs(self) -> dict[str, float]:
        """The metrics of all workers together."""
        states = sum(worker.metrics for worker in self._fleet.workers)
        start = 0
        for variable in self.model.metrics_variables:
            size = int(tf.size(variable))
            variable.assign(states[start : start + size].reshape(variable.shape))
            start += size
        return {name: float(value) for name, value in self.model.get_metrics_result().items()}

    def _count(self) -> None:
        """Adds to the meter what an average worker has sent and received since the last call."""
        totals = self._totals()
        dense, pushed, pulled, skipped, steps = (int(n) for n in totals - self._counted)
        self._counted = totals
        first = self._fleet.workers[0].report
        self._meter.add(
            Traffic(
                steps=steps,
                skipped_steps=skipped,
                bytes_sent=pushed,
                bytes_pulled=pulled,
                dense_bytes=dense,
                gradient_norm=first.message_norm if first else 0.0,
            )
        )

    def _totals(self) -> np.ndarray:
        """Bytes of an average worker: dense, pushed and pulled; steps skipped, and all steps."""
        fleet = self._fleet
        workers = fleet.workers
        dense_words = 2 * sum(server.format.dense_words for server in fleet.servers)
        words = [
            dense_words * sum(worker.messages for worker in workers),
            sum(worker.pushed_words for worker in workers),
            sum(worker.pulled_words for worker in workers),
        ]
        mean = [4 * count // len(workers) for count in words]
        return np.array([*mean, fleet.skipped, fleet.applied + fleet.skipped], np.int64)

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


def weight_codec(weight_compressor, optimizer):
    """What pulls are encoded with."""
    if isinstance(weight_compressor, SparseWeights):
        return weight_compressor
    if weight_compressor is None and getattr(optimizer, "l1", 0):
        return SparseWeights()
    if weight_compressor is None:
        return getattr(optimizer, "weight_compressor", compressors.get(None))
    try:
        return compressors.get(weight_compressor)
    except ValueError as error:
        raise ValueError(
            "Argument `weight_compressor` must be None, `SparseWeights()`, or a compressor. "
            f"Received: weight_compressor={weight_compressor!r}"
        ) from error


def check_staleness(mode: str, max_staleness: int | None, workers: int) -> None:
    """Refuses a bound that cannot be kept."""
    if max_staleness is None:
        return
    if mode != "async":
        raise ValueError(
            "Argument `max_staleness` must be None with mode='sync', where nothing is stale. "
            f"Received: max_staleness={max_staleness!r}"
        )
    if type(max_staleness) is not int or max_staleness < workers - 1:
        raise ValueError(
            f"Argument `max_staleness` must be None or an integer from {workers - 1} on: of "
            f"{workers} messages under way the last is that stale at least. "
            f"Received: max_staleness={max_staleness!r}"
        )
